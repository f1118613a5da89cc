"""`ocr_kernels::ocr_block` and its backward, and `ocr_kernels::ocr_block_inference`, as PyTorch ops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ocr_kernels.block import reference
from ocr_kernels.block.norms import Settings
from ocr_kernels.core.arguments import check_device, check_dtype, check_shape
from ocr_kernels.core.backends import BACKENDS, Backend, implementation, is_offered, resolve_backend
from ocr_kernels.core.derivatives import Op
from ocr_kernels.core.layout import empty_in_format, pixels, statistics_dtype
from ocr_kernels.core.registration import (
    batch_back,
    batch_first,
    differentiate,
    differentiate_twice,
    register_inference_op,
    register_op,
)

TENSORS = 14  # that have a derivative: feats, key, three matrices, contexts and eight vectors; the mask is the next
_ARGUMENTS = (
    "Tensor feats, Tensor key, Tensor pixel_in, Tensor pixel_out, Tensor fusing, Tensor contexts, "
    "Tensor gain_in, Tensor shift_in, Tensor gain_out, Tensor shift_out, Tensor gain_up, Tensor shift_up, "
    "Tensor gain_z, Tensor shift_z, Tensor mask"
)
_NAMES = [argument.split()[1] for argument in _ARGUMENTS.split(", ")]
_SAVED = ["hidden_in", "hidden_out", "weights", "fused", "statistics"]
_SETTINGS = "float scale, float[] slopes, float[] eps, str[] groups, bool context_first"


def implemented(device_type: str) -> tuple[Backend, ...]:
    """The backends that have the op; the compiled library for GPUs has not."""
    return BACKENDS if device_type == "cpu" else ("reference", "triton")


def is_used_on(device: torch.device) -> bool:
    """Whether modules use the op: on a GPU without Triton its passes in plain PyTorch are slower than layers."""
    backends = implemented(device.type)
    by_default = device.type == "cpu" or resolve_backend(device, implemented=backends) != "reference"
    return is_offered(backends, by_default)


def _kernels(backend: Backend, tensor: Tensor) -> Any:
    kind = tensor.device.type
    return implementation("block", backend, kind, implemented(kind))


# contexts are u, [B, Y, K], in the dtype of statistics, as the vectors are; pixel_out has no elements where phi has one
# layer, nor have its vectors; mask is [B, O], what z is multiplied by, or has no elements.


def _check(tensors: Sequence[Tensor], settings: Settings) -> None:
    feats, key, _, pixel_out, fusing, contexts = tensors[:6]
    batch, channels, depth, regions, up = _sizes(feats, key, contexts)
    check_shape("fusing", fusing, "[O, Y + C]", fusing.dim() == 2)
    second, outputs = depth if pixel_out.numel() else 0, fusing.shape[0]
    shapes: list[tuple[int, ...]] = [(batch, depth, regions), (depth, channels), (depth, depth) if second else (0,)]
    shapes += [(outputs, up + channels), (batch, up, regions), (depth,), (depth,), (second,), (second,)]
    shapes += [(up,), (up,), (outputs,), (outputs,), (batch, outputs) if tensors[TENSORS].dim() == 2 else (0,)]
    _check_each(_NAMES[1:], tensors[1:], shapes, [feats.dtype] * 4 + [statistics_dtype(feats)] * 10, feats)
    for name, values in zip(("slopes", "eps", "groups"), settings[1:4], strict=True):
        if len(values) != 4:
            raise ValueError(f"{name} must have four values, for the layers of phi, rho and g, but has {len(values)}")


def _check_backward(grad: Tensor, args: Sequence[Any]) -> None:
    """`args` are the others; maps and statistics among them are as the forward pass has given them."""
    tensors, saved = args[: TENSORS + 1], args[TENSORS + 1 : TENSORS + 6]
    *settings, needs, _ = args[TENSORS + 6 :]
    _check(tensors, Settings(*settings))
    feats, regions = tensors[0], tensors[1].shape[2]
    batch, _, *spatial = feats.shape
    depth, second, up, outputs = (vector.shape[0] for vector in tensors[6:TENSORS:2])
    maps = (outputs, depth, second, regions, outputs)
    shapes: list[tuple[int, ...]] = [(batch, channels, *spatial) for channels in maps]
    shapes += [(5 * (depth + second + up + outputs) + 4,)]
    _check_each(["grad", *_SAVED], [grad, *saved], shapes, [feats.dtype] * 5 + [statistics_dtype(feats)], feats)
    if len(needs) != TENSORS:
        raise ValueError(f"needs must have {TENSORS} values, one for each tensor but the mask, but has {len(needs)}")


def _sizes(feats: Tensor, key: Tensor, contexts: Tensor) -> tuple[int, int, int, int, int]:
    """B, C, D, K, Y."""
    check_dtype("feats", feats)
    check_shape("feats", feats, "[B, C, *S] with C >= 1", feats.dim() >= 3 and feats.shape[1] >= 1)
    check_shape("key", key, "[B, D, K]", key.dim() == 3)
    check_shape("contexts", contexts, "[B, Y, K]", contexts.dim() == 3)
    return *feats.shape[:2], *key.shape[1:], contexts.shape[1]


def _check_each(
    names: Sequence[str],
    tensors: Sequence[Tensor],
    shapes: list[tuple[int, ...]],
    dtypes: list[torch.dtype],
    feats: Tensor,
) -> None:
    """All at once, which takes half the time, and one by one where something is wrong."""
    devices = [feats.device] * len(tensors)
    found = [t.shape for t in tensors], [t.dtype for t in tensors], [t.device for t in tensors]
    if found == (shapes, dtypes, devices):
        return
    for name, tensor, shape, dtype in zip(names, tensors, shapes, dtypes, strict=True):
        check_shape(name, tensor, f"{shape} beside feats {tuple(feats.shape)}", tensor.shape == shape)
        check_dtype(name, tensor, dtype)
        check_device(name, tensor, "feats", feats)


def _split(args: Sequence[Any]) -> tuple[list[Tensor], Settings, Backend]:
    """Of the arguments of the op: its tensors, its settings and its backend."""
    return list(args[: TENSORS + 1]), Settings(*args[TENSORS + 1 : -1]), args[-1]


def _allocate(*args: Any) -> tuple[Tensor, ...]:
    """z, and what the backward pass reads: h of both layers of phi, w, G [y, x], the statistics."""
    tensors, settings, _ = _split(args)
    _check(tensors, settings)
    feats, key, pixel_in, pixel_out, fusing, contexts = tensors[:6]
    maps = [empty_in_format(feats, len(each)) for each in (fusing, pixel_in, pixel_out)]
    channels = 5 * (len(pixel_in) + len(pixel_out) + contexts.shape[1] + len(fusing))
    statistics = feats.new_empty(channels + 4, dtype=statistics_dtype(feats))
    return *maps, empty_in_format(feats, key.shape[2]), empty_in_format(feats, len(fusing)), statistics


def _forward(*args: Any) -> tuple[Tensor, ...]:
    tensors, settings, backend = _split(args)
    _check(tensors, settings)
    if not tensors[0].numel() and not any(settings.groups):
        return tuple(out.zero_() for out in _allocate(*args))
    out: tuple[Tensor, ...] = _kernels(backend, tensors[0]).forward(*_grouped(tensors), settings)
    return out


def _grouped(
    tensors: Sequence[Any],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Sequence[Tensor], Tensor]:
    """feats, key, the matrices and contexts; the vectors; the mask."""
    feats, key, pixel_in, pixel_out, fusing, contexts = tensors[:6]
    return feats, key, pixel_in, pixel_out, fusing, contexts, tensors[6:TENSORS], tensors[TENSORS]


def _allocate_gradients(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Gradients in their inputs' dtypes, that of feats in its memory format; those not needed have no elements."""
    tensors, needs = args[:TENSORS], args[-2]
    _check_backward(grad, args)
    dfeats = empty_in_format(tensors[0], tensors[0].shape[1])
    gradients = [dfeats, *(tensor.new_empty(tensor.shape) for tensor in tensors[1:])]
    return tuple(g if need else g.new_empty(0) for g, need in zip(gradients, needs, strict=True))


