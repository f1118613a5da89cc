"""The public call: `ocr_head`, and the weights that it takes."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ocr_kernels.core.arguments import check_device, check_shape, check_tensors
from ocr_kernels.core.backends import left_to_compiler, resolve_backend
from ocr_kernels.head import reference
from ocr_kernels.head.registration import ocr_head_op

Output = Literal["features", "logits", "classes"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMPLEMENTED = ("reference", "triton")


class HeadWeights(NamedTuple):
    """The 1x1 convolutions of step 4, and the classifier's, with BatchNorm in eval mode folded in.

    C, D, O and L are the channels of pixels, of keys, of z, and of the classifier. Matrices have the dtype of the
    pixels, biases are float32; all are contiguous.
    """

    pixel_in: Tensor  # phi, [D, C]
    pixel_in_bias: Tensor  # [D]
    pixel_out: Tensor  # [D, D]
    pixel_out_bias: Tensor  # [D]
    object_in: Tensor  # psi, [D, C]
    object_in_bias: Tensor  # [D]
    object_out: Tensor  # [D, D]
    object_out_bias: Tensor  # [D]
    down: Tensor  # delta, [D, C]
    down_bias: Tensor  # [D]
    up: Tensor  # rho, [C, D]
    up_bias: Tensor  # [C]
    context: Tensor  # the half of g that takes y, [O, C]
    pixels: Tensor  # the half of g that takes x, [O, C]
    bias: Tensor  # [O]
    classes: Tensor | None = None  # [L, O]
    classes_bias: Tensor | None = None  # [L]


def ocr_head(
    feats: Tensor, regions: Tensor, weights: HeadWeights, output: Output = "features", *, backend: str | None = None
) -> Tensor:
    r"""Augmented representations z of every pixel (Eqs. 3, 5 and 6), or what the classifier makes of them.

    .. math:: z_i = \rho(G_y y_i + G_x x_i + g), \qquad y_i = \rho(\sum_k w_{ik} u_k + b), \qquad
              w_{ik} = \mathrm{softmax}_k(D^{-1/2} \phi(x_i)^T \psi(f_k)), \qquad u_k = W_{up} \delta(f_k)

    The softmax runs **over regions**. For inference alone: there is no derivative.

    Args:
        feats: pixel representations x, `[B, C, *S]`, any number of spatial dimensions.
        regions: region representations f, `[B, C, K]`, as `spatial_gather` returns them; any K >= 1.
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
        ValueError: shapes or devices do not match, a size other than B and S is 0, a weight is not contiguous, the
            weights have no classifier where `output` needs one, or `output` or `backend` is unknown.
        RuntimeError: grad mode is on and an argument requires grad (`ocr_kernels.modules.SpatialOCR` is the module to
            train), or the backend asked for cannot run here; the message says why.
    """
    check_tensors(feats=feats, regions=regions)
    if torch.is_autocast_enabled(feats.device.type):
        dtype = torch.get_autocast_dtype(feats.device.type)
        feats, regions = feats.to(dtype), regions.to(dtype)
        cast = (w.to(dtype) if isinstance(w, Tensor) and w.dim() == 2 else w for w in weights)
        weights = HeadWeights(*cast)  # type: ignore[arg-type]  # None stays where it was
    _check(feats, regions, weights, output)
    columns = regions.transpose(1, 2)  # [B, K, C]
    key = _layer(columns, weights.object_in, weights.object_in_bias)  # [B, K, D]
    key = _layer(key, weights.object_out, weights.object_out_bias)
    value = _layer(columns, weights.down, weights.down_bias)  # [B, K, D]
    context_regions = F.linear(value, weights.up)  # u, [B, K, C]
    arguments = [
        weights.pixel_in,
        weights.pixel_in_bias,
        weights.pixel_out,
        weights.pixel_out_bias,
        weights.up_bias,
        weights.context,
        weights.pixels,
        weights.bias,
    ]
    if output != "features":
        arguments += [weights.classes, weights.classes_bias]  # type: ignore[list-item]  # `_check` saw to it
    if left_to_compiler(feats.device, backend) and _is_image(feats) and not _wants_grad(feats, regions, *weights):
        return reference.whole(feats, key.transpose(1, 2), context_regions.transpose(1, 2), arguments, output)
    out: Tensor = ocr_head_op(
        feats,
        key.transpose(1, 2),
        context_regions.transpose(1, 2),
        arguments,
        output,
        resolve_backend(feats.device, backend, IMPLEMENTED),
    )
    return out


def _is_image(feats: Tensor) -> bool:
    """Whether a convolution of PyTorch's takes it."""
    return 3 <= feats.dim() <= 5 and 0 not in feats.shape


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _layer(columns: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """ReLU(W f + b) of regions `[B, K, channels]`."""
    return F.relu(F.linear(columns, weight) + bias).to(columns.dtype)


def _check(feats: Tensor, regions: Tensor, weights: HeadWeights, output: str) -> None:
    if feats.dtype not in DTYPES:
        raise TypeError(f"feats must be float32, bfloat16 or float16, but is {feats.dtype}")
    check_shape("feats", feats, "[B, C, *S] with C >= 1", feats.dim() >= 3 and feats.shape[1] >= 1)
    check_shape(
        "regions",
        regions,
        f"[B, C, K] with K >= 1 beside feats {tuple(feats.shape)}",
        regions.dim() == 3 and regions.shape[:2] == feats.shape[:2] and regions.shape[2] >= 1,
    )
    if regions.dtype != feats.dtype:
        raise TypeError(f"regions must have the dtype of feats, {feats.dtype}, but has {regions.dtype}")
    check_device("regions", regions, "feats", feats)
    if output not in ("features", "logits", "classes"):
        raise ValueError(f"output must be 'features', 'logits' or 'classes', but is {output!r}")
    if output != "features" and (weights.classes is None or weights.classes_bias is None):
        raise ValueError(f"output {output!r} needs weights.classes and weights.classes_bias, but there are none")
    _check_weights(weights, feats)


def _check_weights(weights: HeadWeights, feats: Tensor) -> None:
    sizes = {"C": feats.shape[1]}  # D, O and L are what the first weight that has them says
    for name, weight in zip(weights._fields, weights, strict=True):
        if weight is None and name in ("classes", "classes_bias"):
            continue
        check_tensors(**{f"weights.{name}": weight})
        assert weight is not None  # for mypy; `check_tensors` saw to it
        layout = _LAYOUTS[name]
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


_LAYOUTS = dict(
    zip(HeadWeights._fields, "DC D DD D DC D DD D DC D CD C OC OC O LO L".split(), strict=True)  # noqa: SIM905 (shorter)
)
