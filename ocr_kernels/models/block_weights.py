"""The folded weights of a module's step 4, and how they are made of its parameters and buffers."""

from __future__ import annotations

import dataclasses
import inspect
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ocr_kernels.attention import pixel_region_attention
from ocr_kernels.core.activations import activate_
from ocr_kernels.core.backends import BACKENDS
from ocr_kernels.core.layout import in_format
from ocr_kernels.head.functional import IMPLEMENTED, HeadWeights, Output, Slopes, ocr_head
from ocr_kernels.head.reference import convolved
from ocr_kernels.models.block_trace import Call, Program, Ref


class Layer(NamedTuple):
    """A matrix and a bias, or None for zeros, among a program's results, and the slope of the activation after it."""

    weight: Ref
    bias: Ref | None
    slope: float


class Resizing(NamedTuple):
    """How pixels attend at a lower resolution."""

    pool: Call
    resize: Call  # contexts, to the size that follows
    factor: int  # by which sides get shorter, rounded up

    def run(self, feats: Tensor, key: Tensor, value: Tensor, head: HeadWeights) -> Tensor:
        """z of `ocr_head`, with y made of pooled feats. Resizing commutes with the half of g that takes y."""
        device, dtype, slopes = feats.device, feats.dtype, head.slopes
        query = self.pool.run((), device, feats)
        phi = [(head.pixel_in, head.pixel_in_bias, slopes.pixel_in)]
        if head.pixel_out is not None and head.pixel_out_bias is not None:
            phi.append((head.pixel_out, head.pixel_out_bias, slopes.pixel_out))
        for weight, bias, slope in phi:
            query = activate_(convolved(query, weight, bias), slope).to(dtype)
        context_regions = value if head.up is None else torch.matmul(head.up, value)  # u, [B, Y, K]
        context = pixel_region_attention(query, key, context_regions, head.scale)
        context = context + head.up_bias.view(-1, *(1,) * (feats.dim() - 2))
        context = convolved(activate_(context, slopes.up).to(dtype), head.context)
        context = self.resize.run((), device, context, feats.shape[2:])
        out = activate_(convolved(feats, head.pixels, head.bias).add_(context), slopes.fusing)
        return in_format(out.to(dtype), feats)


