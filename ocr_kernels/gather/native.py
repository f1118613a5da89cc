"""The spatial gather's compiled kernels, csrc/gather.

Tensors are read in place where their pixels lie at one stride, as they do in contiguous and channels last ones; others
are copied over there.
"""

from __future__ import annotations

from torch import Tensor

from ocr_kernels import native

_forward = native.ops().gather_forward.default
_backward = native.ops().gather_backward.default


def forward(out: Tensor, stats: Tensor, feats: Tensor, logits: Tensor, scale: float) -> None:
    """Fill `out` [B, C, K] and the softmax's row maxima and sums, `stats` [B, 2, K]."""
    _forward(out, stats, feats, logits, scale)


def backward(
    dfeats: Tensor | None,
    dlogits: Tensor | None,
    grad: Tensor,
    feats: Tensor,
    logits: Tensor,
    out: Tensor,
    stats: Tensor,
    scale: float,
) -> None:
    """Fill the gradients that are wanted, in their own strides."""
    _backward(dfeats, dlogits, grad, feats, logits, out, stats, scale)
