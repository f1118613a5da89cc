"""The definition of pixel-region attention in plain PyTorch, and its backward pass written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ocr_kernels.core.layout import statistics_dtype


def pixel_region_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """y_i = sum_k softmax_k(scale * q_i . k_k) v_k  (Eqs. 3 and 5): the softmax runs over regions."""
    scale = query.shape[1] ** -0.5 if scale is None else scale
    scores = scale * torch.matmul(query.flatten(2).transpose(1, 2), key)  # [B, N, K]
    context = torch.matmul(F.softmax(scores, dim=2), value.transpose(1, 2))  # [B, N, Dv]
    return context.transpose(1, 2).reshape(*value.shape[:2], *query.shape[2:])  # [B, Dv, *S]


def forward(out: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
    """Fill `out` [B, Dv, *S]."""
    dtype = statistics_dtype(query)
    out.copy_(pixel_region_attention(query.to(dtype), key.to(dtype), value.to(dtype), scale))


def backward(
    dquery: Tensor | None,
    dkey: Tensor | None,
    dvalue: Tensor | None,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
) -> None:
    """Fill the gradients that are wanted.

    dV = dY w^T,  dS = w * (dw - sum_k w dw) with dw = V^T dY,  dQ = scale * K dS,  dK = scale * Q dS^T.
    """
    dtype = statistics_dtype(query)
    q, k, v, g = (t.to(dtype) for t in (query.flatten(2), key, value, grad.flatten(2)))
    weights = F.softmax(scale * torch.matmul(q.transpose(1, 2), k), dim=2)  # [B, N, K]
    if dvalue is not None:
        dvalue.copy_(torch.matmul(g, weights))
    if dquery is None and dkey is None:
        return
    dweights = torch.matmul(g.transpose(1, 2), v)  # [B, N, K]
    dscores = scale * weights * (dweights - (weights * dweights).sum(2, keepdim=True))
    if dquery is not None:
        dquery.copy_(torch.matmul(k, dscores.transpose(1, 2)).view(query.shape))
    if dkey is not None:
        dkey.copy_(torch.matmul(q, dscores))