class Folded(NamedTuple):
    """What a call takes: the head's weights, and what makes keys and values of regions, with tensors in it."""

    head: HeadWeights
    key: tuple[Any, ...]
    value: tuple[Any, ...]
    transposed: bool  # whether regions come as [B, K, C]
    resizing: Resizing | None

    def with_classifier(self, weight: Tensor, bias: Tensor | None) -> Folded | None:
        """With logits for z, made by a matrix `[L, O]`; None where that is no part of the op."""
        z, device = self.head.bias, self.head.bias.device
        casts = torch.is_autocast_enabled(device.type)
        wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (weight, bias))
        if self.resizing is not None or wants_grad or weight.shape[1] != len(z) or weight.device != device:
            return None
        dtype = self.head.pixels.dtype
        if not casts and weight.dtype != dtype:
            return None
        bias = z.new_zeros(len(weight)) if bias is None else bias.detach().to(z.dtype)
        classes = weight.detach().to(dtype).contiguous()
        return self._replace(head=self.head._replace(classes=classes, classes_bias=bias))

    def compute(self, feats: Tensor, regions: Tensor, backend: str | None = None) -> Tensor:
        """z, or logits, in the dtype of the weights, in the memory format of feats."""
        with torch.autocast(feats.device.type, enabled=False):
            dtype = self.head.pixels.dtype
            columns = regions.to(dtype).flatten(2)
            columns = columns if self.transposed else columns.transpose(1, 2)  # [B, K, C]
            key, value = _chain(columns, self.key), _chain(columns, self.value)
            if self.resizing is not None:
                return self.resizing.run(feats.to(dtype), key, value, self.head)
            output: Output = "features" if self.head.classes is None else "logits"
            return ocr_head(feats.to(dtype), (key, value), self.head, output, backend=backend)


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """How a module computes step 4, and of which of its tensors."""

    program: Program
    pixels: tuple[Layer, ...]  # phi, one or two
    key: tuple[Layer | Call, ...]  # psi; calls are of operations that no layer is
    value: tuple[Layer | Call, ...]  # delta
    up: Layer  # rho; its weight is the number of channels where the values themselves are activated
    context: Ref  # the half of g that takes y
    fusing: Layer  # the half of g that takes x
    scale: float
    resizing: Resizing | None
    channels: int
    dims: int  # of feats
    region_dims: int
    transposed: bool  # whether regions come as [B, K, C]
    first: str  # the path of a weight, whose dtype and device are the module's
    layers: tuple[tuple[str, str, tuple[str, ...], tuple[tuple[str, Any], ...]], ...]
    """The path, the class, the names of tensors and the settings of each."""

    @property
    def implemented(self) -> tuple[str, ...]:
        """The backends of what it runs."""
        return IMPLEMENTED if self.resizing is None else BACKENDS

    def weights(self, module: nn.Module, dtype: torch.dtype) -> Folded:
        """The folded weights of `module`, made of its present parameters and buffers in float32."""
        with torch.no_grad():
            results = self.program.run(module)

            def matrix(ref: Ref) -> Tensor:
                made: Tensor = results[ref.at].to(dtype).contiguous()
                return made

            def bias(layer: Layer, like: Ref) -> Tensor:
                weight: Tensor = results[like.at]
                made: Tensor | None = None if layer.bias is None else results[layer.bias.at]
                return weight.new_zeros(len(weight)) if made is None else made.contiguous()

            def part(layer: Layer | Call) -> Any:
                if isinstance(layer, Layer):
                    return matrix(layer.weight), bias(layer, layer.weight), layer.slope
                args = [results[arg.at].to(dtype) if isinstance(arg, Ref) else arg for arg in layer.args]
                return dataclasses.replace(layer, args=tuple(args))

            second = self.pixels[1] if len(self.pixels) == 2 else None
            slopes = Slopes(pixel_in=self.pixels[0].slope, pixel_out=second.slope if second else 0.0)
            context = matrix(self.context)
            ups = self.up.weight is not None
            head = HeadWeights(
                pixel_in=matrix(self.pixels[0].weight),
                pixel_in_bias=bias(self.pixels[0], self.pixels[0].weight),
                pixel_out=matrix(second.weight) if second else None,
                pixel_out_bias=bias(second, second.weight) if second else None,
                object_in=None,
                object_in_bias=None,
                object_out=None,
                object_out_bias=None,
                down=None,
                down_bias=None,
                up=matrix(self.up.weight) if ups else None,
                up_bias=bias(self.up, self.up.weight) if ups else results[self.context.at].new_zeros(context.shape[1]),
                context=context,
                pixels=matrix(self.fusing.weight),
                bias=bias(self.fusing, self.fusing.weight),
                slopes=slopes._replace(up=self.up.slope, fusing=self.fusing.slope),
                scale=self.scale,
            )
            return Folded(
                head, tuple(map(part, self.key)), tuple(map(part, self.value)), self.transposed, self.resizing
            )

    def run(self, module: nn.Module, feats: Tensor, regions: Tensor) -> Tensor:
        """z of `module`, in the shape and memory format that its own forward gives it."""
        device = feats.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else feats.dtype
        with torch.no_grad():
            return self.weights(module, dtype).compute(feats, regions)

    def takes(self, feats: Tensor, regions: Tensor, first: Tensor) -> bool:
        """Whether the module's own forward would take pixels and regions like these; `first` is `self.first`'s."""
        shape, region_shape, dtype = feats.shape, regions.shape, feats.dtype
        return (
            len(shape) == self.dims
            and len(region_shape) == self.region_dims
            and shape[0] == region_shape[0]
            and shape[1] == region_shape[2 if self.transposed else 1] == self.channels
            and all(size == 1 for size in region_shape[3:])
            and 0 not in shape
            and 0 not in region_shape
            and feats.device == regions.device == first.device
            and (dtype == regions.dtype == first.dtype or torch.is_autocast_enabled(feats.device.type))
        )

    def random_inputs(
        self, seed: int, batch: int = 2, sides: tuple[int, ...] = (5, 3, 2), regions: int = 4
    ) -> tuple[Tensor, Tensor]:
        """Pixels and regions of the right channels and dimensions, in float32."""
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, regions, self.channels) if self.transposed else (batch, self.channels, regions)
        factor = self.resizing.factor if self.resizing is not None else 1
        sides = tuple(side * factor + (factor > 1 and side % 2) for side in sides[: self.dims - 2])
        feats = torch.randn((batch, self.channels, *sides), generator=generator)
        return feats, torch.randn((*shape, *[1] * (self.region_dims - 3)), generator=generator)

    def fits(self, module: nn.Module) -> bool:
        """Whether the layers of `module` still are those that were planned, with the same settings."""
        if len(list(module.modules())) != len(self.layers):
            return False
        for path, name, tensors, settings in self.layers:
            layer: Any = module
            for child in path.split(".") if path else ():
                layer = layer._modules.get(child)
                if layer is None:
                    return False
            if type(layer).__qualname__ != name:
                return False
            if present(layer) != tensors:
                return False
            for attribute, value in settings:
                if getattr(layer, attribute, None) != value:
                    return False
        return True


def present(layer: nn.Module) -> tuple[str, ...]:
    """The names of a layer's parameters and buffers that are there."""
    entries = (*layer._parameters.items(), *layer._buffers.items())
    return tuple([name for name, tensor in entries if tensor is not None])


# The code of a module, which its plan was read off


def own_classes(module: nn.Module) -> list[type]:
    """The classes of a module that are not PyTorch's."""
    return [base for base in type(module).__mro__ if base.__module__.partition(".")[0] not in ("torch", "builtins")]


def functions_of(base: type) -> list[FunctionType]:
    return [value for value in map(inspect.unwrap, vars(base).values()) if isinstance(value, FunctionType)]


def globals_of(module: nn.Module) -> list[tuple[dict[str, Any], tuple[str, ...]]]:
    """The globals of its code that are neither modules nor functions nor classes, and so may be other values later."""
    found: dict[int, tuple[dict[str, Any], set[str]]] = {}
    for base in {base for part in module.modules() for base in own_classes(part)}:
        for function in functions_of(base):
            names = found.setdefault(id(function.__globals__), (function.__globals__, set()))[1]
            for name in function.__code__.co_names:
                value = function.__globals__.get(name)
                if value is not None and not callable(value) and not isinstance(value, ModuleType):
                    names.add(name)
    return [(globals, tuple(sorted(names))) for globals, names in found.values() if names]


def _chain(columns: Tensor, parts: tuple[Any, ...]) -> Tensor:
    """`[B, channels, K]` of regions `[B, K, C]`."""
    dtype = columns.dtype
    for part in parts:
        if isinstance(part, Call):
            columns = part.run((), columns.device, columns.transpose(1, 2)).transpose(1, 2)
        else:
            weight, bias, slope = part
            columns = activate_(F.linear(columns, weight) + bias, slope).to(dtype)
    return columns.transpose(1, 2)
