"""Step 4 in plain PyTorch: its definition, both passes, and inference, one tile of pixels after the other.

Maps are `[B, channels, N]` in the memory format of feats. What a norm and an activation make of a product is never
stored: each tile of it is made where the next product reads it, in both passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ocr_kernels.core.activations import activate_
from ocr_kernels.core.layout import in_format, is_channels_last, statistics_dtype

aten = torch.ops.aten

TILE = 2048
"""Pixels at a time on a CPU, whose cache then holds what is between two products."""


class Layer(NamedTuple):
    """A norm and an activation: rho(gain * (h - mean) / sqrt(var + eps) + shift), mean and var over all pixels of h.

    Where eps is negative there is no mean and no var: rho(gain * h + shift).
    """

    gain: Tensor  # [channels]
    shift: Tensor
    slope: float  # of rho: 0 is ReLU, 1 none
    eps: float

    @property
    def has_statistics(self) -> bool:
        return self.eps >= 0


class Settings(NamedTuple):
    """What is no tensor; one entry for each of phi's two layers, rho, and z's."""

    scale: float  # of the scores
    slopes: Sequence[float]
    eps: Sequence[float]
    context_first: bool  # of what the fusing product takes

    def layers(self, vectors: Sequence[Tensor]) -> list[Layer]:
        return [Layer(*each) for each in zip(vectors[::2], vectors[1::2], self.slopes, self.eps, strict=True)]


# The definition


def ocr_block(
    feats: Tensor, key: Tensor, pixel_in: Tensor, pixel_out: Tensor, fusing: Tensor, contexts: Tensor,
    vectors: Sequence[Tensor], mask: Tensor, settings: Settings,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """z `[B, O, *S]`, and the mean and variance of each layer in one vector (Eqs. 3, 5, 6).

    q_i = phi(x_i),  w_i = softmax_k(scale * q_i . key_k),  y_i = rho(sum_k w_ik u_k),  z_i = rho(G [y_i, x_i])
    """
    x = feats.flatten(2)
    first, second, up, last = settings.layers(vectors)
    statistics: list[Tensor] = []

    def applied(layer: Layer, h: Tensor) -> Tensor:
        mean, var = h.new_zeros(h.shape[1]), h.new_ones(h.shape[1])
        if layer.has_statistics:
            mean, var = h.mean((0, 2)), h.var((0, 2), correction=0)
            h = (h - mean[:, None]) * (var + layer.eps).rsqrt()[:, None]
        statistics.extend((mean, var))
        return F.leaky_relu(layer.gain[:, None] * h + layer.shift[:, None], layer.slope)

    query = applied(first, pixel_in @ x)
    if len(pixel_out):
        query = applied(second, pixel_out @ query)
    else:
        statistics += [second.shift, second.shift]
    weights = F.softmax(settings.scale * (key.mT @ query), dim=1)  # [B, K, N]
    context = applied(up, contexts @ weights)
    z = applied(last, fusing @ torch.cat([context, x] if settings.context_first else [x, context], 1))
    if len(mask):
        z = z * mask[:, :, None]
    return z.view(*z.shape[:2], *feats.shape[2:]), torch.cat(statistics)


# Tiles


def maps_of(feats: Tensor) -> Tensor:
    """`[B, C, N]`, in one of two memory formats."""
    return (feats if is_channels_last(feats) else feats.contiguous()).flatten(2)


def empty_maps(like: Tensor, channels: int, dtype: torch.dtype | None = None, *sizes: int) -> Tensor:
    """`[B, channels, N]` in the memory format of `like`, `[B, C, N]`; `sizes` are another B and N."""
    batch, pixels = sizes or like.shape[::2]
    if not like.is_contiguous():
        return like.new_empty((batch, pixels, channels), dtype=dtype).transpose(1, 2)
    return like.new_empty((batch, channels, pixels), dtype=dtype)


class Tiles:
    """Which pixels make a tile, and memory for what is made of one, the same for each."""

    def __init__(self, maps: Tensor) -> None:
        self.maps = maps
        self.pixels = min(TILE if maps.is_cpu else 16 * TILE, maps.shape[2])
        self.memory: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        """Images, and ranges of their pixels."""
        for image in range(self.maps.shape[0]):
            for start in range(0, self.maps.shape[2], self.pixels):
                yield image, slice(start, min(start + self.pixels, self.maps.shape[2]))

    def empty(self, name: str, channels: int, part: slice, dtype: torch.dtype | None = None) -> Tensor:
        """`[channels, pixels of part]`, for as long as no other tile goes by that name."""
        if name not in self.memory:
            self.memory[name] = empty_maps(self.maps, channels, dtype, 1, self.pixels)[0]
        return self.memory[name][:, : part.stop - part.start]


class Norm:
    """A layer and its statistics, for tiles `[channels, T]`; what a channel has is `[channels, 1]`."""

    def __init__(self, layer: Layer, mean: Tensor | None = None, var: Tensor | None = None) -> None:
        self.layer = layer
        self.gain, self.shift = layer.gain[:, None], layer.shift[:, None]
        zeros = torch.zeros_like(self.gain)
        if mean is None or var is None or not layer.has_statistics:
            mean, var = zeros, zeros + 1
        self.mean, self.var = mean.view_as(zeros), var.view_as(zeros)
        self.rstd = (self.var + layer.eps).rsqrt() if layer.has_statistics else zeros + 1
        self.factor = self.gain * self.rstd
        self.offset = self.shift - self.mean * self.factor

    def before(self, h: Tensor, out: Tensor) -> Tensor:
        """What the activation is taken of."""
        return torch.mul(h, self.factor, out=out).add_(self.offset)

    def __call__(self, h: Tensor, out: Tensor) -> Tensor:
        return activate_(self.before(h, out), self.layer.slope)


class Moments:
    """Means, and sums of squares about them, of tiles that are added one after the other."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.count = 0
        self.mean = self.squares = torch.zeros_like(layer.gain[:, None])

    def add(self, h: Tensor, spare: Tensor) -> None:
        """A tile; `spare` is memory of its size."""
        if self.layer.has_statistics:
            mean = h.mean(1, keepdim=True, dtype=spare.dtype)
            self.merge(h.shape[1], mean, torch.sub(h, mean, out=spare).square_().sum(1, keepdim=True))

    def merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        total, difference = self.count + count, mean - self.mean
        self.squares = self.squares + squares + difference.square() * (self.count * count / total)
        self.mean = self.mean + difference * (count / total)
        self.count = total

    def norm(self) -> Norm:
        return Norm(self.layer, self.mean, self.squares / max(self.count, 1))


