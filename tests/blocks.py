"""Heads that compute step 4, from pixels and regions to z, in many styles, and heads that compute something else."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ocr_kernels import modules, reference

C, D, OUT, K = 8, 6, 10, 4


class ConvBnAct(nn.Module):
    """A block of a library: the norm and the activation are options."""

    def __init__(self, inputs: int, outputs: int, *, dims: int = 2, norm: Any = None, act: Any = nn.ReLU) -> None:
        super().__init__()
        self.conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](inputs, outputs, 1, bias=norm is nn.Identity)
        self.bn = norm(outputs) if norm else (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](outputs)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Head(nn.Module):
    """Layers under names of their own; what differs from head to head are its methods and its blocks."""

    dims, region_dims = 2, 2
    layers = (2, 2)  # in phi and psi

    def __init__(self, block: Callable[..., nn.Module] = ConvBnAct, contexts: int = C, **options: Any) -> None:
        super().__init__()
        pixel, region = (functools.partial(block, dims=d, **options) for d in (self.dims, self.region_dims))
        self.theta = nn.Sequential(*(pixel(D if i else C, D) for i in range(self.layers[0])))
        self.phi = nn.Sequential(*(region(D if i else C, D) for i in range(self.layers[1])))
        self.g = region(C, D)
        self.out = pixel(D, contexts)
        self.fuse = nn.Sequential(pixel(C + contexts, OUT), nn.Dropout(0.3))

    def forward(self, x: Tensor, proxies: Tensor) -> Any:
        query, key, value = self.theta(x), self.phi(proxies), self.g(proxies)
        context = self.attend(query.flatten(2), key.flatten(2), value.flatten(2))
        return self.join(x, self.out(context.reshape(query.shape)))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return value @ (D**-0.5 * query.mT @ key).softmax(-1).mT

    def join(self, x: Tensor, context: Tensor) -> Any:
        return self.fuse(torch.cat([x, context], 1))


class NoFactor(Head):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.bmm(value, F.softmax(torch.bmm(key.mT, query), dim=1))


class Einsum(Head):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = torch.einsum("bdk,bdn->bkn", key, query) / torch.sqrt(torch.tensor(float(D)))
        return torch.einsum("bdk,bkn->bdn", value, scores.softmax(1))


class Wide(Head):
    """A convolution of more than one pixel joins pixels and contexts."""

    def __init__(self, *sizes: int, norm: bool = True, **options: Any) -> None:
        super().__init__()
        self.dims = self.region_dims = len(sizes)
        super().__init__()
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(sizes) - 1]
        dilation = options.get("dilation", 1)
        padding = tuple(dilation * (size // 2) for size in sizes)
        joining = kind(2 * C, OUT, sizes, **{"padding": padding, "bias": not norm, **options})
        norms = [(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(sizes) - 1](OUT), nn.ReLU()]
        self.fuse = nn.Sequential(joining, *norms * norm)


class ScaledDotProduct(Head):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query.mT[:, None], key.mT[:, None], value.mT[:, None])[:, 0].mT


class AddedProduct(Head):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = torch.baddbmm(query.new_zeros(1, 1, 1), query.mT, key, beta=0, alpha=D**-0.5)
        return torch.bmm(value, scores.softmax(2).transpose(1, 2))


class RegionColumns(Head):
    """Conv1d on regions `[B, C, K]`."""

    region_dims = 1


class Volume(Head):
    dims = region_dims = 3


class Sequence(Head):
    dims = region_dims = 1


class OneLayer(Head):
    layers = (1, 1)


class RegionRows(OneLayer):
    """Regions `[B, K, C]` and linear layers, with what stands on regions alone: a norm and a smooth activation."""

    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(C, D), nn.LayerNorm(D), nn.GELU(), nn.Linear(D, D, bias=False))
        self.g = nn.Linear(C, D)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return super().attend(query, key.mT, value.mT)


class Pooled(Head):
    """Pixels that attend at a lower resolution."""

    factor: Any = 2
    mode = "bilinear"

    def __init__(self) -> None:
        super().__init__()
        self.pool = (nn.AvgPool2d if self.dims == 2 else nn.MaxPool3d)(self.factor)

    def forward(self, x: Tensor, proxies: Tensor) -> Any:
        low = self.pool(x)
        query, key, value = self.theta(low), self.phi(proxies), self.g(proxies)
        context = self.attend(query.flatten(2), key.flatten(2), value.flatten(2))
        return self.join(x, self.enlarged(self.out(context.reshape(query.shape)), x))

    def enlarged(self, context: Tensor, x: Tensor) -> Tensor:
        return F.interpolate(context, size=x.shape[2:], mode=self.mode)


class PooledSideways(Pooled):
    factor, mode = (1, 3), "bicubic"


class PooledVolume(Pooled):
    dims = region_dims = 3
    mode = "nearest"


class ByFactor(Pooled):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2, ceil_mode=True)

    def enlarged(self, context: Tensor, x: Tensor) -> Tensor:
        return F.interpolate(context, scale_factor=2.0)[..., : x.shape[2], : x.shape[3]]


class PooledTwice(Pooled):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.Sequential(nn.MaxPool2d(2, 1), nn.MaxPool2d(2, 1))


class FixedSize(Pooled):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(3)


class RegionNorms(RegionColumns):
    """GroupNorm on regions."""

    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Sequential(nn.Conv1d(C, D, 1), nn.GroupNorm(2, D), nn.SiLU())


class Sum(Head):
    """Two projections are added up, where others join maps and project them."""

    def __init__(self) -> None:
        super().__init__()
        self.of_x, self.of_y = nn.Conv2d(C, OUT, 1, bias=False), nn.Conv2d(C, OUT, 1)
        self.norm = nn.BatchNorm2d(OUT)

    def join(self, x: Tensor, context: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.of_x(x) + self.of_y(context)), 0.2)


class Residual(Head):
    """Of a context that a learned number weighs."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1))

    def join(self, x: Tensor, context: Tensor) -> Tensor:
        return super().join(x, self.gamma * context + x)


