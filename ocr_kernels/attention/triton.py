"""Pixel-region attention in Triton: forward, and backward in two forms.

Every tensor is addressed as `[B, channels, N]` with its strides, so both memory formats are read in place.
A program holds all K regions up to 256, in two tiles, so that little of them is padding: the softmax over regions stays
inside it, and the query and the incoming gradient pass through memory once per kernel. More regions have kernels of
their own. So have few regions, whose key and value stay in a program that goes over many pixels, while the loads of the
next ones are under way.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ocr_kernels.attention import tiles
from ocr_kernels.core.layout import statistics_dtype
from ocr_kernels.core.tiles import Problem, has_wgmma
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
    tile_pointers,
    transposed,
)
from ocr_kernels.core.triton_host import (
    aligned_rows,
    alignment,
    cdiv,
    constants,
    device_facts,
    numbers_of,
    round_up,
    split,
    sum_splits,
)
from ocr_kernels.core.triton_launch import Launch, prepared


@triton.jit
def channel_product(
    pixels, regions, k0, n0, NUMBERS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr
):
    """sum over channels of pixels[c, n] * regions[c, k], a [BLOCK_N, BLOCK_K] tile."""
    total = tl.zeros([BLOCK_N, BLOCK_K], NUMBERS.accumulator)
    for c0 in range(0, pixels.height, BLOCK_C):
        p = load_tile(transposed(pixels), n0, c0, BLOCK_N, BLOCK_C)
        r = load_tile(regions, c0, k0, BLOCK_C, BLOCK_K)
        total = add_product(total, p, r, NUMBERS)
    return total


@triton.jit
def channel_products(
    pixels, regions, n0, NUMBERS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The same of the first BLOCK_K regions, and of BLOCK_L after them."""
    total = tl.zeros([BLOCK_N, BLOCK_K], NUMBERS.accumulator)
    last_total = tl.zeros([BLOCK_N, BLOCK_L], NUMBERS.accumulator)
    for c0 in range(0, pixels.height, BLOCK_C):
        p = load_tile(transposed(pixels), n0, c0, BLOCK_N, BLOCK_C)
        total = add_product(total, p, load_tile(regions, c0, 0, BLOCK_C, BLOCK_K), NUMBERS)
        last_total = add_product(last_total, p, load_tile(regions, c0, BLOCK_K, BLOCK_C, BLOCK_L), NUMBERS)
    return total, last_total


@triton.jit
def masked_scores(products, k0, K, factor):
    """factor * q . k, with -inf where there is no region."""
    regions = k0 + tl.arange(0, products.shape[1])
    return tl.where((regions < K)[None, :], products * factor, float("-inf"))


@triton.jit
def of_highest(dweights, weights, REGIONS: tl.constexpr):
    """dw of each pixel's highest weight, which before it is normalised is 1; -inf where the tile does not have it.

    dw - sum_k w dw, of which nearly nothing is left where one weight is nearly 1, is taken of what dw exceeds it by.
    REGIONS is the tile's dimension that they are.
    """
    return tl.max(tl.where(weights == 1.0, dweights, float("-inf")), REGIONS)