def _backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    tensors, saved = args[: TENSORS + 1], args[TENSORS + 1 : TENSORS + 6]
    *settings, needs, backend = args[TENSORS + 6 :]
    _check_backward(grad, args)
    if not grad.numel() and not any(settings[3]):  # sums over no pixels
        return tuple(gradient.zero_() for gradient in _allocate_gradients(grad, *args))
    grouped = _grouped(tensors)
    dfeats, *others = _kernels(backend, grad).backward(grad, *grouped, saved, Settings(*settings), needs)
    gradients = [dfeats, *(g.to(t.dtype).contiguous() for g, t in zip(others, tensors[1:], strict=False))]
    return tuple(g if need else g.new_empty(0) for g, need in zip(gradients, needs, strict=True))


def _define(*args: Any) -> tuple[Tensor, ...]:
    tensors, settings, _ = _split(args)
    exact = statistics_dtype(tensors[0])
    z, statistics = reference.ocr_block(*_grouped([t.to(exact) for t in tensors]), settings)
    return z.to(tensors[0].dtype), *(z.new_empty(0) for _ in range(4)), statistics


def _definition(mask: Tensor, settings: Settings) -> Any:
    def z(*tensors: Tensor) -> Tensor:
        exact = statistics_dtype(tensors[0])
        grouped = _grouped([tensor.to(exact) for tensor in (*tensors, mask)])
        return reference.ocr_block(*grouped, settings)[0].to(tensors[0].dtype)

    return z


