"""Step 4 with a derivative in Triton: PyTorch's products, and between two of them one kernel over the pixels.

Maps are `[B, channels, N]` with their strides, so both memory formats are read in place. A norm's statistics are made
of sums over splits of the pixels, added in a fixed order; the norm and the activation are applied where the next
kernel reads, or in one pass before a product of PyTorch's. Up to 256 regions, phi's last norm, the scores and their
softmax are one kernel, as is the softmax's backward pass with what rho's norm takes from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ocr_kernels.block import tiles
from ocr_kernels.block.norms import (
    Contexts,
    Gradients,
    Layer,
    Moments,
    Norm,
    Settings,
    norm_of,
    others_of,
    split_statistics,
    statistics_of,
)
from ocr_kernels.block.passes import activation_backward_, empty_maps, maps_of
from ocr_kernels.block.triton_inference import activated, add_bias, infer
from ocr_kernels.core.layout import empty_in_format, statistics_dtype
from ocr_kernels.core.tiles import Problem, Tile
from ocr_kernels.core.triton_device import (
    add_product,
    finite,
    image_of,
    load_tile,
    narrow,
    product,
    split_of_program,
    store_tile,
    tile_of_program,
    transposed,
)
from ocr_kernels.core.triton_host import (
    aligned_rows,
    cdiv,
    constants,
    device_facts,
    has_scattered_pixels,
    numbers_of,
    round_up,
    split,
)
from ocr_kernels.core.triton_launch import Launch, prepared

__all__ = ["backward", "forward", "infer"]


@triton.jit
def column_of(vector, c0, C, BLOCK_C: tl.constexpr):
    """[BLOCK_C, 1] of a vector [C], zeros after it."""
    c = c0 + tl.arange(0, BLOCK_C)
    return tl.load(vector + c, mask=c < C, other=0.0)[:, None]


@triton.jit
def masked(grad, taken, SLOPE: tl.constexpr):
    """The gradient of what an activation was taken of. NaN lets it pass, as in PyTorch."""
    if SLOPE != 1:
        grad = tl.where(taken <= 0, grad * SLOPE if SLOPE != 0 else 0.0, grad)
    return grad


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
    out,  # [5, C]: the gradients of gain and shift; slope, offset and constant, below
    partial,  # [parts, 2, C]: sums of the gradients, and of those times h - mean
    factor, rstd, mean,  # [C]
    count,  # a number
    C, parts,
    STATISTICS: tl.constexpr, ACCUMULATOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The sums of all splits, in a fixed order, and what follows from them for each pixel.

    The gradient of h is factor * d + slope * (h - mean) + offset, or factor * d + slope * h + constant.
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
    tl.store(out + 4 * C + c, offset - tl.load(mean + c, mask=c < C, other=0.0) * slope, mask=c < C)


@triton.jit(do_not_specialize=["N"])
def ocr_block_gradient_kernel(
    out,  # [B, C, N]: the gradient of h
    grad,  # [B, C, N]
    h,  # [B, C, N]
    factor, offset,  # [C]
    slope, constant,  # [C]: it is factor * d + slope * h + constant, or without statistics factor * d
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
        d = d + x * column_of(slope, c0, C, BLOCK_C) + column_of(constant, c0, C, BLOCK_C)
    store_tile(out, d, c0, n0)


@triton.jit(do_not_specialize=["N"])
def ocr_block_region_weights_kernel(
    weights,  # [B, K, N]
    h,  # [B, D, N]
    key,  # [B, D, row_length], of which K are regions
    factor, offset,  # [D]
    weights_strides, h_strides, key_strides,
    D, K, N, row_length, scale: tl.float64,
    SLOPE: tl.constexpr,
    NUMBERS: tl.constexpr, ALIGNMENT: tl.constexpr, INT64: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """w = softmax_k(scale * key_k . rho(factor * h + offset)), of a tile of pixels and all regions."""
    _, n0, image = tile_of_program(1, N, BLOCK_N)
    weights = image_of(weights, weights_strides, image, K, N, ALIGNMENT, INT64)
    h = image_of(h, h_strides, image, D, N, ALIGNMENT, INT64)
    key = image_of(key, key_strides, image, D, row_length, 1, False)
    scores = tl.zeros([BLOCK_K, BLOCK_N], NUMBERS.accumulator)
    for c0 in range(0, D, BLOCK_C):
        q = load_tile(h, c0, n0, BLOCK_C, BLOCK_N).to(NUMBERS.accumulator)
        q = activated(q * column_of(factor, c0, D, BLOCK_C) + column_of(offset, c0, D, BLOCK_C), SLOPE)
        k = load_tile(key, c0, 0, BLOCK_C, BLOCK_K)
        scores = add_product(scores, tl.trans(k), narrow(q, NUMBERS.dot), NUMBERS)
    scores *= tl.full((), scale, NUMBERS.accumulator)
    scores = tl.where((tl.arange(0, BLOCK_K) < K)[:, None], scores, float("-inf"))
    w = tl.exp(scores - finite(tl.max(scores, 0))[None, :])
    store_tile(weights, w / tl.sum(w, 0)[None, :], 0, n0)


@triton.jit(do_not_specialize=["N"])
def ocr_block_contexts_kernel(
    out,  # [B, Y, N]
    weights,  # [B, K, N]
    u,  # [B, Y, row_length], of which K are regions
    offset,  # [B, Y]
    out_strides, weights_strides, u_strides,
    Y, K, N, row_length,
    SLOPE: tl.constexpr,
    NUMBERS: tl.constexpr, ALIGNMENT: tl.constexpr, INT64: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = rho(u w + offset)."""
    tile, n0, image = tile_of_program(tl.cdiv(Y, BLOCK_C), N, BLOCK_N)
    c0 = tile * BLOCK_C
    out = image_of(out, out_strides, image, Y, N, ALIGNMENT, INT64)
    weights = image_of(weights, weights_strides, image, K, N, ALIGNMENT, INT64)
    u = image_of(u, u_strides, image, Y, row_length, 1, False)
    y = tl.zeros([BLOCK_C, BLOCK_N], NUMBERS.accumulator)
    for k0 in range(0, K, BLOCK_K):
        w = load_tile(weights, k0, n0, BLOCK_K, BLOCK_N)
        y = add_product(y, load_tile(u, c0, k0, BLOCK_C, BLOCK_K), w, NUMBERS)
    store_tile(out, activated(y + column_of(offset + image * Y, c0, Y, BLOCK_C), SLOPE), c0, n0)


