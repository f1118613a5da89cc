"""The definition of the folded head in plain PyTorch, for one tile of pixels after the other.

The tiles keep maps with C channels out of memory, but for copies of contiguous feats and z on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ocr_kernels.core.layout import is_channels_last


def ocr_head(pixels: Tensor, key: Tensor, context_regions: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """z of T pixels `[T, C]` as `[T, O]`, or the classifier's logits `[T, L]`, with key `[K, D]` and u `[C, K]`.

    q_i = phi(x_i),  w_i = softmax_k(D^-1/2 q_i . key_k),  y_i = ReLU(sum_k w_ik u_k + b)  (Eqs. 3, 5),
    z_i = ReLU(G_y y_i + G_x x_i + g)  (Eq. 6)

    Products are rounded to the dtype of the pixels, as PyTorch does; biases are added in float32.
    """
    pixel_in, pixel_in_bias, pixel_out, pixel_out_bias, up_bias, on_context, on_pixels, bias, *classifier = weights
    dtype = pixels.dtype
    hidden = _linear(pixels, pixel_in, pixel_in_bias).relu_().to(dtype)  # [T, D]
    query = _linear(hidden, pixel_out, pixel_out_bias).relu_().to(dtype)
    scores = key.shape[1] ** -0.5 * _linear(query, key).float()  # [T, K]
    attention = F.softmax(scores, dim=1).to(dtype)
    context = _linear(attention, context_regions, up_bias).relu_().to(dtype)  # y, [T, C]
    out = _linear(pixels, on_pixels, bias).add_(_linear(context, on_context)).relu_()  # z, [T, O]
    return _linear(out.to(dtype), *classifier) if classifier else out


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
    out: Tensor, feats: Tensor, key: Tensor, context_regions: Tensor, weights: Sequence[Tensor], output: str
) -> None:
    """Fill `out`: z `[B, O, *S]`, logits `[B, L, *S]` or classes `[B, *S]`."""
    on_cpu = feats.device.type == "cpu"
    tile = 2048 if on_cpu else 32768
    for image in range(feats.shape[0]):
        pixels = feats[image].flatten(1).t()  # [N, C]
        target = out[image].view(-1) if output == "classes" else out[image].flatten(1).t()
        result = target
        if on_cpu:  # PyTorch turns a whole matrix several times as fast as a part of one
            pixels = pixels.contiguous()
            result = target if target.is_contiguous() else target.new_empty(target.shape)
        k, u = key[image].t().contiguous(), context_regions[image].contiguous()
        for start in range(0, pixels.shape[0], tile):
            part = ocr_head(pixels[start : start + tile].contiguous(), k, u, weights)
            result[start : start + tile] = part.argmax(1) if output == "classes" else part
        if result is not target:
            target.t().copy_(result.t())


def whole(feats: Tensor, key: Tensor, context_regions: Tensor, weights: Sequence[Tensor], output: str) -> Tensor:
    """What `forward` fills `out` with, of all pixels at once: for a compiler, which fuses what is not a product.

    Contexts are made channels last and enter one convolution beside the pixels: convolutions are laid out so anyway.
    """
    pixel_in, pixel_in_bias, pixel_out, pixel_out_bias, up_bias, on_context, on_pixels, bias, *classifier = weights
    batch, channels, *spatial = feats.shape
    hidden = F.relu(_convolved(feats, pixel_in, pixel_in_bias)).to(feats.dtype)  # [B, D, *S]
    query = F.relu(_convolved(hidden, pixel_out, pixel_out_bias)).to(feats.dtype)
    scores = key.shape[1] ** -0.5 * torch.matmul(query.flatten(2).transpose(1, 2), key).float()  # [B, N, K]
    attention = F.softmax(scores, dim=2).to(feats.dtype)
    context = F.relu(torch.matmul(attention, context_regions.transpose(1, 2)) + up_bias).to(feats.dtype)  # y, [B, N, C]
    context = context.view(batch, *spatial, channels).movedim(-1, 1)
    both, fusing = torch.cat((context, feats), 1), torch.cat((on_context, on_pixels), 1)
    out = F.relu(_convolved(both, fusing, bias))
    if classifier:
        out = _convolved(out.to(feats.dtype), *classifier)
    if output == "classes":
        return out.argmax(1)
    out = out.to(feats.dtype)
    return out.movedim(1, -1).contiguous().movedim(-1, 1) if is_channels_last(feats) else out.contiguous()


def _convolved(feats: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """W x + b of `[B, channels, *S]` in the dtype of b."""
    ones = (1,) * (feats.dim() - 2)
    convolution = (F.conv1d, F.conv2d, F.conv3d)[feats.dim() - 3]
    return convolution(feats, weight.view(*weight.shape, *ones)) + bias.view(-1, *ones)
