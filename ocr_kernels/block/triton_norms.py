"""The norms of the block in Triton: kernels over the pixels of a map, and what their sums make of its channels.

Statistics are made of sums over splits of the pixels, added in a fixed order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ocr_kernels.block import tiles
from ocr_kernels.block.norms import Contexts, Gradients, Layer, Moments, Norm, norm_of, others_of
from ocr_kernels.block.passes import empty_maps
from ocr_kernels.core.layout import statistics_dtype
from ocr_kernels.core.tiles import Problem, Tile
from ocr_kernels.core.triton_device import (
    activated,
    column_of,
    image_of,
    load_tile,
    masked,
    split_of_program,
    store_tile,
    tile_of_program,
)
from ocr_kernels.core.triton_host import cdiv, constants, device_facts, has_scattered_pixels, numbers_of, split
from ocr_kernels.core.triton_launch import Launch, prepared


@triton.jit(do_not_specialize=["N", "splits"])
def ocr_block_moments_kernel(
    partial,  # [B, splits, 2, C]: means, and sums of squares about them
    h,  # [B, C, N]
    h_strides,
    C, N, split_length, splits,
    ACCUMULATOR: tl.constexpr, ALIGNMENT: tl.constexpr, INT64: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of a split of the pixels, about the mean of its first tile, which leaves nothing to cancel."""
    c0, _, program, start = split_of_program(C, 1, splits, split_length, BLOCK_C, 1)
    h = image_of(h, h_strides, tl.cast(program // splits, tl.int64), C, N, ALIGNMENT, INT64)
    end = tl.minimum(start + split_length, N)
    about = load_tile(h, c0, start, BLOCK_C, BLOCK_N).to(ACCUMULATOR)
    about = tl.sum(about, 1) / tl.minimum(end - start, BLOCK_N)
    total = tl.zeros([BLOCK_C, BLOCK_N], ACCUMULATOR)
    squares = tl.zeros([BLOCK_C, BLOCK_N], ACCUMULATOR)
    for n0 in range(start, end, BLOCK_N):
        x = load_tile(h, c0, n0, BLOCK_C, BLOCK_N).to(ACCUMULATOR) - about[:, None]
        x = tl.where((n0 + tl.arange(0, BLOCK_N) < end)[None, :], x, 0.0)
        total += x
        squares += x * x
    off = tl.sum(total, 1)
    c = c0 + tl.arange(0, BLOCK_C)
    partial += tl.cast(program, tl.int64) * 2 * C + c
    tl.store(partial, about + off / (end - start), mask=c < C)
    tl.store(partial + C, tl.sum(squares, 1) - off * off / (end - start), mask=c < C)


@triton.jit(do_not_specialize=["N", "split_length", "splits", "parts"])
def ocr_block_norm_kernel(
    out,  # [5, C]: mean, unbiased variance, 1 / sqrt(variance + eps), and what h is multiplied by, and what is added
    partial,  # [parts, 2, C]: means, and sums of squares about them
    gain, shift,  # [C]
    C, N, split_length, splits, parts, eps: tl.float64,
    ACCUMULATOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The moments of all splits of all images as one, in a fixed order, and the norm that they make."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    count = tl.cast(N, ACCUMULATOR) * (parts // splits)
    total = tl.zeros([BLOCK_C], ACCUMULATOR)
    for p0 in range(0, parts, BLOCK_N):
        n, rows = pixels_of_parts(p0, N, split_length, splits, parts, BLOCK_N, ACCUMULATOR)
        means = tl.load(
            partial + rows[:, None] * 2 * C + c[None, :], mask=(n > 0)[:, None] & (c < C)[None, :], other=0.0
        )
        total += tl.sum(means * n[:, None], 0)
    mean = total / count
    squares = tl.zeros([BLOCK_C], ACCUMULATOR)
    for p0 in range(0, parts, BLOCK_N):
        n, rows = pixels_of_parts(p0, N, split_length, splits, parts, BLOCK_N, ACCUMULATOR)
        inside = (n > 0)[:, None] & (c < C)[None, :]
        part = partial + rows[:, None] * 2 * C + c[None, :]
        off = tl.load(part, mask=inside, other=0.0) - mean[None, :]
        squares += tl.sum(tl.load(part + C, mask=inside, other=0.0) + n[:, None] * off * off, 0)
    rstd = 1 / tl.sqrt(squares / count + tl.full((), eps, ACCUMULATOR))
    factor = tl.load(gain + c, mask=c < C, other=0.0) * rstd
    offset = tl.load(shift + c, mask=c < C, other=0.0) - mean * factor
    tl.store(out + c, mean, mask=c < C)
    tl.store(out + C + c, squares / tl.maximum(count - 1, 1), mask=c < C)
    tl.store(out + 2 * C + c, rstd, mask=c < C)
    tl.store(out + 3 * C + c, factor, mask=c < C)
    tl.store(out + 4 * C + c, offset, mask=c < C)


@triton.jit
def pixels_of_parts(p0, N, split_length, splits, parts, BLOCK_N: tl.constexpr, ACCUMULATOR: tl.constexpr):
    """How many pixels some parts have, 0 after the last, and which they are."""
    p = p0 + tl.arange(0, BLOCK_N)
    n = tl.minimum(N - p % splits * split_length, split_length)
    return tl.where(p < parts, n, 0).to(ACCUMULATOR), tl.cast(p, tl.int64)


@triton.jit(do_not_specialize=["N"])
def ocr_block_apply_kernel(
    out,  # [B, C, N]
    h,  # [B, C, N]
    factor, offset,  # [C]
    mask,  # [B, C]
    out_strides, h_strides,
    C, N,
    SLOPE: tl.constexpr, MASKED: tl.constexpr,
    ACCUMULATOR: tl.constexpr, ALIGNMENT: tl.constexpr, INT64: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A norm and an activation, and dropout's mask."""
    tile, n0, image = tile_of_program(tl.cdiv(C, BLOCK_C), N, BLOCK_N)
    c0 = tile * BLOCK_C
    out = image_of(out, out_strides, image, C, N, ALIGNMENT, INT64)
    h = image_of(h, h_strides, image, C, N, ALIGNMENT, INT64)
    x = load_tile(h, c0, n0, BLOCK_C, BLOCK_N).to(ACCUMULATOR)
    x = activated(x * column_of(factor, c0, C, BLOCK_C) + column_of(offset, c0, C, BLOCK_C), SLOPE)
    if MASKED:
        x *= column_of(mask + image * C, c0, C, BLOCK_C)
    store_tile(out, x, c0, n0)


@triton.jit
def gradient_before_activation(
    grad, h, factor, offset, mask, image, c0, n0,
    SLOPE: tl.constexpr, MASKED: tl.constexpr, ACCUMULATOR: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient of what the activation is taken of, and the tile of h."""
    C = h.height
    x = load_tile(h, c0, n0, BLOCK_C, BLOCK_N).to(ACCUMULATOR)
    d = load_tile(grad, c0, n0, BLOCK_C, BLOCK_N).to(ACCUMULATOR)
    if MASKED:
        d *= column_of(mask + image * C, c0, C, BLOCK_C)
    taken = x * column_of(factor, c0, C, BLOCK_C) + column_of(offset, c0, C, BLOCK_C)
    return masked(d, taken, SLOPE), x


@triton.jit(do_not_specialize=["N", "splits"])
def ocr_block_gradient_sums_kernel(
    partial,  # [B, splits, 2, C]: sums of the gradients, and of those times h - mean
    grad,  # [B, C, N]
    h,  # [B, C, N]
    factor, offset, mean,  # [C]
    mask,  # [B, C]
    grad_strides, h_strides,
    C, N, split_length, splits,
    SLOPE: tl.constexpr, MASKED: tl.constexpr,
    ACCUMULATOR: tl.constexpr, ALIGNMENT: tl.constexpr, INT64: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    c0, _, program, start = split_of_program(C, 1, splits, split_length, BLOCK_C, 1)
    image = tl.cast(program // splits, tl.int64)
    grad = image_of(grad, grad_strides, image, C, N, ALIGNMENT, INT64)
    h = image_of(h, h_strides, image, C, N, ALIGNMENT, INT64)
    about = column_of(mean, c0, C, BLOCK_C)
    total = tl.zeros([BLOCK_C, BLOCK_N], ACCUMULATOR)
    products = tl.zeros([BLOCK_C, BLOCK_N], ACCUMULATOR)
    for n0 in range(start, tl.minimum(start + split_length, N), BLOCK_N):
        d, x = gradient_before_activation(
            grad, h, factor, offset, mask, image, c0, n0, SLOPE, MASKED, ACCUMULATOR, BLOCK_C, BLOCK_N
        )
        total += d
        products += d * (x - about)
    c = c0 + tl.arange(0, BLOCK_C)
    partial += tl.cast(program, tl.int64) * 2 * C + c
    tl.store(partial, tl.sum(total, 1), mask=c < C)
    tl.store(partial + C, tl.sum(products, 1), mask=c < C)


@triton.jit(do_not_specialize=["parts"])
def ocr_block_norm_gradient_kernel(
    out,  # [4, C]: the gradients of gain and shift; slope and offset, below
    partial,  # [parts, 2, C]: sums of the gradients, and of those times h - mean
    factor, rstd,  # [C]
    count,  # a number
    C, parts,
    STATISTICS: tl.constexpr, ACCUMULATOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The sums of all splits, in a fixed order, and what follows from them for each pixel.

    The gradient of h is factor * d + slope * (h - mean) + offset.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    shift = tl.zeros([BLOCK_C], ACCUMULATOR)
    gain = tl.zeros([BLOCK_C], ACCUMULATOR)
    for p0 in range(0, parts, BLOCK_N):
        p = tl.cast(p0 + tl.arange(0, BLOCK_N), tl.int64)
        part = partial + p[:, None] * 2 * C + c[None, :]
        inside = (p < parts)[:, None] & (c < C)[None, :]
        shift += tl.sum(tl.load(part, mask=inside, other=0.0), 0)
        gain += tl.sum(tl.load(part + C, mask=inside, other=0.0), 0)
    gain *= tl.load(rstd + c, mask=c < C, other=0.0)
    slope = tl.zeros([BLOCK_C], ACCUMULATOR)
    offset = tl.zeros([BLOCK_C], ACCUMULATOR)
    if STATISTICS:
        share = -tl.load(factor + c, mask=c < C, other=0.0) / tl.load(count)
        slope = share * tl.load(rstd + c, mask=c < C, other=0.0) * gain
        offset = share * shift
    tl.store(out + c, gain, mask=c < C)
    tl.store(out + C + c, shift, mask=c < C)
    tl.store(out + 2 * C + c, slope, mask=c < C)
    tl.store(out + 3 * C + c, offset, mask=c < C)


@triton.jit(do_not_specialize=["N"])
def ocr_block_gradient_kernel(
    out,  # [B, C, N]: the gradient of h
    grad,  # [B, C, N]
    h,  # [B, C, N]
    factor, offset,  # [C]
    slope, shift, mean,  # [C]: it is factor * d + slope * (h - mean) + shift, or without statistics factor * d
    mask,  # [B, C]
    out_strides, grad_strides, h_strides,
    C, N,
    SLOPE: tl.constexpr, MASKED: tl.constexpr, STATISTICS: tl.constexpr,
    ACCUMULATOR: tl.constexpr, ALIGNMENT: tl.constexpr, INT64: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, n0, image = tile_of_program(tl.cdiv(C, BLOCK_C), N, BLOCK_N)
    c0 = tile * BLOCK_C
    out = image_of(out, out_strides, image, C, N, ALIGNMENT, INT64)
    grad = image_of(grad, grad_strides, image, C, N, ALIGNMENT, INT64)
    h = image_of(h, h_strides, image, C, N, ALIGNMENT, INT64)
    d, x = gradient_before_activation(
        grad, h, factor, offset, mask, image, c0, n0, SLOPE, MASKED, ACCUMULATOR, BLOCK_C, BLOCK_N
    )
    d = d * column_of(factor, c0, C, BLOCK_C)
    if STATISTICS:
        x -= column_of(mean, c0, C, BLOCK_C)
        d = d + x * column_of(slope, c0, C, BLOCK_C) + column_of(shift, c0, C, BLOCK_C)
    store_tile(out, d, c0, n0)


# Launching them


def _pass(*maps: Tensor) -> tuple[Tile, dict[str, object]]:
    """The tile of a kernel that goes over maps of one shape, and its arguments."""
    numbers = numbers_of(maps[-1])
    device, channels = device_facts(maps[-1].device), maps[-1].shape[1]
    tile = tiles.PASS.choose(Problem(numbers.itemsize, device, channels, scattered=has_scattered_pixels(*maps)))
    arguments = constants(tile, numbers, maps)
    del arguments["NUMBERS"]
    return tile, arguments | {"ACCUMULATOR": numbers.accumulator}


def _programs(tile: Tile, maps: Tensor) -> int:
    batch, channels, pixels = maps.shape
    return batch * cdiv(channels, tile.channels) * cdiv(pixels, tile.pixels)


class Summing(NamedTuple):
    """A kernel that sums over the pixels of splits, the shape of what it fills, and the pixels of a split."""

    launch: Launch
    shape: tuple[int, ...]  # [B, splits, 2, C]
    length: int


def _summing(kernel: Any, resident: int, *maps: Tensor, **flags: Any) -> Summing:
    """A multiprocessor holds so many programs of the kernel at a time."""
    batch, channels, pixels = maps[-1].shape
    tile, arguments = _pass(*maps)
    programs = batch * cdiv(channels, tile.channels)
    wanted = resident * device_facts(maps[-1].device).multiprocessors
    length, splits = split(pixels, tile.pixels, programs, wanted)
    sizes = *(each.stride() for each in maps), channels, pixels, length, splits
    launch = Launch(kernel, programs * splits, *sizes, **flags, **arguments)
    return Summing(launch, (batch, splits, 2, channels), length)


def _vectors(parts: Tensor) -> tuple[int, dict[str, object]]:
    """The programs, and arguments, of a kernel that adds up parts `[parts, 2, C]`."""
    arguments = {"ACCUMULATOR": numbers_of(parts).accumulator}
    return cdiv(parts.shape[2], tiles.PARTS.channels), arguments | tiles.PARTS.arguments


@prepared
def _norm_launch(parts: Tensor, *, pixels: int, split_length: int, eps: float) -> Launch:
    programs, arguments = _vectors(parts)
    splits, all_parts, channels = cdiv(pixels, split_length), parts.shape[0], parts.shape[2]
    sizes = channels, pixels, split_length, splits, all_parts
    return Launch(ocr_block_norm_kernel, programs, *sizes, eps, **arguments)


def _norm_of(layer: Layer, parts: Tensor, pixels: int, split_length: int) -> Norm:
    """That of the moments `[parts, 2, C]` of splits of the pixels of images, and of the layer's other processes."""
    count = parts.shape[0] // cdiv(pixels, split_length) * pixels
    out = parts.new_empty((5, parts.shape[2]))
    launch = _norm_launch(parts, pixels=pixels, split_length=split_length, eps=layer.eps)
    launch(out, parts, layer.gain, layer.shift)
    mean, var, rstd, factor, offset = out.unbind()
    norm = Norm(layer, mean, var, rstd, factor, offset, count)
    return norm_of(layer, count, norm.mean, norm.var * others_of(count)) if layer.group else norm


@prepared
def _moments_launch(h: Tensor) -> Summing:
    return _summing(ocr_block_moments_kernel, 4, h)


def norm_of_maps(layer: Layer, h: Tensor) -> Norm:
    """With the statistics of the map that it is for."""
    if not layer.has_statistics or not h.numel():
        return Moments(layer).norm()
    moments = _moments_launch(h)
    partial = h.new_empty(moments.shape, dtype=statistics_dtype(h))
    moments.launch(partial, h)
    return _norm_of(layer, partial.flatten(0, 1), h.shape[2], moments.length)


def norm_of_contexts(layer: Layer, y: Contexts) -> Norm:
    if not layer.has_statistics or not y.means.numel() or not y.pixels:
        return y.norm(layer)
    return _norm_of(layer, torch.stack(y.moments(), 1), y.pixels, y.pixels)


@prepared
def _apply_launch(out: Tensor, h: Tensor, *, slope: float, masked: bool) -> Launch:
    tile, arguments = _pass(out, h)
    sizes = out.stride(), h.stride(), *h.shape[1:]
    return Launch(ocr_block_apply_kernel, _programs(tile, h), *sizes, SLOPE=slope, MASKED=masked, **arguments)


def applied(norm: Norm, h: Tensor, mask: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """rho of a map, times the mask where it has elements."""
    out = empty_maps(h, h.shape[1]) if out is None else out
    is_masked = mask is not None and mask.shape[0] > 0
    factors: Any = mask if is_masked else norm.factor
    if h.numel():
        launch = _apply_launch(out, h, slope=norm.layer.slope, masked=is_masked)
        launch(out, h, norm.factor, norm.offset, factors)
    return out


@prepared
def _norm_gradient_launch(parts: Tensor, *, statistics: bool) -> Launch:
    programs, arguments = _vectors(parts)
    sizes = parts.shape[2], parts.shape[0]
    return Launch(ocr_block_norm_gradient_kernel, programs, *sizes, STATISTICS=statistics, **arguments)


def added(norm: Norm, parts: Tensor) -> tuple[Gradients, Tensor, Tensor]:
    """Of sums `[parts, 2, C]` of gradients, and of those times h - mean: them, and slope and offset.

    The gradient of h is factor * d + slope * (h - mean) + offset.
    """
    vectors = parts.new_empty((4, parts.shape[2]))
    launch = _norm_gradient_launch(parts, statistics=norm.layer.has_statistics)
    pixels: Any = norm.pixels  # a tensor, as `split_statistics` gives it
    launch(vectors, parts, norm.factor, norm.rstd, pixels)
    gain, shift, slope, offset = vectors.unbind()
    gradients = Gradients(norm, gain, shift)
    if norm.layer.group:
        slope, offset = gradients.centred()
    return gradients, slope, offset


@prepared
def _gradient_sums_launch(grad: Tensor, h: Tensor, *, slope: float, masked: bool) -> Summing:
    return _summing(ocr_block_gradient_sums_kernel, 3, grad, h, SLOPE=slope, MASKED=masked)


@prepared
def _gradient_launch(out: Tensor, grad: Tensor, h: Tensor, *, slope: float, masked: bool, statistics: bool) -> Launch:
    tile, arguments = _pass(out, grad, h)
    sizes = out.stride(), grad.stride(), h.stride(), *h.shape[1:]
    return Launch(
        ocr_block_gradient_kernel, _programs(tile, h), *sizes,
        SLOPE=slope, MASKED=masked, STATISTICS=statistics, **arguments,
    )  # fmt: skip


def gradients_of(norm: Norm, grad: Tensor, h: Tensor, out: Tensor, mask: Tensor | None = None) -> Gradients:
    """The sums of a layer's backward pass; `out` is filled with the gradient of h, of that after the activation."""
    is_masked = mask is not None and mask.shape[0] > 0
    factors: Any = mask if is_masked else norm.factor
    flags: Any = {"slope": norm.layer.slope, "masked": is_masked}
    if not h.numel():
        gradients = Gradients.of(norm, [])
        gradients.centred()  # for which other processes wait
        return gradients
    sums = _gradient_sums_launch(grad, h, **flags)
    partial = h.new_empty(sums.shape, dtype=statistics_dtype(h))
    sums.launch(partial, grad, h, norm.factor, norm.offset, norm.mean, factors)
    gradients, slope, shift = added(norm, partial.flatten(0, 1))
    launch = _gradient_launch(out, grad, h, **flags, statistics=norm.layer.has_statistics)
    launch(out, grad, h, norm.factor, norm.offset, slope, shift, norm.mean, factors)
    return gradients
