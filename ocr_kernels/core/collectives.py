"""Reductions over processes with a derivative.

PyTorch has two that do not serve: `torch.distributed.nn.functional.all_reduce` refuses to be compiled, and that of the
functional collectives has a derivative in later releases only, and in earlier ones none and no error. This one is made
of the public `torch.distributed.all_reduce`, which the compiler replaces by the functional one in all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


def maximum(tensor: Tensor, group: distributed.ProcessGroup | None) -> Tensor:
    """The largest of each element over the processes; a constant."""
    out = tensor.detach().clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(out, distributed.ReduceOp.MAX, group=group)
    return out


def total(tensor: Tensor, group: distributed.ProcessGroup | None) -> Tensor:
    """The sum of each element over the processes, each of which has a loss of its own.

    The gradient is that of the sum of their losses: it is summed over the processes, too.
    """
    out: Tensor = _Total.apply(tensor, group)  # type: ignore[no-untyped-call]
    return out


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        out = tensor.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return total(grad, ctx.group), None
