"""`ocr_kernels::spatial_gather` and its backward, as PyTorch ops."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ocr_kernels.core import libraries
from ocr_kernels.core.arguments import check_device, check_dtype, check_shape
from ocr_kernels.core.layout import empty_in_format, pixels, statistics_dtype
from ocr_kernels.core.registration import (
    batch_back,
    batch_first,
    differentiate,
    differentiate_twice,
    register_op,
)
from ocr_kernels.gather import reference


def _check(feats: Tensor, logits: Tensor) -> None:
    check_dtype("feats", feats)
    check_dtype("logits", logits)
    check_shape("feats", feats, "[B, C, *S] with C >= 1", feats.dim() >= 3 and feats.shape[1] >= 1)
    check_shape(
        "logits",
        logits,
        f"[B, K, *S] with K >= 1 beside feats {tuple(feats.shape)}",
        logits.dim() == feats.dim()
        and logits.shape[0] == feats.shape[0]
        and logits.shape[1] >= 1
        and logits.shape[2:] == feats.shape[2:],
    )
    check_device("logits", logits, "feats", feats)


def _allocate(feats: Tensor, logits: Tensor, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    _check(feats, logits)
    out = feats.new_empty((feats.shape[0], feats.shape[1], logits.shape[1]))
    stats = feats.new_empty((feats.shape[0], 2, logits.shape[1]), dtype=statistics_dtype(feats, logits))
    return out, stats


def _forward(feats: Tensor, logits: Tensor, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    out, stats = _allocate(feats, logits, scale, backend)
    if out.shape[0] == 0:
        return out, stats
    if pixels(feats.shape) == 0:  # a sum over no pixels
        return out.zero_(), stats.zero_()
    _implementation(backend, feats.is_cuda).forward(out, stats, feats, logits, scale)
    return out, stats


def _empty_gradients(feats: Tensor, logits: Tensor, need_feats: bool, need_logits: bool) -> tuple[Tensor, Tensor]:
    """Gradients in their inputs' memory formats; those not needed have no elements."""
    _check(feats, logits)
    dfeats = empty_in_format(feats, feats.shape[1]) if need_feats else feats.new_empty(0)
    dlogits = empty_in_format(logits, logits.shape[1]) if need_logits else logits.new_empty(0)
    return dfeats, dlogits


def _backward(
    grad: Tensor,
    feats: Tensor,
    logits: Tensor,
    out: Tensor,
    stats: Tensor,
    scale: float,
    need_feats: bool,
    need_logits: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    dfeats, dlogits = _empty_gradients(feats, logits, need_feats, need_logits)
    if dfeats.numel() or dlogits.numel():
        wanted = dfeats if need_feats else None, dlogits if need_logits else None
        _implementation(backend, feats.is_cuda).backward(*wanted, grad, feats, logits, out, stats, scale)
    return dfeats, dlogits


@functools.cache
def _implementation(backend: str, on_gpu: bool) -> Any:
    if backend == "native":
        libraries.ops("cuda" if on_gpu else "cpu")
    return importlib.import_module(f"ocr_kernels.gather.{backend}")


def _define(feats: Tensor, logits: Tensor, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    _check(feats, logits)
    out, stats = reference.gather_and_statistics(feats, logits, scale)
    return out.to(feats.dtype), stats


def _define_backward(grad: Tensor, feats: Tensor, logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    scale, *needs = rest[2:5]
    definition = functools.partial(reference.spatial_gather, scale=scale)
    return differentiate(definition, (feats, logits), grad, needs)


def _flops(feats: Sequence[int], logits: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(feats) * logits[1]


def _flops_backward(grad: Any, feats: Sequence[int], logits: Sequence[int], *rest: Any, **_: Any) -> int:
    needs: int = sum(rest[3:5])
    return needs * _flops(feats, logits)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    feats, logits, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(feats, logits, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    needs = ctx.needs_input_grad[:2]
    gradients = spatial_gather_backward_op(grad, *ctx.saved_tensors, ctx.scale, *needs, ctx.backend)
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad, feats, logits, _, _, ctx.scale, *_ = inputs
    ctx.save_for_backward(grad, feats, logits)
    ctx.set_materialize_grads(False)


def _differentiate_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    grad, feats, logits = ctx.saved_tensors
    definition = functools.partial(reference.spatial_gather, scale=ctx.scale)
    return *differentiate_twice(definition, (feats, logits), grad, cotangents), *(None,) * 6


def _vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
    tensors = batch_first(args[:2], in_dims[:2], info.batch_size)
    return batch_back(spatial_gather_op(*tensors, *args[2:]), info.batch_size)


def _vmap_backward(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
    tensors = batch_first(args[:5], in_dims[:5], info.batch_size)
    return batch_back(spatial_gather_backward_op(*tensors, *args[5:]), info.batch_size)


spatial_gather_op = register_op(
    "spatial_gather(Tensor feats, Tensor logits, float scale, str backend) -> (Tensor, Tensor)",
    kernel=_forward,
    fake=_allocate,
    definition=_define,
    flops=_flops,
    setup_context=_save,
    backward=_differentiate,
    vmap=_vmap,
    autocast=1,  # feats; the logits are taken as they are
)
spatial_gather_backward_op = register_op(
    "spatial_gather_backward(Tensor grad, Tensor feats, Tensor logits, Tensor out, Tensor stats, float scale,"
    " bool need_feats, bool need_logits, str backend) -> (Tensor, Tensor)",
    kernel=_backward,
    fake=lambda grad, feats, logits, out, stats, scale, *needs_and_backend: _empty_gradients(
        feats, logits, *needs_and_backend[:2]
    ),
    definition=_define_backward,
    flops=_flops_backward,
    setup_context=_save_backward,
    backward=_differentiate_backward,
    vmap=_vmap_backward,
)
