"""Step 4 for inference in Triton: two kernels from pixels to z, and a third one to class logits.

The first makes every pixel's softmax over the regions, the second the fusing product with y rebuilt in every tile, so
feats pass through memory twice and neither y nor anything of D channels is stored. Where that does not pay (float32,
whose products take no matrix units, and D or K above 256) PyTorch's own products run, as the reference has them.

Every tensor of pixels is addressed as `[B, channels, N]` with its strides, so both memory formats are read in place.
Tiles are `[pixels, channels]`: what one product leaves in registers then enters the next one from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ocr_kernels.block import reference, tiles
from ocr_kernels.core.tiles import Problem, padded
from ocr_kernels.core.triton_device import (
    activated,
    add_bias,
    add_product,
    image_of,
    load_tile,
    narrow,
    product,
    rows_of,
    store_tile,
    tile_of_program,
    transposed,
)
from ocr_kernels.core.triton_host import (
    aligned_rows,
    alignment,
    cdiv,
    constants,
    device_facts,
    has_scattered_pixels,
    numbers_of,
    round_up,
)
from ocr_kernels.core.triton_launch import Launch, prepared


@triton.jit
def add_channels(
    total, pixels, weight, n0, o0,
    NUMBERS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """total + sum over channels of pixels[n, c] * weight[c, o], a [BLOCK_N, BLOCK_O] tile."""
    for c0 in range(0, pixels.width, BLOCK_C):
        x = load_tile(pixels, n0, c0, BLOCK_N, BLOCK_C)
        total = add_product(total, x, load_tile(weight, c0, o0, BLOCK_C, BLOCK_O), NUMBERS)
    return total


@triton.jit
def matrix_of(weight, OUTPUTS, CHANNELS):
    """A contiguous weight [OUTPUTS, CHANNELS] as it enters products of pixels, [CHANNELS, OUTPUTS]."""
    return transposed(rows_of(weight, OUTPUTS, CHANNELS, CHANNELS))


@triton.jit(do_not_specialize=["N"])
def ocr_block_weights_kernel(
    weights,  # [B, N, row_length]: the softmax over K regions, lifted, and zeros after them
    feats,  # [B, C, N]
    key,  # [B, D, row_length]
    pixel_in,  # [D, C]
    pixel_in_bias,  # [D]
    pixel_out,  # [D, D], of the second layer of phi
    pixel_out_bias,  # [D]
    feats_strides, key_strides,
    C, D, K, N, row_length, scale: tl.float64,
    LAYERS: tl.constexpr,  # of phi; pixel_out is not read where it is 1
    SLOPE: tl.constexpr, OUT_SLOPE: tl.constexpr,  # of the first layer and the second
    NUMBERS: tl.constexpr, ALIGNMENT: tl.constexpr, INT64: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,  # all of D
    BLOCK_O: tl.constexpr,  # channels of q that are made at a time
    BLOCK_K: tl.constexpr,  # all of K
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of pixels: phi, the scores and their softmax, with nothing stored in between."""
    _, n0, image = tile_of_program(1, N, BLOCK_N)
    weights = rows_of(weights + image * N * row_length, N, row_length, row_length)
    feats = transposed(image_of(feats, feats_strides, image, C, N, ALIGNMENT, INT64))
    key = image_of(key, key_strides, image, D, row_length, 1, False)
    pixel_in, pixel_out = matrix_of(pixel_in, D, C), matrix_of(pixel_out, D, D)

    hidden = tl.zeros([BLOCK_N, BLOCK_D], NUMBERS.accumulator)
    hidden = add_channels(hidden, feats, pixel_in, n0, 0, NUMBERS, BLOCK_C, BLOCK_D, BLOCK_N)
    hidden = narrow(activated(add_bias(hidden, pixel_in_bias, 0, D), SLOPE), NUMBERS.dot)
    scores = tl.zeros([BLOCK_N, BLOCK_K], NUMBERS.accumulator)
    if LAYERS == 1:
        scores = add_product(scores, hidden, load_tile(key, 0, 0, BLOCK_D, BLOCK_K), NUMBERS)
    else:
        for d0 in range(0, D, BLOCK_O):
            q = product(hidden, load_tile(pixel_out, 0, d0, BLOCK_D, BLOCK_O), NUMBERS)
            q = narrow(activated(add_bias(q, pixel_out_bias, d0, D), OUT_SLOPE), NUMBERS.dot)
            scores = add_product(scores, q, load_tile(key, d0, 0, BLOCK_O, BLOCK_K), NUMBERS)
    factor = tl.full((), scale, NUMBERS.accumulator)
    scores = tl.where((tl.arange(0, BLOCK_K) < K)[None, :], scores * factor, float("-inf"))
    w = tl.exp(scores - tl.max(scores, 1)[:, None])
    store_tile(weights, w / (tl.sum(w, 1) / NUMBERS.lift)[:, None], n0, 0)


