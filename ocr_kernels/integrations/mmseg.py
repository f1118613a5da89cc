"""mmsegmentation: a hook that a config names, so that its OCR modules run on the fused ops.

It takes any model of an mmengine `Runner`, and needs mmengine alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

try:
    from mmengine.hooks import Hook
    from mmengine.model import is_model_wrapper
    from mmengine.registry import HOOKS
except ImportError as error:
    raise ImportError("ocr_kernels.integrations.mmseg needs mmengine: pip install mmengine") from error

from ocr_kernels.models.replace import Filter, replace_ocr_modules

__all__ = ["ReplaceOCRModules"]


@HOOKS.register_module()
class ReplaceOCRModules(Hook):  # type: ignore[misc] # mmengine has no types
    """Calls `replace_ocr_modules` on the model before a `Runner` trains, validates or tests it, and logs the report.

    Weights are loaded after that, and checkpoints are what they were.

    Args:
        filter: `(module, name) -> bool`, whether a module may be replaced; in a config, a regular expression to be
            found in its name.
        example_inputs: as `replace_ocr_modules` takes them, or the shape of random images, such as `(1, 3, 512, 1024)`:
            the report then has what ran fused, and its error.
        blocks: whether step 4 may run as one op.
        raise_if_incomplete: whether the run stops where something that looks like OCR was left alone.

    Examples:
        In a config:

        >>> custom_imports = dict(imports=["ocr_kernels.integrations.mmseg"])
        >>> custom_hooks = [dict(type="ReplaceOCRModules", example_inputs=(1, 3, 512, 1024))]
    """

    priority = "VERY_HIGH"

    def __init__(
        self,
        *,
        filter: Filter | str | None = None,
        example_inputs: Any = None,
        blocks: bool = True,
        raise_if_incomplete: bool = False,
    ) -> None:
        self.filter = _in_the_name(filter) if isinstance(filter, str) else filter
        self.example_inputs = example_inputs
        self.blocks = blocks
        self.raise_if_incomplete = raise_if_incomplete

    def before_run(self, runner: Any) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        inputs = self.example_inputs
        if isinstance(inputs, Sequence) and all(isinstance(size, int) for size in inputs):
            inputs = torch.rand(*inputs, device=next(model.parameters()).device)
        report = replace_ocr_modules(model, filter=self.filter, example_inputs=inputs, blocks=self.blocks)
        runner.logger.info(f"ocr_kernels: {report}")
        if self.raise_if_incomplete:
            report.raise_if_incomplete()


def _in_the_name(expression: str) -> Filter:
    pattern = re.compile(expression)
    return lambda module, name: pattern.search(name) is not None
