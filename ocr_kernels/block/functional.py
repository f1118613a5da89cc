"""The public call: `ocr_block`, and the layers that it takes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from numbers import Real
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ocr_kernels.block import reference
from ocr_kernels.block.layers import Layer, Norm
from ocr_kernels.block.registration import implemented, ocr_block_inference_op, ocr_block_op
from ocr_kernels.core.arguments import (
    check_device,
    check_dtype,
    check_same_dtype,
    check_shape,
    check_tensors,
    is_dtensor,
)
from ocr_kernels.core.backends import Backend, left_to_compiler, resolve_backend
from ocr_kernels.core.derivatives import is_differentiated, is_in_transform
from ocr_kernels.core.layout import DTYPES, in_format, pixels, statistics_dtype
from ocr_kernels.core.registration import is_autocast_on, without_autocast

Output = Literal["features", "logits", "classes"]
Classifier: TypeAlias = tuple[Tensor, Tensor | None]


def ocr_block(
    feats: Tensor,
    key: Tensor,
    value: Tensor,
    pixel: Sequence[Layer],
    up: Layer | None,
    fusing: Layer,
    classifier: Classifier | None = None,
    *,
    output: Output | None = None,
    scale: float | None = None,
    context_first: bool = True,
    mask: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Step 4 as one op: augmented representations z of every pixel (Eqs. 3, 5 and 6), or the classifier's logits.

        z_i = rho(G [y_i, x_i]),    y_i = rho(W_up sum_k w_ik v_k),    w_ik = softmax_k(scale * phi(x_i) . key_k)

    The softmax runs **over regions**; rho is a norm and an activation.

    Where a derivative is wanted, there is a mask or a norm takes the statistics of the batch, feats, the products of
    the layers of phi, the weights w `[B, K, *S]` and one map of z's channels are saved for backward; neither y nor
    anything that a norm or an activation made. Else norms are folded into the matrices and nothing is saved.

    Args:
        feats: pixel representations x, `[B, C, *S]`, any number of spatial dimensions.
        key: transformed regions psi(f), `[B, D, K]`, any K >= 1.
        value: transformed regions delta(f), `[B, V, K]`.
        pixel: phi, one layer or two, `[D, C]` and `[D, D]`.
        up: rho, `[Y, V]`; `None` where contexts are the weighted values themselves, and Y is V; of a layer without a
            weight, what follows is done to those.
        fusing: g, `[O, Y + C]`.
        classifier: the weight `[L, O]` of what makes logits of z, and its bias `[L]` or `None`.
        output: `"features"` for z, `"logits"`, or `"classes"` for the argmax of those; `None` for logits where there is
            a classifier, else z.
        scale: factor on the scores; `None` means `D ** -0.5`.
        context_first: whether g takes `[y, x]`, or `[x, y]`.
        mask: what z is multiplied by, `[B, O]`, as Dropout2d does, a constant; float32, or float64 for float64.
        backend: `"reference"`, `"triton"`, or on a CPU `"native"`; `None` chooses (see `ocr_kernels.use_backend`).

    Returns:
        z, `[B, O, *S]`, or logits, `[B, L, *S]`, in the dtype and the memory format (contiguous or channels last) of
        `feats`; or classes, int64 `[B, *S]`. Sums and statistics are float32, or float64 for float64.

    DTensors may be sharded over images, or feats over pixels; the statistics of a batch are those of all processes.

    Under autocast feats, key and the matrices that pixels meet are cast to the autocast dtype. Forward and backward are
    bitwise reproducible.

    Raises:
        TypeError: an argument is no tensor, no `Layer`, no `Norm` or no number, or the dtypes differ or are others.
        ValueError: shapes or devices do not match, a size other than B and S is 0, there is one pixel where a norm
            takes the statistics of the batch, a norm has one running statistic of two or a negative eps, a slope is
            negative where a derivative is wanted, there is a mask or a norm takes the statistics of the batch, the mask
            requires grad, `output` needs a classifier, or `output` or `backend` is unknown.
        RuntimeError: the backend asked for cannot run here; the message says why.

    Examples:
        >>> feats, key, value = torch.randn(2, 64, 32, 32), torch.randn(2, 16, 19), torch.randn(2, 16, 19)
        >>> pixel = [Layer(torch.randn(16, 64)), Layer(torch.randn(16, 16))]
        >>> up, fusing = Layer(torch.randn(64, 16)), Layer(torch.randn(48, 128), norm=Norm())
        >>> ocr_block(feats, key, value, pixel, up, fusing).shape
        torch.Size([2, 48, 32, 32])
    """
    layers = _named(pixel, up, fusing)
    if is_dtensor(feats):
        from ocr_kernels.block.sharding import check_dtensors, with_groups

        check_dtensors(feats=feats, key=key, value=value)
        layers = with_groups(layers, feats)
    sizes = _check(feats, key, value, layers, scale, mask)
    if output is None:
        output = "features" if classifier is None else "logits"
    _check_output(output, classifier, sizes, feats)
    takes_statistics = [
        name for name, layer in layers.items() if layer and layer.norm is not None and layer.norm.is_batch
    ]
    scale = key.shape[1] ** -0.5 if scale is None else float(scale)
    made_of = [feats, key, value, *_tensors(layers.values(), classifier if output != "features" else None)]
    if not takes_statistics and mask is None and not is_differentiated(made_of):
        kind = feats.device.type
        casts = is_autocast_on(kind) and feats.dtype != torch.float64
        dtype = torch.get_autocast_dtype(kind) if casts else feats.dtype
        with without_autocast(kind):
            options: Any = {"output": output, "scale": scale, "context_first": context_first, "dtype": dtype}
            folded = fold_block(pixel, up, fusing, classifier, **options)
            return folded.run(feats.to(dtype), key.to(dtype), value, backend)
    for name, layer in layers.items():
        if layer is not None and layer.slope < 0:
            where = "a derivative is wanted, there is a mask, or a norm takes the statistics of the batch"
            raise ValueError(f"{name}.slope must be a number >= 0 where {where}, but is {layer.slope}")
    count = feats.shape[0] * pixels(feats.shape)
    groups = [layer.norm.group for layer in layers.values() if layer is not None and layer.norm is not None]
    if takes_statistics and count == 1 and not any(groups):
        name = takes_statistics[0]
        raise ValueError(f"{name}.norm takes the statistics of a batch that has one pixel; call it in eval mode")
    exact = statistics_dtype(feats)
    vectors, eps, slopes, names = [], [], [], []
    for name, layer in layers.items():
        gain, shift = (feats.new_empty(0),) * 2 if layer is None else _gain_and_shift(layer, sizes["Y"], value)
        vectors += [gain.to(exact), shift.to(exact)]
        norm = layer.norm if layer is not None and name in takes_statistics else None
        eps.append(-1.0 if norm is None else norm.eps)
        slopes.append(1.0 if layer is None else float(layer.slope))
        names.append("" if norm is None or norm.group is None else norm.group.group_name)
    with without_autocast(feats.device.type):  # few numbers, of which all of y is made
        contexts = value.to(exact)  # u, [B, Y, K]
        contexts = contexts if up is None or up.weight is None else torch.matmul(up.weight.to(exact), contexts)
    none = feats.new_empty(0, dtype=exact)
    second = pixel[1].weight if len(pixel) == 2 else feats.new_empty(0)
    chosen = resolve_backend(feats.device, backend, implemented(feats.device.type))
    z, *_, statistics = ocr_block_op(
        feats, key, pixel[0].weight, second, fusing.weight, contexts, *vectors, none if mask is None else mask,
        scale, slopes, eps, names, context_first, chosen,
    )  # fmt: skip
    out = _classified(z, classifier, output)
    lengths = [gain.shape[0] for gain in vectors[::2] for _ in range(5)]  # of what `statistics_of` puts there
    *known, _ = statistics.detach().split([*lengths, len(layers)])
    found = list(zip(layers.values(), known[::5], known[1::5], strict=True))
    _update(found, runs=count > 0 or any(names))  # last: an error leaves statistics as they were
    return out


