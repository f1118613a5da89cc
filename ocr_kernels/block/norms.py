"""What the block's norms do to channels: statistics, what follows from them, and the sums of the backward pass.

All that is here is as small as the channels and regions are; pixels are the backends' own. Vectors are `[channels, 1]`,
in the dtype of statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from ocr_kernels.block.passes import Passes
from ocr_kernels.core.collectives import process_group


class Layer(NamedTuple):
    """A norm and an activation: rho(gain * (h - mean) / sqrt(var + eps) + shift), mean and var over all pixels of h.

    Where eps is negative there is no mean and no var: rho(gain * h + shift).
    """

    gain: Tensor  # [channels]
    shift: Tensor
    slope: float  # of rho: 0 is ReLU, 1 none
    eps: float
    group: str  # the processes that share statistics; empty: this one alone

    @property
    def has_statistics(self) -> bool:
        return self.eps >= 0


class Settings(NamedTuple):
    """What is no tensor; one entry for each of phi's two layers, rho, and z's."""

    scale: float  # of the scores
    slopes: Sequence[float]
    eps: Sequence[float]
    groups: Sequence[str]
    context_first: bool  # of what the fusing product takes

    def layers(self, vectors: Sequence[Tensor]) -> list[Layer]:
        settings = self.slopes, self.eps, self.groups
        return [Layer(*each) for each in zip(vectors[::2], vectors[1::2], *settings, strict=True)]


class Norm(NamedTuple):
    """A layer and its statistics: it makes factor * h + offset of h."""

    layer: Layer
    mean: Tensor
    var: Tensor  # unbiased, as statistics that run take it
    rstd: Tensor
    factor: Tensor
    offset: Tensor
    pixels: Tensor | int = 1  # that the statistics are of

    @classmethod
    def of(
        cls, layer: Layer, mean: Tensor | None = None, squares: Tensor | None = None, pixels: Tensor | int = 1
    ) -> Norm:
        """Of a layer's mean and sum of squares about it; one that has no statistics takes none."""
        gain, shift = layer.gain[:, None], layer.shift[:, None]
        if mean is None or squares is None or not layer.has_statistics:
            ones = torch.ones_like(gain)
            return cls(layer, torch.zeros_like(gain), ones, ones, gain, shift, pixels)
        rstd = (squares / pixels + layer.eps).rsqrt()
        factor, var = gain * rstd, squares / others_of(pixels)
        return cls(layer, mean, var, rstd, factor, torch.addcmul(shift, mean, factor, value=-1), pixels)

    def vectors(self, mask: Tensor | None = None, *more: Tensor) -> Tensor:
        """What passes over tiles take, `[3 + len(more), channels]`: factor, offset, what follows is multiplied by."""
        mask = torch.ones_like(self.factor) if mask is None else mask[:, None]
        return torch.cat((self.factor, self.offset, mask, *more), 1).t().contiguous()

    def of_images(self, masks: Tensor, images: int, *more: Tensor) -> list[Tensor]:
        """The vectors for each image; masks are `[B, channels]`, or have no elements."""
        if len(masks):
            return [self.vectors(mask, *more) for mask in masks]
        return [self.vectors(None, *more)] * images


def others_of(pixels: Tensor | int) -> Tensor | int:
    """How many there are besides one; 1 where there is only one, whose squares are 0."""
    return (pixels - 1).clamp(min=1) if isinstance(pixels, Tensor) else max(pixels - 1, 1)


def split_statistics(layers: Sequence[Layer], statistics: Tensor) -> list[Norm]:
    """The norms that `statistics_of` has put into one vector."""
    *vectors, counts = statistics.split([*(5 * layer.gain.shape[0] for layer in layers), len(layers)])
    norms = []
    for layer, each, count in zip(layers, vectors, counts, strict=True):
        mean, var, rstd, factor, offset = each.view(5, -1, 1).unbind()
        norms.append(Norm(layer, mean, var, rstd, factor, offset, count))
    return norms