class Resized(Head):
    """Pooled and brought back by a factor that is 1."""

    def forward(self, x: Tensor, proxies: Tensor) -> Any:
        return super().forward(F.max_pool2d(x, 1), proxies)

    def join(self, x: Tensor, context: Tensor) -> Tensor:
        return super().join(x, F.interpolate(context, scale_factor=1, mode="bilinear", align_corners=True))


class NoUp(Head):
    """No layer after the attention, and a product with rows of pixels."""

    def __init__(self) -> None:
        super().__init__(contexts=D)
        self.out = nn.Identity()
        self.last = nn.Linear(C + D, OUT)

    def join(self, x: Tensor, context: Tensor) -> Tensor:
        rows = torch.cat([context, x], 1).flatten(2).transpose(1, 2)
        return F.relu_(self.last(rows)).permute(0, 2, 1).contiguous().view(-1, OUT, *x.shape[2:])


class Temperature(Head):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.7))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return value @ (query.mT @ key / self.temperature).softmax(-1).mT


class ActivatedNorm(nn.Module):
    """Norm and activation in one, as InPlaceABN."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        self.slope, self.eps = 0.01, 1e-5

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return F.leaky_relu_(x, self.slope)


class OfBatch(nn.Module):
    """The statistics of the batch in every mode, by code of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True)


class FrozenNorm(nn.Module):
    """Buffers alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps = 1e-5
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, 0.5 + torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (t.view(-1, 1, 1) for t in self.buffers())
        scale = weight * (var + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)


class Mmseg(Head):
    """mmsegmentation's: regions `[B, C, K, 1]`, contexts before pixels."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        sim_map = torch.matmul(query.permute(0, 2, 1), key)
        sim_map = (D**-0.5) * sim_map
        context = torch.matmul(F.softmax(sim_map, dim=-1), value.permute(0, 2, 1))
        return context.permute(0, 2, 1).contiguous()

    def join(self, x: Tensor, context: Tensor) -> Tensor:
        return self.fuse(torch.cat([context, x], dim=1))


class Label(Mmseg):
    """openseg's forward takes a label as well."""

    def forward(self, x: Tensor, proxies: Tensor, label: Tensor | None = None) -> Any:
        assert label is None
        return super().forward(x, proxies)


def ours(library: Any = modules, **options: Any) -> nn.Module:
    return library.SpatialOCR(C, D, OUT, **options)


def parametrized() -> nn.Module:
    head: Any = Head()
    nn.utils.parametrizations.weight_norm(head.fuse[0].conv)
    return head


