"""`ocr_kernels::pixel_region_attention` and its backward, as PyTorch ops."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ocr_kernels.attention import reference
from ocr_kernels.core import libraries
from ocr_kernels.core.arguments import check_device, check_dtype, check_shape
from ocr_kernels.core.layout import empty_in_format, is_channels_last, pixels, statistics_dtype
from ocr_kernels.core.registration import (
    batch_back,
    batch_first,
    differentiate,
    differentiate_twice,
    register_op,
)


def check_query_and_key(query: Tensor, key: Tensor) -> None:
    check_dtype("query", query)
    check_shape("query", query, "[B, D, *S] with D >= 1", query.dim() >= 3 and query.shape[1] >= 1)
    check_shape(
        "key",
        key,
        f"[B, D, K] with K >= 1 beside query {tuple(query.shape)}",
        key.dim() == 3 and key.shape[:2] == query.shape[:2] and key.shape[2] >= 1,
    )
    _check_same("key", key, query)


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    check_query_and_key(query, key)
    check_shape(
        "value",
        value,
        f"[B, Dv, K] with Dv >= 1 beside key {tuple(key.shape)}",
        value.dim() == 3 and value.shape[::2] == key.shape[::2] and value.shape[1] >= 1,
    )
    _check_same("value", value, query)


def _check_same(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.dtype != query.dtype:
        raise TypeError(f"{name} must have the dtype of query, {query.dtype}, but has {tensor.dtype}")
    check_device(name, tensor, "query", query)


def _allocate(query: Tensor, key: Tensor, value: Tensor, scale: float | None, backend: str) -> Tensor:
    _check(query, key, value)
    return empty_in_format(query, value.shape[1])


def _forward(query: Tensor, key: Tensor, value: Tensor, scale: float | None, backend: str) -> Tensor:
    out = _allocate(query, key, value, scale, backend)
    if out.numel():
        _implementation(backend, query.is_cuda).forward(out, query, key, value, _scale(query, scale))
    return out


def _empty_gradients(
    query: Tensor, key: Tensor, value: Tensor, need_query: bool, need_key: bool, need_value: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients, the query's in its memory format; those not needed have no elements."""
    _check(query, key, value)
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _empty_gradients(query, key, value, need_query, need_key, need_value)
    if grad.numel() == 0:  # sums over no pixels
        for gradient in gradients:
            gradient.zero_()
    else:
        wanted = (gradient if gradient.numel() else None for gradient in gradients)
        _implementation(backend, query.is_cuda).backward(*wanted, grad, query, key, value, _scale(query, scale))
    return gradients


def _scale(query: Tensor, scale: float | None) -> float:
    return query.shape[1] ** -0.5 if scale is None else scale


@functools.cache
def _implementation(backend: str, on_gpu: bool) -> Any:
    if backend == "native":
        libraries.ops("cuda" if on_gpu else "cpu")
    return importlib.import_module(f"ocr_kernels.attention.{backend}")


def _define(query: Tensor, key: Tensor, value: Tensor, scale: float | None, backend: str) -> Tensor:
    _check(query, key, value)
    dtype = statistics_dtype(query)
    out = reference.pixel_region_attention(query.to(dtype), key.to(dtype), value.to(dtype), scale).to(query.dtype)
    return out if is_channels_last(query) else out.contiguous()


def _define_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    scale, *needs = rest[:4]
    definition = functools.partial(reference.pixel_region_attention, scale=scale)
    return differentiate(definition, (query, key, value), grad, needs)


def _flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * pixels(query) * (math.prod(key) + math.prod(value))


def _flops_backward(
    grad: Any, query: Sequence[int], key: Sequence[int], value: Sequence[int], *rest: Any, **_: Any
) -> int:
    need_query, need_key, need_value = rest[1:4]
    with_key: int = need_query + need_key
    with_value: int = need_value + (need_query or need_key)
    return 2 * pixels(query) * (with_key * math.prod(key) + with_value * math.prod(value))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    needs = ctx.needs_input_grad[:3]
    gradients = pixel_region_attention_backward_op(grad, *ctx.saved_tensors, ctx.scale, *needs, ctx.backend)
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, _, _, _, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    grad, *inputs = ctx.saved_tensors
    definition = functools.partial(reference.pixel_region_attention, scale=ctx.scale)
    return *differentiate_twice(definition, inputs, grad, cotangents), *(None,) * 5


def _vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
    tensors = batch_first(args[:3], in_dims[:3], info.batch_size)
    (out,), (dim,) = batch_back([pixel_region_attention_op(*tensors, *args[3:])], info.batch_size)
    return out, dim


def _vmap_backward(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
    tensors = batch_first(args[:4], in_dims[:4], info.batch_size)
    return batch_back(pixel_region_attention_backward_op(*tensors, *args[4:]), info.batch_size)


pixel_region_attention_op = register_op(
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
pixel_region_attention_backward_op = register_op(
    "pixel_region_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value,"
    " float? scale, bool need_query, bool need_key, bool need_value, str backend) -> (Tensor, Tensor, Tensor)",
    kernel=_backward,
    fake=lambda grad, query, key, value, scale, *needs_and_backend: _empty_gradients(
        query, key, value, *needs_and_backend[:3]
    ),
    definition=_define_backward,
    flops=_flops_backward,
    setup_context=_save_backward,
    backward=_differentiate_backward,
    vmap=_vmap_backward,
)
