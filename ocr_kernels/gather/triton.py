"""The spatial gather in Triton: forward, and backward.

Every tensor is addressed as `[B, channels, N]` with its strides, so both memory formats are read in place.
A program holds all K regions up to 256, so feats pass through memory once in either direction.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ocr_kernels.core.layout import statistics_dtype
from ocr_kernels.core.tiles import NEVER_FUSED, Problem, padded
from ocr_kernels.core.triton_device import (
    add_product,
    exponential,
    finite,
    image_of,
    load_tile,
    narrow,
    part_of_sum,
    product,
    rows_of,
    split_of_program,
    store_tile,
    tile_of_program,
)
from ocr_kernels.core.triton_host import (
    alignment,
    cdiv,
    constants,
    device_facts,
    has_scattered_pixels,
    numbers_of,
    round_up,
    split,
)
from ocr_kernels.core.triton_launch import Launch, prepared
from ocr_kernels.gather import tiles


@triton.jit
def scores_of(logits, k0, n0, factor, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """factor * M, a [BLOCK_K, BLOCK_N] tile, with -inf where there is no pixel."""
    m = load_tile(logits, k0, n0, BLOCK_K, BLOCK_N)
    return tl.where((n0 + tl.arange(0, BLOCK_N) < logits.width)[None, :], m.to(factor.dtype) * factor, float("-inf"))


@triton.jit
def add_pixels(sums, total, rounded_total, x, scores, maximum, NUMBERS: tl.constexpr):
    """The sums of a split and of its weights, with those of a tile of pixels."""
    weights = exponential(scores - finite(maximum)[:, None])
    rounded = narrow(weights * NUMBERS.lift, NUMBERS.dot)
    total += tl.sum(weights, 1)
    rounded_total += tl.sum(rounded.to(NUMBERS.accumulator), 1)
    return add_product(sums, x, tl.trans(rounded), NUMBERS), total, rounded_total


@triton.jit
def store_split(
    partial, partial_stats, program, sums, maximum, total, rounded_total, C, K, row_length, c0, k0,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    program = tl.cast(program, tl.int64)
    k = k0 + tl.arange(0, BLOCK_K)
    stats = partial_stats + program * 3 * K + k
    tl.store(stats, maximum, mask=k < K)
    tl.store(stats + K, total, mask=k < K)
    tl.store(stats + 2 * K, rounded_total, mask=k < K)
    store_tile(rows_of(partial + program * C * row_length, C, row_length, row_length), sums, c0, k0)


@triton.jit(do_not_specialize=["splits"])
def spatial_gather_forward_kernel(
    partial,  # [B, splits, C, row_length]: sum over the split's pixels of exp(score - maximum) x, not normalised
    partial_stats,  # [B, splits, 3, K]: the split's maximum, sum of weights, sum of weights as they were rounded
    feats,  # [B, C, N]
    logits,  # [B, K, N]
    feats_strides, logits_strides,
    C, K, N, row_length, split_length, splits, scale: tl.float64,
    NUMBERS: tl.constexpr, ALIGNMENT: tl.constexpr, INT64: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of channels, a split of the pixels, and all regions: their maxima are found on the way."""
    c0, k0, program, start = split_of_program(C, K, splits, split_length, BLOCK_C, BLOCK_K)
    image = tl.cast(program // splits, tl.int64)
    feats = image_of(feats, feats_strides, image, C, N, ALIGNMENT, INT64)
    logits = image_of(logits, logits_strides, image, K, N, ALIGNMENT, INT64)

    factor = tl.full((), scale, NUMBERS.accumulator)
    maximum = tl.full([BLOCK_K], float("-inf"), NUMBERS.accumulator)
    total = tl.zeros([BLOCK_K], NUMBERS.accumulator)
    rounded_total = tl.zeros([BLOCK_K], NUMBERS.accumulator)
    sums = tl.zeros([BLOCK_C, BLOCK_K], NUMBERS.accumulator)
    for n0 in range(start, min(start + split_length, logits.width), BLOCK_N):
        scores = scores_of(logits, k0, n0, factor, BLOCK_K, BLOCK_N)
        x = load_tile(feats, c0, n0, BLOCK_C, BLOCK_N)
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        decay = exponential(maximum - finite(new_maximum))
        maximum = new_maximum
        sums, total, rounded_total = add_pixels(
            sums * decay[None, :], total * decay, rounded_total * decay, x, scores, maximum, NUMBERS
        )
    store_split(partial, partial_stats, program, sums, maximum, total, rounded_total, C, K, row_length, c0, k0, BLOCK_K)


@triton.jit
def highest_scores(extremes, k0, K, factor, BLOCK_K: tl.constexpr):
    k = k0 + tl.arange(0, BLOCK_K)
    return tl.load(extremes + k, mask=k < K, other=0.0).to(factor.dtype) * factor


@triton.jit(do_not_specialize=["splits"])
def spatial_gather_forward_many_kernel(
    partial, partial_stats,  # as above, of the whole image's maximum
    extremes,  # [B, K]: the logit with the highest score
    feats,  # [B, C, N]
    logits,  # [B, K, N]
    feats_strides, logits_strides,
    C, K, N, row_length, split_length, splits, scale: tl.float64,
    NUMBERS: tl.constexpr, ALIGNMENT: tl.constexpr, INT64: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The same of more regions, BLOCK_K and then BLOCK_L; their maxima are known, so that no sum is rescaled."""
    c0, k0, program, start = split_of_program(C, K, splits, split_length, BLOCK_C, BLOCK_K + BLOCK_L)
    image = tl.cast(program // splits, tl.int64)
    feats = image_of(feats, feats_strides, image, C, N, ALIGNMENT, INT64)
    logits = image_of(logits, logits_strides, image, K, N, ALIGNMENT, INT64)

    factor = tl.full((), scale, NUMBERS.accumulator)
    end = min(start + split_length, logits.width)
    l0 = k0 + BLOCK_K
    maximum = highest_scores(extremes + image * K, k0, K, factor, BLOCK_K)
    last_maximum = highest_scores(extremes + image * K, l0, K, factor, BLOCK_L)
    total = tl.zeros([BLOCK_K], NUMBERS.accumulator)
    rounded_total = tl.zeros([BLOCK_K], NUMBERS.accumulator)
    sums = tl.zeros([BLOCK_C, BLOCK_K], NUMBERS.accumulator)
    last_total = tl.zeros([BLOCK_L], NUMBERS.accumulator)
    last_rounded_total = tl.zeros([BLOCK_L], NUMBERS.accumulator)
    last_sums = tl.zeros([BLOCK_C, BLOCK_L], NUMBERS.accumulator)
    for n0 in range(start, end, BLOCK_N):
        scores = scores_of(logits, k0, n0, factor, BLOCK_K, BLOCK_N)
        last_scores = scores_of(logits, l0, n0, factor, BLOCK_L, BLOCK_N)
        x = load_tile(feats, c0, n0, BLOCK_C, BLOCK_N)
        sums, total, rounded_total = add_pixels(sums, total, rounded_total, x, scores, maximum, NUMBERS)
        last_sums, last_total, last_rounded_total = add_pixels(
            last_sums, last_total, last_rounded_total, x, last_scores, last_maximum, NUMBERS
        )
    store_split(partial, partial_stats, program, sums, maximum, total, rounded_total, C, K, row_length, c0, k0, BLOCK_K)
    store_split(
        partial, partial_stats, program, last_sums, last_maximum, last_total, last_rounded_total,
        C, K, row_length, c0, l0, BLOCK_L,
    )  # fmt: skip


@triton.jit(do_not_specialize=["splits"])
def spatial_gather_merge_kernel(
    out,  # [B, C, K]
    stats,  # [B, C + 2, K]: `out` before its rounding, the softmax's maxima and its sums
    partial,  # [B, splits, C, row_length]
    partial_stats,  # [B, splits, 3, K]
    out_strides,
    C, K, row_length, splits,
    BLOCK_S: tl.constexpr,  # >= splits: all at once, for many independent loads
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add up the splits in a fixed order, rescaled to their common maximum, and normalise them."""
    c0, k0, program, _ = split_of_program(C, K, 1, 0, BLOCK_C, BLOCK_K)
    image = tl.cast(program, tl.int64)
    split = tl.arange(0, BLOCK_S)
    c, k = c0 + tl.arange(0, BLOCK_C), k0 + tl.arange(0, BLOCK_K)
    rows = partial + ((image * splits + split)[:, None] * C + c[None, :]) * row_length
    in_rows = (split < splits)[:, None] & (c < C)[None, :]
    pieces = tl.load(rows[:, :, None] + k, mask=in_rows[:, :, None] & (k < row_length), other=0.0)
    rows = partial_stats + (image * splits + split)[:, None] * 3 * K + k[None, :]
    inside = (split < splits)[:, None] & (k < K)[None, :]
    maxima = tl.load(rows, mask=inside, other=float("-inf"))
    totals = tl.load(rows + K, mask=inside, other=0.0)
    rounded_totals = tl.load(rows + 2 * K, mask=inside, other=0.0)

    maximum = tl.max(maxima, 0)
    decay = tl.exp(maxima - finite(maximum)[None, :])
    factors = decay / tl.sum(decay * rounded_totals, 0)[None, :]
    result = tl.sum(pieces * factors[:, None, :], 0)
    stats += image * (C + 2) * K
    in_k = (k < K) & (c0 == 0)
    tl.store(stats + C * K + k, maximum, mask=in_k)
    tl.store(stats + (C + 1) * K + k, tl.sum(decay * totals, 0), mask=in_k)
    store_tile(rows_of(stats, C, K, K), result, c0, k0)
    store_tile(image_of(out, out_strides, image, C, K, 1, False), result, c0, k0)


def forward(out: Tensor, stats: Tensor, feats: Tensor, logits: Tensor, scale: float) -> None:
    """Fill `out` [B, C, K], and `stats` [B, C + 2, K]: `out` before its rounding, the softmax's maxima and its sums."""
    x, m = feats.flatten(2), logits.flatten(2)
    batch, regions = m.shape[:2]
    with torch.cuda.device_of(x):
        launch, merge, splits = _forward_launches(out, x, m, scale=scale)
        partial = stats.new_empty((batch, splits, x.shape[1], round_up(regions)))
        partial_stats = stats.new_empty((batch, splits, 3, regions))
        if regions <= tiles.FEW:
            launch(partial, partial_stats, x, m)
        else:
            launch(partial, partial_stats, m.amax(2) if scale >= 0 else m.amin(2), x, m)
        merge(out, stats, partial, partial_stats)


@prepared
def _forward_launches(out: Tensor, x: Tensor, m: Tensor, *, scale: float) -> tuple[Launch, Launch, int]:
    """That of the splits, that of their sum, and how many there are of each image."""
    batch, channels, pixels = x.shape
    regions, row_length = m.shape[1], round_up(m.shape[1])
    numbers, device = numbers_of(x, m), device_facts(x.device)
    scattered = alignment(x, m) == 1 or m.dtype.itemsize > numbers.itemsize
    problem = Problem(numbers.itemsize, device, channels, regions, scattered=scattered)
    few = regions <= tiles.FEW
    kernel = spatial_gather_forward_kernel if few else spatial_gather_forward_many_kernel
    tile = (tiles.FORWARD if few else tiles.FORWARD_MANY).choose(problem)
    programs = cdiv(channels, tile.channels) * cdiv(regions, tile.all_regions) * batch
    split_length, splits = split(pixels, tile.pixels, programs, tile.resident * device.multiprocessors)
    block_s, block_k = padded(splits), padded(regions, 32)
    block_c = max(1, 65536 // (block_s * block_k * statistics_dtype(x, m).itemsize))
    launch = Launch(
        kernel, programs * splits,
        x.stride(), m.stride(), channels, regions, pixels, row_length, split_length, splits, scale,
        **constants(tile, numbers, (x, m)),
    )  # fmt: skip
    merge = Launch(
        spatial_gather_merge_kernel, batch * cdiv(channels, block_c) * cdiv(regions, block_k),
        out.stride(), channels, regions, row_length, splits,
        BLOCK_S=block_s, BLOCK_C=block_c, BLOCK_K=block_k, num_warps=8, **NEVER_FUSED,
    )  # fmt: skip
    return launch, merge, splits


@triton.jit
def spatial_gather_delta_kernel(
    padded_grad,  # [B, C, row_length]: grad with zeros after its K regions
    delta,  # [B, K]: sum over c of grad * F, the term that all pixels of a region share in the softmax's derivative
    peaks,  # [B, K], filled with -1
    grad,  # [B, C, K]
    stats,  # [B, C + 2, K], of which the first C rows are F
    grad_strides,
    C, K, row_length,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    image = tl.cast(tl.program_id(0) // tl.cdiv(K, BLOCK_K), tl.int64)
    k0 = tl.program_id(0) % tl.cdiv(K, BLOCK_K) * BLOCK_K
    grad = image_of(grad, grad_strides, image, C, K, 1, False)
    result = rows_of(stats + image * (C + 2) * K, C, K, K)
    padded_grad = rows_of(padded_grad + image * C * row_length, C, row_length, row_length)
    total = tl.zeros([BLOCK_K], delta.dtype.element_ty)
    for c0 in range(0, C, BLOCK_C):
        g = load_tile(grad, c0, k0, BLOCK_C, BLOCK_K)
        total += tl.sum(g.to(total.dtype) * load_tile(result, c0, k0, BLOCK_C, BLOCK_K), 0)
        store_tile(padded_grad, g, c0, k0)
    k = k0 + tl.arange(0, BLOCK_K)
    tl.store(delta + image * K + k, total, mask=k < K)
    tl.store(peaks + image * K + k, tl.full([BLOCK_K], -1, tl.int32), mask=k < K)


@triton.jit
def softmax_over_pixels(logits, stats, k0, n0, factor, K, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """P = exp(scale * M - maximum) / sum, a [BLOCK_K, BLOCK_N] tile."""
    k = k0 + tl.arange(0, BLOCK_K)
    m = load_tile(logits, k0, n0, BLOCK_K, BLOCK_N)
    maximum = tl.load(stats + k, mask=k < K, other=0.0)
    total = tl.load(stats + K + k, mask=k < K, other=1.0)
    return exponential(m.to(factor.dtype) * factor - maximum[:, None]) / total[:, None]


@triton.jit
def spatial_gather_backward_kernel(
    dfeats,  # [B, C, N]
    dlogits,  # [B, K, N]
    grad,  # [B, C, row_length]
    feats,  # [B, C, N]
    logits,  # [B, K, N]
    stats,  # [B, C + 2, K], of which the last two rows are maxima and sums
    delta,  # [B, K]
    peaks,  # [B, K]: the pixel with more than half of a region's weight, if there is one
    others,  # [B, tiles of pixels, K]: sum over the tile of P * (dF^T X - delta), less the peak's
    dfeats_strides, dlogits_strides, feats_strides, logits_strides,
    C, K, N, row_length, scale: tl.float64,
    NEED_FEATS: tl.constexpr,  # only of one tile of regions
    NEED_LOGITS: tl.constexpr,
    REGION_TILES: tl.constexpr,  # ceil(K / BLOCK_K)
    NUMBERS: tl.constexpr, ALIGNMENT: tl.constexpr, INT64: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of regions and pixels: dX = dF P, dM = scale * P * (dF^T X - delta).

    A softmax's gradients add up to zero: that of a peak, in which nearly equal numbers are subtracted, is left to
    `spatial_gather_peaks_kernel`.
    """
    tile, n0, image = tile_of_program(REGION_TILES, N, BLOCK_N)
    k0 = tile * BLOCK_K
    dfeats = image_of(dfeats, dfeats_strides, image, C, N, ALIGNMENT, INT64)
    dlogits = image_of(dlogits, dlogits_strides, image, K, N, ALIGNMENT, INT64)
    grad = rows_of(grad + image * C * row_length, C, row_length, row_length)
    feats = image_of(feats, feats_strides, image, C, N, ALIGNMENT, INT64)
    logits = image_of(logits, logits_strides, image, K, N, ALIGNMENT, INT64)

    factor = tl.full((), scale, NUMBERS.accumulator)
    weights = softmax_over_pixels(logits, stats + (image * (C + 2) + C) * K, k0, n0, factor, K, BLOCK_K, BLOCK_N)
    k = k0 + tl.arange(0, BLOCK_K)
    if NEED_LOGITS:
        n = n0 + tl.arange(0, BLOCK_N)
        weights = tl.where((n < N)[None, :], weights, 0.0)
        peak = tl.max(tl.where(weights > 0.5, n[None, :], -1), 1)
        tl.store(peaks + image * K + k, peak, mask=(peak >= 0) & (k < K))
    rounded = narrow(weights * NUMBERS.lift, NUMBERS.dot)
    dweights = tl.zeros([BLOCK_K, BLOCK_N], NUMBERS.accumulator)
    for c0 in range(0, C, BLOCK_C):
        g = load_tile(grad, c0, k0, BLOCK_C, BLOCK_K)
        if NEED_LOGITS:
            x = load_tile(feats, c0, n0, BLOCK_C, BLOCK_N)
            dweights = add_product(dweights, tl.trans(g), x, NUMBERS)
        if NEED_FEATS:
            store_tile(dfeats, product(g, rounded, NUMBERS) / NUMBERS.lift, c0, n0)
    if NEED_LOGITS:
        shared = tl.load(delta + image * K + k, mask=k < K, other=0.0)
        dscores = weights * (dweights - shared[:, None])
        total = tl.sum(tl.where(weights > 0.5, dscores - dscores, dscores), 1)  # 0 of a peak, or NaN
        program = tl.cast(tl.program_id(0) // REGION_TILES, tl.int64)  # image * tiles of pixels + tile
        tl.store(others + program * K + k, total, mask=k < K)
        store_tile(dlogits, factor * dscores, k0, n0)


@triton.jit(do_not_specialize=["pixel_tiles"])
def spatial_gather_peaks_kernel(
    dlogits,  # [B, K, N]
    peaks,  # [B, K]
    others,  # [B, pixel_tiles, K]
    dlogits_strides,
    K, pixel_tiles, scale: tl.float64,
    BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The gradient of a region's peak: minus the sum of its other pixels'."""
    image = tl.cast(tl.program_id(0) // tl.cdiv(K, BLOCK_K), tl.int64)
    k = tl.program_id(0) % tl.cdiv(K, BLOCK_K) * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_K], others.dtype.element_ty)
    others += image * pixel_tiles * K + k[None, :]
    for t0 in range(0, pixel_tiles, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        inside = (t < pixel_tiles)[:, None] & (k < K)[None, :]
        total += tl.sum(tl.load(others + tl.cast(t, tl.int64)[:, None] * K, mask=inside, other=0.0), 0)
    peak = tl.load(peaks + image * K + k, mask=k < K, other=-1)
    row = image * dlogits_strides[0] + tl.cast(k, tl.int64) * dlogits_strides[1]
    dpeak = narrow(-tl.full((), scale, total.dtype) * total, dlogits.dtype.element_ty)
    tl.store(dlogits + row + tl.cast(peak, tl.int64) * dlogits_strides[2], dpeak, mask=peak >= 0)


@triton.jit
def spatial_gather_backward_feats_kernel(
    dfeats,  # [B, C, N]
    grad,  # [B, C, row_length]
    logits,  # [B, K, N]
    stats,  # [B, C + 2, K]
    dfeats_strides, logits_strides,
    C, K, N, row_length, scale: tl.float64,
    NUMBERS: tl.constexpr, ALIGNMENT: tl.constexpr, INT64: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dX = dF P of more regions than a program holds; a program owns a tile of channels and pixels."""
    tile, n0, image = tile_of_program(tl.cdiv(C, BLOCK_C), N, BLOCK_N)
    c0 = tile * BLOCK_C
    dfeats = image_of(dfeats, dfeats_strides, image, C, N, ALIGNMENT, INT64)
    grad = rows_of(grad + image * C * row_length, C, row_length, row_length)
    logits = image_of(logits, logits_strides, image, K, N, ALIGNMENT, INT64)
    stats += (image * (C + 2) + C) * K

    factor = tl.full((), scale, NUMBERS.accumulator)
    dx = tl.zeros([BLOCK_C, BLOCK_N], NUMBERS.accumulator)
    for k0 in range(0, K, BLOCK_K):
        weights = softmax_over_pixels(logits, stats, k0, n0, factor, K, BLOCK_K, BLOCK_N)
        g = load_tile(grad, c0, k0, BLOCK_C, BLOCK_K)
        dx += part_of_sum(product(g, narrow(weights * NUMBERS.lift, NUMBERS.dot), NUMBERS), n0, N)
    store_tile(dfeats, dx / NUMBERS.lift, c0, n0)


def backward(
    dfeats: Tensor | None,
    dlogits: Tensor | None,
    grad: Tensor,
    feats: Tensor,
    logits: Tensor,
    stats: Tensor,
    scale: float,
) -> None:
    """Fill the gradients that are wanted, in their own strides."""
    x, m, stats = feats.flatten(2), logits.flatten(2), stats.contiguous()  # an image's are expanded by vmap
    batch, regions = m.shape[:2]
    dx = x if dfeats is None else dfeats.flatten(2)
    dm = m if dlogits is None else dlogits.flatten(2)
    needs = dfeats is not None, dlogits is not None
    with torch.cuda.device_of(x):
        launches = _backward_launches(dx, dm, grad, x, m, needs=needs, scale=scale)
        rows = grad.new_empty((batch, x.shape[1], round_up(regions)))
        delta = stats.new_empty((batch, regions))
        peaks = stats.new_empty((batch, regions), dtype=torch.int32)
        others = stats.new_empty((batch, launches.pixel_tiles, regions) if needs[1] else 1)
        launches.delta(rows, delta, peaks, grad, stats)
        if launches.pixels is not None:
            launches.pixels(dx, dm, rows, x, m, stats, delta, peaks, others)
        if launches.peaks is not None:
            launches.peaks(dm, peaks, others)
        if launches.feats is not None:
            launches.feats(dx, rows, m, stats)


class Backward(NamedTuple):
    """The launches of a backward pass that are wanted, in their order, and how many tiles of pixels there are."""

    delta: Launch
    pixels: Launch | None
    peaks: Launch | None
    feats: Launch | None
    pixel_tiles: int


@prepared
def _backward_launches(
    dx: Tensor, dm: Tensor, grad: Tensor, x: Tensor, m: Tensor, *, needs: tuple[bool, bool], scale: float
) -> Backward:
    batch, channels, pixels = x.shape
    regions, row_length = m.shape[1], round_up(m.shape[1])
    need_feats, need_logits = needs
    numbers = numbers_of(x, m)
    scattered = has_scattered_pixels(x, m, dx, dm)
    problem = Problem(numbers.itemsize, device_facts(x.device), channels, regions, scattered=scattered)
    tile = tiles.BACKWARD.choose(problem)
    region_tiles, pixel_tiles = cdiv(regions, tile.regions), cdiv(pixels, tile.pixels)
    sizes = channels, regions, pixels, row_length, scale
    options = constants(tile, numbers, (x, m, dx, dm))
    delta = Launch(
        spatial_gather_delta_kernel, batch * cdiv(regions, 16), grad.stride(), channels, regions, row_length,
        BLOCK_C=2048 // statistics_dtype(x, m).itemsize, BLOCK_K=16, num_warps=8, **NEVER_FUSED,
    )  # fmt: skip
    over_pixels = over_peaks = over_feats = None
    if region_tiles == 1 or need_logits:
        over_pixels = Launch(
            spatial_gather_backward_kernel, batch * pixel_tiles * region_tiles,
            dx.stride(), dm.stride(), x.stride(), m.stride(), *sizes,
            NEED_FEATS=region_tiles == 1 and need_feats, NEED_LOGITS=need_logits, REGION_TILES=region_tiles, **options,
        )  # fmt: skip
    if need_logits:  # few regions a program, since there are few programs, and many tiles at once
        over_peaks = Launch(
            spatial_gather_peaks_kernel, batch * cdiv(regions, 4), dm.stride(), regions, pixel_tiles, scale,
            BLOCK_K=4, BLOCK_T=512, num_warps=8, **NEVER_FUSED,
        )  # fmt: skip
    if region_tiles > 1 and need_feats:
        programs = batch * pixel_tiles * cdiv(channels, tile.channels)
        strides = dx.stride(), m.stride()
        over_feats = Launch(spatial_gather_backward_feats_kernel, programs, *strides, *sizes, **options)
    return Backward(delta, over_pixels, over_peaks, over_feats, pixel_tiles)
