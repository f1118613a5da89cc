"""The two ops as the tests see them: one description each, so that every test runs over both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import ocr_kernels
from ocr_kernels.attention.reference import pixel_region_attention as attention_definition
from ocr_kernels.gather.reference import spatial_gather as gather_definition
from ocr_kernels.testing import Measurement, assert_parity, attention_inputs, gather_inputs


@dataclass(frozen=True)
class Op:
    """An op of the library: the public call, its definition, its registered op, and how to draw inputs."""

    name: str
    call: Callable[..., Tensor]
    definition: Callable[..., Tensor]
    inputs: Callable[..., tuple[Tensor, ...]]

    @property
    def overload(self) -> torch._ops.OpOverload:
        return getattr(torch.ops.ocr_kernels, self.name).default

    def on(self, backend: str) -> Callable[..., Tensor]:
        """The public call on one backend."""
        return partial(self.call, backend=backend)

    def assert_parity(self, backend: str, inputs: Sequence[Any], **options: Any) -> list[Measurement]:
        return assert_parity(self.on(backend), self.definition, inputs, name=f"{self.name} on {backend}", **options)


GATHER = Op("spatial_gather", ocr_kernels.spatial_gather, gather_definition, gather_inputs)
ATTENTION = Op("pixel_region_attention", ocr_kernels.pixel_region_attention, attention_definition, attention_inputs)
both_ops = pytest.mark.parametrize("op", [GATHER, ATTENTION], ids=lambda op: op.name)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
