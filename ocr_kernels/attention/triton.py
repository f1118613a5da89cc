"""Pixel-region attention in Triton: forward, and backward in two forms.

Every tensor is addressed as `[B, channels, N]` with three strides, so both memory formats are read in place.
A region tile covers all K regions up to 256, so the softmax over regions stays inside one program and the query
and the incoming gradient pass through memory once per kernel.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ocr_kernels.core.layout import statistics_dtype
from ocr_kernels.core.triton_device import aligned, image_of, load_tile, narrow, product, store_tile
from ocr_kernels.core.triton_host import (
    TL,
    Blocks,
    alignment,
    blocks_from,
    device_facts,
    dot_dtype,
    extent,
    input_precision,
    lift,
    padded,
    requires_int64_offsets,
    round_up,
    split,
)


@triton.jit
def channel_product(
    pixels, regions, k0, n0, CHANNELS, row_length, N,
    pixels_stride_c, pixels_stride_n, regions_stride_c, regions_stride_k,
    DOT: tl.constexpr, ACCUMULATOR: tl.constexpr, INPUT_PRECISION: tl.constexpr, INT64: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """sum over channels of regions[c, k] * pixels[c, n], a [BLOCK_K, BLOCK_N] tile."""
    total = tl.zeros([BLOCK_K, BLOCK_N], ACCUMULATOR)
    for c0 in range(0, CHANNELS, BLOCK_C):
        p = load_tile(pixels, c0, n0, CHANNELS, N, pixels_stride_c, pixels_stride_n, INT64, BLOCK_C, BLOCK_N)
        r = load_tile(
            regions, c0, k0, CHANNELS, row_length, regions_stride_c, regions_stride_k, INT64, BLOCK_C, BLOCK_K
        )
        total = product(tl.trans(r.to(DOT)), p.to(DOT), total, INPUT_PRECISION)
    return total


@triton.jit
def pixel_region_attention_forward_kernel(
    out,  # [B, V, N]
    query,  # [B, D, N]
    key,  # [B, D, row_length], of which K are regions
    value,  # [B, V, row_length]
    D,
    V,
    K,
    N,
    row_length,
    scale: tl.float64,
    out_stride_b,
    out_stride_v,
    out_stride_n,
    query_stride_b,
    query_stride_d,
    query_stride_n,
    key_stride_b,
    key_stride_d,
    key_stride_k,
    value_stride_b,
    value_stride_v,
    value_stride_k,
    REGION_TILES: tl.constexpr,  # ceil(K / BLOCK_K)
    DOT: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    LIFT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program owns a tile of pixels, all their regions and all their channels."""
    program = tl.program_id(0)
    n0 = (program % tl.cdiv(N, BLOCK_N)) * BLOCK_N
    image = tl.cast(program // tl.cdiv(N, BLOCK_N), tl.int64)
    N = aligned(N, ALIGNMENT)
    out, out_stride_v = image_of(out, image, out_stride_b, out_stride_v, ALIGNMENT)
    query, query_stride_d = image_of(query, image, query_stride_b, query_stride_d, ALIGNMENT)
    key += image * key_stride_b
    value += image * value_stride_b

    k = tl.arange(0, BLOCK_K)
    factor = tl.full((), scale, ACCUMULATOR)
    maximum = tl.full([BLOCK_N], float("-inf"), ACCUMULATOR)
    total = tl.zeros([BLOCK_N], ACCUMULATOR)
    rounded = tl.zeros([BLOCK_K, BLOCK_N], DOT)
    for k0 in range(0, REGION_TILES * BLOCK_K, BLOCK_K):
        scores = channel_product(
            query, key, k0, n0, D, row_length, N, query_stride_d, query_stride_n, key_stride_d, key_stride_k,
            DOT, ACCUMULATOR, INPUT_PRECISION, INT64, BLOCK_C, BLOCK_K, BLOCK_N,
        )  # fmt: skip
        scores = tl.where((k0 + k < K)[:, None], scores * factor, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 0))
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)  # no region above -inf yet
        rounded = narrow(tl.exp(scores - shift[None, :]) * LIFT, DOT)
        decay = tl.exp(maximum - shift)
        total = total * decay + tl.sum(rounded.to(ACCUMULATOR), 0)  # of what enters the product
        maximum = new_maximum

    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    for v0 in range(0, V, BLOCK_C):
        context = tl.zeros([BLOCK_C, BLOCK_N], ACCUMULATOR)
        for k0 in range(0, REGION_TILES * BLOCK_K, BLOCK_K):
            if REGION_TILES > 1:  # too many regions to have kept their weights
                scores = channel_product(
                    query, key, k0, n0, D, row_length, N, query_stride_d, query_stride_n, key_stride_d, key_stride_k,
                    DOT, ACCUMULATOR, INPUT_PRECISION, INT64, BLOCK_C, BLOCK_K, BLOCK_N,
                )  # fmt: skip
                scores = tl.where((k0 + k < K)[:, None], scores * factor, float("-inf"))
                rounded = narrow(tl.exp(scores - shift[None, :]) * LIFT, DOT)
            region = load_tile(value, v0, k0, V, row_length, value_stride_v, value_stride_k, INT64, BLOCK_C, BLOCK_K)
            context = product(region.to(DOT), rounded, context, INPUT_PRECISION)
        store_tile(out, context / total[None, :], v0, n0, V, N, out_stride_v, out_stride_n, INT64, BLOCK_C, BLOCK_N)


