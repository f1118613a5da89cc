"""The folded weights of a module's step 4, and how they are made of its parameters and buffers."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ocr_kernels import block
from ocr_kernels.attention import pixel_region_attention, reference
from ocr_kernels.block.reference import convolved, query_of, split_weights
from ocr_kernels.block.registration import implemented
from ocr_kernels.core.activations import activate_
from ocr_kernels.core.backends import BACKENDS, Backend, left_to_compiler
from ocr_kernels.core.layout import in_format, statistics_dtype
from ocr_kernels.models.block_program import Call, Program, Ref, Window
from ocr_kernels.models.own_code import class_of, is_value, present


class Layer(NamedTuple):
    """A matrix and a bias, or None for zeros, among a program's results, and the slope of the activation after it."""

    weight: Ref | None  # None in `up` alone, where the values themselves are activated
    bias: Ref | None
    slope: float


class Beyond(NamedTuple):
    """What takes more than one pixel: how pixels attend at a lower resolution, and the convolution that joins."""

    pool: Call | None
    resize: Call | None  # contexts, to the size that follows
    factor: int  # by which sides get shorter, rounded up
    window: Window | None

    def run(self, feats: Tensor, key: Tensor, value: Tensor, folded: block.FoldedBlock) -> Tensor:
        """z of `ocr_block`, with these. Resizing commutes with the half of g that takes y, if that is 1x1."""
        device, dtype, slopes = feats.device, feats.dtype, folded.slopes
        exact = statistics_dtype(feats)
        pooled = feats if self.pool is None else self.pool.run((), device, exact, feats)
        query = query_of(pooled, folded.weights, slopes)
        attend = reference.pixel_region_attention if left_to_compiler(query) else pixel_region_attention
        _, (up_bias, on_context, on_pixels, bias) = split_weights(folded.weights)
        context = attend(query, key, folded.contexts(value), folded.scale)
        context = context + up_bias.view(-1, *(1,) * (feats.dim() - 2))
        context = convolved(activate_(context, slopes[2]).to(dtype), on_context, window=self.window)
        if self.resize is not None:
            context = self.resize.run((), device, exact, context, feats.shape[2:])
        out = convolved(feats, on_pixels, bias, window=self.window).add_(context)
        return in_format(activate_(out, slopes[3]).to(dtype), feats)


