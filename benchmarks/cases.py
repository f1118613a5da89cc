"""What is measured: shapes named after real networks, the two ops, and the least that each must move and compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch
from torch import Tensor

import ocr_kernels
from ocr_kernels.attention import reference as attention_reference
from ocr_kernels.gather import reference as gather_reference

Pass = Literal["forward", "forward+backward"]
PASSES: tuple[Pass, ...] = ("forward", "forward+backward")


@dataclass(frozen=True)
class Case:
    name: str
    batch: int
    channels: int
    key_channels: int
    regions: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        return self.height * self.width

    def quick(self) -> Case:
        """One image with a sixteenth of the pixels."""
        return replace(self, batch=1, height=max(1, self.height // 4), width=max(1, self.width // 4))


CASES = {
    case.name: case
    for case in (
        Case("cityscapes-inference", 1, 512, 256, 19, 256, 512),
        Case("cityscapes-training", 2, 512, 256, 19, 128, 256),
        Case("ade20k", 4, 512, 256, 150, 130, 130),
        Case("coco-stuff", 4, 512, 256, 171, 130, 130),
        Case("pascal-context", 4, 512, 256, 59, 130, 130),
        Case("lip", 8, 512, 256, 20, 119, 119),
        Case("mmseg-r101-d8", 4, 512, 256, 19, 64, 128),
        Case("interactive", 8, 64, 32, 2, 96, 96),
        Case("interactive-w18", 8, 128, 64, 2, 96, 96),
        Case("4k-frame", 1, 512, 256, 19, 540, 960),
        Case("long-tail", 1, 512, 256, 1203, 128, 128),
    )
}
QUICK_CASES = ("cityscapes-inference", "ade20k")


@dataclass(frozen=True)
class Op:
    """One op: ours, its definition in plain PyTorch, and its shapes and multiply-adds as functions of the case."""

    name: str
    ours: Callable[..., Tensor]
    definition: Callable[..., Tensor]
    input_shapes: Callable[[Case], list[tuple[int, ...]]]
    output_shape: Callable[[Case], tuple[int, ...]]
    multiply_adds: Callable[[Case], dict[Pass, int]]

    def inputs(self, case: Case, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Tensor]:
        """The inputs, which require gradients, and the gradient of the output; the same at every call."""
        generator = torch.Generator(device).manual_seed(0)
        shapes = [*self.input_shapes(case), self.output_shape(case)]
        *inputs, grad = (torch.randn(s, generator=generator, device=device, dtype=dtype) for s in shapes)
        return [tensor.requires_grad_() for tensor in inputs], grad

    def bytes(self, case: Case, what: Pass, dtype: torch.dtype) -> int:
        """Forward: every input is read and the output written once. Backward: inputs and gradients likewise."""
        inputs, output = sum(map(prod, self.input_shapes(case))), prod(self.output_shape(case))
        numbers = inputs + output if what == "forward" else (inputs + output) + (2 * inputs + output)
        return numbers * dtype.itemsize

    def flops(self, case: Case, what: Pass) -> int:
        return 2 * self.multiply_adds(case)[what]


def _gather_multiply_adds(case: Case) -> dict[Pass, int]:
    product = case.batch * case.pixels * case.regions * case.channels
    return {"forward": product, "forward+backward": 3 * product}  # backward: dX and dP


def _attention_multiply_adds(case: Case) -> dict[Pass, int]:
    product = case.batch * case.pixels * case.regions * case.key_channels
    return {"forward": 2 * product, "forward+backward": 7 * product}  # backward: the scores again, dV, dw, dQ, dK


OPS = (
    Op(
        "gather",
        ocr_kernels.spatial_gather,
        gather_reference.spatial_gather,
        lambda c: [(c.batch, channels, c.height, c.width) for channels in (c.channels, c.regions)],
        lambda c: (c.batch, c.channels, c.regions),
        _gather_multiply_adds,
    ),
    Op(
        "attention",
        ocr_kernels.pixel_region_attention,
        attention_reference.pixel_region_attention,
        lambda c: [(c.batch, c.key_channels, c.height, c.width), *[(c.batch, c.key_channels, c.regions)] * 2],
        lambda c: (c.batch, c.key_channels, c.height, c.width),
        _attention_multiply_adds,
    ),
)
