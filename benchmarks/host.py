"""What launching takes of a host: each op on small maps, with a GPU's driver that does nothing, so without a GPU.

`python -m benchmarks.host` prints microseconds on one thread: of a forward pass, and of one with its backward pass.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # compiled kernels, not interpreted ones

import torch
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ocr_kernels import pixel_region_attention, reference, replace_ocr_modules, spatial_gather, use_backend
from ocr_kernels.core import backends

STEPS = 300


class Driver:
    """Of a GPU that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Compiled(CompiledKernel):  # type: ignore[misc]
    """In place of machine code."""

    def __init__(self, kernel: JITFunction[Any], signature: dict[str, Any], attributes: dict[Any, Any]) -> None:
        self.name, self.module, self.function, self.packed_metadata, self.src = kernel.fn.__name__, 0, 0, (), None
        self.types = str(signature), str(sorted((str(where), str(what)) for where, what in attributes.items()))

    def _init_handles(self) -> None:
        pass

    @property
    def run(self) -> Callable[..., None]:
        return nothing


def nothing(*_: Any) -> None:
    pass


@contextlib.contextmanager
def without_gpu(made: type[Compiled] = Compiled) -> Iterator[None]:
    """In here `triton` takes tensors of the CPU, and its kernels, which are `made`, not compiled, compute nothing."""

    def compile(
        kernel: Any, key: Any, signature: Any, device: int, constants: Any, options: Any, attributes: Any, warmup: bool
    ) -> Compiled:
        compiled = kernel.device_caches[device][0][key] = made(kernel, signature, attributes)
        return compiled

    driver.set_active(Driver())
    can_run = {("triton", None): None, ("triton", "cpu"): None}
    with (
        mock.patch.dict(backends._problems, can_run),
        mock.patch.object(JITFunction, "_do_compile", compile),
        use_backend("triton"),
    ):
        yield


def seconds(forward: Callable[[], Tensor]) -> tuple[list[float], list[float]]:
    """Of forward passes, and of those with their backward passes."""
    alone, both = [], []
    for _ in range(STEPS):
        start = time.perf_counter()
        out = forward()
        alone.append(time.perf_counter() - start)
        if out.requires_grad:
            out.sum().backward()
            both.append(time.perf_counter() - start)
    return alone, both


def steps() -> Iterator[tuple[str, Callable[[], Tensor]]]:
    def given(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16).requires_grad_()

    for regions in (19, 150):
        feats, logits = given(2, 32, 8, 8), given(2, regions, 8, 8)
        key, value = given(2, 32, regions), given(2, 32, regions)
        yield f"gather, K={regions}", functools.partial(spatial_gather, feats, logits)
        yield f"attention, K={regions}", functools.partial(pixel_region_attention, feats, key, value)
    plain: nn.Module = reference.SpatialOCR(16, 8, 16).bfloat16()
    inputs = given(2, 16, 8, 8), given(2, 16, 5, 1)
    yield "SpatialOCR, plain", functools.partial(plain, *inputs)
    replaced = copy.deepcopy(plain)
    replace_ocr_modules(replaced, example_inputs=inputs)
    yield "SpatialOCR, replaced", functools.partial(replaced, *inputs)
    folded = copy.deepcopy(replaced).eval().requires_grad_(False)
    yield "SpatialOCR, replaced, inference", functools.partial(folded, *(each.detach() for each in inputs))


def main() -> None:
    torch.set_num_threads(1)
    every = list(steps())  # a module is replaced by what it computes
    print(f"{'us, fastest (median) of ' + str(STEPS):34} {'forward':>16} {'and backward':>16}")
    with without_gpu():
        for name, forward in every:
            seconds(forward)  # what is prepared once
            columns = [
                f"{min(each) * 1e6:.0f} ({statistics.median(each) * 1e6:.0f})" if each else "-"
                for each in seconds(forward)
            ]
            print(f"{name:34} {columns[0]:>16} {columns[1]:>16}", flush=True)


if __name__ == "__main__":
    main()
