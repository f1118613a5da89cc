"""The public call: `ocr_block`, and the layers that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ocr_kernels.block.registration import IMPLEMENTED, ocr_block_op
from ocr_kernels.core.arguments import check_device, check_dtype, check_same_dtype, check_shape, check_tensors
from ocr_kernels.core.backends import resolve_backend
from ocr_kernels.core.layout import pixels, statistics_dtype


class Norm(NamedTuple):
    """BatchNorm, with what `torch.nn.functional.batch_norm` takes; statistics that run are updated as it does."""

    weight: Tensor | None = None  # [channels]
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    training: bool = True  # whether statistics are the batch's
    momentum: float = 0.1
    eps: float = 1e-5


class Layer(NamedTuple):
    """A 1x1 convolution, a norm or none, and an activation: x where it is positive, slope * x elsewhere."""

    weight: Tensor  # [outputs, inputs]
    bias: Tensor | None = None
    norm: Norm | None = None
    slope: float = 0.0  # 0 is ReLU, 1 no activation


def ocr_block(
    feats: Tensor,
    key: Tensor,
    value: Tensor,
    pixel: Sequence[Layer],
    up: Layer | None,
    fusing: Layer,
    *,
    scale: float | None = None,
    context_first: bool = True,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Step 4 in training: augmented representations z of every pixel (Eqs. 3, 5 and 6), as one op with a derivative.

    .. math:: z_i = \rho(G [y_i, x_i]), \qquad y_i = \rho(W_{up} \sum_k w_{ik} v_k), \qquad
              w_{ik} = \mathrm{softmax}_k(s \, \phi(x_i)^T key_k)

    The softmax runs **over regions**; :math:`\rho` is a norm and an activation. Saved for backward are feats, the
    products of the layers of phi, the weights w `[B, K, *S]` and one map of z's channels; neither y nor anything that a
    norm or an activation made.

    Args:
        feats: pixel representations x, `[B, C, *S]`, any number of spatial dimensions.
        key: transformed regions psi(f), `[B, D, K]`, any K >= 1.
        value: transformed regions delta(f), `[B, V, K]`.
        pixel: phi, one layer or two, `[D, C]` and `[D, D]`.
        up: rho, `[Y, V]`; `None` where contexts are the weighted values themselves, and Y is V.
        fusing: g, `[O, Y + C]`.
        scale: factor on the scores; `None` means `D ** -0.5`.
        context_first: whether g takes `[y, x]`, or `[x, y]`.
        mask: what z is multiplied by, `[B, O]`, as Dropout2d does; float32, or float64 for float64.
        backend: `"reference"`; `None` chooses (see `ocr_kernels.use_backend`).

    Returns:
        z, `[B, O, *S]`, in the dtype and the memory format (contiguous or channels last) of `feats`. Sums and
        statistics are float32, or float64 for float64.

    Under autocast feats, key, value and the matrices are cast to the autocast dtype. Forward and backward are bitwise
    reproducible.

    Raises:
        TypeError: an argument is no tensor, or the dtypes differ or are others.
        ValueError: shapes or devices do not match, a size other than B and S is 0, there is one pixel where a norm
            takes the statistics of the batch, or `backend` is unknown.
        RuntimeError: the backend asked for cannot run here; the message says why.
    """
    layers = _named(pixel, up, fusing)
    _check(feats, key, value, layers, scale, mask)
    count = feats.shape[0] * pixels(feats.shape)
    exact = statistics_dtype(feats)
    vectors, eps, slopes = [], [], []
    for name, layer in layers.items():
        takes_statistics = layer is not None and layer.norm is not None and _is_batch(layer.norm)
        if takes_statistics and count == 1:
            raise ValueError(f"{name}.norm takes the statistics of a batch that has one pixel; call it in eval mode")
        if layer is None:  # rho of the values themselves, or no second layer of phi
            ones = feats.new_ones(value.shape[1] if name == "up" else 0, dtype=exact)
            gain, shift = ones, 0 * ones
        else:
            gain, shift = _gain_and_shift(layer)
        vectors += [gain.to(exact), shift.to(exact)]
        eps.append(layer.norm.eps if layer is not None and layer.norm is not None and takes_statistics else -1.0)
        slopes.append(1.0 if layer is None else float(layer.slope))
    with torch.autocast(feats.device.type, enabled=False):  # few numbers, of which all of y is made
        contexts = value.to(exact)  # u, [B, Y, K]
        contexts = contexts if up is None else torch.matmul(up.weight.to(exact), contexts)
    none = feats.new_empty(0, dtype=exact)
    second = pixel[1].weight if len(pixel) == 2 else feats.new_empty(0)
    scale = key.shape[1] ** -0.5 if scale is None else float(scale)
    chosen = resolve_backend(feats.device, backend, IMPLEMENTED)
    z, *_, statistics = ocr_block_op(
        feats, key, pixel[0].weight, second, fusing.weight, contexts, *vectors, none if mask is None else mask,
        scale, slopes, eps, context_first, chosen,
    )  # fmt: skip
    if count:
        known = statistics.detach().split([len(vector) for vector in vectors])
        for layer, mean, var in zip(layers.values(), known[::2], known[1::2], strict=True):
            if layer is not None:
                _update(layer, mean, var, count)
    out: Tensor = z
    return out


