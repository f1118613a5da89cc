"""What the block's norms do to channels: statistics, what follows from them, and the sums of the backward pass.

All that is here is as small as the channels and regions are; pixels are the backends' own. Vectors are `[channels]`, in
the dtype of statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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
        if mean is None or squares is None or not layer.has_statistics:
            ones = torch.ones_like(layer.gain)
            return cls(layer, torch.zeros_like(ones), ones, ones, layer.gain, layer.shift, pixels)
        rstd = (squares / pixels + layer.eps).rsqrt()
        factor, var = layer.gain * rstd, squares / others_of(pixels)
        return cls(layer, mean, var, rstd, factor, torch.addcmul(layer.shift, mean, factor, value=-1), pixels)

    def vectors(self, mask: Tensor | None = None, *more: Tensor) -> Tensor:
        """What passes over tiles take, `[3 + len(more), channels]`: factor, offset, what follows is multiplied by."""
        mask = torch.ones_like(self.factor) if mask is None else mask
        return torch.stack((self.factor, self.offset, mask, *more))

    def of_images(self, masks: Tensor, images: int, *more: Tensor) -> list[Tensor]:
        """The vectors for each image; masks are `[B, channels]`, or have no elements."""
        if masks.shape[0]:
            return [self.vectors(mask, *more) for mask in masks.unbind()]
        return [self.vectors(None, *more)] * images


def others_of(pixels: Tensor | int) -> Tensor | int:
    """How many there are besides one; 1 where there is only one, whose squares are 0."""
    return (pixels - 1).clamp(min=1) if isinstance(pixels, Tensor) else max(pixels - 1, 1)


def split_statistics(layers: Sequence[Layer], statistics: Tensor) -> list[Norm]:
    """The norms that `statistics_of` has put into one vector."""
    lengths = [layer.gain.shape[0] for layer in layers for _ in range(5)]
    vectors = torch.split_with_sizes(statistics, [*lengths, *(1 for _ in layers)])
    norms = []
    for i, (layer, count) in enumerate(zip(layers, vectors[len(lengths) :], strict=True)):
        mean, var, rstd, factor, offset = vectors[5 * i : 5 * i + 5]
        norms.append(Norm(layer, mean, var, rstd, factor, offset, count))
    return norms


def statistics_of(norms: Sequence[Norm]) -> Tensor:
    """What `split_statistics` takes: the five vectors of each layer, and the counts."""
    vectors = [vector for norm in norms for vector in norm[1:6]]
    counts = [norm.pixels for norm in norms]
    if len(set(counts)) == 1 and isinstance(counts[0], int):
        return torch.cat([*vectors, vectors[0].new_full((len(counts),), counts[0])])
    return torch.cat([*vectors, *(_on_device(count, vectors[0]) for count in counts)])


def _on_device(count: Tensor | int, like: Tensor) -> Tensor:
    """Nothing waits for the device: it fills what a number is, and copies nothing."""
    return count if isinstance(count, Tensor) else like.new_full((1,), count)


class Moments:
    """Means, and sums of squares about them, of the tiles of a map."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.counts: list[int] = []
        self.parts: list[Tensor] = []  # [2, channels]

    def add(self, h: Tensor, tiles: Passes) -> None:
        if self.layer.has_statistics:
            self.counts.append(h.shape[1])
            self.parts.append(tiles.moments(h))

    def norm(self) -> Norm:
        if len(self.parts) < 2:
            part = self.parts[0] if self.parts else self.layer.gain.new_zeros((2, self.layer.gain.shape[0]))
            return norm_of(self.layer, sum(self.counts), *part.unbind())
        means, squares = torch.stack(self.parts).unbind(1)
        if len(set(self.counts)) == 1:
            return norm_of(self.layer, *merged(self.counts[0], means, squares))
        counts = torch.stack([_on_device(count, means) for count in self.counts])
        _, mean, squares = merged(counts, means, squares)
        return norm_of(self.layer, sum(self.counts), mean, squares)


def merged(counts: Any, means: Tensor, squares: Tensor) -> tuple[Any, Tensor, Tensor]:
    """Those of all parts `[parts, channels]`, of as many pixels each, or as `[parts, 1]` has it, some perhaps none."""
    total = counts.sum(0) if isinstance(counts, Tensor) else counts * means.shape[0]
    off = means - means[0]  # means may be large, and differ little
    mean_off = (counts * off).sum(0) / total
    return total, means[0] + mean_off, (squares + counts * (off - mean_off).square()).sum(0)


def norm_of(layer: Layer, count: int, mean: Tensor, squares: Tensor) -> Norm:
    """With the statistics of all processes of the layer's group, of which these are one's."""
    if not layer.has_statistics:
        return Norm.of(layer)
    if not layer.group:
        return Norm.of(layer, mean, squares, max(count, 1))
    parts = _gathered(torch.stack((torch.full_like(mean, count), mean, squares)), layer.group)
    counts, means, everywhere = parts.unbind(1)
    total, mean, squares = merged(counts[:, :1], means, everywhere)
    return Norm.of(layer, mean, squares, total)


