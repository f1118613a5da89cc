"""Reductions over processes, as an op with a derivative.

PyTorch has two that do not serve: `torch.distributed.nn.functional.all_reduce` refuses to be compiled, and that of the
functional collectives has a derivative in later releases only, and in earlier ones none and no error, also where the
compiler puts it in place of `torch.distributed.all_reduce`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from ocr_kernels.core.registration import LIBRARY


def process_group(name: str) -> distributed.ProcessGroup:
    """That of a name, which is what ops and compiled programs have of it."""
    find: Any = distributed.distributed_c10d  # nothing public finds it
    group: distributed.ProcessGroup = find._resolve_process_group(name)
    return group


def maximum(tensor: Tensor, group: distributed.ProcessGroup | None) -> Tensor:
    """The largest of each element over the processes; a constant."""
    return _reduced(tensor.detach(), "MAX", group)


def total(tensor: Tensor, group: distributed.ProcessGroup | None) -> Tensor:
    """The sum of each element over the processes, each of which has a loss of its own.

    The gradient is that of the sum of their losses: it is summed over the processes, too.
    """
    return _reduced(tensor, "SUM", group)


def _reduced(tensor: Tensor, reduction: str, group: distributed.ProcessGroup | None) -> Tensor:
    group = distributed.group.WORLD if group is None else group
    if group is not None and not hasattr(group, "group_name"):
        raise TypeError(f"group must be a process group or None, but is {type(group).__name__}")
    if group is None:
        raise RuntimeError("torch.distributed is not initialised: call torch.distributed.init_process_group first")
    out: Tensor = torch.ops.ocr_kernels.all_reduce(tensor, reduction, group.group_name)
    return out


def _all_reduce(tensor: Tensor, reduction: str, group: str) -> Tensor:
    out = tensor.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(out, getattr(distributed.ReduceOp, reduction), group=process_group(group))
    return out


def _like(tensor: Tensor, reduction: str, group: str) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.reduction, ctx.group = inputs


def _sum(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.ocr_kernels.all_reduce(grad, ctx.reduction, ctx.group), None, None


LIBRARY.define("all_reduce(Tensor tensor, str reduction, str group) -> Tensor")
LIBRARY.impl("all_reduce", _all_reduce, "CompositeExplicitAutograd")
torch.library.register_fake("ocr_kernels::all_reduce", _like, lib=LIBRARY)
torch.library.register_autograd("ocr_kernels::all_reduce", _sum, setup_context=_keep, lib=LIBRARY)