class Folded(NamedTuple):
    """What a call takes: the layers of pixels, and what makes keys and values of regions, with tensors in it."""

    block: block.FoldedBlock
    key: tuple[Any, ...]
    value: tuple[Any, ...]
    transposed: bool  # whether regions come as [B, K, C]
    beyond: Beyond | None

    def with_classifier(self, weight: Tensor, bias: Tensor | None) -> Folded | None:
        """With logits for z, made by a matrix `[L, O]`; None where that is no part of the op."""
        last = self.block.weights[-1]  # z's bias
        casts = last.dtype != torch.float64 and torch.is_autocast_enabled(last.device.type)
        wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (weight, bias))
        if self.beyond is not None or wants_grad or weight.shape[1] != len(last) or weight.device != last.device:
            return None
        if not casts and weight.dtype != self.block.dtype:
            return None
        return self._replace(block=self.block.with_classifier(weight.detach(), None if bias is None else bias.detach()))

    def compute(self, feats: Tensor, regions: Tensor, backend: Backend | None = None) -> Tensor:
        """z, or logits, in the dtype of the weights, in the memory format of feats."""
        with torch.autocast(feats.device.type, enabled=False), torch.no_grad():
            dtype = self.block.dtype
            columns = regions.to(dtype).flatten(2)
            columns = columns if self.transposed else columns.mT.contiguous()  # [B, K, C]
            key, value = _chain(columns, self.key), _chain(columns, self.value)
            if self.beyond is not None:
                return self.beyond.run(feats.to(dtype), key, value, self.block)
            return self.block.run(feats.to(dtype), key, value, backend)


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """How a module computes step 4, and of which of its tensors."""

    program: Program
    pixels: tuple[Layer, ...]  # phi, one or two
    key: tuple[Layer | Call, ...]  # psi; calls are of operations that no layer is
    value: tuple[Layer | Call, ...]  # delta
    up: Layer  # rho
    context: Ref  # the half of g that takes y
    fusing: Layer  # the half of g that takes x
    scale: float
    beyond: Beyond | None
    channels: int
    dims: int  # of feats
    region_dims: int
    transposed: bool  # whether regions come as [B, K, C]
    first: str  # the path of a weight, whose dtype and device are the module's
    folds: bool  # whether every norm has statistics that run, so that eval mode takes those
    layers: tuple[tuple[str, str, tuple[str, ...], tuple[tuple[str, Any], ...]], ...]
    """The path, the class, the names of tensors and the settings of each."""
    casts: bool = True  # whether autocast decides the dtype of the result; else the module runs itself under autocast

    def backends(self, device_type: str) -> tuple[Backend, ...]:
        """Those of what it runs."""
        return implemented(device_type) if self.beyond is None else BACKENDS

    def weights(self, module: nn.Module, dtype: torch.dtype) -> Folded:
        """The folded weights of `module`, made of its present parameters and buffers in the dtype of statistics."""
        with torch.no_grad():
            results = self.program.run(module, torch.promote_types(dtype, torch.float32))

            def vector(ref: Ref | None) -> Tensor | None:
                return None if ref is None else results[ref.at].contiguous()

            def matrix(ref: Any) -> Tensor:
                made: Tensor = results[ref.at].to(dtype).contiguous()
                return made

            def folded(layer: Layer) -> block.Layer:
                weight = None if layer.weight is None else matrix(layer.weight)
                return block.Layer(weight, vector(layer.bias), None, layer.slope)

            def part(layer: Layer | Call) -> Any:
                if isinstance(layer, Layer):
                    return folded(layer)
                args = [results[arg.at].to(dtype) if isinstance(arg, Ref) else arg for arg in layer.args]
                return dataclasses.replace(layer, args=tuple(args))

            fusing = folded(self.fusing)
            fusing = fusing._replace(weight=torch.cat((matrix(self.context), matrix(self.fusing.weight)), 1))
            pixel = tuple(map(folded, self.pixels))
            made = block.fold_block(pixel, folded(self.up), fusing, scale=self.scale, dtype=dtype)
            key, value = (tuple(map(part, parts)) for parts in (self.key, self.value))
            return Folded(made, key, value, self.transposed, self.beyond)

    def takes(self, feats: Tensor, regions: Tensor, first: Tensor) -> bool:
        """Whether the module's own forward would take pixels and regions like these; `first` is `self.first`'s."""
        shape, region_shape, dtype = feats.shape, regions.shape, feats.dtype
        return (
            len(shape) == self.dims
            and len(region_shape) == self.region_dims
            and shape[0] == region_shape[0]
            and shape[1] == region_shape[2 if self.transposed else 1] == self.channels
            and region_shape[3:] == (1,) * (self.region_dims - 3)
            and 0 not in shape
            and 0 not in region_shape
            and feats.device == regions.device == first.device
            and (self.casts if _are_cast(feats, regions, first) else dtype == regions.dtype == first.dtype)
        )

    def random_inputs(
        self, seed: int, batch: int = 2, sides: tuple[int, ...] = (5, 3, 2), regions: int = 4
    ) -> tuple[Tensor, Tensor]:
        """Pixels and regions of the right channels and dimensions, in float32."""
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, regions, self.channels) if self.transposed else (batch, self.channels, regions)
        factor = self.beyond.factor if self.beyond is not None else 1
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
            if class_of(layer).__qualname__ != name:
                return False
            if present(layer) != tensors:
                return False
            for attribute, value in settings:
                found = getattr(layer, attribute, None)
                if not is_value(found) or found != value:
                    return False
        return True


def computed_in(feats: Tensor) -> torch.dtype:
    """The dtype of the products of a call; autocast leaves float64 alone."""
    return torch.get_autocast_dtype(feats.device.type) if _are_cast(feats) else feats.dtype


def _are_cast(*tensors: Tensor) -> bool:
    is_exact = any(tensor.dtype == torch.float64 for tensor in tensors)
    return not is_exact and torch.is_autocast_enabled(tensors[0].device.type)


def _chain(columns: Tensor, parts: tuple[Any, ...]) -> Tensor:
    """`[B, channels, K]` of regions `[B, K, C]`."""
    dtype = columns.dtype
    for part in parts:
        if isinstance(part, Call):
            columns = part.run((), columns.device, statistics_dtype(columns), columns.transpose(1, 2)).transpose(1, 2)
        else:
            is_exact = part.bias is not None and part.bias.dtype == dtype
            columns = F.linear(columns, part.weight, part.bias if is_exact else None)
            columns = columns if is_exact or part.bias is None else columns + part.bias
            columns = activate_(columns, part.slope).to(dtype)
    return columns.transpose(1, 2)