def _define_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *settings, needs, _ = args[TENSORS + 6 :]
    return differentiate(_definition(args[TENSORS], Settings(*settings)), args[:TENSORS], grad, needs)


def _flops(feats: Sequence[int], key: Sequence[int], *rest: Any, **_: Any) -> int:
    *matrices, contexts = (math.prod(map(int, shape)) for shape in rest[:4])
    total: int = 2 * pixels(feats) * (feats[0] * sum(matrices) + math.prod(key) + contexts)
    return total


def _flops_backward(grad: Any, *args: Any, **_: Any) -> int:
    again: int = 2 * pixels(args[0]) * math.prod(args[5])  # y
    return 2 * _flops(*args) + again


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.settings, ctx.backend = inputs[TENSORS + 1 : -1], inputs[-1]
    ctx.save_for_backward(*inputs[: TENSORS + 1], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    others = (None,) * (2 + len(ctx.settings))
    if grad is None:
        return *(None,) * TENSORS, *others
    needs = list(ctx.needs_input_grad[:TENSORS])
    gradients = ocr_block_backward_op(grad, *ctx.saved_tensors, *ctx.settings, needs, ctx.backend)
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), *others


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad, *args = inputs
    ctx.settings = Settings(*args[TENSORS + 6 : -2])
    ctx.save_for_backward(grad, *args[: TENSORS + 1])
    ctx.set_materialize_grads(False)


def _differentiate_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    grad, *tensors, mask = ctx.saved_tensors
    derivatives = differentiate_twice(_definition(mask, ctx.settings), tensors, grad, cotangents)
    return *derivatives, *(None,) * (6 + len(ctx.settings) + 2)


