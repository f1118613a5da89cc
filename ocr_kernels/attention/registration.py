"""`ocr_kernels::pixel_region_attention` and its backward, as PyTorch ops."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ocr_kernels.attention import reference
from ocr_kernels.core.arguments import check_device, check_dtype, check_same_dtype, check_shape
from ocr_kernels.core.backends import Backend, implementation
from ocr_kernels.core.derivatives import Op
from ocr_kernels.core.layout import empty_in_format, is_channels_last, pixels, statistics_dtype
from ocr_kernels.core.registration import batch_back, batch_first, differentiate, differentiate_twice, register_op


def check_query_and_key(query: Tensor, key: Tensor) -> None:
    check_dtype("query", query)
    check_shape("query", query, "[B, D, *S] with D >= 1", query.dim() >= 3 and query.shape[1] >= 1)
    check_shape(
        "key",
        key,
        f"[B, D, K] with K >= 1 beside query {tuple(query.shape)}",
        key.dim() == 3 and key.shape[:2] == query.shape[:2] and key.shape[2] >= 1,
    )
    check_same_dtype("key", key, "query", query)
    check_device("key", key, "query", query)


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    check_query_and_key(query, key)
    check_shape(
        "value",
        value,
        f"[B, Dv, K] with Dv >= 1 beside key {tuple(key.shape)}",
        value.dim() == 3 and value.shape[::2] == key.shape[::2] and value.shape[1] >= 1,
    )
    check_same_dtype("value", value, "query", query)
    check_device("value", value, "query", query)


def _allocate(query: Tensor, key: Tensor, value: Tensor, scale: float | None, backend: Backend) -> Tensor:
    _check(query, key, value)
    return empty_in_format(query, value.shape[1])


def _forward(query: Tensor, key: Tensor, value: Tensor, scale: float | None, backend: Backend) -> Tensor:
    out = _allocate(query, key, value, scale, backend)
    kernels = implementation("attention", backend, query.device.type)
    if out.numel():
        kernels.forward(out, query, key, value, _scale(query, scale))
    return out


def _allocate_gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    need_query: bool,
    need_key: bool,
    need_value: bool,
    backend: Backend,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients, the query's in its memory format; those not needed have no elements."""
    _check(query, key, value)
    expected = (query.shape[0], value.shape[1], *query.shape[2:])
    check_shape("grad", grad, f"[B, Dv, *S] {expected}", tuple(grad.shape) == expected)
    check_same_dtype("grad", grad, "query", query)
    check_device("grad", grad, "query", query)
    dquery = empty_in_format(query, query.shape[1]) if need_query else query.new_empty(0)
    dkey = key.new_empty(key.shape if need_key else 0)
    dvalue = value.new_empty(value.shape if need_value else 0)
    return dquery, dkey, dvalue


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    need_query: bool,
    need_key: bool,
    need_value: bool,
    backend: Backend,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _allocate_gradients(grad, query, key, value, scale, need_query, need_key, need_value, backend)
    kernels = implementation("attention", backend, query.device.type)
    if grad.numel() == 0:  # sums over no pixels
        for gradient in gradients:
            gradient.zero_()
    else:
        wanted = (gradient if gradient.numel() else None for gradient in gradients)
        kernels.backward(*wanted, grad, query, key, value, _scale(query, scale))
    return gradients


def _scale(query: Tensor, scale: float | None) -> float:
    return query.shape[1] ** -0.5 if scale is None else scale


def _define(query: Tensor, key: Tensor, value: Tensor, scale: float | None, backend: Backend) -> Tensor:
    _check(query, key, value)
    dtype = statistics_dtype(query)
    out = reference.pixel_region_attention(query.to(dtype), key.to(dtype), value.to(dtype), scale).to(query.dtype)
    return out if is_channels_last(query) else out.contiguous()


def _define_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    need_query: bool,
    need_key: bool,
    need_value: bool,
    backend: Backend,
) -> tuple[Tensor, ...]:
    definition = functools.partial(reference.pixel_region_attention, scale=scale)
    return differentiate(definition, (query, key, value), grad, (need_query, need_key, need_value))


def _flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * pixels(query) * (math.prod(key) + math.prod(value))


def _flops_backward(
    grad: Any,
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    scale: Any,
    need_query: bool,
    need_key: bool,
    need_value: bool,
    *_: Any,
    **__: Any,
) -> int:
    with_key = (need_query + need_key) * math.prod(key)
    with_value = (need_value + (need_query or need_key)) * math.prod(value)
    return 2 * pixels(query) * (with_key + with_value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(query, key, value)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None
    needs = need_query, need_key, need_value = ctx.needs_input_grad[:3]
    dquery, dkey, dvalue = pixel_region_attention_backward_op(grad, *ctx.saved_tensors, ctx.scale, *needs, ctx.backend)
    return dquery if need_query else None, dkey if need_key else None, dvalue if need_value else None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad, query, key, value, ctx.scale, *_ = inputs
    ctx.save_for_backward(grad, query, key, value)
    ctx.set_materialize_grads(False)


def _differentiate_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    grad, query, key, value = ctx.saved_tensors
    definition = functools.partial(reference.pixel_region_attention, scale=ctx.scale)
    derivatives = differentiate_twice(definition, (query, key, value), grad, cotangents)
    return *derivatives, None, None, None, None, None


def _vmap(info: Any, in_dims: Sequence[int | None], query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Any:
    tensors = batch_first((query, key, value), in_dims[:3], info.batch_size)
    (out,), (dim,) = batch_back([pixel_region_attention_op(*tensors, *options)], info.batch_size)
    return out, dim


def _vmap_backward(
    info: Any, in_dims: Sequence[int | None], grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *options: Any
) -> Any:
    tensors = batch_first((grad, query, key, value), in_dims[:4], info.batch_size)
    return batch_back(pixel_region_attention_backward_op(*tensors, *options), info.batch_size)


pixel_region_attention_op: Op = register_op(
    "pixel_region_attention(Tensor query, Tensor key, Tensor value, float? scale, str backend) -> Tensor",
    kernel=_forward,
    fake=_allocate,
    definition=_define,
    flops=_flops,
    setup_context=_save,
    backward=_differentiate,
    vmap=_vmap,
    autocast=3,
)
pixel_region_attention_backward_op: Op = register_op(
    "pixel_region_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value,"
    " float? scale, bool need_query, bool need_key, bool need_value, str backend) -> (Tensor, Tensor, Tensor)",
    kernel=_backward,
    fake=_allocate_gradients,
    definition=_define_backward,
    flops=_flops_backward,
    setup_context=_save_backward,
    backward=_differentiate_backward,
    vmap=_vmap_backward,
)
