"""Logits of a tile brought to the size of the image, with the same weights as if the image were whole."""

from __future__ import annotations

import torch
from torch import Tensor

from ocr_kernels.tiled.tiles import Span


def resize(x: Tensor, dim: int, span: Span, wanted: slice, size: int, align_corners: bool) -> Tensor:
    """Bilinear interpolation along one dimension, of which `x` has a tile's `span`: the pixels `wanted` of an image.

    `size` is that of the image. `x` must have a stride that divides the span.
    """
    stride = span.stride_of(x.shape[dim])
    if stride == 1:
        return x.narrow(dim, wanted.start - span.start, wanted.stop - wanted.start)
    pixels = torch.arange(wanted.start, wanted.stop, dtype=torch.float64)
    at = pixels * ((size // stride - 1) / (size - 1)) if align_corners else (pixels + 0.5) / stride - 0.5
    at = (at - span.start // stride).clamp(0, x.shape[dim] - 1)
    low = at.floor()
    high = (low + 1).clamp(max=x.shape[dim] - 1)
    weight = (at - low).to(x).view(-1, *[1] * (x.dim() - dim - 1))
    picked = (x.index_select(dim, index.long().to(x.device)) for index in (low, high))
    return next(picked).lerp_(next(picked), weight)