def _vmap(info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
    return _one_by_one(ocr_block_op, info.batch_size, in_dims, args)


def _vmap_backward(info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
    return _one_by_one(ocr_block_backward_op, info.batch_size, in_dims, args)


def _one_by_one(op: Op, size: int, in_dims: Sequence[Any], args: Sequence[Any]) -> Any:
    """The statistics of a call are those of its own pixels, so there is a call for each."""
    dims = [dim if isinstance(arg, Tensor) else None for arg, dim in zip(args, in_dims, strict=True)]
    outputs = [
        op(*(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, dims, strict=True)))
        for i in range(size)
    ]
    return tuple(map(torch.stack, zip(*outputs, strict=True))), (0,) * len(outputs[0])


ocr_block_op: Op = register_op(
    f"ocr_block({_ARGUMENTS}, {_SETTINGS}, str backend) -> ({', '.join(['Tensor'] * 6)})",
    kernel=_forward,
    fake=_allocate,
    definition=_define,
    flops=_flops,
    setup_context=_save,
    backward=_differentiate,
    vmap=_vmap,
    autocast=5,
)
ocr_block_backward_op: Op = register_op(
    f"ocr_block_backward(Tensor grad, {_ARGUMENTS}, {', '.join(f'Tensor {name}' for name in _SAVED)}, {_SETTINGS}, "
    f"bool[] needs, str backend) -> ({', '.join(['Tensor'] * TENSORS)})",
    kernel=_backward,
    fake=_allocate_gradients,
    definition=_define_backward,
    flops=_flops_backward,
    setup_context=_save_backward,
    backward=_differentiate_backward,
    vmap=_vmap_backward,
)


# Inference: statistics are known, and norms folded into the layers. `weights`: pixel_in [D, C], its bias [D]; where phi
# has two layers pixel_out [D, D], its bias [D]; up's bias [Y]; the halves of the fusing matrix, for y [O, Y] and for x
# [O, C], their bias [O]; for logits and classes the classifier [L, O], its bias [L]. `slopes`: those of pixel_in,
# pixel_out, up and z.


_INFERENCE_NAMES = ["key", "contexts", *(f"weights[{i}]" for i in range(10))]


def _check_inference(
    feats: Tensor, key: Tensor, contexts: Tensor, weights: Sequence[Tensor], slopes: Sequence[float], output: str
) -> None:
    if output not in ("features", "logits", "classes"):
        raise ValueError(f"output must be 'features', 'logits' or 'classes', but is {output!r}")
    if len(slopes) != 4:
        raise ValueError(f"slopes must have four values, for the layers of phi, rho and g, but has {len(slopes)}")
    rest = 4 if output == "features" else 6
    if len(weights) not in (rest + 2, rest + 4):
        raise ValueError(f"weights must be {rest + 2} or {rest + 4} tensors for {output}, but are {len(weights)}")
    batch, channels, depth, regions, up = _sizes(feats, key, contexts)
    outputs, classes = weights[3 - rest].numel(), weights[-1].numel()  # of biases
    shapes: list[tuple[int, ...]] = [(batch, depth, regions), (batch, up, regions), (depth, channels), (depth,)]
    shapes += [(depth, depth), (depth,)] if len(weights) == rest + 4 else []
    shapes += [(up,), (outputs, up), (outputs, channels), (outputs,)]
    shapes += [(classes, outputs), (classes,)] if rest == 6 else []
    dtypes = [statistics_dtype(feats) if len(shape) == 1 else feats.dtype for shape in shapes]
    _check_each(_INFERENCE_NAMES[: len(shapes)], [key, contexts, *weights], shapes, dtypes, feats)


def _allocate_inference(
    feats: Tensor,
    key: Tensor,
    contexts: Tensor,
    weights: Sequence[Tensor],
    scale: float,
    slopes: Sequence[float],
    output: str,
    backend: Backend,
) -> Tensor:
    _check_inference(feats, key, contexts, weights, slopes, output)
    if output == "classes":
        return feats.new_empty((feats.shape[0], *feats.shape[2:]), dtype=torch.int64)
    return empty_in_format(feats, len(weights[-1]))


def _infer(feats: Tensor, *args: Any) -> Tensor:
    *others, backend = args
    out = _allocate_inference(feats, *args)
    if out.numel():
        _kernels(backend, feats).infer(out, feats, *others)
    return out


def _flops_inference(
    feats: Sequence[int],
    key: Sequence[int],
    contexts: Sequence[int],
    weights: Sequence[Sequence[int]],
    *_: Any,
    **__: Any,
) -> int:
    matrices = sum(math.prod(weight) for weight in weights if len(weight) == 2)
    return 2 * pixels(feats) * (feats[0] * matrices + math.prod(key) + math.prod(contexts))


def _vmap_inference(
    info: Any,
    in_dims: Sequence[Any],
    feats: Tensor,
    key: Tensor,
    contexts: Tensor,
    weights: Sequence[Tensor],
    *settings: Any,
) -> tuple[Tensor, int]:
    tensors = feats, key, contexts
    *dims, weights_dims = in_dims[:4]
    if any(dim is not None for dim in weights_dims):  # weights of several blocks: one after the other
        blocks = [
            ocr_block_inference_op(*_select(tensors, dims, i), _select(weights, weights_dims, i), *settings)
            for i in range(info.batch_size)
        ]
        return torch.stack(blocks), 0
    out = ocr_block_inference_op(*batch_first(tensors, dims, info.batch_size), weights, *settings)
    (out,), (dim,) = batch_back([out], info.batch_size)
    return out, dim


def _select(tensors: Sequence[Tensor], dims: Sequence[int | None], index: int) -> list[Tensor]:
    """One of the vmapped tensors each."""
    return [t if d is None else t.select(d, index).contiguous() for t, d in zip(tensors, dims, strict=True)]


ocr_block_inference_op: Op = register_inference_op(
    "ocr_block_inference(Tensor feats, Tensor key, Tensor contexts, Tensor[] weights, float scale, float[] slopes, "
    "str output, str backend) -> Tensor",
    kernel=_infer,
    fake=_allocate_inference,
    flops=_flops_inference,
    vmap=_vmap_inference,
    instead="ocr_kernels.ocr_block",
)