HEADS: dict[str, Callable[[], nn.Module]] = {
    "ours": ours,
    "reference": functools.partial(ours, reference),
    "LeakyReLU": functools.partial(ours, act_layer=nn.LeakyReLU),
    "no activation": functools.partial(ours, act_layer=nn.Identity),
    "blocks": Head,
    "mmsegmentation": Mmseg,
    "openseg": Label,
    "no factor": NoFactor,
    "einsum": Einsum,
    "scaled_dot_product_attention": ScaledDotProduct,
    "baddbmm": AddedProduct,
    "Conv1d on regions": RegionColumns,
    "volume": Volume,
    "sequence": Sequence,
    "one layer": OneLayer,
    "linear layers": RegionRows,
    "norms on regions": RegionNorms,
    "sum": Sum,
    "residual": Residual,
    "learned temperature": Temperature,
    "resized by 1": Resized,
    "scale": functools.partial(ours, scale=2),
    "scale, reference": functools.partial(ours, reference, scale=2),
    "pooled": Pooled,
    "pooled sideways": PooledSideways,
    "pooled volume": PooledVolume,
    "joined by 3x3": lambda: Wide(3, 3),
    "joined by 3x1": lambda: Wide(3, 1, norm=False),
    "joined by 3x3, dilated": lambda: Wide(3, 3, dilation=2),
    "joined by 3": lambda: Wide(3),
    "joined by 1x3x3": lambda: Wide(1, 3, 3),
    "no up": NoUp,
    "few contexts": lambda: Head(contexts=5),
    "ABN": lambda: Head(norm=ActivatedNorm, act=nn.Identity),
    "frozen": lambda: Head(norm=FrozenNorm),
    "SyncBatchNorm": lambda: Head(norm=nn.SyncBatchNorm),
    "no norm": lambda: Head(norm=nn.Identity),
    "no affine": lambda: Head(norm=functools.partial(nn.BatchNorm2d, affine=False)),
    "in place": lambda: Head(act=functools.partial(nn.ReLU, inplace=True)),
    "parametrized": parametrized,
}


def inputs(module: nn.Module, *, batch: int = 2, regions: int = K) -> tuple[Tensor, Tensor]:
    feats = torch.randn(batch, C, *(7, 5, 3)[: getattr(module, "dims", 2)])
    if isinstance(module, RegionRows):
        return feats, torch.randn(batch, regions, C)
    return feats, torch.randn(batch, C, regions, *[1] * (getattr(module, "region_dims", 2) - 1))


def trained(module: nn.Module) -> nn.Module:
    """`module` in eval mode, with statistics that have seen data."""
    for name, tensor in (*module.named_buffers(), *module.named_parameters()):
        if name.endswith("running_var"):
            tensor.data.uniform_(0.5, 1.5)
        elif tensor.is_floating_point() and tensor.dim() == 1:
            tensor.data.uniform_(-1, 1.5)
    return module.eval()


# What is another computation


class Gelu(Head):
    def __init__(self) -> None:
        super().__init__(act=nn.GELU)


class WrongAxis(Head):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return value @ (query.mT @ key).softmax(1).mT


class TwoHeads(Head):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.unflatten(1, (2, -1)) for x in (query, key, value))
        return (v @ (q.mT @ k).softmax(-1).mT).flatten(1, 2)


class TwoResults(Head):
    def join(self, x: Tensor, context: Tensor) -> Any:
        return super().join(x, context), context


class Kept(Head):
    def join(self, x: Tensor, context: Tensor) -> Any:
        self.last_context = context
        return super().join(x, context)


class Prior(Head):
    def __init__(self) -> None:
        super().__init__()
        self.prior = nn.Parameter(torch.randn(1, 1, 1))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return value @ (query.mT @ key + self.prior).softmax(-1).mT


class Counting(Head):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def join(self, x: Tensor, context: Tensor) -> Any:
        self.calls += 1
        return super().join(x, context)


class Filled(Head):
    def join(self, x: Tensor, context: Tensor) -> Any:
        both = torch.cat([context, torch.zeros_like(x)], 1)
        both[:, C:] = x
        return self.fuse(both)


class Threshold(Head):
    def join(self, x: Tensor, context: Tensor) -> Any:
        return super().join(x, context if context.mean() > 0 else 2 * context)


class InPlace(Head):
    def forward(self, x: Tensor, proxies: Tensor) -> Any:
        return super().forward(x, proxies.relu_())


class Number(Head):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(()))

    def join(self, x: Tensor, context: Tensor) -> Any:
        return super().join(x, self.gamma.item() * context)


class Noise(Head):
    def join(self, x: Tensor, context: Tensor) -> Any:
        return super().join(x, context + torch.rand(context.shape))


