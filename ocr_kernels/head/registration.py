"""`ocr_kernels::ocr_head` as a PyTorch op."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ocr_kernels.core.layout import empty_in_format, pixels
from ocr_kernels.core.registration import batch_back, batch_first, register_inference_op

# Arguments have been checked by the public call. `weights`: pixel_in [D, C], its bias [D], where phi has two layers
# pixel_out [D, D] and its bias [D], up's bias [Y], context [O, Y], pixels [O, C], their bias [O], and for logits and
# classes classes [L, O] and its bias [L]. `slopes`: those of pixel_in, pixel_out, up and z.


def _allocate(
    feats: Tensor,
    key: Tensor,
    context_regions: Tensor,
    weights: Sequence[Tensor],
    scale: float,
    slopes: Sequence[float],
    output: str,
    backend: str,
) -> Tensor:
    if output == "classes":
        return feats.new_empty((feats.shape[0], *feats.shape[2:]), dtype=torch.int64)
    return empty_in_format(feats, weights[-1].shape[0])


def _forward(
    feats: Tensor,
    key: Tensor,
    context_regions: Tensor,
    weights: Sequence[Tensor],
    scale: float,
    slopes: Sequence[float],
    output: str,
    backend: str,
) -> Tensor:
    out = _allocate(feats, key, context_regions, weights, scale, slopes, output, backend)
    if out.numel():
        _implementation(backend).forward(out, feats, key, context_regions, weights, scale, slopes, output)
    return out


@functools.cache
def _implementation(backend: str) -> Any:
    return importlib.import_module(f"ocr_kernels.head.{backend}")


def _flops(
    feats: Sequence[int],
    key: Sequence[int],
    context_regions: Sequence[int],
    weights: Sequence[Sequence[int]],
    *_: Any,
    **__: Any,
) -> int:
    matrices = sum(math.prod(weight) for weight in weights if len(weight) == 2)
    return 2 * pixels(feats) * (feats[0] * matrices + math.prod(key) + math.prod(context_regions))


def _vmap(
    info: Any,
    in_dims: Sequence[Any],
    feats: Tensor,
    key: Tensor,
    context_regions: Tensor,
    weights: Sequence[Tensor],
    *settings: Any,
) -> tuple[Tensor, int]:
    tensors = feats, key, context_regions
    *dims, weights_dims = in_dims[:4]
    if any(dim is not None for dim in weights_dims):  # weights of several heads: one after the other
        heads = [
            ocr_head_op(*_select(tensors, dims, i), _select(weights, weights_dims, i), *settings)
            for i in range(info.batch_size)
        ]
        return torch.stack(heads), 0
    out = ocr_head_op(*batch_first(tensors, dims, info.batch_size), weights, *settings)
    (out,), (dim,) = batch_back([out], info.batch_size)
    return out, dim


def _select(tensors: Sequence[Tensor], dims: Sequence[int | None], index: int) -> list[Tensor]:
    """One of the vmapped tensors each."""
    return [t if d is None else t.select(d, index).contiguous() for t, d in zip(tensors, dims, strict=True)]


ocr_head_op = register_inference_op(
    "ocr_head(Tensor feats, Tensor key, Tensor context_regions, Tensor[] weights, float scale, float[] slopes, "
    "str output, str backend) -> Tensor",
    kernel=_forward,
    fake=_allocate,
    flops=_flops,
    vmap=_vmap,
    instead="ocr_kernels.modules.SpatialOCR",
)
