"""Our ops on DTensors: what a layout of their inputs makes of their outputs. Importing it registers the rules.

A rule is of one dimension of a mesh of processes, and names the placement of each tensor, outputs first. Every op may
be replicated, or sharded over images; what else it may be stands below. PyTorch redistributes other layouts to one of
these, and gathers a dimension that is shorter than there are processes. The public functions import this file at the
first DTensor; who calls `torch.ops.ocr_kernels` with DTensors imports it first.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from ocr_kernels.attention.registration import pixel_region_attention_backward_op, pixel_region_attention_op
from ocr_kernels.block.layers import Layer
from ocr_kernels.block.registration import TENSORS, ocr_block_backward_op, ocr_block_inference_op, ocr_block_op
from ocr_kernels.core.backends import Backend
from ocr_kernels.core.layout import pixels
from ocr_kernels.gather.registration import check_feats_and_logits, spatial_gather_backward_op, spatial_gather_op
from ocr_kernels.gather.state import autocast, sums_of

Rule = list[Placement]


def _register(op: Any, rules: Callable[..., Iterator[Rule]]) -> None:
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


def _spatial(tensor: Any) -> list[Shard]:
    return [Shard(dim) for dim in range(2, tensor.ndim)]


def _needed(gradients: Sequence[Placement], needs: Sequence[bool]) -> Rule:
    """Those that are not needed have no elements."""
    return [gradient if need else Replicate() for gradient, need in zip(gradients, needs, strict=True)]


def _gather(*_: Any) -> Iterator[Rule]:
    yield [Shard(0)] * 4


def _gather_backward(grad: Any, feats: Any, logits: Any, stats: Any, scale: Any, *options: Any) -> Iterator[Rule]:
    for shard, regions in ((Shard(0), Shard(0)), *((shard, Replicate()) for shard in _spatial(feats))):
        yield [*_needed([shard, shard], options[:2]), regions, shard, shard, regions]


def _attention(query: Any, *_: Any) -> Iterator[Rule]:
    yield [Shard(0)] * 4
    for shard in _spatial(query):
        yield [shard, shard, Replicate(), Replicate()]


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, scale: Any, *options: Any) -> Iterator[Rule]:
    yield [*_needed([Shard(0)] * 3, options[:3]), *[Shard(0)] * 4]
    for shard in _spatial(query):
        yield [*_needed([shard, Partial(), Partial()], options[:3]), shard, shard, Replicate(), Replicate()]


def _block_inputs(shard: Shard, mask: Any) -> Rule:
    regions = shard if shard.dim == 0 else Replicate()
    masks = regions if mask.ndim == 2 else Replicate()
    return [shard, regions, *[Replicate()] * 3, regions, *[Replicate()] * (TENSORS - 6), masks]


def _block_shards(feats: Any, eps: Sequence[float], groups: Sequence[str]) -> list[Shard]:
    """None where a norm takes the statistics of the pixels of one process."""
    shared = all(e < 0 or group for e, group in zip(eps, groups, strict=True))
    return [Shard(0), *_spatial(feats)] if shared else []


def _block(*args: Any) -> Iterator[Rule]:
    _, _, eps, groups, *_ = args[TENSORS + 1 :]
    for shard in _block_shards(args[0], eps, groups):
        yield [*[shard] * 5, Replicate(), *_block_inputs(shard, args[TENSORS])]


def _block_backward(grad: Any, *args: Any) -> Iterator[Rule]:
    _, _, eps, groups, _, needs, _ = args[TENSORS + 6 :]
    for shard in _block_shards(args[0], eps, groups):
        regions = shard if shard.dim == 0 else Partial()
        gradients = [shard, regions, *[Partial()] * 3, regions, *[Partial()] * (TENSORS - 6)]
        inputs = _block_inputs(shard, args[TENSORS])
        yield [*_needed(gradients, needs), shard, *inputs, *[shard] * 4, Replicate()]


def _block_inference(
    feats: Any, key: Any, contexts: Any, weights: Sequence[Any], scale: Any, slopes: Any, output: str, backend: str
) -> Iterator[Rule]:
    yield [*[Shard(0)] * 4, *[Replicate()] * len(weights)]
    for shard in _spatial(feats):
        out = Shard(shard.dim - 1) if output == "classes" else shard
        yield [out, shard, *[Replicate()] * (2 + len(weights))]


_register(spatial_gather_op, _gather)
_register(spatial_gather_backward_op, _gather_backward)
_register(pixel_region_attention_op, _attention)
_register(pixel_region_attention_backward_op, _attention_backward)
_register(ocr_block_op, _block)
_register(ocr_block_backward_op, _block_backward)
_register(ocr_block_inference_op, _block_inference)


def check_dtensors(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            raise TypeError(f"{name} must be a DTensor where another argument is, but is {type(tensor).__name__}")


def gather(feats: Tensor, logits: Tensor, scale: float, backend: Backend) -> Tensor:
    """The spatial gather of DTensors. Of pixels that are sharded, each process sums its own, as `GatherState` does."""
    check_dtensors(feats=feats, logits=logits)
    assert isinstance(feats, DTensor)
    assert isinstance(logits, DTensor)
    check_feats_and_logits(feats, logits)
    mesh, both = feats.device_mesh, zip(feats.placements, logits.placements, strict=True)
    placements = [next((p for p in pair if _divides(p)), Replicate()) for pair in both]
    x, m = feats.redistribute(placements=placements), logits.redistribute(placements=placements)
    of_pixels = [isinstance(p, Shard) and p.dim > 1 for p in placements]
    if not pixels(feats.shape) or not any(of_pixels):
        out: Tensor = spatial_gather_op(x, m, scale, backend)[0]
        return out
    local = autocast(x.to_local())
    sums = sums_of(local, m.to_local(), scale, backend)

    def everywhere(part: Tensor, reduction: str) -> DTensor:
        parts = [Partial(reduction) if spatial else p for spatial, p in zip(of_pixels, placements, strict=True)]
        shape = torch.Size((feats.shape[0], *part.shape[1:]))
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        made = DTensor.from_local(part.contiguous(), mesh, parts, shape=shape, stride=tuple(strides))
        return made.redistribute(placements=[p if p == Shard(0) else Replicate() for p in placements])

    maximum = everywhere(sums.maximum, "max").to_local()
    rows = everywhere(sums.relative_to(maximum).rows(), "sum")
    regions: Tensor = (rows[:, :-1] / rows[:, -1:]).to(local.dtype)
    return regions


def _divides(placement: Placement) -> TypeGuard[Shard]:
    """Images or pixels."""
    return isinstance(placement, Shard) and placement.dim != 1


def with_groups(layers: dict[str, Layer | None], feats: Tensor) -> dict[str, Layer | None]:
    """The layers of a block, whose norms take the statistics of the pixels of all processes."""
    assert isinstance(feats, DTensor)
    mesh, shape = feats.device_mesh, feats.shape
    divided = [i for i, p in enumerate(feats.placements) if _divides(p) and shape[p.dim] >= mesh.size(i)]
    return {name: _with_group(name, layer, mesh, divided) for name, layer in layers.items()}


def _with_group(name: str, layer: Layer | None, mesh: DeviceMesh, divided: Sequence[int]) -> Layer | None:
    """`divided` are the dimensions of the mesh over which images or pixels are."""
    norm = None if layer is None else layer.norm
    if layer is None or norm is None or not norm.is_batch or norm.group is not None or not divided:
        return layer
    if len(divided) > 1:
        raise ValueError(
            f"{name}.norm must have the group of all processes among which the pixels of feats are divided, over "
            f"{len(divided)} dimensions of a mesh, but has none"
        )
    return layer._replace(norm=norm._replace(group=mesh.get_group(divided[0])))