@triton.jit
def pixel_region_attention_forward_kernel(
    out,  # [B, V, N]
    query,  # [B, D, N]
    key,  # [B, D, row_length], of which K are regions
    value,  # [B, V, row_length]
    out_strides, query_strides, key_strides, value_strides,
    D, V, K, N, row_length, scale: tl.float64,
    NUMBERS: tl.constexpr, ALIGNMENT: tl.constexpr, INT64: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of pixels, all their regions and all their channels."""
    _, n0, image = tile_of_program(1, N, BLOCK_N)
    out = image_of(out, out_strides, image, V, N, ALIGNMENT, INT64)
    query = image_of(query, query_strides, image, D, N, ALIGNMENT, INT64)
    key = image_of(key, key_strides, image, D, row_length, 1, INT64)
    value = image_of(value, value_strides, image, V, row_length, 1, INT64)
    factor = tl.full((), scale, NUMBERS.accumulator)

    scores, last_scores = channel_products(query, key, n0, NUMBERS, BLOCK_C, BLOCK_K, BLOCK_L, BLOCK_N)
    scores, last_scores = masked_scores(scores, 0, K, factor), masked_scores(last_scores, BLOCK_K, K, factor)
    maximum = finite(tl.maximum(tl.max(scores, 1), tl.max(last_scores, 1)))[:, None]
    weights = narrow(exponential(scores - maximum) * NUMBERS.lift, NUMBERS.dot)
    last_weights = narrow(exponential(last_scores - maximum) * NUMBERS.lift, NUMBERS.dot)
    total = tl.sum(weights.to(NUMBERS.accumulator), 1)  # of what enters the product
    inverse = (1.0 / (total + tl.sum(last_weights.to(NUMBERS.accumulator), 1)))[:, None]
    for v0 in range(0, V, BLOCK_C):
        context = product(weights, load_tile(transposed(value), 0, v0, BLOCK_K, BLOCK_C), NUMBERS)
        last_value = load_tile(transposed(value), BLOCK_K, v0, BLOCK_L, BLOCK_C)
        store_tile(transposed(out), add_product(context, last_weights, last_value, NUMBERS) * inverse, n0, v0)


@triton.jit
def pixel_region_attention_forward_many_kernel(
    out,  # [B, V, N]
    query,  # [B, D, N]
    key,  # [B, D, row_length], of which K are regions
    value,  # [B, V, row_length]
    out_strides, query_strides, key_strides, value_strides,
    D, V, K, N, row_length, scale: tl.float64,
    NUMBERS: tl.constexpr, ALIGNMENT: tl.constexpr, INT64: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The same of more regions than a program holds, as flash attention has it; it owns a tile of values' channels."""
    tile, n0, image = tile_of_program(tl.cdiv(V, BLOCK_C), N, BLOCK_N)
    v0 = tile * BLOCK_C
    out = image_of(out, out_strides, image, V, N, ALIGNMENT, INT64)
    query = image_of(query, query_strides, image, D, N, ALIGNMENT, INT64)
    key = image_of(key, key_strides, image, D, row_length, 1, INT64)
    value = image_of(value, value_strides, image, V, row_length, 1, INT64)
    factor = tl.full((), scale, NUMBERS.accumulator)

    maximum = tl.full([BLOCK_N], float("-inf"), NUMBERS.accumulator)
    total = tl.zeros([BLOCK_N], NUMBERS.accumulator)
    context = tl.zeros([BLOCK_N, BLOCK_C], NUMBERS.accumulator)
    for k0 in range(0, K, BLOCK_K):
        scores = channel_product(query, key, k0, n0, NUMBERS, BLOCK_C, BLOCK_K, BLOCK_N)
        scores = masked_scores(scores, k0, K, factor)
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        shift = finite(new_maximum)
        weights = narrow(exponential(scores - shift[:, None]) * NUMBERS.lift, NUMBERS.dot)
        decay = exponential(maximum - shift)
        total = total * decay + tl.sum(weights.to(NUMBERS.accumulator), 1)
        part = product(weights, load_tile(transposed(value), k0, v0, BLOCK_K, BLOCK_C), NUMBERS)
        context = context * decay[:, None] + part_of_sum(part, v0, V)
        maximum = new_maximum
    store_tile(transposed(out), context / total[:, None], n0, v0)


@triton.jit(do_not_specialize=["splits"])
def pixel_region_attention_forward_few_kernel(
    out,  # [B, V, N]
    query,  # [B, D, N]
    key,  # [B, D, K]
    value,  # [B, V, K]
    out_strides, query_strides, key_strides, value_strides,
    D, V, K, N, split_length, splits, scale: tl.float64,
    NUMBERS: tl.constexpr, ALIGNMENT: tl.constexpr, INT64: tl.constexpr,
    BLOCK_C: tl.constexpr,  # >= D
    BLOCK_O: tl.constexpr,  # >= V
    BLOCK_K: tl.constexpr,  # >= K
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The same of so few regions that a program keeps key and value for a whole split of the pixels."""
    program = tl.program_id(0)  # image * splits + split
    start = (program % splits) * split_length
    image = tl.cast(program // splits, tl.int64)
    out = image_of(out, out_strides, image, V, N, ALIGNMENT, INT64)
    query = image_of(query, query_strides, image, D, N, ALIGNMENT, INT64)
    key = load_tile(image_of(key, key_strides, image, D, K, 1, INT64), 0, 0, BLOCK_C, BLOCK_K)
    value = load_tile(image_of(value, value_strides, image, V, K, 1, INT64), 0, 0, BLOCK_O, BLOCK_K)
    factor = tl.full((), scale, NUMBERS.accumulator)
    for n0 in range(start, min(start + split_length, query.width), BLOCK_N):
        q = load_tile(query, 0, n0, BLOCK_C, BLOCK_N)
        scores = product(tl.trans(key), q, NUMBERS) * factor
        scores = tl.where((tl.arange(0, BLOCK_K) < K)[:, None], scores, float("-inf"))
        weights = narrow(exponential(scores - finite(tl.max(scores, 0))[None, :]) * NUMBERS.lift, NUMBERS.dot)
        inverse = 1.0 / tl.sum(weights.to(NUMBERS.accumulator), 0)  # of what enters the product
        store_tile(out, product(value, weights, NUMBERS) * inverse[None, :], 0, n0)


def forward(out: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
    """Fill `out` [B, V, *S], in its own strides."""
    q, y = query.flatten(2), out.flatten(2)
    with torch.cuda.device_of(q):
        launch = _forward_in_one_pass_launch(y, q, key, value, scale=scale)
        if launch is None:
            regions = key.shape[2]
            key, value = aligned_rows(key, value)
            launch = _forward_launch(y, q, key, value, regions=regions, scale=scale)
        launch(y, q, key, value)


@prepared
def _forward_in_one_pass_launch(y: Tensor, q: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Launch | None:
    batch, channels, pixels = q.shape
    _, value_channels, regions = value.shape
    problem = _problem(q, value, y)
    tile = tiles.FORWARD_IN_ONE_PASS.choose(problem)
    if tile is None:
        return None
    split_length, splits = split(pixels, tile.pixels, batch, 2 * problem.device.multiprocessors)
    return Launch(
        pixel_region_attention_forward_few_kernel, batch * splits,
        y.stride(), q.stride(), key.stride(), value.stride(),
        channels, value_channels, regions, pixels, split_length, splits, scale,
        **constants(tile, numbers_of(q), (q, y), (key, value)),
    )  # fmt: skip


@prepared
def _forward_launch(y: Tensor, q: Tensor, key: Tensor, value: Tensor, *, regions: int, scale: float) -> Launch:
    """Of key and value with aligned rows, of which so many are regions."""
    batch, channels, pixels = q.shape
    value_channels = value.shape[1]
    tile = tiles.FORWARD.choose(tiles.of_either(_problem(q, value[..., :regions], y)))
    kernel, programs = pixel_region_attention_forward_kernel, batch * cdiv(pixels, tile.pixels)
    if tile.all_regions < regions:
        kernel = pixel_region_attention_forward_many_kernel
        programs *= cdiv(value_channels, tile.channels)
    return Launch(
        kernel, programs, y.stride(), q.stride(), key.stride(), value.stride(),
        channels, value_channels, regions, pixels, key.shape[2], scale,
        **constants(tile, numbers_of(q), (q, y), (key, value)),
    )  # fmt: skip


def _scattered(*pixel_tensors: Tensor) -> int:
    """As `Problem` has it. In channels last, channels lie together whatever the number of pixels."""
    together = alignment(*(t for t in pixel_tensors if t.stride(1) != 1))
    return 2 if together == 1 else int(together < 8)


def _problem(query: Tensor, value: Tensor, *pixel_tensors: Tensor) -> Problem:
    scattered = _scattered(query, *pixel_tensors)
    _, outputs, regions = value.shape
    itemsize = numbers_of(query).itemsize
    return Problem(itemsize, device_facts(query.device), query.shape[1], regions, outputs, scattered)


@triton.jit(do_not_specialize=["splits"])
def pixel_region_attention_backward_kernel(
    partial,  # [B, splits, BLOCK_C + BLOCK_O, BLOCK_K]: dkey above dvalue, each split's sum over its pixels
    dquery,  # [B, D, N]
    grad,  # [B, V, N]
    query,  # [B, D, N]
    key,  # [B, D, K]
    value,  # [B, V, K]
    dquery_strides, grad_strides, query_strides, key_strides, value_strides,
    D, V, K, N, split_length, splits, scale: tl.float64,
    NEED_QUERY: tl.constexpr, NEED_KEY: tl.constexpr, NEED_VALUE: tl.constexpr,
    PIXELS_FIRST: tl.constexpr,  # dquery's product is [pixels, channels], which wgmma's rows are, else its transpose
    NUMBERS: tl.constexpr, ALIGNMENT: tl.constexpr, INT64: tl.constexpr,
    BLOCK_C: tl.constexpr,  # >= D
    BLOCK_O: tl.constexpr,  # >= V
    BLOCK_K: tl.constexpr,  # >= K
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All three gradients in one pass, where dkey and dvalue fit in one program's registers."""
    program = tl.program_id(0)  # image * splits + split
    start = (program % splits) * split_length
    image = tl.cast(program // splits, tl.int64)
    dquery = image_of(dquery, dquery_strides, image, D, N, ALIGNMENT, INT64)
    grad = image_of(grad, grad_strides, image, V, N, ALIGNMENT, INT64)
    query = image_of(query, query_strides, image, D, N, ALIGNMENT, INT64)
    key = load_tile(image_of(key, key_strides, image, D, K, 1, INT64), 0, 0, BLOCK_C, BLOCK_K)
    value = load_tile(image_of(value, value_strides, image, V, K, 1, INT64), 0, 0, BLOCK_O, BLOCK_K)

    factor = tl.full((), scale, NUMBERS.accumulator)
    dkey = tl.zeros([BLOCK_C, BLOCK_K], NUMBERS.accumulator)
    dvalue = tl.zeros([BLOCK_O, BLOCK_K], NUMBERS.accumulator)
    for n0 in range(start, min(start + split_length, query.width), BLOCK_N):
        q = load_tile(query, 0, n0, BLOCK_C, BLOCK_N)
        dy = load_tile(grad, 0, n0, BLOCK_O, BLOCK_N)
        scores = product(tl.trans(key), q, NUMBERS) * factor
        scores = tl.where((tl.arange(0, BLOCK_K) < K)[:, None], scores, float("-inf"))
        scores = tl.where((n0 + tl.arange(0, BLOCK_N) < N)[None, :], scores, 0.0)  # 0 times an infinite key is NaN
        weights = exponential(scores - tl.max(scores, 0)[None, :])
        if NEED_QUERY or NEED_KEY:
            dweights = product(tl.trans(value), dy, NUMBERS)
            dweights -= of_highest(dweights, weights, 0)[None, :]
        weights *= (1.0 / tl.sum(weights, 0))[None, :]
        if NEED_VALUE:
            dvalue = add_product(dvalue, dy, tl.trans(narrow(weights * NUMBERS.lift, NUMBERS.dot)), NUMBERS)
        if NEED_QUERY or NEED_KEY:
            dscores = narrow(weights * (dweights - tl.sum(weights * dweights, 0)[None, :]), NUMBERS.dot)
        if NEED_KEY:
            dkey = add_product(dkey, q, tl.trans(dscores), NUMBERS)
        if NEED_QUERY and PIXELS_FIRST:
            dq = product(tl.trans(dscores), tl.trans(key), NUMBERS)
            store_tile(transposed(dquery), dq * factor, n0, 0)
        elif NEED_QUERY:
            store_tile(dquery, product(key, dscores, NUMBERS) * factor, 0, n0)

    partial += tl.cast(program, tl.int64) * (BLOCK_C + BLOCK_O) * BLOCK_K
    rows = rows_of(partial, BLOCK_C + BLOCK_O, BLOCK_K, BLOCK_K)
    if NEED_KEY:
        tl.store(tile_pointers(rows, 0, 0, BLOCK_C, BLOCK_K), dkey * factor)
    if NEED_VALUE:
        tl.store(tile_pointers(rows, BLOCK_C, 0, BLOCK_O, BLOCK_K), dvalue / NUMBERS.lift)


@triton.jit
def pixel_region_attention_backward_maps_kernel(
    weights_map,  # [B, K, N]: w, lifted
    dscores_map,  # [B, K, N]: w * (dw - delta)
    grad,  # [B, V, N]
    query,  # [B, D, N]
    key,  # [B, D, row_length], of which K are regions
    value,  # [B, V, row_length]
    map_strides, grad_strides, query_strides, key_strides, value_strides,
    D, V, K, N, row_length, scale: tl.float64,
    NEED_SCORES: tl.constexpr, NEED_VALUE: tl.constexpr,
    NUMBERS: tl.constexpr, ALIGNMENT: tl.constexpr, MAP_ALIGNMENT: tl.constexpr, INT64: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The two maps that the gradients are products of; a program owns a tile of pixels, all regions and channels."""
    _, n0, image = tile_of_program(1, N, BLOCK_N)
    weights_map = image_of(weights_map, map_strides, image, K, N, MAP_ALIGNMENT, INT64)
    dscores_map = image_of(dscores_map, map_strides, image, K, N, MAP_ALIGNMENT, INT64)
    grad = image_of(grad, grad_strides, image, V, N, ALIGNMENT, INT64)
    query = image_of(query, query_strides, image, D, N, ALIGNMENT, INT64)
    key = image_of(key, key_strides, image, D, row_length, 1, INT64)
    value = image_of(value, value_strides, image, V, row_length, 1, INT64)
    factor = tl.full((), scale, NUMBERS.accumulator)

    scores, last_scores = channel_products(query, key, n0, NUMBERS, BLOCK_C, BLOCK_K, BLOCK_L, BLOCK_N)
    scores, last_scores = masked_scores(scores, 0, K, factor), masked_scores(last_scores, BLOCK_K, K, factor)
    maximum = finite(tl.maximum(tl.max(scores, 1), tl.max(last_scores, 1)))[:, None]
    weights, last_weights = exponential(scores - maximum), exponential(last_scores - maximum)
    if NEED_SCORES:
        dweights, last_dweights = channel_products(grad, value, n0, NUMBERS, BLOCK_C, BLOCK_K, BLOCK_L, BLOCK_N)
        highest = tl.maximum(of_highest(dweights, weights, 1), of_highest(last_dweights, last_weights, 1))[:, None]
        dweights -= highest
        last_dweights -= highest
    inverse = (1.0 / (tl.sum(weights, 1) + tl.sum(last_weights, 1)))[:, None]
    weights *= inverse
    last_weights *= inverse
    if NEED_VALUE:
        store_tile(transposed(weights_map), weights * NUMBERS.lift, n0, 0)
        store_tile(transposed(weights_map), last_weights * NUMBERS.lift, n0, BLOCK_K)
    if NEED_SCORES:
        delta = (tl.sum(weights * dweights, 1) + tl.sum(last_weights * last_dweights, 1))[:, None]
        store_tile(transposed(dscores_map), weights * (dweights - delta), n0, 0)
        store_tile(transposed(dscores_map), last_weights * (last_dweights - delta), n0, BLOCK_K)


@triton.jit
def pixel_region_attention_backward_many_maps_kernel(
    weights_map,  # [B, K, N]: w, lifted
    dscores_map,  # [B, K, N]: w * (dw - delta)
    grad,  # [B, V, N]
    query,  # [B, D, N]
    key,  # [B, D, row_length], of which K are regions
    value,  # [B, V, row_length]
    map_strides, grad_strides, query_strides, key_strides, value_strides,
    D, V, K, N, row_length, scale: tl.float64,
    NEED_SCORES: tl.constexpr, NEED_VALUE: tl.constexpr,
    NUMBERS: tl.constexpr, ALIGNMENT: tl.constexpr, MAP_ALIGNMENT: tl.constexpr, INT64: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The same of more regions than a program holds: once for each pixel's statistics, once for the maps."""
    _, n0, image = tile_of_program(1, N, BLOCK_N)
    weights_map = image_of(weights_map, map_strides, image, K, N, MAP_ALIGNMENT, INT64)
    dscores_map = image_of(dscores_map, map_strides, image, K, N, MAP_ALIGNMENT, INT64)
    grad = image_of(grad, grad_strides, image, V, N, ALIGNMENT, INT64)
    query = image_of(query, query_strides, image, D, N, ALIGNMENT, INT64)
    key = image_of(key, key_strides, image, D, row_length, 1, INT64)
    value = image_of(value, value_strides, image, V, row_length, 1, INT64)
    factor = tl.full((), scale, NUMBERS.accumulator)

    maximum = tl.full([BLOCK_N], float("-inf"), NUMBERS.accumulator)
    total = tl.zeros([BLOCK_N], NUMBERS.accumulator)
    highest = tl.zeros([BLOCK_N], NUMBERS.accumulator)  # dw of the maximum
    delta = tl.zeros([BLOCK_N], NUMBERS.accumulator)  # sum over k of w * (dw - highest)
    for k0 in range(0, K, BLOCK_K):
        scores = channel_product(query, key, k0, n0, NUMBERS, BLOCK_C, BLOCK_K, BLOCK_N)
        scores = masked_scores(scores, k0, K, factor)
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        shift = finite(new_maximum)
        decay = exponential(maximum - shift)
        weights = exponential(scores - shift[:, None])
        if NEED_SCORES:
            dweights = channel_product(grad, value, k0, n0, NUMBERS, BLOCK_C, BLOCK_K, BLOCK_N)
            new_highest = of_highest(dweights, weights, 1)
            new_highest = tl.where(new_highest == float("-inf"), highest, new_highest)
            delta = (delta + total * (highest - new_highest)) * decay
            delta += tl.sum(weights * (dweights - new_highest[:, None]), 1)
            highest = new_highest
        total = total * decay + tl.sum(weights, 1)
        maximum = new_maximum
    delta /= total
    for k0 in range(0, K, BLOCK_K):
        scores = channel_product(query, key, k0, n0, NUMBERS, BLOCK_C, BLOCK_K, BLOCK_N)
        scores = masked_scores(scores, k0, K, factor)
        weights = exponential(scores - finite(maximum)[:, None]) / total[:, None]
        if NEED_VALUE:
            store_tile(transposed(weights_map), weights * NUMBERS.lift, n0, k0)
        if NEED_SCORES:
            dweights = channel_product(grad, value, k0, n0, NUMBERS, BLOCK_C, BLOCK_K, BLOCK_N)
            dscores = weights * (dweights - highest[:, None] - delta[:, None])
            store_tile(transposed(dscores_map), dscores, n0, k0)


@triton.jit(do_not_specialize=["splits"])
def pixel_region_attention_backward_regions_kernel(
    partial,  # [B, splits, C, row_length]: each split's sum over its pixels
    pixels,  # [B, C, N]: the query or the incoming gradient
    region_map,  # [B, K, N]: the scores' gradient or the weights
    pixels_strides, map_strides,
    C, K, N, row_length, split_length, splits, scale: tl.float64,
    NUMBERS: tl.constexpr, ALIGNMENT: tl.constexpr, MAP_ALIGNMENT: tl.constexpr, INT64: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """scale * sum over pixels of pixels[c, n] * region_map[k, n]: dkey or dvalue."""
    c0, k0, program, start = split_of_program(C, K, splits, split_length, BLOCK_C, BLOCK_K + BLOCK_L)
    image = tl.cast(program // splits, tl.int64)
    pixels = image_of(pixels, pixels_strides, image, C, N, ALIGNMENT, INT64)
    region_map = image_of(region_map, map_strides, image, K, N, MAP_ALIGNMENT, INT64)
    total = tl.zeros([BLOCK_C, BLOCK_K], NUMBERS.accumulator)
    last_total = tl.zeros([BLOCK_C, BLOCK_L], NUMBERS.accumulator)
    for n0 in range(start, min(start + split_length, pixels.width), BLOCK_N):
        p = load_tile(pixels, c0, n0, BLOCK_C, BLOCK_N)
        r = load_tile(region_map, k0, n0, BLOCK_K, BLOCK_N)
        last = load_tile(region_map, k0 + BLOCK_K, n0, BLOCK_L, BLOCK_N)
        total = add_product(total, p, tl.trans(r), NUMBERS)
        last_total = add_product(last_total, p, tl.trans(last), NUMBERS)
    partial = rows_of(partial + tl.cast(program, tl.int64) * C * row_length, C, row_length, row_length)
    factor = tl.full((), scale, NUMBERS.accumulator)
    store_tile(partial, total * factor, c0, k0)
    store_tile(partial, last_total * factor, c0, k0 + BLOCK_K)


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
    tensors = q if dq is None else dq, dy, q, key, value
    needs = tuple(each is not None for each in (dquery, dkey, dvalue))
    with torch.cuda.device_of(q):
        in_one_pass = _backward_in_one_pass_launch(*tensors, needs=needs, scale=scale)
        if in_one_pass is None:
            _backward_in_maps(dq, dkey, dvalue, dy, q, key, value, scale)
            return
        launch, shape, top = in_one_pass
        partial = q.new_empty(shape, dtype=statistics_dtype(q))
        launch(partial, *tensors)
        if dkey is not None:
            sum_splits(dkey, partial, below=dvalue, top=top)
        elif dvalue is not None:
            sum_splits(dvalue, partial[:, :, top:])


@prepared
def _backward_in_one_pass_launch(
    dq: Tensor, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *, needs: tuple[bool, ...], scale: float
) -> tuple[Launch, tuple[int, ...], int] | None:
    """With the shape of what it fills, splits of rows, and how many of those are dkey's."""
    batch, channels, pixels = query.shape
    _, value_channels, regions = value.shape
    problem = _problem(query, value, grad, dq)
    tile = tiles.BACKWARD_IN_ONE_PASS.choose(problem)
    if tile is None:
        return None
    split_length, splits = split(pixels, tile.pixels, batch, problem.device.multiprocessors)
    launch = Launch(
        pixel_region_attention_backward_kernel, batch * splits,
        dq.stride(), grad.stride(), query.stride(), key.stride(), value.stride(),
        channels, value_channels, regions, pixels, split_length, splits, scale,
        NEED_QUERY=needs[0], NEED_KEY=needs[1], NEED_VALUE=needs[2],
        PIXELS_FIRST=problem.itemsize == 2 and has_wgmma(problem) and tile.regions < 64,
        **constants(tile, numbers_of(query), (dq, query, grad), (key, value)),
    )  # fmt: skip
    return launch, (batch, splits, tile.channels + tile.outputs, tile.regions), tile.channels


def _backward_in_maps(
    dquery: Tensor | None, dkey: Tensor | None, dvalue: Tensor | None,
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float,
) -> None:  # fmt: skip
    batch, _, pixels = query.shape
    regions = value.shape[2]
    needs = dquery is not None or dkey is not None, dvalue is not None  # of the scores, and of the values
    dscores, weights = (query.new_empty((batch, regions, pixels) if need else 1) for need in needs)
    rows = aligned_rows(key, value)
    dq = query if dquery is None else dquery
    options: Any = {"regions": regions, "needs": needs, "scale": scale}
    launch = _maps_launch(dq, dscores if needs[0] else weights, grad, query, *rows, **options)
    launch(weights, dscores, grad, query, *rows)
    if dquery is not None and scale == 0:  # a product times 0 leaves what was in memory before, be it NaN
        torch.bmm(key, dscores, out=dquery).mul_(scale)
    elif dquery is not None:
        torch.baddbmm(dquery, key, dscores, beta=0, alpha=scale, out=dquery)
    if dkey is not None:
        _sum_over_pixels(dkey, query, dscores, scale)
    if dvalue is not None:
        _sum_over_pixels(dvalue, grad, weights, 1.0 / numbers_of(query).lift)


@prepared
def _maps_launch(
    dq: Tensor, a_map: Tensor, grad: Tensor, query: Tensor, key: Tensor, value: Tensor,
    *, regions: int, needs: tuple[bool, bool], scale: float,
) -> Launch:  # fmt: skip
    batch, channels, pixels = query.shape
    tile = tiles.MAPS.choose(tiles.of_either(_problem(query, value[..., :regions], grad, dq)))
    kernel = pixel_region_attention_backward_maps_kernel
    if tile.all_regions < regions:
        kernel = pixel_region_attention_backward_many_maps_kernel
    return Launch(
        kernel, batch * cdiv(pixels, tile.pixels),
        a_map.stride(), grad.stride(), query.stride(), key.stride(), value.stride(),
        channels, value.shape[1], regions, pixels, key.shape[2], scale,
        NEED_SCORES=needs[0], NEED_VALUE=needs[1], MAP_ALIGNMENT=math.gcd(pixels, 16),
        **constants(tile, numbers_of(query), (query, grad), (key, value, a_map)),
    )  # fmt: skip


def _sum_over_pixels(out: Tensor, pixels: Tensor, region_map: Tensor, scale: float) -> None:
    launch, shape = _sums_launch(pixels, region_map, scale=scale)
    partial = pixels.new_empty(shape, dtype=statistics_dtype(pixels))
    launch(partial, pixels, region_map)
    sum_splits(out, partial)


@prepared
def _sums_launch(pixels: Tensor, region_map: Tensor, *, scale: float) -> tuple[Launch, tuple[int, ...]]:
    """With the shape of what it fills."""
    batch, channels, length = pixels.shape
    regions = region_map.shape[1]
    numbers, device = numbers_of(pixels), device_facts(pixels.device)
    tile = tiles.SUMS.choose(
        Problem(numbers.itemsize, device, channels, regions, scattered=_scattered(pixels, region_map))
    )
    programs = cdiv(channels, tile.channels) * cdiv(regions, tile.all_regions) * batch
    split_length, splits = split(length, tile.pixels, programs, tile.resident * device.multiprocessors)
    row_length = round_up(regions)
    launch = Launch(
        pixel_region_attention_backward_regions_kernel, programs * splits,
        pixels.stride(), region_map.stride(), channels, regions, length, row_length, split_length, splits, scale,
        MAP_ALIGNMENT=math.gcd(length, 16), **constants(tile, numbers, (pixels,), (region_map,)),
    )  # fmt: skip
    return launch, (batch, splits, channels, row_length)