FORWARD_TILES = {
    2: ((64, 128, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 1), (64, 64, 8, 1)),
    4: ((32, 32, 8, 2), (32, 32, 4, 2), (32, 32, 8, 2), (32, 16, 8, 2), (32, 16, 8, 2)),
    8: ((16, 16, 8, 1),) * 5,
}


def forward_blocks(channels: int, value_channels: int, regions: int, itemsize: int) -> Blocks:
    """Tiles of the forward kernel: all regions up to 256, then pixels, then channels."""
    blocks = blocks_from(FORWARD_TILES, max(channels, value_channels), regions, itemsize)
    return blocks if blocks.channels > 32 else blocks._replace(pixels=min(blocks.pixels, 64))


def forward(out: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
    """Fill `out` [B, V, *S], in its own strides."""
    q, y = query.flatten(2), out.flatten(2)
    batch, channels, pixels = q.shape
    _, value_channels, regions = value.shape
    dtype = dot_dtype(q)
    blocks = forward_blocks(channels, value_channels, regions, dtype.itemsize)
    with torch.cuda.device_of(q):
        key, value = _with_aligned_rows(key, value)
        pixel_region_attention_forward_kernel[(batch * triton.cdiv(pixels, blocks.pixels),)](
            y, q, key, value, channels, value_channels, regions, pixels, key.shape[2], scale,
            *y.stride(), *q.stride(), *key.stride(), *value.stride(),
            REGION_TILES=triton.cdiv(regions, blocks.regions),
            DOT=TL[dtype],
            ACCUMULATOR=TL[statistics_dtype(q)],
            LIFT=lift(dtype),
            INPUT_PRECISION=input_precision(),
            ALIGNMENT=alignment(q, y),
            INT64=_int64(blocks, (q, y), (key, value)),
            **blocks.arguments(),
        )  # fmt: skip


def _with_aligned_rows(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """More than 32 regions in rows of a multiple of 16, zeros at the end: then one address serves for several."""
    batch, channels, regions = key.shape
    if regions <= 32 or regions % 16 == 0:
        return key, value
    rows = key.new_zeros((batch, channels + value.shape[1], round_up(regions, 16)))
    torch.cat((key, value), 1, out=rows[..., :regions])
    return rows[:, :channels], rows[:, channels:]


def _int64(blocks: Blocks, pixel_tensors: tuple[Tensor, ...], region_tensors: tuple[Tensor, ...]) -> bool:
    return requires_int64_offsets(
        *(extent(blocks.channels, t.stride(1), blocks.pixels, t.stride(2)) for t in pixel_tensors),
        *(extent(blocks.channels, t.stride(1), blocks.regions, t.stride(2)) for t in region_tensors),
    )


@triton.jit
def pixel_region_attention_backward_kernel(
    dquery,  # [B, D, N]
    partial,  # [B, splits, D + V, row_length]: dkey above dvalue, each split's sum over its pixels
    grad,  # [B, V, N]
    query,  # [B, D, N]
    key,  # [B, D, K]
    value,  # [B, V, K]
    D,
    V,
    K,
    N,
    row_length,
    chunk,
    splits,
    scale: tl.float64,
    dquery_stride_b,
    dquery_stride_d,
    dquery_stride_n,
    grad_stride_b,
    grad_stride_v,
    grad_stride_n,
    query_stride_b,
    query_stride_d,
    query_stride_n,
    key_stride_b,
    key_stride_d,
    key_stride_k,
    value_stride_b,
    value_stride_v,
    value_stride_k,
    NEED_QUERY: tl.constexpr,
    NEED_KEY: tl.constexpr,
    NEED_VALUE: tl.constexpr,
    DOT: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    LIFT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_D: tl.constexpr,  # >= D
    BLOCK_V: tl.constexpr,  # >= V
    BLOCK_K: tl.constexpr,  # >= K
    BLOCK_N: tl.constexpr,
):
    """All three gradients in one pass, where dkey and dvalue fit in one program's registers."""
    program = tl.program_id(0)  # image * splits + split
    start = (program % splits) * chunk
    image = tl.cast(program // splits, tl.int64)
    N = aligned(N, ALIGNMENT)
    dquery, dquery_stride_d = image_of(dquery, image, dquery_stride_b, dquery_stride_d, ALIGNMENT)
    grad, grad_stride_v = image_of(grad, image, grad_stride_b, grad_stride_v, ALIGNMENT)
    query, query_stride_d = image_of(query, image, query_stride_b, query_stride_d, ALIGNMENT)
    key += image * key_stride_b
    value += image * value_stride_b

    in_k = tl.arange(0, BLOCK_K) < K
    factor = tl.full((), scale, ACCUMULATOR)
    key_tile = load_tile(key, 0, 0, D, K, key_stride_d, key_stride_k, INT64, BLOCK_D, BLOCK_K).to(DOT)
    value_tile = load_tile(value, 0, 0, V, K, value_stride_v, value_stride_k, INT64, BLOCK_V, BLOCK_K).to(DOT)
    dkey = tl.zeros([BLOCK_D, BLOCK_K], ACCUMULATOR)
    dvalue = tl.zeros([BLOCK_V, BLOCK_K], ACCUMULATOR)
    for n0 in range(start, min(start + chunk, N), BLOCK_N):
        q = load_tile(query, 0, n0, D, N, query_stride_d, query_stride_n, INT64, BLOCK_D, BLOCK_N).to(DOT)
        dy = load_tile(grad, 0, n0, V, N, grad_stride_v, grad_stride_n, INT64, BLOCK_V, BLOCK_N).to(DOT)
        scores = product(tl.trans(key_tile), q, tl.zeros([BLOCK_K, BLOCK_N], ACCUMULATOR), INPUT_PRECISION) * factor
        scores = tl.where(in_k[:, None], scores, float("-inf"))
        weights = tl.exp(scores - tl.max(scores, 0)[None, :])
        weights /= tl.sum(weights, 0)[None, :]
        if NEED_QUERY or NEED_KEY:
            dweights = product(tl.trans(value_tile), dy, tl.zeros([BLOCK_K, BLOCK_N], ACCUMULATOR), INPUT_PRECISION)
            dscores = narrow(weights * (dweights - tl.sum(weights * dweights, 0)[None, :]), DOT)
        if NEED_QUERY:
            dq = product(key_tile, dscores, tl.zeros([BLOCK_D, BLOCK_N], ACCUMULATOR), INPUT_PRECISION) * factor
            store_tile(dquery, dq, 0, n0, D, N, dquery_stride_d, dquery_stride_n, INT64, BLOCK_D, BLOCK_N)
        if NEED_KEY:
            dkey = product(q, tl.trans(dscores), dkey, INPUT_PRECISION)
        if NEED_VALUE:
            dvalue = product(dy, tl.trans(narrow(weights * LIFT, DOT)), dvalue, INPUT_PRECISION)

    partial += tl.cast(program, tl.int64) * (D + V) * row_length
    if NEED_KEY:
        store_tile(partial, dkey * factor, 0, 0, D, row_length, row_length, 1, False, BLOCK_D, BLOCK_K)
    if NEED_VALUE:
        store_tile(partial, dvalue / LIFT, D, 0, D + V, row_length, row_length, 1, False, BLOCK_V, BLOCK_K)


@triton.jit
def score_tiles(
    query, key, grad, value, k0, n0, D, V, K, N, row_length, factor,
    query_stride_d, query_stride_n, key_stride_d, key_stride_k,
    grad_stride_v, grad_stride_n, value_stride_v, value_stride_k,
    NEED_SCORES: tl.constexpr, DOT: tl.constexpr, INPUT_PRECISION: tl.constexpr, INT64: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The scores and, where their gradient is needed, dw = V^T dY: [BLOCK_K, BLOCK_N] tiles."""
    scores = channel_product(
        query, key, k0, n0, D, row_length, N, query_stride_d, query_stride_n, key_stride_d, key_stride_k,
        DOT, factor.dtype, INPUT_PRECISION, INT64, BLOCK_C, BLOCK_K, BLOCK_N,
    )  # fmt: skip
    scores = tl.where((k0 + tl.arange(0, BLOCK_K) < K)[:, None], scores * factor, float("-inf"))
    dweights = scores
    if NEED_SCORES:
        dweights = channel_product(
            grad, value, k0, n0, V, row_length, N, grad_stride_v, grad_stride_n, value_stride_v, value_stride_k,
            DOT, factor.dtype, INPUT_PRECISION, INT64, BLOCK_C, BLOCK_K, BLOCK_N,
        )  # fmt: skip
    return scores, dweights


@triton.jit
def pixel_region_attention_backward_scores_kernel(
    weights_map,  # [B, K, N]: w, lifted
    dscores_map,  # [B, K, N]: w * (dw - sum over k of w * dw)
    grad,  # [B, V, N]
    query,  # [B, D, N]
    key,  # [B, D, row_length], of which K are regions
    value,  # [B, V, row_length]
    D,
    V,
    K,
    N,
    row_length,
    scale: tl.float64,
    grad_stride_b,
    grad_stride_v,
    grad_stride_n,
    query_stride_b,
    query_stride_d,
    query_stride_n,
    key_stride_b,
    key_stride_d,
    key_stride_k,
    value_stride_b,
    value_stride_v,
    value_stride_k,
    NEED_SCORES: tl.constexpr,
    NEED_VALUE: tl.constexpr,
    REGION_TILES: tl.constexpr,
    DOT: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    LIFT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    MAP_ALIGNMENT: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The two maps that the gradients of many regions are products of; one program owns a tile of pixels."""
    program = tl.program_id(0)
    n0 = (program % tl.cdiv(N, BLOCK_N)) * BLOCK_N
    image = tl.cast(program // tl.cdiv(N, BLOCK_N), tl.int64)
    N = aligned(N, MAP_ALIGNMENT)
    grad, grad_stride_v = image_of(grad, image, grad_stride_b, grad_stride_v, ALIGNMENT)
    query, query_stride_d = image_of(query, image, query_stride_b, query_stride_d, ALIGNMENT)
    key += image * key_stride_b
    value += image * value_stride_b
    weights_map += image * K * N
    dscores_map += image * K * N

    factor = tl.full((), scale, ACCUMULATOR)
    maximum = tl.full([BLOCK_N], float("-inf"), ACCUMULATOR)
    shift = maximum
    total = tl.zeros([BLOCK_N], ACCUMULATOR)
    row = tl.zeros([BLOCK_N], ACCUMULATOR)  # sum over k of w * dw
    scores = tl.zeros([BLOCK_K, BLOCK_N], ACCUMULATOR)
    dweights = scores
    for k0 in range(0, REGION_TILES * BLOCK_K, BLOCK_K):
        scores, dweights = score_tiles(
            query, key, grad, value, k0, n0, D, V, K, N, row_length, factor,
            query_stride_d, query_stride_n, key_stride_d, key_stride_k,
            grad_stride_v, grad_stride_n, value_stride_v, value_stride_k,
            NEED_SCORES, DOT, INPUT_PRECISION, INT64, BLOCK_C, BLOCK_K, BLOCK_N,
        )  # fmt: skip
        new_maximum = tl.maximum(maximum, tl.max(scores, 0))
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)  # no region above -inf yet
        decay = tl.exp(maximum - shift)
        weights = tl.exp(scores - shift[None, :])
        total = total * decay + tl.sum(weights, 0)
        if NEED_SCORES:
            row = row * decay + tl.sum(weights * dweights, 0)
        maximum = new_maximum
    row /= total
    for k0 in range(0, REGION_TILES * BLOCK_K, BLOCK_K):
        if REGION_TILES > 1:  # too many regions to have kept their tiles
            scores, dweights = score_tiles(
                query, key, grad, value, k0, n0, D, V, K, N, row_length, factor,
                query_stride_d, query_stride_n, key_stride_d, key_stride_k,
                grad_stride_v, grad_stride_n, value_stride_v, value_stride_k,
                NEED_SCORES, DOT, INPUT_PRECISION, INT64, BLOCK_C, BLOCK_K, BLOCK_N,
            )  # fmt: skip
        weights = tl.exp(scores - shift[None, :]) / total[None, :]
        if NEED_VALUE:
            store_tile(weights_map, weights * LIFT, k0, n0, K, N, N, 1, INT64, BLOCK_K, BLOCK_N)
        if NEED_SCORES:
            store_tile(dscores_map, weights * (dweights - row[None, :]), k0, n0, K, N, N, 1, INT64, BLOCK_K, BLOCK_N)


@triton.jit
def pixel_region_attention_backward_regions_kernel(
    partial,  # [B, splits, C, row_length]: each split's sum over its pixels
    pixels,  # [B, C, N]: the query or the incoming gradient
    region_map,  # [B, K, N]: the scores' gradient or the weights
    C,
    K,
    N,
    row_length,
    chunk,
    splits,
    factor: tl.float64,
    pixels_stride_b,
    pixels_stride_c,
    pixels_stride_n,
    DOT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    MAP_ALIGNMENT: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """factor * sum over pixels of pixels[c, n] * region_map[k, n]: dkey or dvalue."""
    program = tl.program_id(0)
    c0 = (program % tl.cdiv(C, BLOCK_C)) * BLOCK_C
    program //= tl.cdiv(C, BLOCK_C)
    k0 = (program % tl.cdiv(K, BLOCK_K)) * BLOCK_K
    program //= tl.cdiv(K, BLOCK_K)  # image * splits + split
    start = (program % splits) * chunk
    image = tl.cast(program // splits, tl.int64)
    N = aligned(N, MAP_ALIGNMENT)
    pixels, pixels_stride_c = image_of(pixels, image, pixels_stride_b, pixels_stride_c, ALIGNMENT)
    region_map += image * K * N

    ACCUMULATOR: tl.constexpr = partial.dtype.element_ty
    total = tl.zeros([BLOCK_C, BLOCK_K], ACCUMULATOR)
    for n0 in range(start, min(start + chunk, N), BLOCK_N):
        p = load_tile(pixels, c0, n0, C, N, pixels_stride_c, pixels_stride_n, INT64, BLOCK_C, BLOCK_N)
        r = load_tile(region_map, k0, n0, K, N, N, 1, INT64, BLOCK_K, BLOCK_N)
        total = product(p.to(DOT), tl.trans(r.to(DOT)), total, INPUT_PRECISION)
    total *= tl.full((), factor, ACCUMULATOR)
    partial += tl.cast(program, tl.int64) * C * row_length
    store_tile(partial, total, c0, k0, C, row_length, row_length, 1, False, BLOCK_C, BLOCK_K)


SCORES_TILES = {
    2: ((64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2), (64, 64, 8, 1)),
    4: ((32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2), (32, 16, 8, 2), (16, 16, 8, 2)),
    8: ((16, 16, 8, 1),) * 5,
}
REGIONS_TILES = {
    2: ((128, 32, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 1), (128, 32, 8, 2)),
    4: ((64, 16, 8, 2),) * 5,
    8: ((32, 16, 8, 1),) * 5,
}


def scores_blocks(channels: int, value_channels: int, regions: int, itemsize: int) -> Blocks:
    """Tiles of the maps' kernel: all regions up to 256, then pixels, then channels."""
    return blocks_from(SCORES_TILES, max(channels, value_channels), regions, itemsize)


def regions_blocks(channels: int, regions: int, itemsize: int) -> Blocks:
    """Tiles of the sums over pixels: all regions up to 256, then as many channels as registers hold."""
    return blocks_from(REGIONS_TILES, channels, regions, itemsize)


class OnePassBlocks(NamedTuple):
    """Tile sizes of the one-pass backward: all channels and regions, and some pixels."""

    channels: int
    value_channels: int
    regions: int
    pixels: int


def one_pass_blocks(
    channels: int, value_channels: int, regions: int, itemsize: int, shared_memory: int
) -> OnePassBlocks | None:
    """Tiles of the one-pass backward; None where dkey and dvalue do not fit in a program's registers."""
    block_d, block_v, block_k = (padded(size, 1 << 30) for size in (channels, value_channels, regions))
    tile_bytes = 32768 if shared_memory >= 99000 else 16384
    row_bytes = (block_d + block_v) * itemsize  # of a pixel's query and incoming gradient
    if row_bytes * block_k > 32768 or row_bytes * 16 > tile_bytes:
        return None
    return OnePassBlocks(block_d, block_v, block_k, next(n for n in (64, 32, 16) if row_bytes * n <= tile_bytes))


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
    q, dy, dq = query.flatten(2), grad.flatten(2), None if dquery is None else dquery.flatten(2)
    channels, (_, value_channels, regions) = q.shape[1], value.shape
    shared_memory = device_facts(q.device).shared_memory
    blocks = one_pass_blocks(channels, value_channels, regions, dot_dtype(q).itemsize, shared_memory)
    run = _backward_in_maps if blocks is None else functools.partial(_backward_in_one_pass, blocks)
    with torch.cuda.device_of(q):
        run(dq, dkey, dvalue, dy, q, key, value, scale)


def _backward_in_one_pass(
    blocks: OnePassBlocks,
    dquery: Tensor | None,
    dkey: Tensor | None,
    dvalue: Tensor | None,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
) -> None:
    batch, channels, pixels = query.shape
    _, value_channels, regions = value.shape
    dtype = dot_dtype(query)
    chunk, splits = split(pixels, blocks.pixels, batch, device_facts(query.device).multiprocessors)
    dq = query if dquery is None else dquery
    row_length = round_up(regions, 16)
    partial = query.new_empty((batch, splits, channels + value_channels, row_length), dtype=statistics_dtype(query))
    pixel_region_attention_backward_kernel[(batch * splits,)](
        dq, partial, grad, query, key, value,
        channels, value_channels, regions, pixels, row_length, chunk, splits, scale,
        *dq.stride(), *grad.stride(), *query.stride(), *key.stride(), *value.stride(),
        NEED_QUERY=dquery is not None,
        NEED_KEY=dkey is not None,
        NEED_VALUE=dvalue is not None,
        DOT=TL[dtype],
        ACCUMULATOR=TL[partial.dtype],
        LIFT=lift(dtype),
        INPUT_PRECISION=input_precision(),
        ALIGNMENT=alignment(dq, query, grad),
        INT64=requires_int64_offsets(
            *(extent(t.shape[1], t.stride(1), blocks.pixels, t.stride(2)) for t in (dq, query, grad)),
            *(extent(t.shape[1], t.stride(1), regions, t.stride(2)) for t in (key, value)),
        ),
        BLOCK_D=blocks.channels,
        BLOCK_V=blocks.value_channels,
        BLOCK_K=blocks.regions,
        BLOCK_N=blocks.pixels,
        num_warps=8,
        num_stages=1,
    )  # fmt: skip
    if dkey is not None:
        dkey.copy_(partial[:, :, :channels, :regions].sum(1))
    if dvalue is not None:
        dvalue.copy_(partial[:, :, channels:, :regions].sum(1))


def _backward_in_maps(
    dquery: Tensor | None,
    dkey: Tensor | None,
    dvalue: Tensor | None,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
) -> None:
    batch, channels, pixels = query.shape
    _, value_channels, regions = value.shape
    need_scores = dquery is not None or dkey is not None
    weights = query.new_empty((batch, regions, pixels) if dvalue is not None else 1)
    dscores = query.new_empty((batch, regions, pixels) if need_scores else 1)
    dtype = dot_dtype(query)
    blocks = scores_blocks(channels, value_channels, regions, dtype.itemsize)
    key_rows, value_rows = _with_aligned_rows(key, value)
    pixel_region_attention_backward_scores_kernel[(batch * triton.cdiv(pixels, blocks.pixels),)](
        weights, dscores, grad, query, key_rows, value_rows,
        channels, value_channels, regions, pixels, key_rows.shape[2], scale,
        *grad.stride(), *query.stride(), *key_rows.stride(), *value_rows.stride(),
        NEED_SCORES=need_scores,
        NEED_VALUE=dvalue is not None,
        REGION_TILES=triton.cdiv(regions, blocks.regions),
        DOT=TL[dtype],
        ACCUMULATOR=TL[statistics_dtype(query)],
        LIFT=lift(query.dtype),  # of the map's dtype
        INPUT_PRECISION=input_precision(),
        ALIGNMENT=alignment(query, grad),
        MAP_ALIGNMENT=math.gcd(pixels, 16),
        INT64=_int64(blocks, (query, grad), (key_rows, value_rows)) or extent(blocks.regions, pixels, 1, 1) >= 2**31,
        **blocks.arguments(),
    )  # fmt: skip
    if dquery is not None:
        torch.baddbmm(dquery, key, dscores, beta=0, alpha=scale, out=dquery)
    if dkey is not None:
        _sum_over_pixels(dkey, query, dscores, scale)
    if dvalue is not None:
        _sum_over_pixels(dvalue, grad, weights, 1.0 / lift(query.dtype))


def _sum_over_pixels(result: Tensor, pixels: Tensor, region_map: Tensor, factor: float) -> None:
    batch, channels, length = pixels.shape
    regions = region_map.shape[1]
    dtype = dot_dtype(pixels)
    blocks = regions_blocks(channels, regions, dtype.itemsize)
    tiles = triton.cdiv(channels, blocks.channels) * triton.cdiv(regions, blocks.regions)
    chunk, splits = split(length, blocks.pixels, batch * tiles, 2 * device_facts(pixels.device).multiprocessors)
    row_length = round_up(regions, 16)
    partial = pixels.new_empty((batch, splits, channels, row_length), dtype=statistics_dtype(pixels))
    pixel_region_attention_backward_regions_kernel[(batch * splits * tiles,)](
        partial, pixels, region_map, channels, regions, length, row_length, chunk, splits, factor, *pixels.stride(),
        DOT=TL[dtype],
        INPUT_PRECISION=input_precision(),
        ALIGNMENT=alignment(pixels),
        MAP_ALIGNMENT=math.gcd(length, 16),
        INT64=_int64(blocks, (pixels,), (region_map.transpose(1, 2),)),
        **blocks.arguments(),
    )  # fmt: skip
    result.copy_(partial[..., :regions].sum(1))