class Gradients:
    """The two sums over pixels of a layer's backward pass, and then that pass itself."""

    def __init__(self, norm: Norm, count: int) -> None:
        self.norm, self.count = norm, count
        self.shift = torch.zeros_like(norm.gain)  # sum of the gradients of what the activation is taken of
        self.gain = torch.zeros_like(norm.gain)  # sum of those times what is normalised

    def add(self, grad: Tensor, h: Tensor, spare: Tensor) -> None:
        """A tile, whose h was normalised; `spare` is memory of its size."""
        self.shift += grad.sum(1, keepdim=True)
        self.gain += torch.sub(h, self.norm.mean, out=spare).mul_(grad).sum(1, keepdim=True).mul_(self.norm.rstd)

    def through(self, grad: Tensor, h: Tensor, out: Tensor) -> Tensor:
        """The gradient of h: factor * (grad - shift / count - normalised h * gain / count)."""
        torch.mul(grad, self.norm.factor, out=out)
        if self.norm.layer.has_statistics:
            slope = -self.norm.factor * self.norm.rstd * self.gain / self.count
            out.addcmul_(h, slope).sub_(self.norm.factor * self.shift / self.count + self.norm.mean * slope)
        return out


class Contexts:
    """y = rho(sum_k w_k u_k) of tiles of weights; its statistics follow from the moments of the weights."""

    def __init__(self, contexts: Tensor, weights: Tensor, tiles: Tiles, dtype: torch.dtype) -> None:
        self.u = contexts.to(dtype)  # [B, Y, K]
        self.mean_weights = weights.mean(2, keepdim=True, dtype=dtype)  # [B, K, 1]
        batch, regions, pixels = weights.shape
        self.covariance = self.u.new_zeros((batch, regions, regions))  # centred: digits would be lost otherwise
        for image, part in tiles:
            centred = weights[image][:, part] - self.mean_weights[image]
            self.covariance[image].addmm_(centred, centred.t())
        self.covariance /= pixels
        self.means = self.u @ self.mean_weights  # [B, Y, 1]

    def moments(self, layer: Layer, pixels: int) -> Moments:
        moments = Moments(layer)
        variances = ((self.u @ self.covariance) * self.u).sum(2, keepdim=True)
        for mean, variance in zip(self.means, variances, strict=True):
            moments.merge(pixels, mean, variance * pixels)
        return moments

    def before(self, norm: Norm, image: int, weights: Tensor) -> Tensor:
        """What the activation is taken of, `[Y, T]`."""
        return torch.addmm(norm.offset, norm.factor * self.u[image], weights.to(self.u.dtype))


