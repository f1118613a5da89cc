"""The inference head in Triton: two kernels from pixels to z, and a third one to class logits.

The first makes every pixel's softmax over the regions, the second the fusing product with y rebuilt in every tile, so
feats pass through memory twice and neither y nor anything of D channels is stored. Where that does not pay (float32,
whose products take no matrix units, and D or K above 256) the same products run one by one over chunks of pixels.

Every tensor of pixels is addressed as `[B, channels, N]` with three strides, so both memory formats are read in place.
Tiles are `[pixels, channels]`: what one product leaves in registers then enters the next one from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ocr_kernels.core.triton_device import aligned, image_of, load_tile, narrow, product, store_tile
from ocr_kernels.core.triton_host import (
    TL,
    alignment,
    device_facts,
    dot_dtype,
    extent,
    input_precision,
    lift,
    padded,
    requires_int64_offsets,
    round_up,
)


@triton.jit
def add_channels(
    total, pixels, weight, n0, o0, N, OUTPUTS, CHANNELS,
    pixels_stride_n, pixels_stride_c, weight_stride_o, weight_stride_c,
    DOT: tl.constexpr, INPUT_PRECISION: tl.constexpr, INT64: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """total + sum over channels of pixels[c, n] * weight[o, c], a [BLOCK_N, BLOCK_O] tile."""
    for c0 in range(0, CHANNELS, BLOCK_C):
        x = load_tile(pixels, n0, c0, N, CHANNELS, pixels_stride_n, pixels_stride_c, INT64, BLOCK_N, BLOCK_C)
        w = load_tile(weight, c0, o0, CHANNELS, OUTPUTS, weight_stride_c, weight_stride_o, False, BLOCK_C, BLOCK_O)
        total = product(x.to(DOT), w.to(DOT), total, INPUT_PRECISION)
    return total


@triton.jit
def add_bias(total, bias, o0, OUTPUTS, BLOCK_O: tl.constexpr):
    """total + bias[o], a [pixels, BLOCK_O] tile."""
    o = o0 + tl.arange(0, BLOCK_O)
    return total + tl.load(bias + o, mask=o < OUTPUTS, other=0.0)[None, :]


@triton.jit
def positive(x):
    """ReLU, which keeps NaN."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def softmax_weights(scores, maximum, total, LIFT: tl.constexpr):
    """The softmax's weights [pixels, BLOCK_K] of scores whose maximum and sum over all regions are given, lifted."""
    return tl.exp(scores - maximum[:, None]) / (total / LIFT)[:, None]