@triton.jit(do_not_specialize=["N"])
def ocr_block_fuse_kernel(
    out,  # [B, O, N]
    feats,  # [B, C, N]
    weights,  # [B, N, row_length], lifted
    contexts,  # [B, Y, row_length]: u
    up_bias,  # [Y]
    context,  # [O, Y]: G_y
    pixels,  # [O, C]: G_x
    bias,  # [O]
    out_strides, feats_strides, context_strides,
    C, Y, OUTPUTS, N, row_length,
    REGION_TILES: tl.constexpr,  # ceil(K / BLOCK_K)
    UP_SLOPE: tl.constexpr, SLOPE: tl.constexpr,  # of y and of z
    NUMBERS: tl.constexpr, ALIGNMENT: tl.constexpr, INT64: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """z = rho(G_y y + G_x x + g), with y = rho(u w + up_bias) rebuilt for each tile."""
    tile, n0, image = tile_of_program(tl.cdiv(OUTPUTS, BLOCK_O), N, BLOCK_N)
    o0 = tile * BLOCK_O
    out = transposed(image_of(out, out_strides, image, OUTPUTS, N, ALIGNMENT, INT64))
    feats = transposed(image_of(feats, feats_strides, image, C, N, ALIGNMENT, INT64))
    weights = rows_of(weights + image * N * row_length, N, row_length, row_length)
    u = transposed(image_of(contexts, context_strides, image, Y, row_length, 1, False))
    context, pixels = matrix_of(context, OUTPUTS, Y), matrix_of(pixels, OUTPUTS, C)

    total = tl.zeros([BLOCK_N, BLOCK_O], NUMBERS.accumulator)
    total = add_channels(total, feats, pixels, n0, o0, NUMBERS, BLOCK_C, BLOCK_O, BLOCK_N)
    if REGION_TILES == 1:
        w = load_tile(weights, n0, 0, BLOCK_N, BLOCK_K)
    for c0 in range(0, Y, BLOCK_C):
        y = tl.zeros([BLOCK_N, BLOCK_C], NUMBERS.accumulator)
        for k0 in tl.static_range(0, REGION_TILES * BLOCK_K, BLOCK_K):
            if REGION_TILES > 1:  # too many regions to hold their weights
                w = load_tile(weights, n0, k0, BLOCK_N, BLOCK_K)
            y = add_product(y, w, load_tile(u, k0, c0, BLOCK_K, BLOCK_C), NUMBERS)
        y = narrow(activated(add_bias(y / NUMBERS.lift, up_bias, c0, Y), UP_SLOPE), NUMBERS.dot)
        total = add_product(total, y, load_tile(context, c0, o0, BLOCK_C, BLOCK_O), NUMBERS)
    store_tile(out, activated(add_bias(total, bias, o0, OUTPUTS), SLOPE), n0, o0)


@triton.jit(do_not_specialize=["N"])
def ocr_block_linear_kernel(
    out,  # [B, O, N]
    pixels,  # [B, C, N]
    weight,  # [O, C]
    bias,  # [O]
    out_strides, pixels_strides,
    C, OUTPUTS, N,
    NUMBERS: tl.constexpr, ALIGNMENT: tl.constexpr, OUT_ALIGNMENT: tl.constexpr, INT64: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """weight @ pixels + bias: a 1x1 convolution."""
    tile, n0, image = tile_of_program(tl.cdiv(OUTPUTS, BLOCK_O), N, BLOCK_N)
    o0 = tile * BLOCK_O
    out = transposed(image_of(out, out_strides, image, OUTPUTS, N, OUT_ALIGNMENT, INT64))
    pixels = transposed(image_of(pixels, pixels_strides, image, C, N, ALIGNMENT, INT64))
    total = tl.zeros([BLOCK_N, BLOCK_O], NUMBERS.accumulator)
    total = add_channels(total, pixels, matrix_of(weight, OUTPUTS, C), n0, o0, NUMBERS, BLOCK_C, BLOCK_O, BLOCK_N)
    store_tile(out, add_bias(total, bias, o0, OUTPUTS), n0, o0)


PIXELS_AT_ONCE = 32768  # where z is an intermediate result


def infer(
    out: Tensor,
    feats: Tensor,
    key: Tensor,
    contexts: Tensor,
    weights: Sequence[Tensor],
    scale: float,
    slopes: Sequence[float],
    output: str,
) -> None:
    """Fill `out`, in its own strides: z [B, O, *S], logits [B, L, *S], or the classes [B, *S]."""
    # RDNA's lanes, which hold an operand of a product twice, have no registers for one of all channels of keys
    if numbers_of(feats).itemsize > 2 or max(key.shape[1:]) > tiles.MOST or device_facts(feats.device).is_rdna:
        reference.infer(out, feats, key, contexts, weights, scale, slopes, output)
        return
    weights = [weight.contiguous() for weight in weights]
    layers, (up_bias, context, pixels, bias, *classifier) = reference.split_weights(weights)
    whole, result = feats.flatten(2), out.flatten(1 if output == "classes" else 2)
    regions = key.shape[2]
    step = whole.shape[2] if output == "features" else pixels_at_once(*whole.shape[::2])
    with torch.cuda.device_of(feats):
        key, contexts = aligned_rows(key, contexts)
        if output != "features":
            some_z = _empty_pixels(whole, len(bias), step, whole.dtype)
        if output == "classes":  # of logits that are not rounded to 16 bits
            some_logits = _empty_pixels(whole, len(classifier[0]), step, torch.float32)
        for start in range(0, whole.shape[2], step):
            x, part = whole[..., start : start + step], result[..., start : start + step]
            z = part if output == "features" else some_z[..., : x.shape[2]]
            w = _region_weights(x, key, regions, layers, scale, slopes)
            _fuse(z, x, w, contexts, regions, up_bias, context, pixels, bias, slopes)
            if output == "logits":
                _linear(part, z, *classifier)
            if output == "classes":
                logits = some_logits[..., : x.shape[2]]
                _linear(logits, z, *classifier)
                part.copy_(logits.argmax(1))


def pixels_at_once(batch: int, pixels: int) -> int:
    """How many of each image, in equal steps of whole tiles, which leaves their addresses as aligned as the first."""
    most = max(1024, PIXELS_AT_ONCE // batch // 128 * 128)
    return round_up(cdiv(pixels, cdiv(pixels, most)), 128)


def _empty_pixels(like: Tensor, channels: int, pixels: int, dtype: torch.dtype) -> Tensor:
    """[B, channels, pixels] in the memory format of `like` [B, C, N], and aligned whatever N is."""
    pixels = round_up(min(pixels, like.shape[2]))
    if like.stride(1) == 1:
        return like.new_empty((len(like), pixels, channels), dtype=dtype).transpose(1, 2)
    return like.new_empty((len(like), channels, pixels), dtype=dtype)


@prepared
def _region_weights_launch(
    feats: Tensor, key: Tensor, *, regions: int, layers: int, scale: float, slope: float, out_slope: float
) -> Launch:
    batch, channels, pixels = feats.shape
    _, key_channels, row_length = key.shape
    numbers = numbers_of(feats)
    problem = Problem(numbers.itemsize, device_facts(feats.device), channels, regions, outputs=key_channels)
    tile = tiles.WEIGHTS.choose(problem)
    return Launch(
        ocr_block_weights_kernel, batch * cdiv(pixels, tile.pixels),
        feats.stride(), key.stride(), channels, key_channels, regions, pixels, row_length, scale,
        LAYERS=layers, SLOPE=slope, OUT_SLOPE=out_slope,
        BLOCK_D=padded(key_channels), **constants(tile, numbers, (feats,)),
    )  # fmt: skip


def _region_weights(
    feats: Tensor,
    key: Tensor,
    regions: int,
    layers: Sequence[tuple[Tensor, Tensor]],
    scale: float,
    slopes: Sequence[float],
) -> Tensor:
    """w [B, N, row_length], lifted."""
    weights = feats.new_empty((feats.shape[0], feats.shape[2], key.shape[2]))
    options: Any = {"regions": regions, "layers": len(layers), "scale": scale}
    launch = _region_weights_launch(feats, key, slope=slopes[0], out_slope=slopes[1], **options)
    launch(weights, feats, key, *layers[0], *layers[-1])
    return weights


@prepared
def _fuse_launch(
    out: Tensor, feats: Tensor, contexts: Tensor, *, regions: int, up: int, up_slope: float, slope: float
) -> Launch:
    batch, channels, length = feats.shape
    outputs = out.shape[1]
    numbers, device = numbers_of(feats), device_facts(feats.device)
    scattered = has_scattered_pixels(feats, out)
    tile = tiles.FUSE.choose(Problem(numbers.itemsize, device, channels, regions, outputs, scattered))
    return Launch(
        ocr_block_fuse_kernel, batch * cdiv(length, tile.pixels) * cdiv(outputs, tile.outputs),
        out.stride(), feats.stride(), contexts.stride(), channels, up, outputs, length, contexts.shape[2],
        REGION_TILES=cdiv(regions, tile.regions), UP_SLOPE=up_slope, SLOPE=slope,
        **constants(tile, numbers, (feats, out)),
    )  # fmt: skip


def _fuse(
    out: Tensor, feats: Tensor, weights: Tensor, contexts: Tensor, regions: int,
    up_bias: Tensor, context: Tensor, pixels: Tensor, bias: Tensor, slopes: Sequence[float],
) -> None:  # fmt: skip
    """Fill out [B, O, N]."""
    options: Any = {"regions": regions, "up": len(up_bias), "up_slope": slopes[2], "slope": slopes[3]}
    launch = _fuse_launch(out, feats, contexts, **options)
    launch(out, feats, weights, contexts, up_bias, context, pixels, bias)


@prepared
def _linear_launch(out: Tensor, pixels: Tensor) -> Launch:
    batch, channels, length = pixels.shape
    outputs = out.shape[1]
    numbers = numbers_of(pixels)
    tile = tiles.LINEAR.choose(Problem(numbers.itemsize, device_facts(pixels.device), channels, outputs=outputs))
    return Launch(
        ocr_block_linear_kernel, batch * cdiv(length, tile.pixels) * cdiv(outputs, tile.outputs),
        out.stride(), pixels.stride(), channels, outputs, length,
        OUT_ALIGNMENT=alignment(out), **constants(tile, numbers, (pixels,), (out,)),
    )  # fmt: skip


def _linear(out: Tensor, pixels: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Fill out [B, O, N] with weight @ pixels + bias."""
    _linear_launch(out, pixels)(out, pixels, weight, bias)
