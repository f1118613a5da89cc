"""What core/derivatives.py does where PyTorch's private functions are missing or do something else."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ocr_kernels.core import derivatives

ROOT = Path(__file__).parent.parent

MISSING = {
    "below autograd": ("torch._C._AutoDispatchBelowAutograd", "torch._C.missing"),
    "dual levels": ("forward_ad._current_level", "forward_ad.missing"),
    "apply": ("super(torch.autograd.Function, function).apply", "function.missing"),
    "whole calls": ('"FuncTorchDynamicLayerFrontMode"', '"missing"'),
}
CHANGES = {f"no {name}": [change] for name, change in MISSING.items()} | {
    "nothing": [*MISSING.values()],
    "other whole calls": [('"FuncTorchDynamicLayerFrontMode"', '"Meta"')],
}

# Runs pytest with another text of core/derivatives.py.
ALTERED = """
import importlib.machinery, sys, pytest
class Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, name):
        source = self.get_data(self.path).decode()
        for old, new in {changes!r}:
            assert old in source, old
            source = source.replace(old, new)
        return self.source_to_code(source, self.path)
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "ocr_kernels.core.derivatives":
            file = path[0] + "/derivatives.py"
            return importlib.machinery.ModuleSpec(name, Loader(name, file), origin=file)
sys.meta_path.insert(0, Finder())
sys.exit(pytest.main({arguments!r}))
"""


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(changes, id=id, marks=() if id == "nothing" else pytest.mark.wide)
        for id, changes in CHANGES.items()
    ],
)
def test_public_forms(changes: list[tuple[str, str]]) -> None:
    """They pass what the private ones pass, all of them both ops."""
    ops = "reference" if len(changes) > 1 else "reference and spatial_gather"
    selected = "transforms or third or subset or nothing_is_saved or forward_mode or compile_of or compile_without"
    arguments = ["-q", "-x", "-p", "no:cacheprovider", "tests/test_autograd.py", "tests/test_registration.py"]
    code = ALTERED.format(changes=changes, arguments=[*arguments, "-k", f"{ops} and ({selected} or autocast)"])
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-5000:] + process.stderr[-5000:]


@pytest.mark.parametrize(("found", "works"), [
    (torch.enable_grad, derivatives._hides_autograd),
    (torch.no_grad, derivatives._hides_autograd),
    (lambda: 1 / 0, derivatives._hides_autograd),
    (lambda _: False, derivatives._sees_levels),
    (lambda _: True, derivatives._sees_levels),
    (lambda function: lambda x: function.forward(None, x), derivatives._applies),
])  # fmt: skip
def test_what_does_something_else_is_not_used(found: Any, works: Callable[[Any], bool]) -> None:
    assert derivatives._private(lambda: found, works) is None


PRIVATE = re.compile(
    r"torch\._(C|functorch|decomp|inductor|library|dynamo)\b|from torch\._|sys\.meta_path|_current_level"
)


@pytest.mark.parametrize("folder", ["core", "gather", "attention", "block", "tiled"])
def test_private_functions_stand_in_files_of_core(folder: str) -> None:
    files = [path for path in (ROOT / "ocr_kernels" / folder).glob("*.py") if PRIVATE.search(path.read_text())]
    assert sorted(path.name for path in files) == (["derivatives.py", "memory.py"] if folder == "core" else [])


def test_the_private_forms_are_used_here() -> None:
    assert derivatives._below_autograd is torch._C._AutoDispatchBelowAutograd
    assert derivatives.in_forward_mode is not derivatives._has_tangent


def test_trials_pass_in_any_mode() -> None:
    for mode in (torch.no_grad(), torch.inference_mode(), torch.device("meta")):
        with mode:
            assert derivatives._private(lambda: torch._C._AutoDispatchBelowAutograd, derivatives._hides_autograd)
            assert derivatives._private(lambda: lambda function: function.apply, derivatives._applies)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("position", [0, 3])
def test_forward_mode_of_an_op_for_inference_is_refused(position: int, compiled: bool) -> None:
    shapes = (2, 4), (2,), (2, 2), (2,), (4,), (5, 4), (5, 4), (5,)  # C = 4, D = 2, O = 5
    tensors = [torch.randn(1, 4, 3), torch.randn(1, 2, 3), torch.randn(1, 4, 3), *map(torch.randn, shapes)]

    def call(x: Tensor) -> Tensor:
        arguments = [*tensors[:position], x, *tensors[position + 1 :]]
        return torch.ops.ocr_kernels.ocr_block_inference(
            *arguments[:3], arguments[3:], 1.0, [0.0] * 4, "features", "reference"
        )

    def derivative(x: Tensor) -> Tensor:
        return torch.func.jvp(call, (x,), (x,))[1]

    torch._dynamo.reset()
    with pytest.raises(Exception, match="is for inference and has no derivative"):
        (torch.compile(derivative, backend="aot_eager") if compiled else derivative)(tensors[position])
