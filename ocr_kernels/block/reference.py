"""Step 4: its definition, both passes, and inference, one tile of pixels after the other, in plain PyTorch.

Maps are `[B, channels, N]` in the memory format of feats. What a norm and an activation make of a product is never
stored: each tile of it is made where the next product reads it, in both passes. What is done to a tile between two
products is an argument, `kind`: `native` has other `Passes`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ocr_kernels.block.norms import (
    Contexts,
    Gradients,
    Layer,
    Moments,
    Norm,
    Settings,
    split_statistics,
    statistics_of,
)
from ocr_kernels.block.passes import Passes, empty_maps, maps_of
from ocr_kernels.core.activations import activate_
from ocr_kernels.core.layout import empty_in_format, in_format, statistics_dtype
from ocr_kernels.core.memory import reused

# The definition


def ocr_block(
    feats: Tensor, key: Tensor, pixel_in: Tensor, pixel_out: Tensor, fusing: Tensor, contexts: Tensor,
    vectors: Sequence[Tensor], mask: Tensor, settings: Settings,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """z `[B, O, *S]`, and the statistics of all layers, as `statistics_of` has them (Eqs. 3, 5, 6).

    q_i = phi(x_i),  w_i = softmax_k(scale * q_i . key_k),  y_i = rho(sum_k w_ik u_k),  z_i = rho(G [y_i, x_i])
    """
    if any(settings.groups):
        raise RuntimeError(
            "statistics that processes share have no second derivative, no forward mode and no export: "
            "use a norm of one process there"
        )
    x = feats.flatten(2)
    count = x.shape[0] * x.shape[2]
    first, second, up, last = settings.layers(vectors)
    statistics: list[Any] = []

    def applied(layer: Layer, h: Tensor) -> Tensor:
        norm = Norm.of(layer)
        if layer.has_statistics:
            norm = Norm.of(layer, h.mean((0, 2)), count * h.var((0, 2), correction=0), count)
            h = (h - norm.mean[:, None]) * norm.rstd[:, None]
        statistics.extend(norm[1:6])
        return F.leaky_relu(layer.gain[:, None] * h + layer.shift[:, None], layer.slope)

    query = applied(first, pixel_in @ x)
    if len(pixel_out):
        query = applied(second, pixel_out @ query)
    else:
        statistics += [second.shift] * 5
    weights = F.softmax(settings.scale * (key.mT @ query), dim=1)  # [B, K, N]
    context = applied(up, contexts @ weights)
    z = applied(last, fusing @ torch.cat([context, x] if settings.context_first else [x, context], 1))
    if len(mask):
        z = z * mask[:, :, None]
    return z.view(*z.shape[:2], *feats.shape[2:]), torch.cat([*statistics, z.new_full((4,), count)])


# Products


@functools.cache
def _has_products(dtype: torch.dtype) -> bool:
    """Whether this machine's CPU multiplies matrices in a 16-bit dtype; else PyTorch does, 50 times as slowly."""
    try:
        if dtype == torch.bfloat16:
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return dtype != torch.float16 or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    except AttributeError:  # a PyTorch without oneDNN
        return False


def product_dtype(feats: Tensor) -> torch.dtype:
    """What products of pixels are computed in: the dtype of feats, or float32 on a CPU that does not have it."""
    return feats.dtype if not feats.is_cpu or _has_products(feats.dtype) else torch.float32


