"""The block on CPUs: products are PyTorch's and oneDNN's, and what is done between them is one pass of csrc/block."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ocr_kernels.block import reference
from ocr_kernels.block.passes import Passes
from ocr_kernels.core import libraries
from ocr_kernels.core.activations import activate_

_ops: Any = libraries.ops()


@functools.cache
def onednn_linear() -> Any:
    """oneDNN's activation(x w' + bias), of contiguous x and w; None where PyTorch's own products are as fast.

    In float32 those are MKL's, which takes a tenth to a third longer with AVX-512 on AMD's processors. The op is what
    Inductor makes of linear layers; nothing public calls it. What is not contiguous would take it a thousand times as
    long.
    """
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    linear: Any = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)
    schema = str(getattr(linear, "_schema", ""))
    if "(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm)" not in schema:
        return None  # another PyTorch's
    return lambda x, w, bias=None, activation="none": linear(x, w, bias, activation, [], "")


SMALL = 2**15
"""Elements of a tile up to which PyTorch's own products are faster, which are called at a fifth of oneDNN's cost."""


class Compiled(Passes):
    def __init__(self, maps: Tensor) -> None:
        super().__init__(maps)
        self.is_small: bool = self.pixels * maps.shape[1] <= SMALL

    def product(self, name: str, matrix: Tensor, tile: Tensor) -> Tensor:
        linear = self._linear(tile)
        if linear is None:
            return super().product(name, matrix, tile)
        rows, matrix = self._rows(tile), matrix.contiguous()
        return linear(rows, matrix).t() if self.is_channels_last else linear(matrix, rows.t())  # type: ignore[no-any-return]

    def multiply(self, matrix: Tensor, tile: Tensor, out: Tensor, *, accumulate: bool = False) -> Tensor:
        if self._linear(tile) is None:
            return super().multiply(matrix, tile, out, accumulate=accumulate)
        made = self.product("product", matrix, tile)
        return out.add_(made) if accumulate else out.copy_(made)

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        linear = None if self.is_channels_last else self._linear(left)
        return super().outer(left, right) if linear is None else linear(self._rows(left), self._rows(right))

    def layer(self, name: str, weight: Tensor, bias: Tensor, tile: Tensor, slope: float) -> Tensor:
        made = self._linear_layer(weight, bias, tile, slope)
        return super().layer(name, weight, bias, tile, slope) if made is None else made

    def layer_into(self, out: Tensor, weight: Tensor, bias: Tensor, tile: Tensor, slope: float) -> Tensor:
        if self.is_small:
            return super().layer_into(out, weight, bias, tile, slope)
        made = self._linear_layer(weight, bias, tile, slope)
        if made is not None:
            return out.copy_(made)
        is_new = self._linear(tile) is not None  # memory that oneDNN's product brings
        made = self.product("", weight, tile) if is_new else self.multiply(weight, tile, out)
        ones = torch.ones_like(bias, dtype=self.exact)
        return self.activate(made, torch.stack((ones, bias.to(self.exact), ones)), slope, out)

    def _linear_layer(self, weight: Tensor, bias: Tensor, tile: Tensor, slope: float) -> Tensor | None:
        """In memory that oneDNN's product brings, where that takes bias and activation too."""
        linear = onednn_linear() if self.is_channels_last and not self.is_small else None
        if linear is None or tile.dtype not in (torch.float32, torch.bfloat16):
            return None
        made = linear(self._rows(tile), weight.contiguous(), bias, "none" if slope else "relu").t()
        return activate_(made, slope) if slope else made

    def _linear(self, tile: Tensor) -> Any:
        return None if self.is_small or tile.dtype != torch.float32 else onednn_linear()

    def _rows(self, tile: Tensor) -> Tensor:
        """Pixels or channels, as memory has them, with nothing between them."""
        return (tile.t() if self.is_channels_last else tile).contiguous()

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
        if vectors.shape[0] == 7:
            _ops.block_through(out, grad, h, vectors, slope)
        else:  # infinite h are multiplied by nothing
            factor, offset, mask, a = vectors
            self.gradient(grad, h, torch.stack((factor, offset, mask * a, offset)), slope, out)
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
