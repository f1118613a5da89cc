"""A launch that was prepared is the one that Triton would have made."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from fresh import python

pytest.importorskip("triton", reason="launches with Triton")

from ocr_kernels.core.triton_launch import MOST, Launch, _prepared, forget_launches, prepared


def test_a_second_step_launches_what_the_first_one_did() -> None:
    """The same machine code, grids and arguments, and nothing goes through Triton's own way again."""
    process = python("launches_worker.py", TRITON_INTERPRET="0")
    assert process.returncode == 0, process.stderr
    steps = json.loads(process.stdout)
    kernels = set()
    for (first, _), (second, through_triton) in zip(steps[::2], steps[1::2], strict=True):
        assert first == second
        assert through_triton == 0
        kernels |= {name for name, *_ in first}
    assert len(kernels) >= 20
    aligned, unaligned = steps[0], steps[len(steps) // 2]
    assert aligned[0] != unaligned[0]
    assert min(aligned[1], unaligned[1]) > 0  # machine code of its own


def test_what_tensors_have_in_common_is_prepared_once() -> None:
    made: list[Any] = []

    @prepared
    def launch(x: torch.Tensor, y: torch.Tensor, *, scale: float) -> int:
        made.append((x.shape, scale))
        return len(made)

    x, y = torch.zeros(2, 3, 4), torch.zeros(5)
    assert [launch(x, y, scale=1.0), launch(x + 1, y, scale=1.0)] == [1, 1]
    different = [
        lambda: launch(x, y, scale=2.0),
        lambda: launch(x[:1], y, scale=1.0),
        lambda: launch(x.mT.contiguous().mT, y, scale=1.0),
        lambda: launch(x.double(), y, scale=1.0),
        lambda: launch(x, y.bfloat16(), scale=1.0),
        lambda: launch(x.to("meta"), y.to("meta"), scale=1.0),
    ]
    assert [call() for call in different] == [2, 3, 4, 5, 6, 7]
    assert [call() for call in different] == [2, 3, 4, 5, 6, 7]
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert launch(x, y, scale=1.0) == 8
        assert launch(x.double(), y.double(), scale=1.0) == 9
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert launch(x.double(), y.double(), scale=1.0) == 9  # whose products have one precision
    forget_launches()
    assert launch(x, y, scale=1.0) == 10
    for scale in range(2 * MOST):
        launch(x, y, scale=float(scale))
    assert len(_prepared) <= MOST


def test_a_kernel_that_is_not_compiled_is_called_each_time() -> None:
    """As in Triton's interpreter, and by tools that stand in for it."""
    calls: list[Any] = []

    class Kernel:
        arg_names = "x", "n", "BLOCK"

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **options: calls.append((grid, args[1:], options))

    launch = Launch(Kernel(), 7, 3, BLOCK=16, num_warps=4)
    for _ in range(2):
        launch(torch.zeros(3))
    assert calls == [((7,), (3,), {"BLOCK": 16, "num_warps": 4})] * 2