def _tensors(layers: Iterable[Layer | None], classifier: Classifier | None) -> Iterator[Tensor]:
    """Those that have a derivative."""
    for layer in layers:
        if layer is not None:
            norm = layer.norm or Norm()
            yield from (t for t in (layer.weight, layer.bias, norm.weight, norm.bias) if t is not None)
    yield from (t for t in classifier or () if t is not None)


def _classified(z: Tensor, classifier: Classifier | None, output: Output) -> Tensor:
    """What `output` asks for, of z."""
    if output == "features" or classifier is None:
        return z
    weight, bias = classifier
    logits = F.linear(z.flatten(2).mT, weight, None if bias is None else bias.to(weight.dtype))
    logits = logits.mT.unflatten(2, z.shape[2:])
    return logits.argmax(1) if output == "classes" else in_format(logits, z)


class FoldedBlock(NamedTuple):
    """Step 4 where every statistic is known, with the norms folded into the matrices. Made once for many calls."""

    up: Tensor  # [Y, V], or [Y], by which values are multiplied
    weights: list[Tensor]  # as the op takes them
    slopes: list[float]
    scale: float | None
    output: Output

    @property
    def dtype(self) -> torch.dtype:
        return self.weights[0].dtype

    def contexts(self, value: Tensor) -> Tensor:
        """u `[B, Y, K]`, of value `[B, V, K]`."""
        if self.up.dim() == 1:
            return (self.up[:, None] * value).to(self.dtype)
        return F.linear(value.mT.to(self.up.dtype), self.up).mT.to(self.dtype)

    def with_classifier(self, weight: Tensor, bias: Tensor | None) -> FoldedBlock:
        """That gives logits, by `[L, O]` and `[L]`."""
        exact = self.up.new_zeros(len(weight)) if bias is None else bias.to(self.up.dtype)
        return self._replace(weights=[*self.weights, weight.to(self.dtype).contiguous(), exact], output="logits")

    def run(self, feats: Tensor, key: Tensor, value: Tensor, backend: Backend | None = None) -> Tensor:
        """What `ocr_block` gives, without its checks, of feats and key in `dtype`; outside of autocast."""
        scale = key.shape[1] ** -0.5 if self.scale is None else self.scale
        arguments = key, self.contexts(value), self.weights, scale, self.slopes, self.output
        is_compiled = left_to_compiler(feats, backend) and 0 not in feats.shape
        if is_compiled and (self.output == "features" or feats.dim() != 4):
            return reference.infer_whole(feats, *arguments)
        if is_compiled:  # and what comes out is small: Inductor's convolutions have made pixels channels last
            feats = feats.contiguous(memory_format=torch.channels_last)
        chosen = resolve_backend(feats.device, backend, implemented(feats.device.type))
        out: Tensor = ocr_block_inference_op(feats, *arguments, chosen)
        return out.contiguous() if is_compiled else out


