"""Tiles of pixels, their products, and what is done between two of them, in plain PyTorch; `native` has others.

A tile is `[channels, T]` of one image, in the memory format of the maps `[B, channels, N]`. `vectors` are rows
`[n, channels]` in the dtype of statistics, as `Norm.vectors` makes them; the slope is that of the activation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ocr_kernels.core.activations import activate_
from ocr_kernels.core.layout import is_channels_last, statistics_dtype

aten: Any = torch.ops.aten

TILE = 2**22
"""Bytes of feats at a time on a CPU, whose cache then holds what is between two products."""


def maps_of(feats: Tensor) -> Tensor:
    """`[B, C, N]`, in one of two memory formats."""
    return (feats if is_channels_last(feats) else feats.contiguous()).flatten(2)


def empty_maps(like: Tensor, channels: int, dtype: torch.dtype | None = None, *sizes: int) -> Tensor:
    """`[B, channels, N]` in the memory format of `like`, `[B, C, N]`; `sizes` are another B and N."""
    batch, pixels = sizes or like.shape[::2]
    if not like.is_contiguous():
        return like.new_empty((batch, pixels, channels), dtype=dtype).transpose(1, 2)
    return like.new_empty((batch, channels, pixels), dtype=dtype)


def activation_backward_(grad: Tensor, activated: Tensor, slope: float) -> Tensor:
    """In place; the slope is no less than 0, so `activated` is positive where the activation was taken of such."""
    if slope == 1:
        return grad
    if slope:
        return aten.leaky_relu_backward.grad_input(grad, activated, slope, False, grad_input=grad)  # type: ignore[no-any-return]
    return aten.threshold_backward.grad_input(grad, activated, 0, grad_input=grad)  # type: ignore[no-any-return]


class Passes:
    """Which pixels make a tile, memory for what is made of one, the same for each, and what is done to it."""

    def __init__(self, maps: Tensor) -> None:
        self.maps = maps
        self.is_channels_last: bool = not maps.is_contiguous()
        pixels = (TILE if maps.is_cpu else 32 * TILE) // (maps.shape[1] * maps.element_size())
        self.pixels: int = max(1, min(pixels, maps.shape[2]))
        self.exact: torch.dtype = statistics_dtype(maps)
        self.memory: dict[tuple[str, int, torch.dtype], Tensor] = {}

    def of(self, *maps: Tensor) -> Iterator[tuple[Any, ...]]:
        """The tiles of maps `[B, channels, N]`: the number of the image, and a tile of each map."""
        pixels = maps[0].shape[2]
        for image, whole in enumerate(zip(*map(Tensor.unbind, maps), strict=True)):
            for start in range(0, pixels, self.pixels):
                length = min(self.pixels, pixels - start)
                yield image, *(whole if length == pixels else (each.narrow(1, start, length) for each in whole))

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """`[channels, pixels]`, for as long as no other tile goes by that name."""
        channels, pixels = shape
        found = self.memory.get((name, channels, dtype))
        if found is None:
            found = self.memory[name, channels, dtype] = empty_maps(self.maps, channels, dtype, 1, self.pixels)[0]
        return found if pixels == self.pixels else found[:, :pixels]

    def product(self, name: str, matrix: Tensor, tile: Tensor) -> Tensor:
        """matrix @ tile, of one dtype, in memory that may be that of other tiles of that name."""
        return torch.mm(matrix, tile, out=self.empty(name, (matrix.shape[0], tile.shape[1]), tile.dtype))

    def multiply(self, matrix: Tensor, tile: Tensor, out: Tensor, *, accumulate: bool = False) -> Tensor:
        """Fill `out`, a part of a map in any dtype, with the product, or add it to that."""
        if out.dtype == matrix.dtype:
            return torch.addmm(out, matrix, tile, beta=int(accumulate), out=out)
        made = self.product("product", matrix, tile)
        return out.add_(made) if accumulate else out.copy_(made)

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """left @ right', the sum over pixels of their outer products."""
        return left @ right.t()

    def layer(self, name: str, weight: Tensor, bias: Tensor, tile: Tensor, slope: float) -> Tensor:
        """activation(W tile + bias), in memory that may be that of other tiles of that name."""
        out = self.empty(name, (weight.shape[0], tile.shape[1]), tile.dtype)
        return self.layer_into(out, weight, bias, tile, slope)

    def layer_into(self, out: Tensor, weight: Tensor, bias: Tensor, tile: Tensor, slope: float) -> Tensor:
        """The same in `out`, which may be part of a map; the bias may be in the dtype of statistics."""
        return activate_(torch.addmm(bias[:, None].to(out.dtype), weight, tile, out=out), slope)

    def activate(self, h: Tensor, vectors: Tensor, slope: float, out: Tensor) -> Tensor:
        """out = activation(factor * h + offset) * mask"""
        factor, offset, mask = vectors.unsqueeze(2)
        exact = out if out.dtype == self.exact else self._spare(h)
        activate_(torch.mul(h, factor, out=exact).add_(offset), slope).mul_(mask)
        return out if exact is out else out.copy_(exact)

    def moments(self, h: Tensor) -> Tensor:
        """Means over pixels, and sums of squares about them, `[2, channels]`."""
        mean = h.mean(1, keepdim=True, dtype=self.exact)
        return torch.stack((mean[:, 0], torch.sub(h, mean, out=self._spare(h)).square_().sum(1)))

    def gradient(self, grad: Tensor, h: Tensor, vectors: Tensor, slope: float, out: Tensor | None = None) -> Tensor:
        """Sums over pixels of d and of d * (h - mean), `[2, channels]`; `out` is filled with d.

        d = grad * mask, through the activation of factor * h + offset.
        """
        *taken, mean = vectors.unsqueeze(2)
        d = self._through_activation(grad, h, slope, *taken)
        if out is not None:
            out.copy_(d)
        return torch.stack((d.sum(1), d.mul_(torch.sub(h, mean, out=self._spare(h, "h"))).sum(1)))

    def through(self, grad: Tensor, h: Tensor, vectors: Tensor, slope: float, out: Tensor) -> Tensor:
        """out = a * d + b * (h - mean) + c, the gradient of h, with the same d; without the last three, a * d alone."""
        taken, (a, *affine) = vectors[:3].unsqueeze(2), vectors[3:].unsqueeze(2)
        d = self._through_activation(grad, h, slope, *taken).mul_(a)
        if affine:
            b, c, mean = affine  # means may be large: b * h and what makes up for it would not be exact
            d.addcmul_(torch.sub(h, mean, out=self._spare(h, "h")), b).add_(c)
        return out.copy_(d)

    def softmax(self, scores: Tensor, out: Tensor) -> Tensor:
        """Over regions."""
        scores = scores.to(self.exact)
        weights = (scores - scores.amax(0, keepdim=True)).exp_()  # PyTorch's own adds up a dimension less exactly
        return out.copy_(weights.div_(weights.sum(0, keepdim=True)))

    def softmax_backward(self, weights: Tensor, dweights: Tensor, matrix: Tensor, scale: float, out: Tensor) -> Tensor:
        """out = scale * w * (dw - sum_k w dw), where dw is dweights + M w + m, and `[M, m]` the matrix `[K, K + 1]`."""
        w = weights.to(self.exact)
        dw = torch.addmm(matrix[:, -1:], matrix[:, :-1], w).add_(dweights)
        dw -= dw.gather(0, w.argmax(0, keepdim=True))  # a peak's gradient is then what is left, not rounding
        return out.copy_(dw.sub_((w * dw).sum(0, keepdim=True)).mul_(w).mul_(scale))

    def _through_activation(
        self, grad: Tensor, h: Tensor, slope: float, factor: Tensor, offset: Tensor, mask: Tensor
    ) -> Tensor:
        d = torch.mul(grad, mask, out=self._spare(h))
        return activation_backward_(d, torch.mul(h, factor, out=self._spare(h, "h")).add_(offset), slope)

    def _spare(self, like: Tensor, name: str = "exact") -> Tensor:
        return self.empty(name, like.shape, self.exact)