@triton.jit
def ocr_head_weights_kernel(
    weights,  # [B, N, row_length]: the softmax over K regions, lifted, and zeros after them
    feats,  # [B, C, N]
    key,  # [B, D, row_length]
    pixel_in,  # [D, C]
    pixel_in_bias,  # [D]
    pixel_out,  # [D, D]
    pixel_out_bias,  # [D]
    C,
    D,
    K,
    N,
    row_length,
    scale: tl.float64,
    feats_stride_b,
    feats_stride_c,
    feats_stride_n,
    DOT: tl.constexpr,
    LIFT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,  # all of D
    BLOCK_O: tl.constexpr,  # channels of q that are made at a time
    BLOCK_K: tl.constexpr,  # all of K
    BLOCK_N: tl.constexpr,
):
    """One program owns a tile of pixels: phi, the scores and their softmax, with nothing stored in between."""
    program = tl.program_id(0)
    n0 = (program % tl.cdiv(N, BLOCK_N)) * BLOCK_N
    image = tl.cast(program // tl.cdiv(N, BLOCK_N), tl.int64)
    weights += image * N * row_length
    key += image * D * row_length
    N = aligned(N, ALIGNMENT)
    feats, feats_stride_c = image_of(feats, image, feats_stride_b, feats_stride_c, ALIGNMENT)

    hidden = add_channels(
        tl.zeros([BLOCK_N, BLOCK_D], tl.float32), feats, pixel_in, n0, 0, N, D, C, feats_stride_n, feats_stride_c, C, 1,
        DOT, INPUT_PRECISION, INT64, BLOCK_C, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    hidden = narrow(positive(add_bias(hidden, pixel_in_bias, 0, D, BLOCK_D)), DOT)
    scores = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for d0 in range(0, D, BLOCK_O):
        w = load_tile(pixel_out, 0, d0, D, D, 1, D, False, BLOCK_D, BLOCK_O).to(DOT)
        q = product(hidden, w, tl.zeros([BLOCK_N, BLOCK_O], tl.float32), INPUT_PRECISION)
        q = narrow(positive(add_bias(q, pixel_out_bias, d0, D, BLOCK_O)), DOT)
        r = load_tile(key, d0, 0, D, row_length, row_length, 1, False, BLOCK_O, BLOCK_K).to(DOT)
        scores = product(q, r, scores, INPUT_PRECISION)
    in_k = tl.arange(0, BLOCK_K) < K
    scores = tl.where(in_k[None, :], scores * tl.full((), scale, tl.float32), float("-inf"))
    maximum = tl.max(scores, 1)
    w = softmax_weights(scores, maximum, tl.sum(tl.exp(scores - maximum[:, None]), 1), LIFT)
    store_tile(weights, w, n0, 0, N, row_length, row_length, 1, False, BLOCK_N, BLOCK_K)


@triton.jit
def ocr_head_softmax_kernel(
    weights,  # [B, N, row_length]: the softmax over K regions, lifted, and zeros after them
    query,  # [B, N, D]
    key,  # [B, D, row_length]
    D,
    K,
    N,
    row_length,
    scale: tl.float64,
    REGION_TILES: tl.constexpr,  # ceil(K / BLOCK_K)
    DOT: tl.constexpr,
    LIFT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The same weights of a query that is stored; one program owns a tile of pixels."""
    program = tl.program_id(0)
    n0 = (program % tl.cdiv(N, BLOCK_N)) * BLOCK_N
    image = tl.cast(program // tl.cdiv(N, BLOCK_N), tl.int64)
    weights += image * N * row_length
    query += image * N * D
    key += image * D * row_length

    k = tl.arange(0, BLOCK_K)
    factor = tl.full((), scale, tl.float32)
    maximum = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    scores = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for k0 in range(0, REGION_TILES * BLOCK_K, BLOCK_K):
        scores = add_channels(
            tl.zeros([BLOCK_N, BLOCK_K], tl.float32), query, key, n0, k0, N, row_length, D, D, 1, 1, row_length,
            DOT, INPUT_PRECISION, False, BLOCK_C, BLOCK_K, BLOCK_N,
        )  # fmt: skip
        scores = tl.where((k0 + k < K)[None, :], scores * factor, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        total = total * tl.exp(maximum - new_maximum) + tl.sum(tl.exp(scores - new_maximum[:, None]), 1)
        maximum = new_maximum
    for k0 in range(0, REGION_TILES * BLOCK_K, BLOCK_K):
        if REGION_TILES > 1:  # too many regions to have kept their scores
            scores = add_channels(
                tl.zeros([BLOCK_N, BLOCK_K], tl.float32), query, key, n0, k0, N, row_length, D, D, 1, 1, row_length,
                DOT, INPUT_PRECISION, False, BLOCK_C, BLOCK_K, BLOCK_N,
            )  # fmt: skip
            scores = tl.where((k0 + k < K)[None, :], scores * factor, float("-inf"))
        w = softmax_weights(scores, maximum, total, LIFT)
        store_tile(weights, w, n0, k0, N, row_length, row_length, 1, False, BLOCK_N, BLOCK_K)


@triton.jit
def ocr_head_linear_kernel(
    out,  # [B, O, N]
    pixels,  # [B, C, N]
    weight,  # [O, C], or one for each image
    bias,  # [O]
    C,
    OUTPUTS,
    N,
    weight_stride_b,
    weight_stride_o,
    out_stride_b,
    out_stride_o,
    out_stride_n,
    pixels_stride_b,
    pixels_stride_c,
    pixels_stride_n,
    RELU: tl.constexpr,
    DOT: tl.constexpr,
    LIFT: tl.constexpr,  # of the pixels
    INPUT_PRECISION: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    OUT_ALIGNMENT: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """weight @ pixels / LIFT + bias, and its positive part if RELU: a 1x1 convolution."""
    # output channels vary fastest, so that programs which share a tile of pixels run together
    program = tl.program_id(0)
    o0 = (program % tl.cdiv(OUTPUTS, BLOCK_O)) * BLOCK_O
    program //= tl.cdiv(OUTPUTS, BLOCK_O)
    n0 = (program % tl.cdiv(N, BLOCK_N)) * BLOCK_N
    image = tl.cast(program // tl.cdiv(N, BLOCK_N), tl.int64)
    N = aligned(aligned(N, ALIGNMENT), OUT_ALIGNMENT)
    out, out_stride_o = image_of(out, image, out_stride_b, out_stride_o, OUT_ALIGNMENT)
    pixels, pixels_stride_c = image_of(pixels, image, pixels_stride_b, pixels_stride_c, ALIGNMENT)
    weight += image * weight_stride_b

    total = add_channels(
        tl.zeros([BLOCK_N, BLOCK_O], tl.float32), pixels, weight, n0, o0, N, OUTPUTS, C,
        pixels_stride_n, pixels_stride_c, weight_stride_o, 1,
        DOT, INPUT_PRECISION, INT64, BLOCK_C, BLOCK_O, BLOCK_N,
    )  # fmt: skip
    total = add_bias(total / LIFT, bias, o0, OUTPUTS, BLOCK_O)
    if RELU:
        total = positive(total)
    store_tile(out, total, n0, o0, N, OUTPUTS, out_stride_n, out_stride_o, INT64, BLOCK_N, BLOCK_O)


@triton.jit
def ocr_head_fuse_kernel(
    out,  # [B, O, N]
    feats,  # [B, C, N]
    weights,  # [B, N, row_length], lifted; or y itself [B, N, C] if there are no REGION_TILES
    context_regions,  # [B, C, row_length]: u
    up_bias,  # [C]
    context,  # [O, C]: G_y
    pixels,  # [O, C]: G_x
    bias,  # [O]
    C,
    OUTPUTS,
    N,
    row_length,
    out_stride_b,
    out_stride_o,
    out_stride_n,
    feats_stride_b,
    feats_stride_c,
    feats_stride_n,
    REGION_TILES: tl.constexpr,  # ceil(K / BLOCK_K)
    DOT: tl.constexpr,
    LIFT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """z = ReLU(G_y y + G_x x + g), with y = ReLU(u w + up_bias) rebuilt for each tile."""
    # output channels vary fastest, so that programs which share a tile of feats run together
    program = tl.program_id(0)
    o0 = (program % tl.cdiv(OUTPUTS, BLOCK_O)) * BLOCK_O
    program //= tl.cdiv(OUTPUTS, BLOCK_O)
    n0 = (program % tl.cdiv(N, BLOCK_N)) * BLOCK_N
    image = tl.cast(program // tl.cdiv(N, BLOCK_N), tl.int64)
    weights += image * N * row_length
    context_regions += image * C * row_length
    N = aligned(N, ALIGNMENT)
    out, out_stride_o = image_of(out, image, out_stride_b, out_stride_o, ALIGNMENT)
    feats, feats_stride_c = image_of(feats, image, feats_stride_b, feats_stride_c, ALIGNMENT)

    total = add_channels(
        tl.zeros([BLOCK_N, BLOCK_O], tl.float32), feats, pixels, n0, o0, N, OUTPUTS, C,
        feats_stride_n, feats_stride_c, C, 1,
        DOT, INPUT_PRECISION, INT64, BLOCK_C, BLOCK_O, BLOCK_N,
    )  # fmt: skip
    if REGION_TILES == 0:
        total = add_channels(
            total, weights, context, n0, o0, N, OUTPUTS, C, row_length, 1, C, 1,
            DOT, INPUT_PRECISION, False, BLOCK_C, BLOCK_O, BLOCK_N,
        )  # fmt: skip
    else:
        if REGION_TILES == 1:
            w = load_tile(weights, n0, 0, N, row_length, row_length, 1, False, BLOCK_N, BLOCK_K).to(DOT)
        for c0 in range(0, C, BLOCK_C):
            y = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
            for k0 in tl.static_range(0, REGION_TILES * BLOCK_K, BLOCK_K):
                if REGION_TILES > 1:  # too many regions to hold their weights
                    w = load_tile(weights, n0, k0, N, row_length, row_length, 1, False, BLOCK_N, BLOCK_K).to(DOT)
                u = load_tile(context_regions, k0, c0, row_length, C, 1, row_length, False, BLOCK_K, BLOCK_C).to(DOT)
                y = product(w, u, y, INPUT_PRECISION)
            y = narrow(positive(add_bias(y / LIFT, up_bias, c0, C, BLOCK_C)), DOT)
            g = load_tile(context, c0, o0, C, OUTPUTS, 1, C, False, BLOCK_C, BLOCK_O).to(DOT)
            total = product(y, g, total, INPUT_PRECISION)
    total = positive(add_bias(total, bias, o0, OUTPUTS, BLOCK_O))
    store_tile(out, total, n0, o0, N, OUTPUTS, out_stride_n, out_stride_o, INT64, BLOCK_N, BLOCK_O)


class HeadBlocks(NamedTuple):
    """Tile sizes along channels that are summed over, channels that are made, regions and pixels."""

    channels: int
    outputs: int
    regions: int
    pixels: int
    num_warps: int
    num_stages: int

    def arguments(self, *without: str) -> dict[str, int]:
        """As arguments of a launch."""
        names = ("BLOCK_C", "BLOCK_O", "BLOCK_K", "BLOCK_N", "num_warps", "num_stages")
        return {name: value for name, value in zip(names, self, strict=True) if name not in without}


def in_two_kernels(key_channels: int, regions: int, itemsize: int) -> bool:
    """Whether phi and all regions fit in a program's registers."""
    return itemsize == 2 and key_channels <= 256 and regions <= 256


def weights_blocks(channels: int, key_channels: int, regions: int, shared_memory: int) -> HeadBlocks:
    """Tiles of the first kernel: all of D and all regions, then pixels, then channels."""
    block_k = padded(regions, 256)
    if shared_memory < 200000:
        block_c, block_o, pixels, num_stages = 32, 32, 64, 2
    elif block_k <= 32:
        block_c, block_o, pixels, num_stages = 64, 64, 128, 3
    elif block_k <= 64:
        block_c, block_o, pixels, num_stages = 64, 32, 128, 2
    else:
        block_c, block_o, pixels, num_stages = 64, 64, 64, 2
    return HeadBlocks(padded(channels, block_c), padded(key_channels, block_o), block_k, pixels, 8, num_stages)


def fuse_blocks(
    channels: int, outputs: int, regions: int, itemsize: int, scattered: bool, shared_memory: int
) -> HeadBlocks:
    """Tiles of the fusing product: as many outputs and pixels as registers hold, regions by 64.

    `scattered` says that each pixel of feats and z has an address of its own, which takes more of them.
    """
    if itemsize == 4:
        return HeadBlocks(padded(channels, 16), padded(outputs, 64), 16, 64, 8, 2)
    block_c, block_o = (64 if regions <= 192 else 32, 256) if shared_memory >= 200000 else (32, 128)
    block_o = min(block_o, 128) if scattered else block_o
    num_stages = 3 if regions <= 64 else 2
    return HeadBlocks(padded(channels, block_c), padded(outputs, block_o), padded(regions, 64), 128, 8, num_stages)


def linear_blocks(channels: int, outputs: int, itemsize: int) -> HeadBlocks:
    """Tiles of a product with nothing else in it."""
    if itemsize == 4:
        return HeadBlocks(padded(channels, 16), padded(outputs, 64), 16, 64, 8, 2)
    return HeadBlocks(padded(channels, 32), padded(outputs, 128), 16, 128, 8, 2)


def softmax_blocks(channels: int, regions: int, itemsize: int) -> HeadBlocks:
    """Tiles of the softmax over any number of regions."""
    if itemsize == 4:
        return HeadBlocks(padded(channels, 16), 16, padded(regions, 64), 64, 8, 2)
    return HeadBlocks(padded(channels, 32), 16, padded(regions, 128), 64, 8, 2)


PIXELS_AT_ONCE = 32768  # where there are intermediate results of many channels


def forward(
    out: Tensor, feats: Tensor, key: Tensor, context_regions: Tensor, weights: Sequence[Tensor], output: str
) -> None:
    """Fill `out`, in its own strides: z [B, O, *S], logits [B, L, *S], or the classes [B, *S]."""
    whole, result = feats.flatten(2), out.flatten(1 if output == "classes" else 2)
    batch, _, pixels = whole.shape
    _, key_channels, regions = key.shape
    key_rows, context_rows = (_with_aligned_rows(t) for t in (key, context_regions))
    at_once = output == "features" and in_two_kernels(key_channels, regions, dot_dtype(feats).itemsize)
    step = pixels if at_once else max(1024, PIXELS_AT_ONCE // batch)
    with torch.cuda.device_of(feats):
        for start in range(0, pixels, step):
            x, part = whole[..., start : start + step], result[..., start : start + step]
            z = part
            if output != "features":
                z = _empty_pixels(x, len(weights[7]), x.dtype, x.stride(1) == 1)
            _fused_pixels(z, x, key_rows, context_rows, regions, weights[:8])
            if output == "logits":
                _linear(part, z, *weights[8:], relu=False)
            if output == "classes":  # of logits that are not rounded to 16 bits
                logits = _empty_pixels(x, len(weights[8]), torch.float32, x.stride(1) == 1)
                _linear(logits, z, *weights[8:], relu=False)
                part.copy_(logits.argmax(1))


def _empty_pixels(like: Tensor, channels: int, dtype: torch.dtype, channels_last: bool) -> Tensor:
    batch, _, pixels = like.shape
    if channels_last:
        return like.new_empty((batch, pixels, channels), dtype=dtype).transpose(1, 2)
    return like.new_empty((batch, channels, pixels), dtype=dtype)


def _fused_pixels(
    out: Tensor, feats: Tensor, key: Tensor, context_regions: Tensor, regions: int, weights: Sequence[Tensor]
) -> None:
    """z [B, O, N], in two kernels or product by product."""
    channels, key_channels = feats.shape[1], key.shape[1]
    if in_two_kernels(key_channels, regions, dot_dtype(feats).itemsize):
        region_weights = _region_weights(feats, key, regions, *weights[:4])
        _fuse(out, feats, region_weights, context_regions, regions, *weights[4:])
        return
    pixel_in, pixel_in_bias, pixel_out, pixel_out_bias, up_bias, *fusing = weights
    hidden = _empty_pixels(feats, key_channels, feats.dtype, True)
    query = torch.empty_like(hidden)
    y = _empty_pixels(feats, channels, feats.dtype, True)
    _linear(hidden, feats, pixel_in, pixel_in_bias)
    _linear(query, hidden, pixel_out, pixel_out_bias)
    region_weights = _softmax(query, key, regions)
    _linear(y, region_weights, context_regions, up_bias, factor=lift(feats.dtype))
    _fuse(out, feats, y, context_regions, 0, up_bias, *fusing)


def _with_aligned_rows(regions: Tensor) -> Tensor:
    """[B, channels, K] in rows of a multiple of 16, zeros at the end: then one address serves for several."""
    batch, channels, count = regions.shape
    if count % 16 == 0:
        return regions.contiguous()
    rows = regions.new_zeros((batch, channels, round_up(count, 16)))
    rows[..., :count].copy_(regions)
    return rows


def _region_weights(
    feats: Tensor, key: Tensor, regions: int,
    pixel_in: Tensor, pixel_in_bias: Tensor, pixel_out: Tensor, pixel_out_bias: Tensor,
) -> Tensor:  # fmt: skip
    """w [B, rows, N], lifted, in the memory of [B, N, rows]."""
    batch, channels, pixels = feats.shape
    _, key_channels, row_length = key.shape
    weights = _empty_pixels(feats, row_length, feats.dtype, True)
    dtype = dot_dtype(feats)
    blocks = weights_blocks(channels, key_channels, regions, device_facts(feats.device).shared_memory)
    ocr_head_weights_kernel[(batch * triton.cdiv(pixels, blocks.pixels),)](
        weights, feats, key, pixel_in, pixel_in_bias, pixel_out, pixel_out_bias,
        channels, key_channels, regions, pixels, row_length, key_channels**-0.5, *feats.stride(),
        DOT=TL[dtype],
        LIFT=lift(feats.dtype),
        INPUT_PRECISION=input_precision(),
        ALIGNMENT=alignment(feats),
        INT64=_int64(blocks, feats),
        BLOCK_D=padded(key_channels, 256),
        **blocks.arguments(),
    )  # fmt: skip
    return weights


def _softmax(query: Tensor, key: Tensor, regions: int) -> Tensor:
    """w [B, rows, N], lifted, in the memory of [B, N, rows]."""
    batch, channels, pixels = query.shape
    row_length = key.shape[2]
    weights = _empty_pixels(query, row_length, query.dtype, True)
    dtype = dot_dtype(query)
    blocks = softmax_blocks(channels, regions, dtype.itemsize)
    ocr_head_softmax_kernel[(batch * triton.cdiv(pixels, blocks.pixels),)](
        weights, query, key, channels, regions, pixels, row_length, channels**-0.5,
        REGION_TILES=triton.cdiv(regions, blocks.regions),
        DOT=TL[dtype],
        LIFT=lift(query.dtype),
        INPUT_PRECISION=input_precision(),
        **blocks.arguments("BLOCK_O"),
    )  # fmt: skip
    return weights


def _linear(
    out: Tensor, pixels: Tensor, weight: Tensor, bias: Tensor, *, relu: bool = True, factor: float = 1.0
) -> None:
    """Fill out [B, O, N] with weight @ pixels / factor + bias, weight [O, C] or [B, O, C]."""
    batch, channels, length = pixels.shape
    outputs = out.shape[1]
    dtype = dot_dtype(pixels)
    blocks = linear_blocks(channels, outputs, dtype.itemsize)
    ocr_head_linear_kernel[(batch * triton.cdiv(length, blocks.pixels) * triton.cdiv(outputs, blocks.outputs),)](
        out, pixels, weight, bias, channels, outputs, length,
        weight.stride(0) if weight.dim() == 3 else 0, weight.stride(-2), *out.stride(), *pixels.stride(),
        RELU=relu,
        DOT=TL[dtype],
        LIFT=factor,
        INPUT_PRECISION=input_precision(),
        ALIGNMENT=alignment(pixels),
        OUT_ALIGNMENT=alignment(out),
        INT64=_int64(blocks, pixels, out),
        **blocks.arguments("BLOCK_K"),
    )  # fmt: skip


def _fuse(
    out: Tensor, feats: Tensor, weights: Tensor, context_regions: Tensor, regions: int,
    up_bias: Tensor, context: Tensor, pixels: Tensor, bias: Tensor,
) -> None:  # fmt: skip
    """Fill out [B, O, N] from the weights of regions, or from y where they are none."""
    batch, channels, length = feats.shape
    outputs = out.shape[1]
    dtype = dot_dtype(feats)
    shared_memory = device_facts(feats.device).shared_memory
    scattered = alignment(feats, out) == 1 and feats.stride(1) != 1
    blocks = fuse_blocks(channels, outputs, regions, dtype.itemsize, scattered, shared_memory)
    ocr_head_fuse_kernel[(batch * triton.cdiv(length, blocks.pixels) * triton.cdiv(outputs, blocks.outputs),)](
        out, feats, weights, context_regions, up_bias, context, pixels, bias,
        channels, outputs, length, weights.shape[1], *out.stride(), *feats.stride(),
        REGION_TILES=triton.cdiv(regions, blocks.regions),
        DOT=TL[dtype],
        LIFT=lift(feats.dtype),
        INPUT_PRECISION=input_precision(),
        ALIGNMENT=alignment(feats, out),
        INT64=_int64(blocks, feats, out),
        **blocks.arguments(),
    )  # fmt: skip


def _int64(blocks: HeadBlocks, *tensors: Tensor) -> bool:
    channels = max(blocks.channels, blocks.outputs)
    return requires_int64_offsets(*(extent(channels, t.stride(1), blocks.pixels, t.stride(2)) for t in tensors))
