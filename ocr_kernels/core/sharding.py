"""Rules for DTensors: what a layout of an op's inputs makes of its outputs.

A rule is of one dimension of a mesh of processes, and names the placement of each tensor, outputs first. Every op may
be replicated, or sharded over images; what else it may be stands in its own `sharding.py`. PyTorch redistributes other
layouts to one of these, and gathers a dimension that is shorter than there are processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeGuard

from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

Rule = list[Placement]


def register(op: Any, rules: Callable[..., Iterator[Rule]]) -> None:
    outputs = len(op._schema.returns)
    first = next(i for i, argument in enumerate(op._schema.arguments) if "Tensor" not in str(argument.type))

    def placements(*args: Any) -> list[tuple[list[Any], list[Any]]]:
        count = sum(len(arg) if isinstance(arg, tuple) else 1 for arg in args[:first])
        every: list[list[Any]] = [[Replicate()] * (outputs + count), *rules(*args)]
        return [(rule[:outputs], rule[outputs:] + [None] * (len(args) - first)) for rule in every]

    register_sharding(op)(placements)
    # Rules and shapes are kept for arguments that are equal from here on, too; nothing public says so.
    infos: Any = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
    infos[op] = dataclasses.replace(infos[op], static_argnum=first)


def spatial(tensor: Any) -> list[Shard]:
    return [Shard(dim) for dim in range(2, tensor.ndim)]


def needed(gradients: Sequence[Placement], needs: Sequence[bool]) -> Rule:
    """Those that are not needed have no elements."""
    return [gradient if need else Replicate() for gradient, need in zip(gradients, needs, strict=True)]


def divides(placement: Placement) -> TypeGuard[Shard]:
    """Images or pixels."""
    return isinstance(placement, Shard) and placement.dim != 1


def check_dtensors(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            raise TypeError(f"{name} must be a DTensor where another argument is, but is {type(tensor).__name__}")