@triton.jit(do_not_specialize=["N"])
def ocr_block_contexts_gradient_kernel(
    dweights,  # [B, K, N]: what dw is without rho's norm
    dy,  # [B, Y, N]: the gradient of y, and afterwards that of u w + offset
    weights,  # [B, K, N]
    u,  # [B, Y, row_length], of which K are regions
    offset,  # [B, Y]
    dweights_strides, dy_strides, weights_strides, u_strides,
    Y, K, N, row_length,
    SLOPE: tl.constexpr,
    NUMBERS: tl.constexpr, ALIGNMENT: tl.constexpr, INT64: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dweights = u' d, where d = dy through the activation of u w + offset takes the place of dy."""
    _, n0, image = tile_of_program(1, N, BLOCK_N)
    dweights = transposed(image_of(dweights, dweights_strides, image, K, N, ALIGNMENT, INT64))
    dy = transposed(image_of(dy, dy_strides, image, Y, N, ALIGNMENT, INT64))
    weights = transposed(image_of(weights, weights_strides, image, K, N, ALIGNMENT, INT64))
    u = transposed(image_of(u, u_strides, image, Y, row_length, 1, False))
    w = load_tile(weights, n0, 0, BLOCK_N, BLOCK_K)
    dw = tl.zeros([BLOCK_N, BLOCK_K], NUMBERS.accumulator)
    for c0 in range(0, Y, BLOCK_C):
        u_tile = load_tile(u, 0, c0, BLOCK_K, BLOCK_C)
        taken = add_bias(product(w, u_tile, NUMBERS), offset + image * Y, c0, Y)
        d = masked(load_tile(dy, n0, c0, BLOCK_N, BLOCK_C).to(NUMBERS.accumulator), taken, SLOPE)
        store_tile(dy, d, n0, c0)
        dw = add_product(dw, narrow(d, NUMBERS.dot), tl.trans(u_tile), NUMBERS)
    store_tile(dweights, dw, n0, 0)


@triton.jit(do_not_specialize=["N"])
def ocr_block_softmax_gradient_kernel(
    dscores,  # [B, K, N]
    dweights,  # [B, K, N]: what dw is without rho's norm
    weights,  # [B, K, N]
    matrix,  # [B, K, row_length], of which K are regions
    column,  # [B, K]
    dscores_strides, dweights_strides, weights_strides, matrix_strides,
    K, N, row_length,
    NUMBERS: tl.constexpr, ALIGNMENT: tl.constexpr, INT64: tl.constexpr,
    BLOCK_C: tl.constexpr,  # regions of the product at a time
    BLOCK_K: tl.constexpr,  # all of K
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """w * (dw - sum_k w dw), with dw = dweights + matrix w + column, of a tile of pixels and all regions."""
    _, n0, image = tile_of_program(1, N, BLOCK_N)
    dscores = image_of(dscores, dscores_strides, image, K, N, ALIGNMENT, INT64)
    dweights = image_of(dweights, dweights_strides, image, K, N, ALIGNMENT, INT64)
    weights = image_of(weights, weights_strides, image, K, N, ALIGNMENT, INT64)
    matrix = image_of(matrix, matrix_strides, image, K, row_length, 1, False)
    dw = tl.zeros([BLOCK_K, BLOCK_N], NUMBERS.accumulator)
    for k0 in range(0, K, BLOCK_C):
        part = load_tile(weights, k0, n0, BLOCK_C, BLOCK_N)
        dw = add_product(dw, load_tile(matrix, 0, k0, BLOCK_K, BLOCK_C), part, NUMBERS)
    dw += load_tile(dweights, 0, n0, BLOCK_K, BLOCK_N) + column_of(column + image * K, 0, K, BLOCK_K)
    w = load_tile(weights, 0, n0, BLOCK_K, BLOCK_N).to(NUMBERS.accumulator)
    # what dw exceeds that of the highest weight by: a peak's gradient is then what is left, not rounding
    dw -= tl.max(tl.where(w == tl.max(w, 0)[None, :], dw, float("-inf")), 0)[None, :]
    dw = tl.where((tl.arange(0, BLOCK_K) < K)[:, None], dw, 0.0)
    store_tile(dscores, w * (dw - tl.sum(w * dw, 0)[None, :]), 0, n0)


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


def _norm(layer: Layer, h: Tensor) -> Norm:
    """With the statistics of the map that it is for."""
    if not layer.has_statistics or not h.numel():
        return Moments(layer).norm()
    moments = _moments_launch(h)
    partial = h.new_empty(moments.shape, dtype=statistics_dtype(h))
    moments.launch(partial, h)
    return _norm_of(layer, partial.flatten(0, 1), h.shape[2], moments.length)


def _norm_of_contexts(layer: Layer, y: Contexts) -> Norm:
    if not layer.has_statistics or not y.means.numel() or not y.pixels:
        return y.norm(layer)
    return _norm_of(layer, torch.stack(y.moments(), 1), y.pixels, y.pixels)


@prepared
def _apply_launch(out: Tensor, h: Tensor, *, slope: float, masked: bool) -> Launch:
    tile, arguments = _pass(out, h)
    sizes = out.stride(), h.stride(), *h.shape[1:]
    return Launch(ocr_block_apply_kernel, _programs(tile, h), *sizes, SLOPE=slope, MASKED=masked, **arguments)


def _apply(norm: Norm, h: Tensor, mask: Tensor | None = None, out: Tensor | None = None) -> Tensor:
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


def _added(norm: Norm, parts: Tensor) -> tuple[Gradients, Tensor, Tensor, Tensor]:
    """Of sums `[parts, 2, C]` of gradients, and of those times h - mean: them, and slope, offset and constant.

    The gradient of h is factor * d + slope * (h - mean) + offset, or factor * d + slope * h + constant.
    """
    vectors = parts.new_empty((5, parts.shape[2]))
    launch = _norm_gradient_launch(parts, statistics=norm.layer.has_statistics)
    pixels: Any = norm.pixels  # a tensor, as `split_statistics` gives it
    launch(vectors, parts, norm.factor, norm.rstd, norm.mean, pixels)
    gain, shift, slope, offset, constant = vectors.unbind()
    gradients = Gradients(norm, gain, shift)
    if norm.layer.group:
        slope, offset = gradients.centred()
        constant = torch.addcmul(offset, norm.mean, slope, value=-1)
    return gradients, slope, offset, constant


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


def _gradients(norm: Norm, grad: Tensor, h: Tensor, out: Tensor, mask: Tensor | None = None) -> Gradients:
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
    gradients, slope, _, constant = _added(norm, partial.flatten(0, 1))
    launch = _gradient_launch(out, grad, h, **flags, statistics=norm.layer.has_statistics)
    launch(out, grad, h, norm.factor, norm.offset, slope, constant, factors)
    return gradients


def _times(matrix: Tensor, maps: Tensor, out: Tensor | None = None) -> Tensor:
    """matrix @ maps, of `[outputs, channels]` or `[B, outputs, channels]`; into `out` where given."""
    out = empty_maps(maps, matrix.shape[-2]) if out is None else out
    if maps.stride(1) == 1 and matrix.dim() == 2:  # one product, whatever B is
        torch.mm(maps.mT.flatten(0, 1), matrix.t(), out=out.mT.flatten(0, 1))
    else:
        torch.bmm(matrix.expand(maps.shape[0], *matrix.shape[-2:]), maps, out=out)
    return out


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of `[B, rows, columns]`, in the dtype of statistics."""
    exact = statistics_dtype(a)
    if not a.is_cpu and a.dtype.itemsize == 2:
        return torch.bmm(a, b, out_dtype=exact)
    return torch.bmm(a.to(exact), b.to(exact))


def _over_pixels(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Fill `out`, in the dtype of statistics, with sum_i a_i b_i' over the pixels of all images."""
    if a.stride(1) == b.stride(1) == 1:
        out.copy_(_wide_product(a.mT.flatten(0, 1).t()[None], b.mT.flatten(0, 1)[None])[0])
    else:
        torch.sum(_wide_product(a, b.mT), 0, out=out)


@prepared
def _region_weights_launch(weights: Tensor, hidden: Tensor, rows: Tensor, *, scale: float, slope: float) -> Launch:
    batch, depth, pixels = hidden.shape
    regions, numbers, scattered = weights.shape[1], numbers_of(hidden), has_scattered_pixels(hidden)
    problem = Problem(numbers.itemsize, device_facts(hidden.device), depth, regions, scattered=scattered)
    tile = tiles.REGION_WEIGHTS.choose(problem)
    return Launch(
        ocr_block_region_weights_kernel, batch * cdiv(pixels, tile.pixels),
        weights.stride(), hidden.stride(), rows.stride(), depth, regions, pixels, rows.shape[2], scale,
        SLOPE=slope, **constants(tile, numbers, (weights, hidden), (rows,)),
    )  # fmt: skip


def _region_weights(query: Norm, hidden: Tensor, key: Tensor, scale: float) -> Tensor:
    """w `[B, K, N]`."""
    regions = key.shape[2]
    weights = empty_maps(hidden, regions)
    if regions > tiles.MOST:
        scores = _wide_product(key.mT.contiguous(), _apply(query, hidden))
        return weights.copy_(torch.softmax(scale * scores, 1))
    if hidden.numel():
        rows, _ = aligned_rows(key, key[:, :0])
        launch = _region_weights_launch(weights, hidden, rows, scale=scale, slope=query.layer.slope)
        launch(weights, hidden, rows, query.factor, query.offset)
    return weights


def _contexts_of(u: Tensor, weights: Tensor, up: Layer) -> Contexts:
    pixels = weights.shape[2]
    if not up.has_statistics or not pixels:
        return Contexts(u, pixels, None)
    mean = weights.mean(2, keepdim=True, dtype=u.dtype)
    centred = weights - mean
    return Contexts(u, pixels, (mean, torch.bmm(centred, centred.mT)))


def _normalised(y: Contexts, up: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A `[B, Y, rows of 16]`, of which K are regions, and b: y is rho(A w + b)."""
    return y.normalised(up, dtype, round_up(y.mean_weights.shape[1]))


@prepared
def _contexts_launch(out: Tensor, weights: Tensor, rows: Tensor, *, slope: float) -> Launch:
    batch, channels, pixels = out.shape
    regions, numbers, scattered = weights.shape[1], numbers_of(out), has_scattered_pixels(out, weights)
    problem = Problem(numbers.itemsize, device_facts(out.device), channels, regions, scattered=scattered)
    tile = tiles.CONTEXTS.choose(problem)
    return Launch(
        ocr_block_contexts_kernel, batch * cdiv(channels, tile.channels) * cdiv(pixels, tile.pixels),
        out.stride(), weights.stride(), rows.stride(), channels, regions, pixels, rows.shape[2],
        SLOPE=slope, **constants(tile, numbers, (out, weights), (rows,)),
    )  # fmt: skip


def _contexts(rows: Tensor, offset: Tensor, slope: float, weights: Tensor, out: Tensor) -> Tensor:
    """Fill `out` `[B, Y, N]` with y = rho(u w + offset), u the first K columns of the rows."""
    if out.numel():
        _contexts_launch(out, weights, rows, slope=slope)(out, weights, rows, offset)
    return out


@prepared
def _contexts_gradient_launch(dweights: Tensor, dy: Tensor, weights: Tensor, rows: Tensor, *, slope: float) -> Launch:
    batch, channels, pixels = dy.shape
    regions, numbers, scattered = weights.shape[1], numbers_of(dy), has_scattered_pixels(dweights, dy, weights)
    problem = Problem(numbers.itemsize, device_facts(dy.device), channels, regions, scattered=scattered)
    tile = tiles.CONTEXTS_GRADIENT.choose(problem)
    return Launch(
        ocr_block_contexts_gradient_kernel, batch * cdiv(pixels, tile.pixels),
        dweights.stride(), dy.stride(), weights.stride(), rows.stride(), channels, regions, pixels, rows.shape[2],
        SLOPE=slope, **constants(tile, numbers, (dweights, dy, weights), (rows,)),
    )  # fmt: skip


def _contexts_gradient_(dy: Tensor, rows: Tensor, offset: Tensor, slope: float, weights: Tensor) -> Tensor:
    """u' d `[B, K, N]` in the dtype of statistics; d, dy through the activation of u w + offset, takes its place."""
    dweights = empty_maps(dy, weights.shape[1], statistics_dtype(dy))
    if dweights.numel():
        _contexts_gradient_launch(dweights, dy, weights, rows, slope=slope)(dweights, dy, weights, rows, offset)
    return dweights


def _outer_sums(dy: Tensor, weights: Tensor, mean_weights: Tensor) -> tuple[Tensor, Tensor]:
    """sum_i dy_i (w_i - mean)' `[B, Y, K]` and sum_i dy_i `[B, Y]`, in the dtype of statistics."""
    if dy.dtype.itemsize > 2:  # a product's long chain of sums would be less exact than a sum
        return _wide_product(dy, (weights - mean_weights).mT), dy.sum(2)
    regions = weights.shape[1]
    columns = empty_maps(dy, round_up(regions + 1))
    torch.sub(weights, mean_weights, out=columns[:, :regions])
    columns[:, regions:].fill_(1)
    sums = _wide_product(dy, columns.mT)  # dy is read once
    return sums[..., :regions], sums[..., regions]


@prepared
def _softmax_gradient_launch(dscores: Tensor, dweights: Tensor, weights: Tensor, rows: Tensor) -> Launch:
    batch, regions, pixels = weights.shape
    numbers, scattered = numbers_of(weights), has_scattered_pixels(dscores, dweights, weights)
    problem = Problem(numbers.itemsize, device_facts(weights.device), regions, regions, scattered=scattered)
    tile = tiles.SOFTMAX_GRADIENT.choose(problem)
    return Launch(
        ocr_block_softmax_gradient_kernel, batch * cdiv(pixels, tile.pixels),
        dscores.stride(), dweights.stride(), weights.stride(), rows.stride(), regions, pixels, rows.shape[2],
        **constants(tile, numbers, (dscores, dweights, weights), (rows,)),
    )  # fmt: skip


def _softmax_gradient(dweights: Tensor, weights: Tensor, matrix: Tensor, column: Tensor) -> Tensor:
    """That of the scores `[B, K, N]`, in the dtype of the weights."""
    regions = weights.shape[1]
    dscores = empty_maps(weights, regions)
    if regions > tiles.MOST:
        w = weights.to(dweights.dtype)
        dw = torch.baddbmm(dweights + column, matrix, w)
        dw -= dw.gather(1, w.argmax(1, keepdim=True))
        return dscores.copy_(w * (dw - (w * dw).sum(1, keepdim=True)))
    if weights.numel():
        matrix = matrix.to(weights.dtype)
        rows, _ = aligned_rows(matrix, matrix[:, :0])
        maps = dscores, dweights, weights, rows
        _softmax_gradient_launch(*maps)(*maps, column.contiguous())
    return dscores


# The two passes


def forward(
    feats: Tensor, key: Tensor, pixel_in: Tensor, pixel_out: Tensor, fusing: Tensor, contexts: Tensor,
    vectors: Sequence[Tensor], mask: Tensor, settings: Settings,
) -> tuple[Tensor, ...]:  # fmt: skip
    """z `[B, O, *S]`, what the backward pass reads (h of both layers of phi, w, G [y, x]), and the statistics."""
    x, exact, mask = maps_of(feats), statistics_dtype(feats), mask.contiguous()
    layers = settings.layers([vector.contiguous() for vector in vectors])
    with torch.cuda.device_of(feats):
        hidden_in = hidden = _times(pixel_in, x)
        first = query = _norm(layers[0], hidden)
        if pixel_out.shape[0]:
            hidden_out = hidden = _times(pixel_out, _apply(first, hidden_in))
            second = query = _norm(layers[1], hidden)
        else:
            hidden_out, second = empty_maps(x, 0), Norm.of(layers[1])
        weights = _region_weights(query, hidden, key, settings.scale)
        y = _contexts_of(contexts.to(exact), weights, layers[2])
        up = _norm_of_contexts(layers[2], y)
        both = empty_maps(x, fusing.shape[1])
        inside, outside = _halves(both, up.factor.shape[0], settings)
        outside.copy_(x)
        _contexts(*_normalised(y, up, x.dtype), up.layer.slope, weights, inside)
        fused = _times(fusing, both)
        last = _norm(layers[3], fused)
        z = empty_in_format(feats, fusing.shape[0])
        _apply(last, fused, mask, z.flatten(2))
    maps = (each.unflatten(2, feats.shape[2:]) for each in (hidden_in, hidden_out, weights, fused))
    return z, *maps, statistics_of((first, second, up, last))


def _halves(tensor: Tensor, contexts: int, settings: Settings) -> tuple[Tensor, Tensor]:
    """What belongs to y and what to x, along the second dimension."""
    others = tensor.shape[1] - contexts
    if settings.context_first:
        return tensor[:, :contexts], tensor[:, contexts:]
    return tensor[:, others:], tensor[:, :others]


def backward(
    grad: Tensor, feats: Tensor, key: Tensor, pixel_in: Tensor, pixel_out: Tensor, fusing: Tensor, contexts: Tensor,
    vectors: Sequence[Tensor], mask: Tensor, saved: Sequence[Tensor], settings: Settings, needs: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of feats, in its dtype, and of key, the three matrices, contexts and the vectors.

    Products that only gradients take part in which are not needed are left out; such gradients are anything.
    """
    x, exact, mask = maps_of(feats), statistics_dtype(feats), mask.contiguous()
    layers = settings.layers([vector.contiguous() for vector in vectors])
    *maps, statistics = saved
    hidden_in, hidden_out, weights, fused = (each.flatten(2) for each in maps)
    need_feats, need_phi = needs[0], any((*needs[:4], *needs[6:10]))
    with torch.cuda.device_of(feats):
        first, second, up, last = split_statistics(layers, statistics.contiguous())
        # of z's norm, and of that of phi's first layer: one product makes the gradient of feats of both
        gradients = empty_maps(x, fusing.shape[0] + need_phi * pixel_in.shape[0])
        d, d_in = gradients[:, : fusing.shape[0]], gradients[:, fusing.shape[0] :]
        dlast = _gradients(last, grad.flatten(2), fused, d, mask)
        on_context, on_pixels = _halves(fusing, up.factor.shape[0], settings)
        y = _contexts_of(contexts.to(exact), weights, layers[2])
        rows, offset = _normalised(y, up, x.dtype)
        context_layer = rows, offset, up.layer.slope, weights
        dfusing = fusing.new_empty(fusing.shape, dtype=exact)
        few = tiles.FEW[numbers_of(x).itemsize]
        is_fused = weights.shape[1] <= few  # then only the gradient of the fusing matrix takes y
        inside = _contexts(*context_layer, empty_maps(x, up.factor.shape[0] if needs[4] or not is_fused else 0))
        if needs[4]:
            for half, of in zip(_halves(dfusing, up.factor.shape[0], settings), (inside, x), strict=True):
                _over_pixels(d, of, half)
        dy = _times(on_context.t(), d, empty_maps(x, up.factor.shape[0]))
        if is_fused:
            dweights = _contexts_gradient_(dy, *context_layer)
        else:
            u = rows[..., : weights.shape[1]]
            dweights = _wide_product(u.mT, activation_backward_(dy, inside, up.layer.slope))
        del inside
        outer, total = _outer_sums(dy, weights, y.mean_weights)
        del dy
        dup, slope, offset, _ = _added(up, y.gradient_sums(up, outer, total))
        dcontexts, matrix, column = y.backward(up, outer, total, slope, offset)

        dkey, dpixel_in, dpixel_out = (torch.empty_like(each, dtype=exact) for each in (key, pixel_in, pixel_out))
        dphi = [Gradients.anything(first), Gradients.anything(second)]
        if need_phi:
            query, hidden = (second, hidden_out) if pixel_out.shape[0] else (first, hidden_in)
            dscores = _softmax_gradient(dweights, weights, matrix, column)
            del dweights
            dkey = settings.scale * _wide_product(_apply(query, hidden), dscores.mT)
            dhidden = _times(settings.scale * key, dscores)
            del dscores
            if pixel_out.shape[0]:
                dout = empty_maps(x, pixel_out.shape[0])
                dphi[1] = _gradients(second, dhidden, hidden_out, dout)
                _over_pixels(dout, _apply(first, hidden_in), dpixel_out)
                dhidden = _times(pixel_out.t(), dout)
                del dout
            dphi[0] = _gradients(first, dhidden, hidden_in, d_in)
            if needs[2]:
                _over_pixels(d_in, x, dpixel_in)
        dfeats = empty_in_format(feats, x.shape[1] if need_feats else 0)
        if need_feats:
            matrices = (on_pixels.t(), pixel_in.t()) if need_phi else (on_pixels.t(),)
            _times(torch.cat(matrices, 1), gradients, dfeats.flatten(2))
    of_layers = [each for layer in (*dphi, dup, dlast) for each in (layer.gain, layer.shift)]
    return dfeats, dkey, dpixel_in, dpixel_out, dfusing, dcontexts, *of_layers