class Gradients(NamedTuple):
    """Sums over pixels of a layer's backward pass, of the gradients of what the activation is taken of."""

    norm: Norm
    gain: Tensor  # of those times what is normalised
    shift: Tensor

    @classmethod
    def of(cls, norm: Norm, sums: list[Tensor]) -> Gradients:
        """Of tiles' sums of the gradients, and of those times h - mean, `[2, channels]` each."""
        if not sums:
            return cls(norm, torch.zeros_like(norm.factor), torch.zeros_like(norm.factor))
        shift, products = (sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)).unbind()
        return cls(norm, products * norm.rstd, shift)

    @classmethod
    def anything(cls, norm: Norm) -> Gradients:
        """Where none are needed."""
        return cls(norm, torch.empty_like(norm.factor), torch.empty_like(norm.factor))

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

    def of_images(self, masks: Tensor, images: int) -> list[Tensor]:
        """What `Passes.through` takes, for each image; masks as `Norm.of_images` has them."""
        norm = self.norm
        if not norm.layer.has_statistics:
            return norm.of_images(masks, images, norm.factor)
        return norm.of_images(masks, images, norm.factor, *self.centred(), norm.mean)

    def vectors(self) -> Tensor:
        """The same where the activation was gone through before."""
        return self.of_images(self.norm.factor[:0], 1)[0]


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

    def __init__(self, u: Tensor, pixels: int, mean_weights: Tensor, scatter: Tensor | None) -> None:
        """Means of the weights, `[B, K, 1]`, and sums of outer products of weights less those, `[B, K, K]`.

        Without the latter rho's norm takes no statistics. One pixel that is NaN, or a region that is infinite, then
        spoils no other: the means are of pixels that are not, and where contexts have none, nothing is taken out.
        """
        self.pixels = pixels  # of an image
        self.scatter = scatter
        means = u @ mean_weights
        if scatter is None:
            means = torch.where(means.isfinite(), means, 0)
            mean_weights = torch.zeros_like(mean_weights)
        self.mean_weights = mean_weights
        self.means = means.squeeze(2)  # [B, Y]
        self.centred = u - means  # [B, Y, K]

    def moments(self) -> tuple[Tensor, Tensor]:
        """Means of u w, and sums of squares about them, image by image `[B, Y]`."""
        assert self.scatter is not None
        return self.means, ((self.centred @ self.scatter) * self.centred).sum(2)

    def norm(self, layer: Layer) -> Norm:
        if not (layer.has_statistics and self.means.numel() and self.pixels):
            return Moments(layer).norm()
        return norm_of(layer, *merged(self.pixels, *self.moments()))

    def normalised(self, norm: Norm, dtype: torch.dtype, columns: int = 0) -> tuple[Tensor, Tensor]:
        """A `[B, Y, K]` in a dtype, and b `[B, Y]`: what rho's activation is taken of is A w + b.

        A has at least so many columns, zeros after its own.
        """
        batch, channels, regions = self.centred.shape
        matrix = self.centred.new_zeros((batch, channels, max(columns, regions)), dtype=dtype)
        torch.mul(norm.factor[:, None], self.centred, out=matrix[..., :regions])
        return matrix, torch.addcmul(norm.layer.shift, norm.factor, self.means - norm.mean)

    def gradient_sums(self, norm: Norm, outer: Tensor, total: Tensor) -> Tensor:
        """Of dy after the activation's backward pass, and of that times u w - mean, image by image `[B, 2, Y]`.

        `outer` is sum_i dy_i (w_i - mean)' `[B, Y, K]`, and `total` sum_i dy_i `[B, Y]`.
        """
        products = torch.addcmul((self.centred * outer).sum(2), self.means - norm.mean, total)
        return torch.stack((total, products), 1)

    def backward(
        self, norm: Norm, outer: Tensor, total: Tensor, slope: Tensor, offset: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of u, and the matrix `[B, K, K]` and the column `[B, K, 1]` of that of w.

        dw_i = A' dy_i + matrix w_i + column, less what all regions have in common, which a softmax does not feel.
        `slope` and `offset` are what `Gradients.centred` gives.
        """
        if self.scatter is None:
            regions = outer.shape[2]
            return norm.factor[:, None] * outer, outer.new_zeros((len(outer), regions, regions)), self.mean_weights
        off = torch.addcmul(offset, slope, self.means - norm.mean)  # of a pixel whose weights are the mean ones
        factors, slopes = norm.factor[:, None], slope[:, None]
        du = torch.addcmul(factors * outer, slopes, self.centred @ self.scatter)
        du.addcmul_(torch.add(norm.factor * total, off, alpha=self.pixels)[..., None], self.mean_weights.mT)
        return du, self.centred.mT @ (slopes * self.centred), self.centred.mT @ off[..., None]
