"""The gathers of a model that sees one tile: added up over tiles, or answered with what the whole image gave."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ocr_kernels.gather.registration import spatial_gather_op
from ocr_kernels.gather.state import GatherState
from ocr_kernels.tiled.tiles import Tile


class Reached(BaseException):
    """Ends a forward at the gather that is being added up; no Exception, so that no model handles it."""


class Gathers(TorchDispatchMode):
    """Answers the first gathers of a forward with `regions`, adds the tile's core to the state of the next, and stops.

    What a gather takes may depend on the result of the one before, so they are added up one after the other.
    """

    def __init__(self, tile: Tile, regions: Sequence[Tensor], state: GatherState | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tile = tile
        self.regions = regions
        self.state = state
        self.calls: int = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not spatial_gather_op:
            return func(*args, **(kwargs or {}))
        feats, logits, scale, backend = args
        self.calls += 1
        if self.calls > len(self.regions):
            cores = self._core(feats), self._core(logits)
            state = GatherState(scale, backend=backend) if self.state is None else self.state
            state.update(*cores)
            self.state = state
            raise Reached
        regions = self.regions[self.calls - 1]
        if regions.shape != (*feats.shape[:2], logits.shape[1]) or regions.dtype != feats.dtype:
            raise RuntimeError(
                f"gather {self.calls} of the model has {regions.dtype} regions {tuple(regions.shape)} on another tile, "
                f"but takes {feats.dtype} feats {tuple(feats.shape)} and logits {tuple(logits.shape)} here"
            )
        statistics = feats.new_full((1, feats.shape[1] + 2, logits.shape[1]), math.nan)  # for a derivative alone
        return regions.clone(), statistics

    def _core(self, x: Tensor) -> Tensor:
        """The core's part of a tile's pixels `[1, C, h, w]`, or `[1, C, N]` row by row."""
        rows, columns = self.tile
        if x.shape[0] != 1 or x.dim() not in (3, 4):
            raise ValueError(f"the model must gather one image [1, C, h, w] or [1, C, N], but gathers {tuple(x.shape)}")
        if x.dim() == 3:
            stride = math.isqrt(rows.size * columns.size // max(x.shape[2], 1))
            if x.shape[2] == rows.size // max(stride, 1) * (columns.size // max(stride, 1)):
                x = x.unflatten(2, (rows.size // stride, columns.size // stride))
        strides = [span.stride_of(size) for span, size in zip(self.tile, x.shape[2:], strict=False)]
        if x.dim() == 3 or not all(strides):
            raise ValueError(
                f"tile {rows.size} x {columns.size} and its core {rows.core_stop - rows.core_start} x "
                f"{columns.core_stop - columns.core_start} must be multiples of the pixels that the model "
                f"gathers, but these are {tuple(x.shape)}: give the model's stride as stride="
            )
        return x[..., rows.core_of(strides[0]), columns.core_of(strides[1])]
