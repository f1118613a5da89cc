"""The definition of the folded head in plain PyTorch, for one tile of pixels after the other.

The tiles keep maps with C channels out of memory, but for a copy of an image's contiguous feats on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ocr_kernels.core.activations import activate_
from ocr_kernels.core.layout import in_format


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
    on_cpu = feats.device.type == "cpu"
    tile = 2048 if on_cpu else 32768
    for image in range(feats.shape[0]):
        pixels = feats[image].flatten(1).t()  # [N, C]
        pixels = pixels.contiguous() if on_cpu else pixels  # a whole matrix is turned several times as fast as a part
        result = out[image].view(-1) if output == "classes" else out[image].flatten(1).t()
        k, u = key[image].t().contiguous(), context_regions[image].contiguous()
        for start in range(0, pixels.shape[0], tile):
            part = ocr_head(pixels[start : start + tile].contiguous(), k, u, weights, scale, slopes)
            result[start : start + tile] = part.argmax(1) if output == "classes" else part


def whole(
    feats: Tensor,
    key: Tensor,
    context_regions: Tensor,
    weights: Sequence[Tensor],
    scale: float,
    slopes: Sequence[float],
    output: str,
) -> Tensor:
    """What `forward` fills `out` with, of all pixels at once: for a compiler, which fuses what is not a product.

    Contexts are made channels last and enter one convolution beside the pixels: convolutions are laid out so anyway.
    """
    layers, (up_bias, on_context, on_pixels, bias, *classifier) = split_weights(weights)
    batch, _, *spatial = feats.shape
    dtype = feats.dtype
    query = feats
    for (weight, layer_bias), slope in zip(layers, slopes, strict=False):
        query = activate_(convolved(query, weight, layer_bias), slope).to(dtype)  # [B, D, *S]
    scores = scale * torch.matmul(query.flatten(2).transpose(1, 2), key).float()  # [B, N, K]
    attention = F.softmax(scores, dim=2).to(dtype)
    context = torch.matmul(attention, context_regions.transpose(1, 2)) + up_bias  # y, [B, N, Y]
    context = activate_(context, slopes[2]).to(dtype)
    context = context.view(batch, *spatial, context.shape[2]).movedim(-1, 1)
    both, fusing = torch.cat((context, feats), 1), torch.cat((on_context, on_pixels), 1)
    out = activate_(convolved(both, fusing, bias), slopes[3])
    if classifier:
        out = convolved(out.to(dtype), *classifier)
    if output == "classes":
        return out.argmax(1)
    return in_format(out.to(dtype), feats)


def convolved(feats: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """W x + b of `[B, channels, *S]` in the dtype of b."""
    ones = (1,) * (feats.dim() - 2)
    convolution = (F.conv1d, F.conv2d, F.conv3d)[feats.dim() - 3]
    fused = bias if bias is not None and bias.dtype == feats.dtype else None
    out = convolution(feats, weight.view(*weight.shape, *ones), fused)
    return out if bias is None or bias is fused else out + bias.view(-1, *ones)