def _named(pixel: Sequence[Layer], up: Layer | None, fusing: Layer) -> dict[str, Layer | None]:
    """The layers by what messages call them."""
    if not isinstance(pixel, (list, tuple)) or isinstance(pixel, Layer) or len(pixel) not in (1, 2):
        raise ValueError("pixel must be one layer or two, in a sequence")
    second = pixel[1] if len(pixel) == 2 else None
    return {"pixel[0]": pixel[0], "pixel[1]": second, "up": up, "fusing": fusing}


def _is_batch(norm: Norm) -> bool:
    return norm.training or norm.running_mean is None


def _gain_and_shift(layer: Layer) -> tuple[Tensor, Tensor]:
    """What a layer multiplies its normalised product by, and adds: all of a norm whose statistics are known."""
    ones = torch.ones(len(layer.weight), device=layer.weight.device)
    bias = torch.zeros_like(ones) if layer.bias is None else layer.bias
    norm = layer.norm
    if norm is None:
        return ones, bias
    gain = ones if norm.weight is None else norm.weight
    shift = torch.zeros_like(ones) if norm.bias is None else norm.bias
    if norm.training or norm.running_mean is None or norm.running_var is None:
        return gain, shift if layer.bias is None else shift + 0 * layer.bias  # which the mean takes out
    exact = torch.promote_types(norm.running_var.dtype, torch.float32)
    gain = gain.to(exact) * (norm.running_var.to(exact) + norm.eps).rsqrt()
    return gain, shift + gain * (bias - norm.running_mean)


@torch.no_grad()
def _update(layer: Layer, mean: Tensor, var: Tensor, count: int) -> None:
    """Let statistics run."""
    norm = layer.norm
    if norm is None or not norm.training or norm.running_mean is None or norm.running_var is None:
        return
    mean = mean if layer.bias is None else mean + layer.bias
    for running, now in ((norm.running_mean, mean), (norm.running_var, var * (count / (count - 1)))):
        running.lerp_(now.to(running.dtype), norm.momentum)


def _check(feats: Tensor, key: Tensor, value: Tensor, layers: dict[str, Layer | None], scale: Any, mask: Any) -> None:
    check_tensors(feats=feats, key=key, value=value)
    check_dtype("feats", feats)
    check_shape("feats", feats, "[B, C, *S] with C >= 1", feats.dim() >= 3 and feats.shape[1] >= 1)
    batched = key.dim() == 3 and key.shape[0] == feats.shape[0]
    check_shape("key", key, "[B, D, K] with the B of feats and K >= 1", batched and 0 not in key.shape[1:])
    batched = value.dim() == 3 and value.shape[::2] == key.shape[::2]
    check_shape("value", value, "[B, V, K] with the B and the K of key", batched and value.shape[1] >= 1)
    _check_as("key", key, feats)
    _check_as("value", value, feats)
    sizes = {"C": feats.shape[1], "D": key.shape[1], "V": value.shape[1]}
    for (name, layer), axes in zip(layers.items(), ("DC", "DD", "YV", "OI"), strict=True):
        if name == "fusing":
            sizes["I"] = sizes.setdefault("Y", sizes["V"]) + sizes["C"]
        if layer is not None:
            _check_layer(name, layer, axes, sizes, feats)
    if scale is not None and not isinstance(scale, Real):
        raise TypeError(f"scale must be a number or None, but is {type(scale).__name__}")
    if mask is not None:
        check_tensors(mask=mask)
        check_shape("mask", mask, "[B, O]", tuple(mask.shape) == (feats.shape[0], sizes["O"]))
        check_dtype("mask", mask, statistics_dtype(feats))
        check_device("mask", mask, "feats", feats)


def _check_as(name: str, tensor: Tensor, feats: Tensor) -> None:
    check_device(name, tensor, "feats", feats)
    if not torch.is_autocast_enabled(feats.device.type):
        check_same_dtype(name, tensor, "feats", feats)


def _check_layer(name: str, layer: Layer, axes: str, sizes: dict[str, int], feats: Tensor) -> None:
    """`sizes` are those known so far."""
    check_tensors(**{f"{name}.weight": layer.weight})
    shape = layer.weight.shape
    if len(shape) == 2 and shape[0] >= 1:
        sizes.setdefault(axes[0], shape[0])
    if tuple(shape) != tuple(sizes.get(axis) for axis in axes):
        wanted = ", ".join(str(sizes.get(axis, axis)) for axis in axes)
        check_shape(f"{name}.weight", layer.weight, f"[{wanted}]", False)
    _check_as(f"{name}.weight", layer.weight, feats)
    if not isinstance(layer.slope, (int, float)) or not layer.slope >= 0:
        raise ValueError(f"{name}.slope must be a number >= 0, but is {layer.slope!r}")
    norm = layer.norm or Norm()
    vectors = {"bias": layer.bias, "norm.weight": norm.weight, "norm.bias": norm.bias}
    vectors |= {"norm.running_mean": norm.running_mean, "norm.running_var": norm.running_var}
    for kind, vector in vectors.items():
        if vector is not None:
            check_tensors(**{f"{name}.{kind}": vector})
            if tuple(vector.shape) != (shape[0],):
                check_shape(f"{name}.{kind}", vector, f"[{shape[0]}]", False)
            check_device(f"{name}.{kind}", vector, "feats", feats)