def fold_block(
    pixel: Sequence[Layer], up: Layer | None, fusing: Layer, classifier: Classifier | None = None,
    *, output: Output = "features", scale: float | None = None, context_first: bool = True, dtype: torch.dtype,
) -> FoldedBlock:  # fmt: skip
    """The layers that `ocr_block` takes, all of whose statistics are known, folded for pixels of a dtype."""
    layers = _named(pixel, up, fusing)
    exact = torch.promote_types(dtype, torch.float32)
    matrix: Any = fusing.weight
    channels = pixel[0].weight.shape[1]  # type: ignore[union-attr]  # `up` alone may have none
    sizes = [matrix.shape[1] - channels, channels]  # Y, C
    folded = {name: _fold(layer, sizes[0], matrix, exact) for name, layer in layers.items() if layer is not None}
    up_matrix, up_bias = folded.pop("up")
    both, bias = folded.pop("fusing")
    on_context, on_pixels = both.split(sizes, 1) if context_first else both.split(sizes[::-1], 1)[::-1]
    weights = [*itertools.chain(*folded.values()), up_bias, on_context, on_pixels, bias]
    weights = [weight.to(exact if weight.dim() == 1 else dtype).contiguous() for weight in weights]
    slopes = [1.0 if layer is None else float(layer.slope) for layer in layers.values()]
    result = FoldedBlock(up_matrix.to(exact), weights, slopes, scale, "features")
    if output == "features":
        return result
    if classifier is None:
        raise ValueError(f"output {output!r} needs a classifier, but there is none")
    return result.with_classifier(*classifier)._replace(output=output)


