"""How far neighbouring tiles differ where both see the same pixels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ocr_kernels.tiled.tiles import Span, Tile


@dataclass(frozen=True)
class Seam:
    """What two neighbouring tiles make of the pixels on both sides of the border between their cores.

    These are the pixels of a core that are nearest to an edge of its tile, a margin away. The regions are the same on
    both sides, so only what the backbone does near a tile's edge differs.
    """

    pixels: int
    largest: float
    """Largest difference of two logits."""
    mean: float
    """Mean difference of logits, without sign."""
    changed: float
    """Share of the pixels whose classes differ."""


class SeamMeter:
    """Takes the logits of tiles, row by row; keeps two lines of pixels of one row of tiles and of one tile."""

    def __init__(self) -> None:
        self.below: dict[int, Tensor] = {}  # by the tile's first column
        self.right: Tensor | None = None
        self.pixels = 0
        self.changed = 0
        self.largest = 0.0
        self.total = 0.0  # of the pixels' mean differences

    def add(self, tile: Tile, logits: Tensor, rows: slice, columns: slice) -> None:
        """`logits` `[K, h, w]` of the pixels that are `seen`, in which the core's are `rows` and `columns`."""
        above = self.below.pop(tile.columns.start, None)
        if above is not None and rows.start:
            self._compare(above, logits[:, :2, columns])
        if self.right is not None and columns.start:
            self._compare(self.right, logits[:, rows, :2])
        self.right = None
        if rows.stop < logits.shape[1]:
            self.below[tile.columns.start] = logits[:, -2:, columns].clone()
        if columns.stop < logits.shape[2]:
            self.right = logits[:, rows, -2:].clone()

    def _compare(self, one: Tensor, other: Tensor) -> None:
        difference = (one - other).abs()
        self.pixels += difference[0].numel()
        self.changed += int((one.argmax(0) != other.argmax(0)).sum())
        self.largest = max(self.largest, float(difference.max()))
        self.total += float(difference.double().mean(0).sum())

    def result(self) -> Seam | None:
        """None where no pixel was seen twice."""
        if not self.pixels:
            return None
        return Seam(self.pixels, self.largest, self.total / self.pixels, self.changed / self.pixels)


def seen(span: Span, size: int) -> slice:
    """The core's pixels, less those beyond an image of `size`, and one more where it has a neighbour and a margin."""
    stop = min(span.core_stop, size)
    first = max(span.core_start - 1, span.start)
    return slice(first, min(stop + 1, span.stop, size))
