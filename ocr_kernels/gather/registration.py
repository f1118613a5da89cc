"""`ocr_kernels::spatial_gather` and its backward, as PyTorch ops."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ocr_kernels.core.arguments import check_device, check_dtype, check_same_dtype, check_shape
from ocr_kernels.core.backends import Backend, implementation
from ocr_kernels.core.derivatives import Op
from ocr_kernels.core.layout import empty_in_format, statistics_dtype
from ocr_kernels.core.registration import batch_back, batch_first, differentiate, differentiate_twice, register_op
from ocr_kernels.gather import reference


def check_feats_and_logits(feats: Tensor, logits: Tensor) -> None:
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


def _stats_shape(feats: Tensor, logits: Tensor) -> tuple[int, int, int]:
    return feats.shape[0], feats.shape[1] + 2, logits.shape[1]


def _allocate(feats: Tensor, logits: Tensor, scale: float, backend: Backend) -> tuple[Tensor, Tensor]:
    """The result [B, C, K], and what the backward pass needs of the forward pass, `stats` [B, C + 2, K].

    Its rows are the result before it was rounded to the feats' dtype, the softmax's maxima and its sums: in the
    statistics' dtype, since the logits' gradient is the difference of products that are almost equal.
    """
    check_feats_and_logits(feats, logits)
    out = feats.new_empty((feats.shape[0], feats.shape[1], logits.shape[1]))
    return out, feats.new_empty(_stats_shape(feats, logits), dtype=statistics_dtype(feats, logits))


def _forward(feats: Tensor, logits: Tensor, scale: float, backend: Backend) -> tuple[Tensor, Tensor]:
    out, stats = _allocate(feats, logits, scale, backend)
    kernels = implementation("gather", backend, feats.device.type)
    if feats.numel() == 0:  # sums over no pixels, or no images
        return out.zero_(), stats.zero_()
    kernels.forward(out, stats, feats, logits, scale)
    return out, stats


def _allocate_gradients(
    grad: Tensor,
    feats: Tensor,
    logits: Tensor,
    stats: Tensor,
    scale: float,
    need_feats: bool,
    need_logits: bool,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """Gradients in their inputs' memory formats; those not needed have no elements."""
    check_feats_and_logits(feats, logits)
    expected = (feats.shape[0], feats.shape[1], logits.shape[1])
    check_shape("grad", grad, f"[B, C, K] {expected}", tuple(grad.shape) == expected)
    check_same_dtype("grad", grad, "feats", feats)
    check_device("grad", grad, "feats", feats)
    expected = _stats_shape(feats, logits)
    check_shape("stats", stats, f"[B, C + 2, K] {expected}", tuple(stats.shape) == expected)
    check_dtype("stats", stats, statistics_dtype(feats, logits))
    check_device("stats", stats, "feats", feats)
    dfeats = empty_in_format(feats, feats.shape[1]) if need_feats else feats.new_empty(0)
    dlogits = empty_in_format(logits, logits.shape[1]) if need_logits else logits.new_empty(0)
    return dfeats, dlogits


def _backward(
    grad: Tensor,
    feats: Tensor,
    logits: Tensor,
    stats: Tensor,
    scale: float,
    need_feats: bool,
    need_logits: bool,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    dfeats, dlogits = _allocate_gradients(grad, feats, logits, stats, scale, need_feats, need_logits, backend)
    kernels = implementation("gather", backend, feats.device.type)
    if dfeats.numel() or dlogits.numel():
        wanted = dfeats if need_feats else None, dlogits if need_logits else None
        kernels.backward(*wanted, grad, feats, logits, stats, scale)
    return dfeats, dlogits


def _define(feats: Tensor, logits: Tensor, scale: float, backend: Backend) -> tuple[Tensor, Tensor]:
    check_feats_and_logits(feats, logits)
    return reference.gather_and_statistics(feats, logits, scale)


def _define_backward(
    grad: Tensor,
    feats: Tensor,
    logits: Tensor,
    stats: Tensor,
    scale: float,
    need_feats: bool,
    need_logits: bool,
    backend: Backend,
) -> tuple[Tensor, ...]:
    definition = functools.partial(reference.spatial_gather, scale=scale)
    return differentiate(definition, (feats, logits), grad, (need_feats, need_logits))


def _flops(feats: Sequence[int], logits: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(feats) * logits[1]


def _flops_backward(
    grad: Any,
    feats: Sequence[int],
    logits: Sequence[int],
    stats: Any,
    scale: float,
    need_feats: bool,
    need_logits: bool,
    *_: Any,
    **__: Any,
) -> int:
    return (need_feats + need_logits) * _flops(feats, logits)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    feats, logits, ctx.scale, ctx.backend = inputs
    _, stats = output
    ctx.save_for_backward(feats, logits, stats)
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    need_feats, need_logits, *_ = ctx.needs_input_grad
    dfeats, dlogits = spatial_gather_backward_op(
        grad, *ctx.saved_tensors, ctx.scale, need_feats, need_logits, ctx.backend
    )
    return dfeats if need_feats else None, dlogits if need_logits else None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad, feats, logits, _, ctx.scale, *_ = inputs
    ctx.save_for_backward(grad, feats, logits)
    ctx.set_materialize_grads(False)


def _differentiate_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    grad, feats, logits = ctx.saved_tensors
    definition = functools.partial(reference.spatial_gather, scale=ctx.scale)
    dgrad, dfeats, dlogits = differentiate_twice(definition, (feats, logits), grad, cotangents)
    return dgrad, dfeats, dlogits, None, None, None, None, None


def _vmap(
    info: Any, in_dims: Sequence[int | None], feats: Tensor, logits: Tensor, scale: float, backend: Backend
) -> Any:
    feats, logits = batch_first((feats, logits), in_dims[:2], info.batch_size)
    return batch_back(spatial_gather_op(feats, logits, scale, backend), info.batch_size)


def _vmap_backward(
    info: Any, in_dims: Sequence[int | None], grad: Tensor, feats: Tensor, logits: Tensor, stats: Tensor, *options: Any
) -> Any:
    tensors = batch_first((grad, feats, logits, stats), in_dims[:4], info.batch_size)
    return batch_back(spatial_gather_backward_op(*tensors, *options), info.batch_size)


spatial_gather_op: Op = register_op(
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
spatial_gather_backward_op: Op = register_op(
    "spatial_gather_backward(Tensor grad, Tensor feats, Tensor logits, Tensor stats, float scale,"
    " bool need_feats, bool need_logits, str backend) -> (Tensor, Tensor)",
    kernel=_backward,
    fake=_allocate_gradients,
    definition=_define_backward,
    flops=_flops_backward,
    setup_context=_save_backward,
    backward=_differentiate_backward,
    vmap=_vmap_backward,
)
