"""The spatial gather in Triton: forward, its reduction over splits, and backward.

Every tensor is addressed as `[B, channels, N]` with three strides, so both memory formats are read in place.
A region tile covers all K regions up to 256, so feats pass through memory once in either direction.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

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
def spatial_gather_forward_kernel(
    feats,  # [B, C, N]
    logits,  # [B, K, N]
    partial,  # [B, splits, C, row_length]: sum over the split's pixels of exp(score - maximum) x, not normalised
    partial_stats,  # [B, splits, 3, K]: the split's maximum, sum of weights, sum of weights as they were rounded
    C,
    K,
    N,
    row_length,
    chunk,
    splits,
    scale: tl.float64,
    feats_stride_b,
    feats_stride_c,
    feats_stride_n,
    logits_stride_b,
    logits_stride_k,
    logits_stride_n,
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
    # channel tiles vary fastest, so that programs which share a tile of logits run together
    program = tl.program_id(0)
    c0 = (program % tl.cdiv(C, BLOCK_C)) * BLOCK_C
    program //= tl.cdiv(C, BLOCK_C)
    k0 = (program % tl.cdiv(K, BLOCK_K)) * BLOCK_K
    program //= tl.cdiv(K, BLOCK_K)  # image * splits + split
    start = (program % splits) * chunk
    image = tl.cast(program // splits, tl.int64)
    N = aligned(N, ALIGNMENT)
    feats, feats_stride_c = image_of(feats, image, feats_stride_b, feats_stride_c, ALIGNMENT)
    logits, logits_stride_k = image_of(logits, image, logits_stride_b, logits_stride_k, ALIGNMENT)

    k = tl.arange(0, BLOCK_K)
    n = tl.arange(0, BLOCK_N)
    in_k = k0 + k < K
    factor = tl.full((), scale, ACCUMULATOR)
    maximum = tl.full([BLOCK_K], float("-inf"), ACCUMULATOR)
    total = tl.zeros([BLOCK_K], ACCUMULATOR)
    rounded_total = tl.zeros([BLOCK_K], ACCUMULATOR)
    sums = tl.zeros([BLOCK_C, BLOCK_K], ACCUMULATOR)
    for n0 in range(start, min(start + chunk, N), BLOCK_N):
        in_n = n0 + n < N
        m = load_tile(logits, k0, n0, K, N, logits_stride_k, logits_stride_n, INT64, BLOCK_K, BLOCK_N)
        x = load_tile(feats, c0, n0, C, N, feats_stride_c, feats_stride_n, INT64, BLOCK_C, BLOCK_N).to(DOT)
        scores = tl.where(in_n[None, :], m.to(ACCUMULATOR) * factor, float("-inf"))  # [BLOCK_K, BLOCK_N]
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)  # no pixel above -inf yet
        weights = tl.exp(scores - shift[:, None])
        rounded = narrow(weights * LIFT, DOT)
        decay = tl.exp(maximum - shift)
        total = total * decay + tl.sum(weights, 1)
        rounded_total = rounded_total * decay + tl.sum(rounded.to(ACCUMULATOR), 1)
        sums = product(x, tl.trans(rounded), sums * decay[None, :], INPUT_PRECISION)
        maximum = new_maximum

    stats = partial_stats + tl.cast(program, tl.int64) * 3 * K + k0 + k
    tl.store(stats, maximum, mask=in_k)
    tl.store(stats + K, total, mask=in_k)
    tl.store(stats + 2 * K, rounded_total, mask=in_k)
    partial += tl.cast(program, tl.int64) * C * row_length
    store_tile(partial, sums, c0, k0, C, row_length, row_length, 1, False, BLOCK_C, BLOCK_K)


@triton.jit
def spatial_gather_reduce_kernel(
    partial,  # [B, splits, C, row_length]
    partial_stats,  # [B, splits, 3, K]
    out,  # [B, C, K]
    stats,  # [B, 2, K]
    C,
    K,
    row_length,
    splits,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Join the splits in a fixed order: their sums rescaled to the common maximum, then normalised."""
    image = tl.cast(tl.program_id(1), tl.int64)
    k0 = (tl.program_id(0) % tl.cdiv(K, BLOCK_K)) * BLOCK_K
    c0 = (tl.program_id(0) // tl.cdiv(K, BLOCK_K)) * BLOCK_C
    s = tl.arange(0, BLOCK_S)
    c = c0 + tl.arange(0, BLOCK_C)
    k = k0 + tl.arange(0, BLOCK_K)
    in_k = k < K
    partial += image * splits * C * row_length
    partial_stats += image * splits * 3 * K

    ACCUMULATOR: tl.constexpr = partial.dtype.element_ty
    maximum = tl.full([BLOCK_K], float("-inf"), ACCUMULATOR)
    for s0 in range(0, splits, BLOCK_S):
        rows = tl.cast(s0 + s, tl.int64)[:, None] * 3 * K + k[None, :]
        inside = (s0 + s < splits)[:, None] & in_k[None, :]
        maximum = tl.maximum(maximum, tl.max(tl.load(partial_stats + rows, mask=inside, other=float("-inf")), 0))
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.zeros([BLOCK_K], ACCUMULATOR)
    rounded_total = tl.zeros([BLOCK_K], ACCUMULATOR)
    sums = tl.zeros([BLOCK_C, BLOCK_K], ACCUMULATOR)
    for s0 in range(0, splits, BLOCK_S):
        rows = tl.cast(s0 + s, tl.int64)[:, None] * 3 * K + k[None, :]
        inside = (s0 + s < splits)[:, None] & in_k[None, :]
        decay = tl.exp(tl.load(partial_stats + rows, mask=inside, other=float("-inf")) - shift[None, :])
        total += tl.sum(decay * tl.load(partial_stats + rows + K, mask=inside, other=0.0), 0)
        rounded_total += tl.sum(decay * tl.load(partial_stats + rows + 2 * K, mask=inside, other=0.0), 0)
        elements = (tl.cast(s0 + s, tl.int64)[:, None] * C + c[None, :])[:, :, None] * row_length + k[None, None, :]
        pieces = tl.load(partial + elements, mask=inside[:, None, :] & (c < C)[None, :, None], other=0.0)
        sums += tl.sum(decay[:, None, :] * pieces, 0)  # over [BLOCK_S, BLOCK_C, BLOCK_K]
    store_tile(out + image * C * K, sums / rounded_total[None, :], c0, k0, C, K, K, 1, False, BLOCK_C, BLOCK_K)
    stats += image * 2 * K + k
    tl.store(stats, maximum, mask=in_k & (c0 == 0))
    tl.store(stats + K, total, mask=in_k & (c0 == 0))


FORWARD_TILES = {
    2: ((128, 32, 4, 2), (128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 1), (128, 32, 8, 2)),
    4: ((64, 16, 8, 2), (64, 16, 8, 2), (64, 16, 8, 1), (64, 16, 8, 1), (64, 16, 8, 1)),
    8: (*((32, 16, 8, 1),) * 3, (16, 16, 8, 1), (32, 16, 8, 1)),
}


def forward_blocks(channels: int, regions: int, itemsize: int, wide_logits: bool, shared_memory: int) -> Blocks:
    """Tiles of the forward kernel: all regions up to 256, then as many channels as registers hold.

    `wide_logits` says that a tile of logits takes more of them: for wider elements, or an address for each.
    """
    blocks = blocks_from(FORWARD_TILES, channels, regions, itemsize)
    if blocks.regions == 256 and wide_logits:
        return blocks._replace(channels=max(16, blocks.channels // 2))
    if blocks.regions == 256 and itemsize == 2 and shared_memory < 200000:  # tiles of 32 pixels pay with wgmma
        return blocks._replace(pixels=16, num_warps=16)
    return blocks


def forward(out: Tensor, stats: Tensor, feats: Tensor, logits: Tensor, scale: float) -> None:
    """Fill `out` [B, C, K] and the softmax's row maxima and sums, `stats` [B, 2, K]."""
    x, m = feats.flatten(2), logits.flatten(2)
    batch, channels, pixels = x.shape
    regions = m.shape[1]
    dtype = dot_dtype(x, m)
    wide_logits = m.dtype.itemsize > dtype.itemsize or m.stride(2) != 1
    blocks = forward_blocks(channels, regions, dtype.itemsize, wide_logits, device_facts(x.device).shared_memory)
    tiles = triton.cdiv(channels, blocks.channels) * triton.cdiv(regions, blocks.regions)
    chunk, splits = split(pixels, blocks.pixels, batch * tiles, 2 * device_facts(x.device).multiprocessors)
    row_length = round_up(regions, 16)
    partial = stats.new_empty((batch, splits, channels, row_length))
    partial_stats = stats.new_empty((batch, splits, 3, regions))
    with torch.cuda.device_of(x):
        spatial_gather_forward_kernel[(batch * splits * tiles,)](
            x, m, partial, partial_stats, channels, regions, pixels, row_length, chunk, splits, scale,
            *x.stride(), *m.stride(),
            DOT=TL[dtype],
            ACCUMULATOR=TL[stats.dtype],
            LIFT=lift(dtype),
            INPUT_PRECISION=input_precision(),
            ALIGNMENT=alignment(x, m),
            INT64=requires_int64_offsets(
                extent(blocks.channels, x.stride(1), blocks.pixels, x.stride(2)),
                extent(blocks.regions, m.stride(1), blocks.pixels, m.stride(2)),
            ),
            **blocks.arguments(),
        )  # fmt: skip
        block_k = padded(regions, 32)
        spatial_gather_reduce_kernel[(triton.cdiv(channels, 8) * triton.cdiv(regions, block_k), batch)](
            partial, partial_stats, out, stats, channels, regions, row_length, splits,
            BLOCK_S=8,
            BLOCK_C=8,
            BLOCK_K=block_k,
        )  # fmt: skip


@triton.jit
def spatial_gather_row_kernel(
    padded_grad,  # [B, C, row_length]: grad with zeros after its K regions
    row,  # [B, K]: sum over c of grad * out, the term that all pixels of a region share in the softmax's derivative
    grad,  # [B, C, K]
    out,  # [B, C, K]
    C,
    K,
    row_length,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    image = tl.cast(tl.program_id(1), tl.int64)
    k0 = tl.program_id(0) * BLOCK_K
    ACCUMULATOR: tl.constexpr = row.dtype.element_ty
    grad += image * C * K
    out += image * C * K
    padded_grad += image * C * row_length
    total = tl.zeros([BLOCK_K], ACCUMULATOR)
    for c0 in range(0, C, BLOCK_C):
        g = load_tile(grad, c0, k0, C, K, K, 1, False, BLOCK_C, BLOCK_K)
        f = load_tile(out, c0, k0, C, K, K, 1, False, BLOCK_C, BLOCK_K)
        total += tl.sum(g.to(ACCUMULATOR) * f.to(ACCUMULATOR), 0)
        store_tile(padded_grad, g, c0, k0, C, row_length, row_length, 1, False, BLOCK_C, BLOCK_K)
    k = k0 + tl.arange(0, BLOCK_K)
    tl.store(row + image * K + k, total, mask=k < K)


@triton.jit
def spatial_gather_weights(
    logits, stats, k0, n0, K, N, factor, stride_k, stride_n,
    INT64: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """P = exp(scale * M - maximum) / sum, a [BLOCK_K, BLOCK_N] tile of the softmax over pixels."""
    k = tl.arange(0, BLOCK_K)
    in_k = k0 + k < K
    m = load_tile(logits, k0, n0, K, N, stride_k, stride_n, INT64, BLOCK_K, BLOCK_N)
    maximum = tl.load(stats + k0 + k, mask=in_k, other=0.0)
    total = tl.load(stats + K + k0 + k, mask=in_k, other=1.0)
    return tl.exp(m.to(factor.dtype) * factor - maximum[:, None]) / total[:, None]


@triton.jit
def spatial_gather_backward_kernel(
    dfeats,  # [B, C, N]
    dlogits,  # [B, K, N]
    grad,  # [B, C, row_length]
    feats,  # [B, C, N]
    logits,  # [B, K, N]
    stats,  # [B, 2, K]
    row,  # [B, K]
    C,
    K,
    N,
    row_length,
    scale: tl.float64,
    dfeats_stride_b,
    dfeats_stride_c,
    dfeats_stride_n,
    dlogits_stride_b,
    dlogits_stride_k,
    dlogits_stride_n,
    feats_stride_b,
    feats_stride_c,
    feats_stride_n,
    logits_stride_b,
    logits_stride_k,
    logits_stride_n,
    NEED_FEATS: tl.constexpr,
    NEED_LOGITS: tl.constexpr,
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
    """One program owns a tile of pixels: dX = dF P, dM = scale * P * (dF^T X - row)."""
    program = tl.program_id(0)
    n0 = (program % tl.cdiv(N, BLOCK_N)) * BLOCK_N
    image = tl.cast(program // tl.cdiv(N, BLOCK_N), tl.int64)
    N = aligned(N, ALIGNMENT)
    dfeats, dfeats_stride_c = image_of(dfeats, image, dfeats_stride_b, dfeats_stride_c, ALIGNMENT)
    dlogits, dlogits_stride_k = image_of(dlogits, image, dlogits_stride_b, dlogits_stride_k, ALIGNMENT)
    grad += image * C * row_length
    feats, feats_stride_c = image_of(feats, image, feats_stride_b, feats_stride_c, ALIGNMENT)
    logits, logits_stride_k = image_of(logits, image, logits_stride_b, logits_stride_k, ALIGNMENT)
    stats += image * 2 * K
    row += image * K

    k = tl.arange(0, BLOCK_K)
    factor = tl.full((), scale, ACCUMULATOR)
    for k0 in range(0, REGION_TILES * BLOCK_K, BLOCK_K):
        weights = spatial_gather_weights(
            logits, stats, k0, n0, K, N, factor, logits_stride_k, logits_stride_n, INT64, BLOCK_K, BLOCK_N
        )
        rounded = narrow(weights * LIFT, DOT)
        dweights = tl.zeros([BLOCK_K, BLOCK_N], ACCUMULATOR)
        for c0 in range(0, C, BLOCK_C):
            g = load_tile(grad, c0, k0, C, row_length, row_length, 1, False, BLOCK_C, BLOCK_K).to(DOT)
            if NEED_LOGITS:
                x = load_tile(feats, c0, n0, C, N, feats_stride_c, feats_stride_n, INT64, BLOCK_C, BLOCK_N).to(DOT)
                dweights = product(tl.trans(g), x, dweights, INPUT_PRECISION)
            if NEED_FEATS and REGION_TILES == 1:
                dx = product(g, rounded, tl.zeros([BLOCK_C, BLOCK_N], ACCUMULATOR), INPUT_PRECISION) / LIFT
                store_tile(dfeats, dx, c0, n0, C, N, dfeats_stride_c, dfeats_stride_n, INT64, BLOCK_C, BLOCK_N)
        if NEED_LOGITS:
            shared = tl.load(row + k0 + k, mask=k0 + k < K, other=0.0)
            dm = factor * weights * (dweights - shared[:, None])
            store_tile(dlogits, dm, k0, n0, K, N, dlogits_stride_k, dlogits_stride_n, INT64, BLOCK_K, BLOCK_N)
    if NEED_FEATS and REGION_TILES > 1:
        for c0 in range(0, C, BLOCK_C):
            dx = tl.zeros([BLOCK_C, BLOCK_N], ACCUMULATOR)
            for k0 in range(0, REGION_TILES * BLOCK_K, BLOCK_K):
                weights = spatial_gather_weights(
                    logits, stats, k0, n0, K, N, factor, logits_stride_k, logits_stride_n, INT64, BLOCK_K, BLOCK_N
                )
                g = load_tile(grad, c0, k0, C, row_length, row_length, 1, False, BLOCK_C, BLOCK_K).to(DOT)
                dx = product(g, narrow(weights * LIFT, DOT), dx, INPUT_PRECISION)
            store_tile(dfeats, dx / LIFT, c0, n0, C, N, dfeats_stride_c, dfeats_stride_n, INT64, BLOCK_C, BLOCK_N)


BACKWARD_TILES = {
    2: ((64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 1), (64, 32, 8, 1), (64, 32, 8, 1)),
    4: ((32, 32, 4, 2), (32, 32, 8, 2), (16, 16, 8, 2), (32, 16, 8, 1), (16, 16, 8, 1)),
    8: ((16, 16, 8, 1),) * 5,
}


def backward_blocks(channels: int, regions: int, itemsize: int, shared_memory: int) -> Blocks:
    """Tiles of the backward kernel: all regions up to 256, then pixels, then channels."""
    most_regions = 128 if itemsize == 8 and shared_memory < 81920 else 256
    blocks = blocks_from(BACKWARD_TILES, channels, regions, itemsize, most_regions)
    return blocks._replace(pixels=64, num_stages=2) if itemsize == 2 and shared_memory >= 200000 else blocks


def backward(
    dfeats: Tensor | None,
    dlogits: Tensor | None,
    grad: Tensor,
    feats: Tensor,
    logits: Tensor,
    out: Tensor,
    stats: Tensor,
    scale: float,
) -> None:
    """Fill the gradients that are wanted, in their own strides."""
    x, m, g = feats.flatten(2), logits.flatten(2), grad.contiguous()
    batch, channels, pixels = x.shape
    regions = m.shape[1]
    dx = x if dfeats is None else dfeats.flatten(2)
    dm = m if dlogits is None else dlogits.flatten(2)
    dtype = dot_dtype(x, m)
    blocks = backward_blocks(channels, regions, dtype.itemsize, device_facts(x.device).shared_memory)
    row_length = round_up(regions, 16)
    padded_grad = g.new_empty((batch, channels, row_length))
    row = stats.new_empty((batch, regions))
    with torch.cuda.device_of(x):
        spatial_gather_row_kernel[(row_length // 16, batch)](
            padded_grad, row, g, out, channels, regions, row_length, BLOCK_C=128, BLOCK_K=16
        )
        spatial_gather_backward_kernel[(batch * triton.cdiv(pixels, blocks.pixels),)](
            dx, dm, padded_grad, x, m, stats, row, channels, regions, pixels, row_length, scale,
            *dx.stride(), *dm.stride(), *x.stride(), *m.stride(),
            NEED_FEATS=dfeats is not None,
            NEED_LOGITS=dlogits is not None,
            REGION_TILES=triton.cdiv(regions, blocks.regions),
            DOT=TL[dtype],
            ACCUMULATOR=TL[stats.dtype],
            LIFT=lift(dtype),
            INPUT_PRECISION=input_precision(),
            ALIGNMENT=alignment(x, m, dx, dm),
            INT64=requires_int64_offsets(
                *(extent(blocks.channels, t.stride(1), blocks.pixels, t.stride(2)) for t in (x, dx)),
                *(extent(blocks.regions, t.stride(1), blocks.pixels, t.stride(2)) for t in (m, dm)),
            ),
            **blocks.arguments(),
        )  # fmt: skip
