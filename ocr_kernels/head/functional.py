"""The public call: `ocr_head`, and the weights that it takes."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ocr_kernels.core.activations import activate_
from ocr_kernels.core.arguments import check_device, check_shape, check_tensors
from ocr_kernels.core.backends import left_to_compiler, resolve_backend
from ocr_kernels.head import reference
from ocr_kernels.head.registration import ocr_head_op

Output = Literal["features", "logits", "classes"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMPLEMENTED = ("reference", "triton")


class Slopes(NamedTuple):
    """Each layer's activation: x where it is positive, slope * x elsewhere. 0 is ReLU, 1 none, 0.01 LeakyReLU."""

    pixel_in: float = 0.0
    pixel_out: float = 0.0
    object_in: float = 0.0
    object_out: float = 0.0
    down: float = 0.0
    up: float = 0.0
    fusing: float = 0.0  # z's


class HeadWeights(NamedTuple):
    """The 1x1 convolutions of step 4, and the classifier's, with BatchNorm in eval mode folded in.

    C, D, V, Y, O and L are the channels of pixels, of keys, of values, of contexts y, of z, and of the classifier.
    Matrices have the dtype of the pixels, biases are float32; all are contiguous. phi and psi have one layer where
    `pixel_out` and `object_out` are None; contexts are rho of the values themselves where `up` is None (then Y is V).
    """

    pixel_in: Tensor  # phi, [D, C]
    pixel_in_bias: Tensor  # [D]
    pixel_out: Tensor | None  # [D, D]
    pixel_out_bias: Tensor | None  # [D]
    object_in: Tensor | None  # psi, [D, C]; psi and delta are None where regions come as key and value
    object_in_bias: Tensor | None  # [D]
    object_out: Tensor | None  # [D, D]
    object_out_bias: Tensor | None  # [D]
    down: Tensor | None  # delta, [V, C]
    down_bias: Tensor | None  # [V]
    up: Tensor | None  # rho, [Y, V]
    up_bias: Tensor  # [Y]
    context: Tensor  # the half of g that takes y, [O, Y]
    pixels: Tensor  # the half of g that takes x, [O, C]
    bias: Tensor  # [O]
    classes: Tensor | None = None  # [L, O]
    classes_bias: Tensor | None = None  # [L]
    slopes: Slopes = Slopes()
    scale: float | None = None  # of the scores; None means D**-0.5


def ocr_head(
    feats: Tensor,
    regions: Tensor | tuple[Tensor, Tensor],
    weights: HeadWeights,
    output: Output = "features",
    *,
    backend: str | None = None,
) -> Tensor:
    r"""Augmented representations z of every pixel (Eqs. 3, 5 and 6), or what the classifier makes of them.

    .. math:: z_i = \rho(G_y y_i + G_x x_i + g), \qquad y_i = \rho(\sum_k w_{ik} u_k + b), \qquad
              w_{ik} = \mathrm{softmax}_k(s \, \phi(x_i)^T \psi(f_k)), \qquad u_k = W_{up} \delta(f_k)

    The softmax runs **over regions**; :math:`\rho` is ReLU, or what `weights.slopes` says. For inference alone:
    there is no derivative.

    Args:
        feats: pixel representations x, `[B, C, *S]`, any number of spatial dimensions.
        regions: region representations f, `[B, C, K]`, as `spatial_gather` returns them, any K >= 1; or key
            :math:`\psi(f)`, `[B, D, K]`, and value :math:`\delta(f)`, `[B, V, K]`, that something else made of them.
        weights: the folded weights, on the device of `feats`.
        output: `"features"` for z, `"logits"` for the classifier's result, `"classes"` for its argmax.
        backend: `"reference"` or `"triton"`; `None` chooses (see `ocr_kernels.use_backend`).

    Returns:
        z, `[B, O, *S]`, or logits, `[B, L, *S]`, in the dtype and the memory format (contiguous or channels last) of
        `feats`; or classes, int64 `[B, *S]`. float32, bfloat16 and float16 are accepted; softmax statistics are
        float32.

    Under autocast feats, regions and matrices are cast to the autocast dtype.

    Raises:
        TypeError: an argument is no tensor, or the dtypes differ or are others.
        ValueError: shapes or devices do not match, a size other than B and S is 0, a weight is not contiguous, one
            is there that `regions` leaves no use for or is missing, the weights have no classifier where `output`
            needs one, or `output` or `backend` is unknown.
        RuntimeError: grad mode is on and an argument requires grad (`ocr_kernels.modules.SpatialOCR` is the module to
            train), or the backend asked for cannot run here; the message says why.
    """
    named: dict[str, Any] = {"regions": regions}
    if isinstance(regions, tuple) and len(regions) == 2:
        named = {"key": regions[0], "value": regions[1]}
    check_tensors(feats=feats, **named)
    if torch.is_autocast_enabled(feats.device.type):
        dtype = torch.get_autocast_dtype(feats.device.type)
        feats, named = feats.to(dtype), {name: tensor.to(dtype) for name, tensor in named.items()}
        cast = (w.to(dtype) if isinstance(w, Tensor) and w.dim() == 2 else w for w in weights)
        weights = HeadWeights(*cast)  # type: ignore[arg-type]  # what is no tensor stays
    _check(feats, named, weights, output)
    slopes = weights.slopes
    if "key" in named:
        key, value = (tensor.transpose(1, 2) for tensor in named.values())  # [B, K, D], [B, K, V]
    else:
        columns = named["regions"].transpose(1, 2)  # [B, K, C]
        key = _layer(columns, weights.object_in, weights.object_in_bias, slopes.object_in)
        if weights.object_out is not None:
            key = _layer(key, weights.object_out, weights.object_out_bias, slopes.object_out)
        value = _layer(columns, weights.down, weights.down_bias, slopes.down)
    context_regions = value if weights.up is None else F.linear(value, weights.up)  # u, [B, K, Y]
    second = [] if weights.pixel_out is None else [weights.pixel_out, weights.pixel_out_bias]
    arguments: list[Any] = [
        weights.pixel_in,
        weights.pixel_in_bias,
        *second,
        weights.up_bias,
        weights.context,
        weights.pixels,
        weights.bias,
    ]
    if output != "features":
        arguments += [weights.classes, weights.classes_bias]
    scale = key.shape[2] ** -0.5 if weights.scale is None else float(weights.scale)
    used = [float(slope) for slope in (slopes.pixel_in, slopes.pixel_out, slopes.up, slopes.fusing)]
    columns = key.transpose(1, 2), context_regions.transpose(1, 2)
    if left_to_compiler(feats, backend) and _is_image(feats) and not _wants_grad(feats, *columns, *arguments):
        return reference.whole(feats, *columns, arguments, scale, used, output)
    chosen = resolve_backend(feats.device, backend, IMPLEMENTED)
    out: Tensor = ocr_head_op(feats, *columns, arguments, scale, used, output, chosen)
    return out


