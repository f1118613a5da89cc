"""The spatial gather of DTensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from ocr_kernels.core.backends import Backend
from ocr_kernels.core.layout import pixels
from ocr_kernels.core.sharding import Rule, check_dtensors, divides, needed, register, spatial
from ocr_kernels.gather.registration import check_feats_and_logits, spatial_gather_backward_op, spatial_gather_op
from ocr_kernels.gather.state import as_the_op_casts, sums_of


def _gather(*_: Any) -> Iterator[Rule]:
    yield [Shard(0)] * 4


def _gather_backward(grad: Any, feats: Any, logits: Any, stats: Any, scale: Any, *options: Any) -> Iterator[Rule]:
    for shard, regions in ((Shard(0), Shard(0)), *((shard, Replicate()) for shard in spatial(feats))):
        yield [*needed([shard, shard], options[:2]), regions, shard, shard, regions]


register(spatial_gather_op, _gather)
register(spatial_gather_backward_op, _gather_backward)


def gather(feats: Tensor, logits: Tensor, scale: float, backend: Backend) -> Tensor:
    """The spatial gather of DTensors. Of pixels that are sharded, each process sums its own, as `GatherState` does."""
    check_dtensors(feats=feats, logits=logits)
    assert isinstance(feats, DTensor)
    assert isinstance(logits, DTensor)
    check_feats_and_logits(feats, logits)
    mesh, both = feats.device_mesh, zip(feats.placements, logits.placements, strict=True)
    placements = [next((p for p in pair if divides(p)), Replicate()) for pair in both]
    x, m = feats.redistribute(placements=placements), logits.redistribute(placements=placements)
    of_pixels = [isinstance(p, Shard) and p.dim > 1 for p in placements]
    if not pixels(feats.shape) or not any(of_pixels):
        out: Tensor = spatial_gather_op(x, m, scale, backend)[0]
        return out
    local = as_the_op_casts(x.to_local())
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