def of_each(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Image by image, of tensors `[B, ...]`."""
    return list(zip(*map(Tensor.unbind, tensors), strict=True))


CHAIN = 2048
"""Pixels that one product sums over: of few regions it is one chain of additions."""


def contexts_of(u: Tensor, weights: Tensor, tiles: Passes, up: Layer) -> Contexts:
    batch, regions, pixels = weights.shape
    if not up.has_statistics:
        return Contexts(u, pixels, weights.nanmean(2, keepdim=True, dtype=u.dtype), None)
    mean_weights = weights.mean(2, keepdim=True, dtype=u.dtype) if pixels else u.new_zeros((batch, regions, 1))
    scatter = u.new_zeros((batch, regions, regions))
    of_images = of_each(scatter, mean_weights)
    for image, w in tiles.of(weights):
        total, mean = of_images[image]
        for part in (w - mean).split(CHAIN, 1):
            total += part @ part.t()  # `addmm_` would go on with the chain
    return Contexts(u, pixels, mean_weights, scatter)


# The two passes


def forward(
    feats: Tensor, key: Tensor, pixel_in: Tensor, pixel_out: Tensor, fusing: Tensor, contexts: Tensor,
    vectors: Sequence[Tensor], mask: Tensor, settings: Settings, kind: type[Passes] = Passes,
) -> tuple[Tensor, ...]:  # fmt: skip
    """z `[B, O, *S]`, what the backward pass reads (h of both layers of phi, w, G [y, x]), and the statistics."""
    x, dtype, exact = maps_of(feats), product_dtype(feats), statistics_dtype(feats)
    pixel_in, pixel_out, fusing = (each.to(dtype).contiguous() for each in (pixel_in, pixel_out, fusing))
    tiles = kind(x)
    layers = settings.layers(vectors)
    depth, outputs, regions = pixel_in.shape[0], fusing.shape[0], key.shape[2]
    made = (depth, pixel_out.shape[0], regions, outputs)
    hidden_in, hidden_out, weights, fused = (reused(empty_maps(x, length)) for length in made)
    z = reused(empty_in_format(feats, outputs))

    moments = Moments(layers[0])
    for _, of_x, h in tiles.of(x, hidden_in):
        moments.add(tiles.multiply(pixel_in, of_x.to(dtype), h), tiles)
    first = query = moments.norm()
    second = Norm.of(layers[1])
    hidden, taken = hidden_in, first.vectors()
    if pixel_out.shape[0]:
        moments = Moments(layers[1])
        for _, h, out in tiles.of(hidden_in, hidden_out):
            q = tiles.activate(h, taken, layers[0].slope, tiles.empty("depth", h.shape, dtype))
            moments.add(tiles.multiply(pixel_out, q, out), tiles)
        second = query = moments.norm()
        hidden, taken = hidden_out, second.vectors()
    keys = (settings.scale * key.to(exact).mT.contiguous()).unbind()  # [K, D]
    for image, h, w in tiles.of(hidden, weights):
        q = tiles.activate(h, taken, query.layer.slope, tiles.empty("depth", h.shape, exact))
        tiles.softmax(tiles.product("scores", keys[image], q), w)

    y = contexts_of(contexts.to(exact), weights, tiles, layers[2])
    up = y.norm(layers[2])
    of_images = of_each(*y.normalised(up, dtype))
    moments = Moments(layers[3])
    for image, of_x, w, h in tiles.of(x, weights, fused):
        matrix, offset = of_images[image]
        both, _ = _joined(of_x, w, matrix, offset, up.layer.slope, settings, tiles)
        moments.add(tiles.multiply(fusing, both, h), tiles)
    last = moments.norm()
    masked = last.of_images(mask, x.shape[0])
    for image, h, out in tiles.of(fused, z.flatten(2)):
        tiles.activate(h, masked[image], last.layer.slope, out)
    maps = (each.view(*each.shape[:2], *feats.shape[2:]) for each in (hidden_in, hidden_out, weights, fused))
    return z, *maps, statistics_of((first, second, up, last))


def _joined(
    x: Tensor, w: Tensor, matrix: Tensor, offset: Tensor, slope: float, settings: Settings, tiles: Passes
) -> tuple[Tensor, Tensor]:
    """What the fusing product takes of a tile, `[Y + C, T]`, and its part that is y."""
    contexts, (channels, pixels) = matrix.shape[0], x.shape
    both = tiles.empty("both", (contexts + channels, pixels), matrix.dtype)
    is_first = settings.context_first
    inside, outside = (both[:contexts], both[contexts:]) if is_first else (both[channels:], both[:channels])
    outside.copy_(x)
    return both, tiles.layer_into(inside, matrix, offset, w.to(matrix.dtype), slope)


def backward(
    grad: Tensor, feats: Tensor, key: Tensor, pixel_in: Tensor, pixel_out: Tensor, fusing: Tensor, contexts: Tensor,
    vectors: Sequence[Tensor], mask: Tensor, saved: Sequence[Tensor], settings: Settings, needs: Sequence[bool],
    kind: type[Passes] = Passes,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of feats, in its dtype, and of key, the three matrices, contexts and the vectors.

    Products that only gradients take part in which are not needed are left out; such gradients are anything.
    """
    x, dtype, exact = maps_of(feats), product_dtype(feats), statistics_dtype(feats)
    pixel_in, pixel_out, fusing = (each.to(dtype).contiguous() for each in (pixel_in, pixel_out, fusing))
    tiles = kind(x)
    *maps, statistics = saved
    hidden_in, hidden_out, weights, fused = (in_format(each, feats).flatten(2) for each in maps)
    incoming = in_format(grad, feats).flatten(2)
    layers = settings.layers(vectors)
    first, second, up, last = split_statistics(layers, statistics)
    channels, (depth, regions) = x.shape[1], key.shape[1:]
    need_feats = needs[0]
    need_phi = any((*needs[:4], *needs[6:10]))
    y = contexts_of(contexts.to(exact), weights, tiles, layers[2])
    dfeats = empty_in_format(feats, channels if need_feats else 0)  # autograd adds to what nobody else holds
    dx = dfeats.flatten(2)

    slope = last.layer.slope
    masked = last.of_images(mask, x.shape[0], last.mean)
    sums = [tiles.gradient(g, h, masked[image], slope) for image, g, h in tiles.of(incoming, fused)]
    dlast = Gradients.of(last, sums)
    masked = dlast.of_images(mask, x.shape[0])
    context_channels = contexts.shape[1]
    halves = fusing.split([context_channels, channels] if settings.context_first else [channels, context_channels], 1)
    on_context, on_pixels = (half.t().contiguous() for half in halves[:: 1 if settings.context_first else -1])
    dfusing = torch.zeros_like(fusing, dtype=exact)
    dweights = reused(empty_maps(x, regions, dtype))
    matrix, offset = y.normalised(up, dtype)
    outer = torch.zeros_like(y.centred)  # sum_i dy_i (w_i - mean)', [B, Y, K]
    total = torch.zeros_like(y.means)  # sum_i dy_i
    ones, zeros = torch.ones_like(up.factor), torch.zeros_like(up.factor)
    activated = torch.stack((ones, zeros, ones, zeros))  # as they are
    of_images = of_each(matrix, offset, matrix.mT.contiguous(), y.mean_weights, outer, total)
    for image, g, h, of_x, w, dw, dout in tiles.of(incoming, fused, x, weights, dweights, dx):
        of_w, constant, on_weights, mean, to_outer, to_total = of_images[image]
        d = tiles.through(g, h, masked[image], slope, tiles.empty("outputs", h.shape, dtype))
        both, inside = _joined(of_x, w, of_w, constant, up.layer.slope, settings, tiles)
        if needs[4]:
            dfusing.add_(tiles.outer(d, both))
        if need_feats:
            tiles.multiply(on_pixels, d, dout)
        dy = tiles.product("contexts", on_context, d)
        to_total.add_(tiles.gradient(dy, inside, activated, up.layer.slope, dy)[0])
        tiles.multiply(on_weights, dy, dw)
        to_outer.add_(dy @ (w - mean).to(dtype).t())

    dup = Gradients.of(up, [y.gradient_sums(up, outer, total).sum(0)])
    dcontexts, matrix, column = y.backward(up, outer, total, *dup.centred())

    dkey, dpixel_in, dpixel_out = (torch.zeros_like(each, dtype=exact) for each in (key, pixel_in, pixel_out))
    dphi = [Gradients.anything(first), Gradients.anything(second)]
    if need_phi:  # through the softmax first
        query, hidden = (second, hidden_out) if pixel_out.shape[0] else (first, hidden_in)
        dquery, slope = reused(empty_maps(x, depth)), query.layer.slope
        taken, centred = query.vectors(), query.vectors(None, query.mean)
        of_images = of_each(key.to(dtype).contiguous(), torch.cat((matrix, column), 2), dkey)
        sums = []
        for image, h, w, dw, out in tiles.of(hidden, weights, dweights, dquery):
            keys, of_w, to_key = of_images[image]  # [D, K], [K, K + 1], [D, K]
            dscores = tiles.softmax_backward(w, dw, of_w, settings.scale, tiles.empty("scores", w.shape, dtype))
            to_key.add_(tiles.activate(h, taken, slope, tiles.empty("depth", h.shape, dtype)) @ dscores.t())
            d = tiles.product("grad of depth", keys, dscores)
            sums.append(tiles.gradient(d, h, centred, slope, out))
        dphi[0] = Gradients.of(query, sums)
        taken, centred = first.vectors(), first.vectors(None, first.mean)
        if pixel_out.shape[0]:
            dphi[1], sums = dphi[0], []
            turned, slope, affine = pixel_out.t().contiguous(), first.layer.slope, dphi[1].vectors()
            for _, h, out, dout in tiles.of(hidden_in, hidden_out, dquery):
                d = tiles.through(dout, out, affine, 1.0, tiles.empty("grad of depth", h.shape, dtype))
                q = tiles.activate(h, taken, slope, tiles.empty("depth", h.shape, dtype))
                dpixel_out.add_(tiles.outer(d, q))
                d = tiles.product("depth", turned, d)
                sums.append(tiles.gradient(d, h, centred, slope, dout))
            dphi[0] = Gradients.of(first, sums)
        turned, affine = pixel_in.t().contiguous(), dphi[0].vectors()
        for _, h, of_x, dq, dout in tiles.of(hidden_in, x, dquery, dx):
            d = tiles.through(dq, h, affine, 1.0, tiles.empty("grad of depth", h.shape, dtype))
            if needs[2]:
                dpixel_in.add_(tiles.outer(d, of_x.to(dtype)))
            if need_feats:
                tiles.multiply(turned, d, dout, accumulate=True)
    of_layers = [each for layer in (*dphi, dup, dlast) for each in (layer.gain, layer.shift)]
    return dfeats, dkey, dpixel_in, dpixel_out, dfusing, dcontexts, *of_layers


# Inference: statistics are known, and norms folded into the layers


def infer(
    out: Tensor,
    feats: Tensor,
    key: Tensor,
    contexts: Tensor,
    weights: Sequence[Tensor],
    scale: float,
    slopes: Sequence[float],
    output: str,
    kind: type[Passes] = Passes,
) -> None:
    """Fill `out`: z `[B, O, *S]`, logits `[B, L, *S]` or classes `[B, *S]`.

    q_i = phi(x_i),  w_i = softmax_k(scale * q_i . key_k),  y_i = rho(sum_k w_ik u_k + b)  (Eqs. 3, 5),
    z_i = rho(G_y y_i + G_x x_i + g)  (Eq. 6)
    """
    x, dtype = maps_of(feats), product_dtype(feats)
    weights = [each.to(dtype) if each.dim() == 2 else each for each in weights]
    layers, (up_bias, on_context, on_pixels, bias, *classifier) = split_weights(weights)
    keys = (scale * key.to(statistics_dtype(key))).to(dtype).mT.contiguous()  # [B, K, D]
    contexts = contexts.to(dtype)  # [B, Y, K]
    fusing = torch.cat((on_context, on_pixels), 1)
    to_result = [(fusing, bias, slopes[3])]
    to_result += [(*each, 1.0) for each in zip(classifier[::2], classifier[1::2], strict=True)]
    result = (out[:, None] if output == "classes" else out).flatten(2)
    tiles = kind(x)
    is_read_in_place = tiles.is_channels_last and x.dtype == dtype  # its rows are whole there, and parts in `both`
    between = on_context.shape[1]
    for image, of_x, place in tiles.of(x, result):
        both = tiles.empty("both", (fusing.shape[1], of_x.shape[1]), dtype)
        context, pixels = both[:between], both[between:]
        pixels.copy_(of_x)
        query = of_x if is_read_in_place else pixels  # [C, T]
        for i, ((weight, layer_bias), slope) in enumerate(zip(layers, slopes, strict=False)):
            query = tiles.layer(f"query {i}", weight, layer_bias, query, slope)  # [D, T]
        scores = tiles.product("scores", keys[image], query)  # [K, T]
        attention = tiles.softmax(scores, scores)
        tiles.layer_into(context, contexts[image], up_bias, attention, slopes[2])  # y, [Y, T]
        z = both
        for i, (weight, layer_bias, slope) in enumerate(to_result):
            if i == len(to_result) - 1 and place.dtype == dtype:
                z = tiles.layer_into(place, weight, layer_bias, z, slope)
            else:
                z = tiles.layer(f"z {i}", weight, layer_bias, z, slope)
        if z is not place:
            place.copy_(z.argmax(0) if output == "classes" else z)


def query_of(feats: Tensor, weights: Sequence[Tensor], slopes: Sequence[float]) -> Tensor:
    """phi of pixels `[B, C, *S]`."""
    for (weight, bias), slope in zip(split_weights(weights)[0], slopes, strict=False):
        feats = activate_(convolved(feats, weight, bias), slope).to(feats.dtype)
    return feats


def split_weights(weights: Sequence[Tensor]) -> tuple[list[tuple[Tensor, Tensor]], Sequence[Tensor]]:
    """The layers of phi, one or two, and the rest: both kinds of bias are vectors, so the third weight tells."""
    layers = 1 if weights[2].dim() == 1 else 2
    return [(weights[2 * i], weights[2 * i + 1]) for i in range(layers)], weights[2 * layers :]


def infer_whole(
    feats: Tensor,
    key: Tensor,
    contexts: Tensor,
    weights: Sequence[Tensor],
    scale: float,
    slopes: Sequence[float],
    output: str,
) -> Tensor:
    """What `infer` fills `out` with, of all pixels at once: for a compiler, which fuses what is not a product.

    Contexts are made channels last and enter one convolution beside the pixels: convolutions are laid out so anyway.
    """
    _, (up_bias, on_context, on_pixels, bias, *classifier) = split_weights(weights)
    batch, _, *spatial = feats.shape
    dtype = feats.dtype
    query = query_of(feats, weights, slopes)  # [B, D, *S]
    scores = scale * torch.matmul(query.flatten(2).transpose(1, 2), key).to(up_bias.dtype)  # [B, N, K]
    attention = F.softmax(scores, dim=2).to(dtype)
    context = torch.matmul(attention, contexts.transpose(1, 2)) + up_bias  # y, [B, N, Y]
    context = activate_(context, slopes[2]).to(dtype)
    context = context.view(batch, *spatial, context.shape[2]).movedim(-1, 1)
    both, fusing = torch.cat((context, feats), 1), torch.cat((on_context, on_pixels), 1)
    out = activate_(convolved(both, fusing, bias), slopes[3])
    if classifier:
        out = convolved(out.to(dtype), classifier[0], classifier[1])
    if output == "classes":
        return out.argmax(1)
    return in_format(out.to(dtype), feats)


def convolved(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    window: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
) -> Tensor:
    """W x + b of `[B, channels, *S]` in the dtype of b; of more than one pixel by a `window`, padding and dilation."""
    ones = (1,) * (feats.dim() - 2)
    if len(ones) > 3 and window is None:
        out = convolved(feats.flatten(4), weight, bias)
        return out.view(*out.shape[:4], *feats.shape[4:])
    convolution = (F.conv1d, F.conv2d, F.conv3d)[feats.dim() - 3]
    fused = bias if bias is not None and bias.dtype == feats.dtype else None
    padding, dilation = ((0,), (1,)) if window is None else window
    weight = weight.view(*weight.shape[:2], *(weight.shape[2:] or ones))
    out = convolution(feats, weight, fused, padding=padding, dilation=dilation)
    return out if bias is None or bias is fused else out + bias.view(-1, *ones)