def statistics_of(norms: Sequence[Norm]) -> Tensor:
    """What `split_statistics` takes: the five vectors of each layer, and the counts."""
    vectors = [vector for norm in norms for vector in norm[1:6]]
    counts = [norm.pixels for norm in norms]
    if len(set(counts)) == 1 and isinstance(counts[0], int):
        return torch.cat([*vectors, vectors[0].new_full((len(counts), 1), counts[0])]).flatten()
    return torch.cat([*vectors, *(_on_device(count, vectors[0]).view(1, 1) for count in counts)]).flatten()


def _on_device(count: Tensor | int, like: Tensor) -> Tensor:
    """Nothing waits for the device: it fills what a number is, and copies nothing."""
    return count if isinstance(count, Tensor) else like.new_full((1,), count)


class Moments:
    """Means, and sums of squares about them, of parts that are added one after the other."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.count: Tensor | int | None = None  # until a part is added
        self.mean: Tensor
        self.squares: Tensor

    def add_tile(self, h: Tensor, tiles: Passes) -> None:
        if self.layer.has_statistics:
            mean, squares = tiles.moments(h).unsqueeze(2)
            self.add(h.shape[1], mean, squares)

    def add(self, count: Tensor | int, mean: Tensor, squares: Tensor) -> None:
        if self.count is None:
            self.count, self.mean, self.squares = count, mean, squares
            return
        total, difference = self.count + count, mean - self.mean
        self.squares = self.squares + squares + difference.square() * (self.count * count / total)
        self.mean = self.mean + difference * (count / total)
        self.count = total

    def add_all(self, counts: Tensor, means: Tensor, squares: Tensor) -> None:
        """Parts `[parts, channels, 1]`, and how many pixels `[parts, 1, 1]` each has, some perhaps none."""
        total = counts.sum(0)
        mean = (counts * means).sum(0) / total
        self.add(total, mean, (squares + counts * (means - mean).square()).sum(0))

    def norm(self) -> Norm:
        """With the statistics of all processes of the layer's group."""
        if not self.layer.has_statistics:
            return Norm.of(self.layer)
        if self.count is None:
            zeros = torch.zeros_like(self.layer.gain[:, None])
            self.add(0, zeros, zeros)
        assert self.count is not None
        if self.layer.group:
            count = _on_device(self.count, self.mean).expand_as(self.mean)
            parts = _gathered(torch.stack((count, self.mean, self.squares)), self.layer.group)
            everywhere = Moments(self.layer._replace(group=""))
            everywhere.add_all(parts[:, 0, :1], parts[:, 1], parts[:, 2])
            return everywhere.norm()
        taken = self.count if isinstance(self.count, Tensor) else max(self.count, 1)
        return Norm.of(self.layer, self.mean, self.squares, taken)


class Gradients:
    """The two sums over pixels of a layer's backward pass, and what follows from them for each pixel."""

    def __init__(self, norm: Norm) -> None:
        self.norm = norm
        self.sums: tuple[Tensor, Tensor] | None = None  # until pixels are added

    @property
    def gain(self) -> Tensor:
        """The sum over pixels of the gradients of what the activation is taken of, times what is normalised."""
        return torch.zeros_like(self.norm.factor) if self.sums is None else self.sums[0]

    @property
    def shift(self) -> Tensor:
        """The sum of those gradients."""
        return torch.zeros_like(self.norm.factor) if self.sums is None else self.sums[1]

    def add(self, sums: Tensor) -> None:
        """Sums over pixels of the gradients, and of those times h - mean, `[2, channels]`."""
        grad, grad_h = sums.unsqueeze(2)
        gain = grad_h * self.norm.rstd
        self.sums = (gain, grad) if self.sums is None else (self.sums[0] + gain, self.sums[1] + grad)

    def centred(self) -> tuple[Tensor, Tensor]:
        """a, b of the gradient of h: factor * grad + a * (h - mean) + b, from the sums of the layer's processes."""
        norm = self.norm
        if not norm.layer.has_statistics:
            zeros = torch.zeros_like(norm.factor)
            return zeros, zeros
        gain, shift = self.gain, self.shift
        if norm.layer.group:
            gain, shift = _gathered(torch.stack((gain, shift)), norm.layer.group).sum(0)
        share = -norm.factor / norm.pixels
        return share * norm.rstd * gain, share * shift

    def affine(self) -> tuple[Tensor, Tensor, Tensor]:
        """a, b, c of the same gradient: a * grad + b * h + c."""
        slope, offset = self.centred()
        return self.norm.factor, slope, torch.addcmul(offset, self.norm.mean, slope, value=-1)

    def vectors(self) -> Tensor:
        """What `Passes.through` takes where the activation was gone through before."""
        return self.norm.vectors(None, *self.affine())


