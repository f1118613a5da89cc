"""The definition of the spatial gather in plain PyTorch, and its backward pass written out."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ocr_kernels.core.layout import statistics_dtype


def spatial_gather(feats: Tensor, logits: Tensor, scale: float = 1.0) -> Tensor:
    """f_k = sum_i softmax_i(scale * M_ki) x_i  (Eq. 4): the softmax runs over pixels."""
    x = feats.flatten(2)  # [B, C, N]
    weights = F.softmax(scale * logits.flatten(2), dim=2)  # [B, K, N]
    return torch.matmul(x, weights.to(x.dtype).transpose(1, 2))  # [B, C, K]


def gather_and_statistics(feats: Tensor, logits: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """f [B, C, K], and [B, C + 2, K]: f before it is rounded to the feats' dtype, the softmax's maxima and its sums.

    Only where all logits are -inf is a sum 0: of NaN it is NaN.
    """
    dtype = statistics_dtype(feats, logits)
    x, scores = feats.flatten(2).to(dtype), scale * logits.flatten(2).to(dtype)
    maximum = scores.amax(2)
    total = (scores - maximum.masked_fill(maximum == -math.inf, 0).unsqueeze(2)).exp().sum(2)
    unrounded = spatial_gather(x, scores)
    return unrounded.to(feats.dtype), torch.cat((unrounded, maximum.unsqueeze(1), total.unsqueeze(1)), dim=1)


def forward(out: Tensor, stats: Tensor, feats: Tensor, logits: Tensor, scale: float) -> None:
    """Fill `out` and `stats`."""
    for target, result in zip((out, stats), gather_and_statistics(feats, logits, scale), strict=True):
        target.copy_(result)


def backward(
    dfeats: Tensor | None,
    dlogits: Tensor | None,
    grad: Tensor,
    feats: Tensor,
    logits: Tensor,
    stats: Tensor,
    scale: float,
) -> None:
    """Fill the gradients that are wanted.

    dX = dF P,  dM = scale * P * (dP - delta) with dP = dF^T X,  P recomputed from the saved statistics. The kernels
    have delta = sum_c dF F; where all of dP is at hand, sum_i P dP is the same, with the errors of the same products.
    """
    dtype = stats.dtype
    maximum, total = stats[:, -2:].unsqueeze(3).unbind(1)  # [B, K, 1] each
    weights = (scale * logits.flatten(2).to(dtype) - maximum).exp() / total  # [B, K, N]
    g = grad.to(dtype)  # [B, C, K]
    if dfeats is not None:
        dfeats.copy_(torch.matmul(g, weights).view(feats.shape))
    if dlogits is not None:
        dweights = torch.matmul(g.transpose(1, 2), feats.flatten(2).to(dtype))  # [B, K, N]
        delta = (weights * dweights).sum(2, keepdim=True)
        dlogits.copy_((scale * weights * (dweights - delta)).view(logits.shape))
