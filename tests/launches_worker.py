"""What reaches Triton's launcher in a first and a second step, without a GPU: compiling and launching are stood in for.

Prints, as JSON, each step's launches and how many of them went through `JITFunction.run`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from benchmarks.host import Compiled, without_gpu
from ocr_kernels import ocr_block, pixel_region_attention, spatial_gather
from ocr_kernels.block.layers import Layer, Norm

launched: list[Any] = []
through_triton: list[str] = []
own_run = JITFunction.run


class Recorded(Compiled):
    @property
    def run(self) -> Callable[..., None]:
        def record(x: int, y: int, z: int, stream: int, function: int, packed: Any, *rest: Any) -> None:
            arguments = rest[3:]  # after the metadata and the hooks
            launched.append([self.name, *self.types, (x, y, z), list(map(described, arguments))])

        return record


def described(argument: Any) -> str:
    if isinstance(argument, Tensor):
        return f"{argument.dtype} {tuple(argument.shape)} {argument.data_ptr() % 16 == 0}"
    return repr(argument)


def run(kernel: JITFunction[Any], *args: Any, **kwargs: Any) -> Any:
    through_triton.append(kernel.fn.__name__)
    return own_run(kernel, *args, **kwargs)


def unaligned(tensor: Tensor) -> Tensor:
    """The same values one element after an address that is a multiple of 16."""
    room = tensor.new_empty(tensor.numel() + 1)
    return room[1:].view(tensor.shape).copy_(tensor)


def ops(place: Callable[[Tensor], Tensor], regions: int, dtype: torch.dtype) -> list[Callable[[], Any]]:
    """Steps of each op, on tensors whose memory `place` chooses."""

    def given(*shape: int) -> Tensor:
        return place(torch.randn(shape, dtype=dtype)).requires_grad_()

    def gather() -> None:
        spatial_gather(given(2, 16, 6, 7), given(2, regions, 6, 7)).sum().backward()

    def attention() -> None:
        query, key, value = given(2, 16, 6, 7), given(2, 16, regions), given(2, 24, regions)
        pixel_region_attention(query, key, value).sum().backward()

    def block(norm: Norm | None) -> Tensor:
        layers = [Layer(given(*shape), norm=norm) for shape in ((16, 24), (16, 16), (24, 16), (32, 48))]
        *pixel, up, fusing = layers
        return ocr_block(given(2, 24, 6, 7), given(2, 16, regions), given(2, 16, regions), pixel, up, fusing)

    def infer() -> None:
        with torch.no_grad():
            block(None)

    return [gather, attention, lambda: block(Norm()).sum().backward(), infer]


def main() -> None:
    torch.manual_seed(0)
    steps = []
    with without_gpu(Recorded), mock.patch.object(JITFunction, "run", run):
        for place in (Tensor.clone, unaligned):
            for regions in (5, 150, 700):
                for dtype in (torch.float32, torch.bfloat16):
                    for op in ops(place, regions, dtype):
                        for _ in range(2):
                            launched.clear(), through_triton.clear()
                            op()
                            steps.append([list(launched), len(through_triton)])
    json.dump(steps, sys.stdout)


if __name__ == "__main__":
    main()
