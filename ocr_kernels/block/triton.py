"""Step 4 with a derivative in Triton: PyTorch's products, and between two of them one kernel over the pixels.

Maps are `[B, channels, N]` with their strides, so both memory formats are read in place. Norms are
`triton_norms`'; a norm and its activation are applied where the next kernel reads, or in one pass before a product of
PyTorch's. Up to 256 regions, phi's last norm, the scores and their
softmax are one kernel, as is the softmax's backward pass with what rho's norm takes from it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ocr_kernels.block import tiles
from ocr_kernels.block.norms import (
    Contexts,
    Gradients,
    Layer,
    Norm,
    Settings,
    split_statistics,
    statistics_of,
)
from ocr_kernels.block.passes import activation_backward_, empty_maps, maps_of
from ocr_kernels.block.triton_inference import infer
from ocr_kernels.block.triton_norms import added, applied, gradients_of, norm_of_contexts, norm_of_maps
from ocr_kernels.core.layout import empty_in_format, statistics_dtype
from ocr_kernels.core.tiles import Problem
from ocr_kernels.core.triton_device import (
    activated,
    add_bias,
    add_product,
    column_of,
    finite,
    image_of,
    load_tile,
    masked,
    narrow,
    product,
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
)
from ocr_kernels.core.triton_launch import Launch, prepared

__all__ = ["backward", "forward", "infer"]


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
        scores = _wide_product(key.mT.contiguous(), applied(query, hidden))
        return weights.copy_(torch.softmax(scale * scores, 1))
    if hidden.numel():
        rows, _ = aligned_rows(key, key[:, :0])
        launch = _region_weights_launch(weights, hidden, rows, scale=scale, slope=query.layer.slope)
        launch(weights, hidden, rows, query.factor, query.offset)
    return weights


def _contexts_of(u: Tensor, weights: Tensor, up: Layer) -> Contexts:
    pixels = weights.shape[2]
    if not up.has_statistics or not pixels:
        return Contexts(u, pixels, weights.nanmean(2, keepdim=True, dtype=u.dtype), None)
    mean = weights.mean(2, keepdim=True, dtype=u.dtype)
    centred = weights - mean
    return Contexts(u, pixels, mean, torch.bmm(centred, centred.mT))


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
        first = query = norm_of_maps(layers[0], hidden)
        if pixel_out.shape[0]:
            hidden_out = hidden = _times(pixel_out, applied(first, hidden_in))
            second = query = norm_of_maps(layers[1], hidden)
        else:
            hidden_out, second = empty_maps(x, 0), Norm.of(layers[1])
        weights = _region_weights(query, hidden, key, settings.scale)
        y = _contexts_of(contexts.to(exact), weights, layers[2])
        up = norm_of_contexts(layers[2], y)
        both = empty_maps(x, fusing.shape[1])
        inside, outside = _halves(both, up.factor.shape[0], settings)
        outside.copy_(x)
        _contexts(*_normalised(y, up, x.dtype), up.layer.slope, weights, inside)
        fused = _times(fusing, both)
        last = norm_of_maps(layers[3], fused)
        z = empty_in_format(feats, fusing.shape[0])
        applied(last, fused, mask, z.flatten(2))
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
        dlast = gradients_of(last, grad.flatten(2), fused, d, mask)
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
        dup, slope, offset = added(up, y.gradient_sums(up, outer, total))
        dcontexts, matrix, column = y.backward(up, outer, total, slope, offset)

        dkey, dpixel_in, dpixel_out = (torch.empty_like(each, dtype=exact) for each in (key, pixel_in, pixel_out))
        dphi = [Gradients.anything(first), Gradients.anything(second)]
        if need_phi:
            query, hidden = (second, hidden_out) if pixel_out.shape[0] else (first, hidden_in)
            dscores = _softmax_gradient(dweights, weights, matrix, column)
            del dweights
            dkey = settings.scale * _wide_product(applied(query, hidden), dscores.mT)
            dhidden = _times(settings.scale * key, dscores)
            del dscores
            if pixel_out.shape[0]:
                dout = empty_maps(x, pixel_out.shape[0])
                dphi[1] = gradients_of(second, dhidden, hidden_out, dout)
                _over_pixels(dout, applied(first, hidden_in), dpixel_out)
                dhidden = _times(pixel_out.t(), dout)
                del dout
            dphi[0] = gradients_of(first, dhidden, hidden_in, d_in)
            if needs[2]:
                _over_pixels(d_in, x, dpixel_in)
        dfeats = empty_in_format(feats, x.shape[1] if need_feats else 0)
        if need_feats:
            matrices = (on_pixels.t(), pixel_in.t()) if need_phi else (on_pixels.t(),)
            _times(torch.cat(matrices, 1), gradients, dfeats.flatten(2))
    of_layers = [each for layer in (*dphi, dup, dlast) for each in (layer.gain, layer.shift)]
    return dfeats, dkey, dpixel_in, dpixel_out, dfusing, dcontexts, *of_layers
