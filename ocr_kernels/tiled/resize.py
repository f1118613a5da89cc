"""Bilinear interpolation of a part of an image, with the same weights as if the image were whole."""

from __future__ import annotations

import torch
from torch import Tensor


def places(wanted: slice, *steps: tuple[int, int], align_corners: bool = False) -> Tensor:
    """Where the pixels `wanted` of a resized axis are in its source, as `F.interpolate` has it, in float64.

    A step is the size of an axis and that of its source, which is the axis of the next step. Places are not beyond the
    first and the last pixel of the last source.
    """
    at = torch.arange(wanted.start, wanted.stop, dtype=torch.float64)
    for size, source in steps:
        at = at * ((source - 1) / max(size - 1, 1)) if align_corners else (at + 0.5) / (size / source) - 0.5
    return at.clamp(0, steps[-1][1] - 1)


def needed(at: Tensor) -> slice:
    """The source's pixels that are interpolated at places."""
    return slice(int(at[0].floor()), int(at[-1].ceil()) + 1)


def resize(x: Tensor, dim: int, at: Tensor) -> Tensor:
    """`x` at places along one dimension; beyond its pixels, the first and the last."""
    at = at.clamp(0, x.shape[dim] - 1)
    low = at.floor()
    first = int(low[0])
    if torch.equal(at, torch.arange(first, first + len(at), dtype=at.dtype)):
        return x.narrow(dim, first, len(at))
    high = (low + 1).clamp(max=x.shape[dim] - 1)
    weight = (at - low).to(x).view(-1, *[1] * (x.dim() - dim - 1))
    picked = (x.index_select(dim, index.long().to(x.device)) for index in (low, high))
    return next(picked).lerp_(next(picked), weight)