def _fold(layer: Layer, contexts: int, like: Tensor, exact: torch.dtype) -> tuple[Tensor, Tensor]:
    """A matrix, or what each channel is multiplied by, and a bias, of a layer whose statistics are known."""
    if layer.norm is None and layer.weight is not None:
        return layer.weight, like.new_zeros(len(layer.weight), dtype=exact) if layer.bias is None else layer.bias
    gain, shift = (each.to(exact) for each in _gain_and_shift(layer, contexts, like))
    return (gain if layer.weight is None else gain[:, None] * layer.weight.to(exact)), shift


def _named(pixel: Sequence[Layer], up: Layer | None, fusing: Layer) -> dict[str, Layer | None]:
    """The layers by what messages call them; `up` is always one."""
    if not isinstance(pixel, (list, tuple)) or isinstance(pixel, Layer):
        raise TypeError(f"pixel must be a list or tuple of one Layer or two, but is {type(pixel).__name__}")
    if len(pixel) not in (1, 2):
        raise ValueError(f"pixel must be of one Layer or two, but is of {len(pixel)}")
    up = Layer(None, slope=1.0) if up is None else up
    layers: dict[str, Any] = {"pixel[0]": pixel[0], "pixel[1]": pixel[-1], "up": up, "fusing": fusing}
    for name, layer in layers.items():
        if not isinstance(layer, Layer):
            wanted = "a Layer or None" if name == "up" else "a Layer"
            raise TypeError(f"{name} must be {wanted}, but is {type(layer).__name__}")
        if layer.norm is not None and not isinstance(layer.norm, Norm):
            hint = "; Norm.of(norm) makes one" if isinstance(layer.norm, nn.Module) else ""
            raise TypeError(f"{name}.norm must be a Norm or None, but is {type(layer.norm).__name__}{hint}")
    if len(pixel) == 1:
        layers["pixel[1]"] = None
    return layers