def activation_backward_(grad: Tensor, activated: Tensor, slope: float) -> Tensor:
    """In place; the slope is no less than 0, so `activated` is positive where the activation was taken of such."""
    if slope == 1:
        return grad
    if slope:
        return aten.leaky_relu_backward.grad_input(grad, activated, slope, False, grad_input=grad)  # type: ignore[no-any-return]
    return aten.threshold_backward.grad_input(grad, activated, 0, grad_input=grad)  # type: ignore[no-any-return]


# The two passes


def forward(
    feats: Tensor, key: Tensor, pixel_in: Tensor, pixel_out: Tensor, fusing: Tensor, contexts: Tensor,
    vectors: Sequence[Tensor], mask: Tensor, settings: Settings,
) -> tuple[Tensor, ...]:  # fmt: skip
    """z `[B, O, *S]`, what the backward pass reads (h of both layers of phi, w, G [y, x]), and the statistics."""
    x, dtype, exact = maps_of(feats), feats.dtype, statistics_dtype(feats)
    tiles = Tiles(x)
    layers = settings.layers(vectors)
    depth, outputs, regions = len(pixel_in), len(fusing), key.shape[2]
    hidden_in, hidden_out = empty_maps(x, depth), empty_maps(x, len(pixel_out))
    weights, fused, z = empty_maps(x, regions), empty_maps(x, outputs), empty_maps(x, outputs)

    moments = Moments(layers[0])
    for image, part in tiles:
        h = torch.mm(pixel_in, x[image][:, part], out=hidden_in[image][:, part])
        moments.add(h, tiles.empty("depth", depth, part, exact))
    first = query = moments.norm()
    second = Norm(layers[1])
    hidden = hidden_in
    if len(pixel_out):
        moments = Moments(layers[1])
        for image, part in tiles:
            spare = tiles.empty("depth", depth, part, exact)
            inner = first(hidden_in[image][:, part], spare).to(dtype)
            moments.add(torch.mm(pixel_out, inner, out=hidden_out[image][:, part]), spare)
        second = query = moments.norm()
        hidden = hidden_out
    keys = settings.scale * key.to(exact).mT  # [B, K, D]
    for image, part in tiles:
        q = query(hidden[image][:, part], tiles.empty("depth", depth, part, exact))
        weights[image][:, part] = torch.softmax(keys[image] @ q, 0)

    y = Contexts(contexts, weights, tiles, exact)
    up = y.moments(layers[2], x.shape[2]).norm()
    moments = Moments(layers[3])
    for image, part in tiles:
        both, _ = _joined(y, up, image, part, x, weights, settings, tiles)
        moments.add(torch.mm(fusing, both, out=fused[image][:, part]), tiles.empty("outputs", outputs, part, exact))
    last = moments.norm()
    for image, part in tiles:
        out = last(fused[image][:, part], tiles.empty("outputs", outputs, part, exact))
        z[image][:, part] = out.mul_(mask[image][:, None]) if len(mask) else out
    statistics = [vector.flatten() for norm in (first, second, up, last) for vector in (norm.mean, norm.var)]
    maps = (each.unflatten(2, feats.shape[2:]) for each in (z, hidden_in, hidden_out, weights, fused))
    return *maps, torch.cat(statistics)


