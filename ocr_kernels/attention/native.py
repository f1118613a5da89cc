"""The attention's compiled kernels, csrc/attention.

Tensors are read in place where their pixels lie at one stride, as they do in contiguous and channels last ones; others
are copied over there.
"""

from __future__ import annotations

from torch import Tensor

from ocr_kernels import native

_forward = native.ops().attention_forward.default
_backward = native.ops().attention_backward.default


def forward(out: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
    """Fill `out` [B, Dv, *S], in its own strides."""
    _forward(out, query, key, value, scale)


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
    """Fill the gradients that are wanted, in their own strides."""
    _backward(dquery, dkey, dvalue, grad, query, key, value, scale)