def _gain_and_shift(layer: Layer, contexts: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer multiplies its normalised product by, and adds: all of a norm whose statistics are known.

    `contexts` is Y, and `like` has the dtype and the device of the matrices.
    """
    norm, bias = layer.norm, layer.bias
    channels = contexts if layer.weight is None else layer.weight.shape[0]
    options: Any = {"dtype": statistics_dtype(like)}
    gain, shift = (norm.weight, norm.bias) if norm is not None else (None, bias)
    gain = like.new_ones(channels, **options) if gain is None else gain
    shift = like.new_zeros(channels, **options) if shift is None else shift
    if norm is None:
        return gain, shift
    if norm.training or norm.running_mean is None or norm.running_var is None:
        return gain, shift if bias is None else shift + 0 * bias  # which the mean takes out
    exact = torch.promote_types(norm.running_var.dtype, torch.float32)
    gain = gain.to(exact) * (norm.running_var.to(exact) + norm.eps).rsqrt()
    mean = norm.running_mean.to(exact, copy=True)  # a pass in training may change it before the backward pass
    return gain, shift - gain * (mean if bias is None else mean - bias)


# Private, as all such calls are; where it is gone each is one of its own.
_lerp_all: Any = getattr(torch, "_foreach_lerp_", None)


@torch.no_grad()
def _update(found: Sequence[tuple[Layer | None, Tensor, Tensor]], *, runs: bool) -> None:
    """Count a batch, and let statistics run, of layers with their means and unbiased variances."""
    running, now = [], []
    momenta: list[Any] = []
    for layer, mean, var in found:
        norm = None if layer is None else layer.norm
        if norm is None or not norm.training:
            continue
        momentum, tracked = norm.momentum, norm.num_batches_tracked
        if tracked is not None:
            tracked.add_(1)
            momentum = 1.0 / float(tracked) if momentum is None else momentum
        if norm.running_mean is None or norm.running_var is None or not runs:
            continue
        running += [norm.running_mean, norm.running_var]
        now += [mean if layer.bias is None else mean + layer.bias, var]  # type: ignore[union-attr]
        momenta += [momentum] * 2
    is_plain = not is_in_transform() and not torch.compiler.is_compiling() and type(found[0][1]) is Tensor
    have_dtypes = [each.dtype for each in running] == [each.dtype for each in now]
    are_alike = len(set(momenta)) == 1 and len({*map(id, running)}) == len(running)  # no layers share a norm
    if is_plain and have_dtypes and are_alike and _lerp_all is not None:  # one launch
        _lerp_all(running, now, momenta[0])
        return
    for statistic, mean_or_var, momentum in zip(running, now, momenta, strict=True):
        value = mean_or_var.to(statistic.dtype)
        if not is_in_transform():
            statistic.lerp_(value, momentum)
            continue
        known, new = _unwrapped(statistic), _unwrapped(value)
        if known is not None and new is not None and _lerp_all is not None:  # which may change what was captured
            _lerp_all([known], [new], momentum)
        else:  # of a vmap, where `lerp_` warns that it is slow
            statistic.copy_(statistic.lerp(value, momentum))


def _unwrapped(tensor: Tensor) -> Tensor | None:
    """What the transforms of torch.func have wrapped; None where one is a vmap, or where a compiler hides them."""
    if torch.compiler.is_compiling():
        return None
    inner = torch.func.debug_unwrap(tensor, recurse=False)
    if inner is tensor:
        return tensor
    return _unwrapped(inner) if inner.shape == tensor.shape else None  # a vmap's has a dimension more


def _check(
    feats: Tensor, key: Tensor, value: Tensor, layers: dict[str, Layer | None], scale: Any, mask: Any
) -> dict[str, int]:
    """The sizes, by letter. At each call, so names and messages are made where something is wrong."""
    check_tensors(feats=feats, key=key, value=value)
    check_dtype("feats", feats)
    maps, keys, values = feats.shape, key.shape, value.shape
    check_shape("feats", feats, "[B, C, *S] with C >= 1", len(maps) >= 3 and maps[1] >= 1)
    batched = len(keys) == 3 and keys[0] == maps[0]
    check_shape("key", key, "[B, D, K] with the B of feats and K >= 1", batched and 0 not in keys[1:])
    batched = len(values) == 3 and values[::2] == keys[::2]
    check_shape("value", value, "[B, V, K] with the B and the K of key", batched and values[1] >= 1)
    _check_as(feats, key, "key")
    _check_as(feats, value, "value")
    sizes = {"C": maps[1], "D": keys[1], "V": values[1]}
    for (name, layer), axes in zip(layers.items(), ("DC", "DD", "YV", "OI"), strict=True):
        if name == "fusing":
            sizes["I"] = sizes["Y"] + sizes["C"]
        if layer is not None:
            _check_layer(name, layer, axes, sizes, feats)
    if scale is not None and not isinstance(scale, Real):
        raise TypeError(f"scale must be a number or None, but is {type(scale).__name__}")
    if mask is not None:
        check_tensors(mask=mask)
        check_shape("mask", mask, "[B, O]", tuple(mask.shape) == (maps[0], sizes["O"]))
        check_dtype("mask", mask, statistics_dtype(feats))
        check_device("mask", mask, "feats", feats)
        if mask.requires_grad and torch.is_grad_enabled():
            raise ValueError("mask must not require grad, for it gets none; multiply z by it instead")
    return sizes


def _check_output(output: str, classifier: Any, sizes: dict[str, int], feats: Tensor) -> None:
    if output not in ("features", "logits", "classes"):
        raise ValueError(f"output must be 'features', 'logits' or 'classes', but is {output!r}")
    if classifier is None:
        if output != "features":
            raise ValueError(f"output {output!r} needs a classifier, but there is none")
        return
    if not isinstance(classifier, tuple) or len(classifier) != 2:
        raise TypeError("classifier must be a weight and a bias or None, in a tuple")
    weight, bias = classifier
    _check_layer("classifier", Layer(weight, bias, slope=1.0), "LO", sizes, feats)


def _check_as(feats: Tensor, tensor: Tensor, *name: str) -> None:
    """`name` is in parts, which nobody joins where all is well."""
    if tensor.dtype == feats.dtype and tensor.device == feats.device and tensor.layout == torch.strided:
        return
    whole = "".join(name)
    check_device(whole, tensor, "feats", feats)
    check_dtype(whole, tensor)
    casts = is_autocast_on(feats.device.type)
    if not casts or torch.float64 in (tensor.dtype, feats.dtype):  # which autocast leaves as it is
        check_same_dtype(whole, tensor, "feats", feats)
    if tensor.layout != torch.strided:
        raise TypeError(f"{whole} must be dense, but is {tensor.layout}")


_VECTORS = ("bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")


def _check_layer(name: str, layer: Layer, axes: str, sizes: dict[str, int], feats: Tensor) -> None:
    """`sizes` are those known so far."""
    weight, bias, norm, slope = layer
    if name == "up" and weight is None:
        sizes["Y"] = sizes["V"]
    else:
        if not isinstance(weight, Tensor):
            raise TypeError(f"{name}.weight must be a tensor, but is {type(weight).__name__}")
        shape = weight.shape
        if len(shape) == 2 and shape[0] >= 1:
            sizes.setdefault(axes[0], shape[0])
        if tuple(shape) != (sizes.get(axes[0]), sizes.get(axes[1])):
            wanted = ", ".join(str(sizes.get(axis, axis)) for axis in axes)
            check_shape(f"{name}.weight", weight, f"[{wanted}]", False)
        _check_as(feats, weight, name, ".weight")
    if not isinstance(slope, (int, float)) or not abs(slope) < math.inf:
        raise TypeError(f"{name}.slope must be a finite number, but is {slope!r}")
    channels, device = sizes[axes[0]], feats.device
    vectors = (bias,) if norm is None else (bias, *norm[:4])
    for i, vector in enumerate(vectors):
        if vector is not None and not (
            isinstance(vector, Tensor)
            and tuple(vector.shape) == (channels,)
            and vector.dtype in DTYPES
            and vector.device == device
            and vector.layout == torch.strided
        ):
            _refuse_vector(f"{name}.{_VECTORS[i]}", vector, channels, feats)
    if norm is not None:
        _check_norm(name, norm)


def _refuse_vector(name: str, vector: Tensor, channels: int, feats: Tensor) -> None:
    check_tensors(**{name: vector})
    check_shape(name, vector, f"[{channels}]", tuple(vector.shape) == (channels,))
    check_dtype(name, vector)
    check_device(name, vector, "feats", feats)
    raise TypeError(f"{name} must be dense, but is {vector.layout}")


def _check_norm(name: str, norm: Norm) -> None:
    """What of a norm is no tensor."""
    runs = norm.running_mean is not None
    if runs != (norm.running_var is not None):
        given = "running_mean" if runs else "running_var"
        raise ValueError(f"{name}.norm must have running_mean and running_var, or neither, but has {given} alone")
    if not isinstance(norm.eps, (float, Real)):
        raise TypeError(f"{name}.norm.eps must be a number, but is {type(norm.eps).__name__}")
    if not norm.eps >= 0:
        raise ValueError(f"{name}.norm.eps must be >= 0, but is {norm.eps}")
    tracked, momentum = norm.num_batches_tracked, norm.momentum
    if tracked is not None and not (isinstance(tracked, Tensor) and tracked.numel() == 1):
        found = f"has shape {tuple(tracked.shape)}" if isinstance(tracked, Tensor) else f"is {type(tracked).__name__}"
        raise TypeError(f"{name}.norm.num_batches_tracked must be a tensor of one element or None, but {found}")
    if norm.group is not None and not hasattr(norm.group, "group_name"):
        raise TypeError(f"{name}.norm.group must be a process group or None, but is {type(norm.group).__name__}")
    if not runs or not norm.training:
        return
    if not isinstance(momentum, (float, Real)) and (momentum is not None or tracked is None):
        raise TypeError(f"{name}.norm.momentum must be a number, but is {type(momentum).__name__}")
    for which in ("running_mean", "running_var"):
        if 0 in getattr(norm, which).stride() and getattr(norm, which).numel() > 1:
            raise ValueError(f"{name}.norm.{which} must have memory for each channel, but is expanded")
