"""The block on CPUs: products are PyTorch's, and what is done between them is one compiled pass, csrc/block."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from ocr_kernels.block import reference
from ocr_kernels.block.passes import Passes
from ocr_kernels.core import libraries

_ops: Any = libraries.ops()


class Compiled(Passes):
    def activate(self, h: Tensor, vectors: Tensor, slope: float, out: Tensor) -> Tensor:
        _ops.block_activate(out, h, vectors, slope)
        return out

    def moments(self, h: Tensor) -> Tensor:
        out = h.new_empty((2, len(h)), dtype=self.exact)
        _ops.block_moments(out, h)
        return out

    def gradient(self, grad: Tensor, h: Tensor, vectors: Tensor, slope: float, out: Tensor | None = None) -> Tensor:
        sums = h.new_empty((2, len(h)), dtype=self.exact)
        _ops.block_gradient(out, sums, grad, h, vectors, slope)
        return sums

    def through(self, grad: Tensor, h: Tensor, vectors: Tensor, slope: float, out: Tensor) -> Tensor:
        _ops.block_through(out, grad, h, vectors, slope)
        return out

    def softmax(self, scores: Tensor, out: Tensor) -> Tensor:
        _ops.block_softmax(out, scores)
        return out

    def softmax_backward(self, weights: Tensor, dweights: Tensor, matrix: Tensor, scale: float, out: Tensor) -> Tensor:
        _ops.block_softmax_backward(out, weights, dweights, matrix, scale)
        return out


forward = functools.partial(reference.forward, kind=Compiled)
backward = functools.partial(reference.backward, kind=Compiled)
infer = functools.partial(reference.infer, kind=Compiled)