def _is_image(feats: Tensor) -> bool:
    """Whether a convolution of PyTorch's takes it."""
    return 3 <= feats.dim() <= 5 and 0 not in feats.shape


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _layer(columns: Tensor, weight: Any, bias: Any, slope: float) -> Tensor:
    """rho(W f + b) of regions `[B, K, channels]`."""
    return activate_(F.linear(columns, weight) + bias, slope).to(columns.dtype)


def _check(feats: Tensor, regions: dict[str, Tensor], weights: HeadWeights, output: str) -> None:
    if feats.dtype not in DTYPES:
        raise TypeError(f"feats must be float32, bfloat16 or float16, but is {feats.dtype}")
    check_shape("feats", feats, "[B, C, *S] with C >= 1", feats.dim() >= 3 and feats.shape[1] >= 1)
    sizes = {"C": feats.shape[1]}  # the others are what the first tensor that has them says
    for name, tensor in regions.items():
        letter = {"regions": "C", "key": "D", "value": "V"}[name]
        axes = f"[B, {letter}, K]"
        batched = tensor.dim() == 3 and tensor.shape[0] == feats.shape[0]
        channels, count = tensor.shape[1:] if batched else (0, 0)
        right = channels == sizes.setdefault(letter, channels) >= 1 and count == sizes.setdefault("K", count) >= 1
        check_shape(name, tensor, f"{axes} with K >= 1 beside feats {tuple(feats.shape)}", right)
        if tensor.dtype != feats.dtype:
            raise TypeError(f"{name} must have the dtype of feats, {feats.dtype}, but has {tensor.dtype}")
        check_device(name, tensor, "feats", feats)
    if output not in ("features", "logits", "classes"):
        raise ValueError(f"output must be 'features', 'logits' or 'classes', but is {output!r}")
    if output != "features" and (weights.classes is None or weights.classes_bias is None):
        raise ValueError(f"output {output!r} needs weights.classes and weights.classes_bias, but there are none")
    _check_weights(weights, feats, sizes, "key" in regions)


def _check_weights(weights: HeadWeights, feats: Tensor, sizes: dict[str, int], pair: bool) -> None:
    """`sizes` are those known so far."""
    absent = {"up": ""} if weights.up is None else {}
    if pair:
        absent |= dict.fromkeys(_REGION_LAYERS, "beside regions that are key and value")
    for name in ("pixel_out", "object_out", "classes"):
        if getattr(weights, name) is None:
            absent |= dict.fromkeys((name, f"{name}_bias"), f"where weights.{name} is")
    for name, layout in _LAYOUTS.items():
        weight = getattr(weights, name)
        if name in absent:
            if weight is not None:
                raise ValueError(f"weights.{name} must be None {absent[name]}")
            continue
        if weights.up is None:
            layout = layout.replace("Y", "V")
        check_tensors(**{f"weights.{name}": weight})
        for letter, size in zip(layout, weight.shape, strict=False):
            sizes.setdefault(letter, size)
        expected = tuple(sizes.get(letter) for letter in layout)
        if tuple(weight.shape) != expected or 0 in expected:
            raise ValueError(
                f"weights.{name} must have shape [{', '.join(layout)}] with sizes >= 1, here "
                f"{list(expected)}, but has {tuple(weight.shape)}"
            )
        dtype = torch.float32 if len(layout) == 1 else feats.dtype
        if weight.dtype != dtype:
            raise TypeError(f"weights.{name} must be {dtype} beside feats of {feats.dtype}, but is {weight.dtype}")
        check_device(f"weights.{name}", weight, "feats", feats)
        if not weight.is_contiguous():
            raise ValueError(f"weights.{name} must be contiguous, but has strides {weight.stride()}")


_REGION_LAYERS = ("object_in", "object_in_bias", "object_out", "object_out_bias", "down", "down_bias")
_LAYOUTS = dict(
    zip(HeadWeights._fields, "DC D DD D DC D DD D VC V YV Y OY OC O LO L".split(), strict=False)  # noqa: SIM905 (shorter)
)