class Gate(Head):
    def join(self, x: Tensor, context: Tensor) -> Any:
        return super().join(x, context * x)


class ByRegions(Head):
    """A factor that depends on the number of regions."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return value @ (query.mT @ key / key.shape[2]).softmax(-1).mT


class ByPixels(Head):
    def join(self, x: Tensor, context: Tensor) -> Any:
        return super().join(2 * x if x[0, 0].numel() > 16 else x, context)


class FirstRegions(Head):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return super().attend(query, key[:, :, :8], value[:, :, :8])


class ByImages(Head):
    def join(self, x: Tensor, context: Tensor) -> Any:
        return super().join(2 * x if len(x) == 1 else x, context)


class ByGradMode(Head):
    def join(self, x: Tensor, context: Tensor) -> Any:
        return super().join(2 * x if torch.is_grad_enabled() else x, context)


class Wider(Head):
    def join(self, x: Tensor, context: Tensor) -> Any:
        return super().join(x, context).float()


class Turned(Head):
    def join(self, x: Tensor, context: Tensor) -> Any:
        return super().join(x, context).contiguous(memory_format=torch.channels_last)


class Configured(Head):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(scale=0.5)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return super().attend(self.config.scale * query, key, value)


class Recording(Head):
    def __init__(self) -> None:
        super().__init__()
        self.maps: list[Tensor] = []

    def join(self, x: Tensor, context: Tensor) -> Any:
        self.maps.append(context)
        return super().join(x, context)


TEMPERATURE = nn.Parameter(torch.tensor(0.7))


class Spread(Head):
    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Conv2d(C, D, 3, padding=1)


class Global(Head):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return super().attend(query * TEMPERATURE, key, value)


class Drawing(Head):
    def join(self, x: Tensor, context: Tensor) -> Any:
        torch.rand(3)
        return super().join(x, context)


REFUSALS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "GroupNorm": (lambda: Head(norm=functools.partial(nn.GroupNorm, 2)), "it has a GroupNorm on the pixels"),
    "GELU": (Gelu, "it has the activation gelu"),
    "PReLU": (lambda: Head(act=nn.PReLU), "it has the activation prelu"),
    "batch statistics": (lambda: Head(norm=OfBatch), "it has a norm without running statistics"),
    "by a factor": (ByFactor, "it resizes its contexts by a factor, not to the size of its pixels"),
    "pooled twice": (PooledTwice, "it has pooled of pixels where step 4 has none"),
    "a fixed size": (FixedSize, "it pools its pixels to a fixed size"),
    "joined by 3x3, grouped": (lambda: Wide(3, 3, groups=2), "it has a convolution with a stride, or with groups"),
    "joined by 2x2": (lambda: Wide(2, 2), "it has a convolution that does not give a pixel for each pixel"),
    "joined by 3x3, reflected": (lambda: Wide(3, 3, padding_mode="reflect"), "it computes reflection_pad2d"),
    "3x3 elsewhere": (Spread, "it has a convolution that is not 1x1, and does not take pixels joined with contexts"),
    "wrong axis": (WrongAxis, "it takes its softmax over pixels, not over regions"),
    "two heads": (TwoHeads, "several heads"),
    "two results": (TwoResults, "it returns a tuple"),
    "kept": (Kept, "it sets its attribute last_context"),
    "prior": (Prior, "it adds to the scores"),
    "values": (Threshold, "it reads values"),
    "counter": (Counting, "it changes its own tensors or its arguments in place"),
    "a part changed": (Filled, "it "),
    "arguments": (InPlace, "it changes its own tensors or its arguments in place"),
    "its own value": (Number, "it reads values"),
    "noise": (Noise, "it draws random numbers"),
    "gate": (Gate, "it multiplies two maps"),
    "regions": (ByRegions, "off by"),
    "pixels": (ByPixels, "off by"),
    "first regions": (FirstRegions, "off by"),
    "images": (ByImages, "off by"),
    "grad mode": (ByGradMode, "off by"),
    "another dtype": (Wider, "its result has another dtype than its pixels"),
    "another format": (Turned, "its result is not contiguous where its pixels are"),
    "configured": (Configured, "it reads config, whose changes would not be seen"),
    "recording": (Recording, "it changes a list, a dict or another object"),
    "global": (Global, "it uses a tensor that is neither its own nor made in its forward"),
    "drawing": (Drawing, "it draws random numbers"),
    "meta": (lambda: Head().to("meta"), "its parameters are on the meta device"),
}