def _joined(
    y: Contexts, up: Norm, image: int, part: slice, x: Tensor, weights: Tensor, settings: Settings, tiles: Tiles
) -> tuple[Tensor, Tensor]:
    """What the fusing product takes of a tile, `[Y + C, T]`, and its part that is y."""
    contexts, channels = y.u.shape[1], x.shape[1]
    both = tiles.empty("both", contexts + channels, part)
    sizes = [contexts, channels] if settings.context_first else [channels, contexts]
    inside, pixels = both.split(sizes)[:: 1 if settings.context_first else -1]
    pixels.copy_(x[image][:, part])
    inside.copy_(activate_(y.before(up, image, weights[image][:, part]), up.layer.slope))
    return both, inside


def backward(
    grad: Tensor, feats: Tensor, key: Tensor, pixel_in: Tensor, pixel_out: Tensor, fusing: Tensor, contexts: Tensor,
    vectors: Sequence[Tensor], mask: Tensor, saved: Sequence[Tensor], settings: Settings, needs: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of feats, in its dtype, and of key, the three matrices, contexts and the vectors.

    Products that only gradients take part in which are not needed are left out; such gradients are anything.
    """
    x, dtype, exact = maps_of(feats), feats.dtype, statistics_dtype(feats)
    tiles = Tiles(x)
    *maps, statistics = saved
    hidden_in, hidden_out, weights, fused = (each.flatten(2) for each in maps)
    incoming = grad.flatten(2)
    layers = settings.layers(vectors)
    known = statistics.split([len(layer.gain) for layer in layers for _ in range(2)])
    first, second, up, last = (Norm(*each) for each in zip(layers, known[::2], known[1::2], strict=True))
    count = x.shape[0] * x.shape[2]
    depth, outputs, channels = len(pixel_in), len(fusing), x.shape[1]
    need_feats = needs[0]
    need_phi = any((*needs[:4], *needs[6:10]))
    y = Contexts(contexts, weights, tiles, exact)
    dx = empty_maps(x, channels if need_feats else 0)

    def of_z(image: int, part: slice) -> Tensor:
        """The gradient of what the last activation is taken of."""
        before = last.before(fused[image][:, part], tiles.empty("outputs", outputs, part, exact))
        d = tiles.empty("grad", outputs, part, exact).copy_(incoming[image][:, part])
        return activation_backward_(d.mul_(mask[image][:, None]) if len(mask) else d, before, last.layer.slope)

    dlast = Gradients(last, count)
    for image, part in tiles:
        d = of_z(image, part)
        dlast.add(d, fused[image][:, part], tiles.empty("outputs", outputs, part, exact))
    contexts_of_y = len(up.gain)
    halves = fusing.split([contexts_of_y, channels] if settings.context_first else [channels, contexts_of_y], 1)
    on_context, on_pixels = (half.t().contiguous() for half in halves[:: 1 if settings.context_first else -1])
    dfusing = torch.zeros_like(fusing, dtype=exact)
    dweights = empty_maps(x, key.shape[2], exact)
    outer = torch.zeros_like(y.u)  # sum_i dy_i w_i', [B, Y, K]
    total = torch.zeros_like(y.means)  # sum_i dy_i
    for image, part in tiles:
        d = of_z(image, part)
        d = dlast.through(d, fused[image][:, part], d).to(dtype)
        both, inside = _joined(y, up, image, part, x, weights, settings, tiles)
        if needs[4]:
            dfusing += d @ both.t()
        if need_feats:
            torch.mm(on_pixels, d, out=dx[image][:, part])
        dy = torch.mm(on_context, d, out=tiles.empty("contexts", len(on_context), part)).to(exact)
        dy = activation_backward_(dy, inside.to(exact), up.layer.slope)
        total[image] += dy.sum(1, keepdim=True)
        outer[image].addmm_(dy, weights[image][:, part].t().to(exact))
        torch.mm((up.factor * y.u[image]).t(), dy, out=dweights[image][:, part])

    # rho's norm: what it takes from the gradients of the contexts and the weights is of rank K
    dup = Gradients(up, count)
    dup.shift = total.sum(0)
    centred = (y.u * (outer - total * y.mean_weights.mT)).sum(2, keepdim=True)
    dup.gain = (centred + (y.means - up.mean) * total).sum(0) * up.rstd
    slope = up.factor * up.rstd * dup.gain / count * up.layer.has_statistics  # [Y, 1]
    offset = up.factor * dup.shift / count * up.layer.has_statistics - slope * up.mean
    moments = y.covariance + y.mean_weights @ y.mean_weights.mT
    dcontexts = up.factor * outer - x.shape[2] * (offset * y.mean_weights.mT + slope * (y.u @ moments))
    matrix, column = y.u.mT @ (slope * y.u), y.u.mT @ offset  # [B, K, K], [B, K, 1]

    # the softmax, and phi
    query, hidden = (second, hidden_out) if len(pixel_out) else (first, hidden_in)
    keys = settings.scale * key.to(exact)  # [B, D, K]
    dkey = torch.zeros_like(keys)
    dquery = empty_maps(x, depth if need_phi else 0)
    dphi = [Gradients(first, count), Gradients(second, count)]
    dpixel_in, dpixel_out = torch.zeros_like(pixel_in, dtype=exact), torch.zeros_like(pixel_out, dtype=exact)
    outermost = dphi[len(pixel_out) > 0]
    for image, part in tiles if need_phi else ():
        w, dw = weights[image][:, part].to(exact), dweights[image][:, part]
        dw = dw.sub_(matrix[image] @ w).sub_(column[image])
        dw -= dw.gather(0, w.argmax(0, keepdim=True))  # a peak's gradient is then what is left, not rounding
        dscores = w * (dw - (w * dw).sum(0, keepdim=True))
        q = query(hidden[image][:, part], tiles.empty("depth", depth, part, exact))
        d = torch.mm(keys[image], dscores, out=tiles.empty("grad of depth", depth, part, exact))
        d = activation_backward_(d, q, query.layer.slope)
        dkey[image].addmm_(q, dscores.t(), alpha=settings.scale)
        outermost.add(d, hidden[image][:, part], q)
        dquery[image][:, part] = d
    turned = pixel_out.t().contiguous()
    for image, part in tiles if need_phi and len(pixel_out) else ():
        spare = tiles.empty("grad of depth", depth, part, exact)
        d = dphi[1].through(dquery[image][:, part], hidden_out[image][:, part], spare).to(dtype)
        q = first(hidden_in[image][:, part], tiles.empty("depth", depth, part, exact))
        dpixel_out += d @ q.to(dtype).t()
        d = torch.mm(turned, d, out=dquery[image][:, part])
        d = activation_backward_(d.to(exact), q, first.layer.slope)
        dphi[0].add(d, hidden_in[image][:, part], q)
        dquery[image][:, part] = d
    turned = pixel_in.t().contiguous()
    for image, part in tiles if need_phi else ():
        spare = tiles.empty("grad of depth", depth, part, exact)
        d = dphi[0].through(dquery[image][:, part], hidden_in[image][:, part], spare).to(dtype)
        if needs[2]:
            dpixel_in += d @ x[image][:, part].t()
        if need_feats:
            dx[image][:, part].addmm_(turned, d)
    sums = [each.flatten() for layer in (*dphi, dup, dlast) for each in (layer.gain, layer.shift)]
    return dx.unflatten(2, feats.shape[2:]), dkey, dpixel_in, dpixel_out, dfusing, dcontexts, *sums


# Inference: statistics are known, and norms folded into the layers


def infer_tile(
    pixels: Tensor,
    key: Tensor,
    contexts: Tensor,
    weights: Sequence[Tensor],
    scale: float,
    slopes: Sequence[float],
) -> Tensor:
    """z of T pixels `[T, C]` as `[T, O]`, or the classifier's logits `[T, L]`, with key `[K, D]` and u `[Y, K]`.

    q_i = phi(x_i),  w_i = softmax_k(scale * q_i . key_k),  y_i = rho(sum_k w_ik u_k + b)  (Eqs. 3, 5),
    z_i = rho(G_y y_i + G_x x_i + g)  (Eq. 6)

    Products are rounded to the dtype of the pixels, as PyTorch does; biases are added in their own.
    """
    layers, (up_bias, on_context, on_pixels, bias, *classifier) = split_weights(weights)
    dtype = pixels.dtype
    query = pixels
    for (weight, layer_bias), slope in zip(layers, slopes, strict=False):
        query = activate_(_linear(query, weight, layer_bias), slope).to(dtype)  # [T, D]
    scores = scale * _linear(query, key).to(up_bias.dtype)  # [T, K]
    attention = F.softmax(scores, dim=1).to(dtype)
    context = activate_(_linear(attention, contexts, up_bias), slopes[2]).to(dtype)  # y, [T, Y]
    out = activate_(_linear(pixels, on_pixels, bias).add_(_linear(context, on_context)), slopes[3])  # z, [T, O]
    return _linear(out.to(dtype), *classifier) if classifier else out


def query_of(feats: Tensor, weights: Sequence[Tensor], slopes: Sequence[float]) -> Tensor:
    """phi of pixels `[B, C, *S]`."""
    for (weight, bias), slope in zip(split_weights(weights)[0], slopes, strict=False):
        feats = activate_(convolved(feats, weight, bias), slope).to(feats.dtype)
    return feats


def split_weights(weights: Sequence[Tensor]) -> tuple[list[tuple[Tensor, Tensor]], Sequence[Tensor]]:
    """The layers of phi, one or two, and the rest: both kinds of bias are vectors, so the third weight tells."""
    layers = 1 if weights[2].dim() == 1 else 2
    return [(weights[2 * i], weights[2 * i + 1]) for i in range(layers)], weights[2 * layers :]


def _linear(pixels: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """W x + b of `[T, channels]`: with a bias in its dtype, else in that of the pixels.

    A convolution of channels in last place is oneDNN's fastest product of float32 on a CPU.
    """
    fused = bias if bias is not None and bias.dtype == pixels.dtype else None
    if pixels.is_cpu:
        image = pixels.reshape(1, 1, *pixels.shape).permute(0, 3, 1, 2)  # [1, channels, 1, T]
        out = F.conv2d(image, weight[:, :, None, None], fused)[0, :, 0].t()
    else:
        out = F.linear(pixels, weight, fused)
    return out if bias is None or bias is fused else out + bias


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
    """Fill `out`: z `[B, O, *S]`, logits `[B, L, *S]` or classes `[B, *S]`."""
    on_cpu = feats.is_cpu
    tile = TILE if on_cpu else 16 * TILE
    for image in range(feats.shape[0]):
        pixels = feats[image].flatten(1).t()  # [N, C]
        pixels = pixels.contiguous() if on_cpu else pixels  # a whole matrix is turned several times as fast as a part
        result = out[image].view(-1) if output == "classes" else out[image].flatten(1).t()
        k, u = key[image].t().contiguous(), contexts[image].contiguous()
        for start in range(0, pixels.shape[0], tile):
            part = infer_tile(pixels[start : start + tile].contiguous(), k, u, weights, scale, slopes)
            result[start : start + tile] = part.argmax(1) if output == "classes" else part


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
        out = convolved(out.to(dtype), *classifier)
    if output == "classes":
        return out.argmax(1)
    return in_format(out.to(dtype), feats)


def convolved(feats: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """W x + b of `[B, channels, *S]` in the dtype of b."""
    ones = (1,) * (feats.dim() - 2)
    if len(ones) > 3:
        out = convolved(feats.flatten(4), weight, bias)
        return out.view(*out.shape[:4], *feats.shape[4:])
    convolution = (F.conv1d, F.conv2d, F.conv3d)[feats.dim() - 3]
    fused = bias if bias is not None and bias.dtype == feats.dtype else None
    out = convolution(feats, weight.view(*weight.shape, *ones), fused)
    return out if bias is None or bias is fused else out + bias.view(-1, *ones)
