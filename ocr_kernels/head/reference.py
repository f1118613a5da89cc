"""The definition of the folded head in plain PyTorch, for one tile of pixels after the other.

The tiles keep maps with C channels out of memory; on a CPU they stay in its caches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def ocr_head(
    pixels: Tensor,
    key: Tensor,
    context_regions: Tensor,
    weights: Sequence[Tensor],
    scale: float,
    slopes: Sequence[float],
) -> Tensor:
    """z of T pixels `[T, C]` as `[T, O]`, or the classifier's logits `[T, L]`, with key `[K, D]` and u `[Y, K]`.

    q_i = phi(x_i),  w_i = softmax_k(scale * q_i . key_k),  y_i = rho(sum_k w_ik u_k + b)  (Eqs. 3, 5),
    z_i = rho(G_y y_i + G_x x_i + g)  (Eq. 6)

    Products are rounded to the dtype of the pixels, as PyTorch does; biases are added in float32.
    """
    layers, (up_bias, on_context, on_pixels, bias, *classifier) = split_weights(weights)
    dtype = pixels.dtype
    query = pixels
    for (weight, layer_bias), slope in zip(layers, slopes, strict=False):
        query = activate_(_linear(query, weight, layer_bias), slope).to(dtype)  # [T, D]
    scores = scale * _linear(query, key).float()  # [T, K]
    attention = F.softmax(scores, dim=1).to(dtype)
    context = activate_(_linear(attention, context_regions, up_bias), slopes[2]).to(dtype)  # y, [T, Y]
    out = activate_(_linear(pixels, on_pixels, bias).add_(_linear(context, on_context)), slopes[3])  # z, [T, O]
    return _linear(out.to(dtype), *classifier) if classifier else out


def split_weights(weights: Sequence[Tensor]) -> tuple[list[tuple[Tensor, Tensor]], Sequence[Tensor]]:
    """The layers of phi, one or two, and the rest: both kinds of bias are vectors, so the third weight tells."""
    layers = 1 if weights[2].dim() == 1 else 2
    return [(weights[2 * i], weights[2 * i + 1]) for i in range(layers)], weights[2 * layers :]


def activate_(x: Tensor, slope: float) -> Tensor:
    """x where it is positive, slope * x elsewhere, in place. NaN stays."""
    if slope == 1:
        return x
    return F.leaky_relu_(x, slope) if slope else x.relu_()


def _linear(pixels: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """W x + b of `[T, channels]`: with a bias in its dtype, else in that of the pixels.

    A convolution of channels in last place is oneDNN's fastest product of float32 on a CPU.
    """
    fused = bias if pixels.dtype == torch.float32 else None
    if pixels.device.type == "cpu":
        image = pixels.reshape(1, 1, *pixels.shape).permute(0, 3, 1, 2)  # [1, channels, 1, T]
        out = F.conv2d(image, weight[:, :, None, None], fused)[0, :, 0].t()
    else:
        out = F.linear(pixels, weight, fused)
    return out if bias is None or bias is fused else out + bias


def forward(
    out: Tensor,
    feats: Tensor,
    key: Tensor,
    context_regions: Tensor,
    weights: Sequence[Tensor],
    scale: float,
    slopes: Sequence[float],
    output: str,
) -> None:
    """Fill `out`: z `[B, O, *S]`, logits `[B, L, *S]` or classes `[B, *S]`."""
    tile = 1024 if feats.device.type == "cpu" else 32768
    for image in range(feats.shape[0]):
        pixels = feats[image].flatten(1).t()  # [N, C]
        result = out[image].view(-1) if output == "classes" else out[image].flatten(1).t()
        k, u = key[image].t().contiguous(), context_regions[image].contiguous()
        for start in range(0, pixels.shape[0], tile):
            part = ocr_head(pixels[start : start + tile].contiguous(), k, u, weights, scale, slopes)
            result[start : start + tile] = part.argmax(1) if output == "classes" else part
