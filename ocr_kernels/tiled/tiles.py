"""The grid of tiles: each sees a margin around its core, and the cores cover the image once."""

from __future__ import annotations

import copy
import itertools
from numbers import Integral
from typing import NamedTuple

from ocr_kernels.tiled.resize import needed, places


class Span(NamedTuple):
    """The pixels of a tile along one axis of the image, and those of its core."""

    start: int
    stop: int
    core_start: int
    core_stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def mirrored(self, size: int) -> Span:
        """Where these pixels are in an axis of `size` that is turned round."""
        return Span(size - self.stop, size - self.start, size - self.core_stop, size - self.core_start)

    def stride_of(self, size: int) -> int:
        """Pixels of the image to one of a map with `size` in this span; 0 where they do not divide it and its core."""
        stride, rest = divmod(self.size, size)
        return stride if not rest and stride and not any(edge % stride for edge in self) else 0

    def core_of(self, stride: int) -> slice:
        """The core in a map of this span with a stride."""
        return slice((self.core_start - self.start) // stride, (self.core_stop - self.start) // stride)


class Tile(NamedTuple):
    rows: Span
    columns: Span

    def __str__(self) -> str:
        return f"rows {self.rows.start}:{self.rows.stop}, columns {self.columns.start}:{self.columns.stop}"


class Grid:
    """Tiles of one size, row by row.

    The image is thought of as continued at its lower and right edges to multiples of `stride`, and all edges of tiles
    and cores are such multiples. Where the last tile would go beyond that, it starts earlier; an image that is smaller
    than a tile is one tile.

    Raises:
        TypeError: a size is no whole number.
        ValueError: `tile` or `margin` is no multiple of `stride`, or no core is left between two margins.
    """

    def __init__(self, image: tuple[int, ...], tile: tuple[int, ...], margin: int, stride: int) -> None:
        if not all(isinstance(size, Integral) for size in (*tile, margin, stride)):
            raise TypeError(f"tile, margin and stride must be whole numbers, but are {tile}, {margin!r} and {stride!r}")
        if stride < 1:
            raise ValueError(f"stride must be at least 1, but is {stride}")
        if margin < 0 or margin % stride:
            raise ValueError(f"margin must be a multiple of the stride {stride}, or 0, but is {margin}")
        if len(tile) != 2:
            raise ValueError(f"tile must be one size, or height and width, but is {tile}")
        for size in tile:
            if size % stride or size <= 2 * margin:
                raise ValueError(
                    f"tile must be a multiple of the stride {stride} and larger than two margins of {margin}, "
                    f"but is {size}"
                )
        self.image = image
        self.margin = margin
        self.stride = stride
        self._divide(*(_spans(_continued(size, stride), side, margin) for size, side in zip(image, tile, strict=True)))

    def _divide(self, rows: list[Span], columns: list[Span]) -> None:
        self.height: int = rows[-1].stop
        self.width: int = columns[-1].stop
        self.spans: tuple[list[Span], ...] = rows, columns
        self.tiles: list[Tile] = [Tile(*spans) for spans in itertools.product(rows, columns)]

    def resized(self, image: tuple[int, ...], align_corners: bool) -> Grid:
        """A tile of the image resized to `image` for each of these: what the core needs, and the margin around it.

        Cores cover the resized image once, as these do the image; small ones may be empty.
        """
        if image == self.image:
            return self
        grid = copy.copy(self)
        grid.image = image
        axes = zip(self.spans, self.image, image, strict=True)
        rows, columns = ([self._resized(span, old, new, align_corners) for span in spans] for spans, old, new in axes)
        grid._divide(rows, columns)
        return grid

    def _resized(self, span: Span, size: int, resized: int, align_corners: bool) -> Span:
        stride, end = self.stride, _continued(resized, self.stride)
        core = slice(span.core_start, min(span.core_stop, size))
        pixels = needed(places(core, (size, resized), align_corners=align_corners))
        first, last = (edge * resized // (size * stride) * stride if edge < size else end for edge in span[2:])
        start = min(first, pixels.start // stride * stride) - self.margin
        stop = max(last, _continued(pixels.stop, stride)) + self.margin
        return Span(max(start, 0), min(stop, end), first, last)

    def mirrored(self, tile: Tile, dims: tuple[int, ...]) -> Tile:
        """Where a tile is in an image of which rows (-2), columns (-1), both or neither are turned round."""
        rows, columns = tile
        return Tile(
            rows.mirrored(self.height) if -2 in dims else rows, columns.mirrored(self.width) if -1 in dims else columns
        )


def _continued(size: int, stride: int) -> int:
    return -(-size // stride) * stride


def _spans(size: int, tile: int, margin: int) -> list[Span]:
    tile = min(tile, size)
    step = max(tile - 2 * margin, 1)
    starts = [*range(0, size - tile, step), size - tile]
    borders = [0, *(start + tile - margin for start in starts[:-1]), size]
    return [Span(start, start + tile, *core) for start, core in zip(starts, itertools.pairwise(borders), strict=True)]