def _gathered(tensor: Tensor, group: str) -> Tensor:
    """`[processes, *shape]`, in the order of their ranks: sums of them are the same everywhere."""
    processes = process_group(group)
    parts = tensor.new_empty((processes.size() * len(tensor), *tensor.shape[1:]))
    distributed.all_gather_into_tensor(parts, tensor.contiguous(), group=processes)
    return parts.view(-1, *tensor.shape)


class Contexts:
    """y = rho(u w): its statistics and its norm's gradients, which follow from the moments of the weights.

    Regions may be nearly alike, as they are before a network is trained. What they have in common is taken out first,
    since weights add up to 1: u w = means + centred w. Norms magnify the rest.
    """

    def __init__(self, u: Tensor, mean_weights: Tensor, scatter: Tensor, pixels: int) -> None:
        self.mean_weights = mean_weights  # [B, K, 1]
        self.scatter = scatter  # [B, K, K]: sums of outer products of weights less their means
        self.pixels = pixels  # of an image
        self.means: Tensor = u @ mean_weights  # [B, Y, 1]
        self.centred: Tensor = u - self.means  # [B, Y, K]

    def moments(self) -> Tensor:
        """Means of u w, and sums of squares about them, image by image `[B, 2, Y]`."""
        squares = ((self.centred @ self.scatter) * self.centred).sum(2)
        return torch.stack((self.means.squeeze(2), squares), 1)

    def norm(self, layer: Layer) -> Norm:
        moments = Moments(layer)
        if layer.has_statistics and self.means.numel() and self.pixels:
            means, squares = self.moments().unsqueeze(3).unbind(1)
            mean = means.mean(0)
            squares = (squares + (means - mean).square() * self.pixels).sum(0)
            moments.add(len(means) * self.pixels, mean, squares)
        return moments.norm()

    def normalised(self, norm: Norm, dtype: torch.dtype, columns: int = 0) -> tuple[Tensor, Tensor]:
        """A `[B, Y, K]` in a dtype, and b `[B, Y, 1]`: what rho's activation is taken of is A w + b.

        A has at least so many columns, zeros after its own.
        """
        batch, channels, regions = self.centred.shape
        matrix = self.centred.new_zeros((batch, channels, max(columns, regions)), dtype=dtype)
        torch.mul(norm.factor, self.centred, out=matrix[..., :regions])
        return matrix, torch.addcmul(norm.layer.shift[:, None], norm.factor, self.means - norm.mean)

    def gradient_sums(self, norm: Norm, outer: Tensor, total: Tensor) -> Tensor:
        """Of dy after the activation's backward pass, and of that times u w - mean, image by image `[B, 2, Y]`.

        `outer` is sum_i dy_i (w_i - mean)' `[B, Y, K]`, and `total` sum_i dy_i `[B, Y, 1]`.
        """
        products = torch.addcmul((self.centred * outer).sum(2, keepdim=True), self.means - norm.mean, total)
        return torch.stack((total.squeeze(2), products.squeeze(2)), 1)

    def backward(
        self, norm: Norm, outer: Tensor, total: Tensor, slope: Tensor, offset: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of u, and the matrix `[B, K, K]` and the column `[B, K, 1]` of that of w.

        dw_i = A' dy_i + matrix w_i + column, less what all regions have in common, which a softmax does not feel.
        `slope` and `offset` are what `Gradients.centred` gives.
        """
        off = torch.addcmul(offset, slope, self.means - norm.mean)  # of a pixel whose weights are the mean ones
        du = torch.addcmul(norm.factor * outer, slope, self.centred @ self.scatter)
        du.addcmul_(torch.add(norm.factor * total, off, alpha=self.pixels), self.mean_weights.mT)
        return du, self.centred.mT @ (slope * self.centred), self.centred.mT @ off
