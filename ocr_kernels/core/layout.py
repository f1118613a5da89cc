"""Memory formats and dtypes: the rules that the kernels' allocations and the fakes share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a `[B, C, *S]` tensor is laid out as a contiguous `[B, *S, C]`, and not channels first as well."""
    return not tensor.is_contiguous() and tensor.movedim(1, -1).is_contiguous()


def empty_in_format(like: Tensor, channels: int) -> Tensor:
    """An uninitialised `[B, channels, *S]` in the memory format of `like` `[B, C, *S]`.

    There are two formats, channels last and contiguous; anything else (slices, expansions) yields contiguous. It is no
    view of another tensor: what an op with a derivative returns could not be modified in place then.
    """
    batch, _, *spatial = like.shape
    if not is_channels_last(like):
        return like.new_empty((batch, channels, *spatial))
    strides, step = [], channels
    for size in reversed(spatial):
        strides.append(step)
        step = step * size
    return like.new_empty_strided((batch, channels, *spatial), (step, 1, *reversed(strides)))


def in_format(out: Tensor, like: Tensor) -> Tensor:
    """`out` in the memory format that `empty_in_format` gives."""
    return out.movedim(1, -1).contiguous().movedim(-1, 1) if is_channels_last(like) else out.contiguous()


def statistics_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of sums and softmax statistics: float64 if any input is, otherwise float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def pixels(shape: Sequence[int]) -> int:
    """N, the product of the spatial sizes of a `[B, C, *S]` shape."""
    count = 1
    for size in shape[2:]:
        count *= size
    return count
