"""What a backbone makes of the tiles, made again in each pass or kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ocr_kernels.tiled.gathers import Gathers, Reached
from ocr_kernels.tiled.output import save
from ocr_kernels.tiled.tiles import Tile


class Features:
    """`where` is "recompute", "keep" or a folder that exists, in which a run has files of its `name`.

    An `index` is that of a tile, a scale and a flip.
    """

    def __init__(self, backbone: Callable[[Tensor], Any] | None, where: str | Path, name: str) -> None:
        self.backbone = backbone
        self.where = where
        self.name = name
        self.kept: dict[int, Any] = {}

    def of(self, tile: Tile, index: int, read: Callable[[], Tensor], is_first_pass: bool) -> Any:
        """What the model takes of a tile, mirrored or not, which `read` reads."""
        if self.backbone is None:
            return read()
        file = self._file(index)
        if not is_first_pass and index in self.kept:
            return self.kept[index]
        if not is_first_pass and file is not None and file.exists():
            return torch.load(file, weights_only=True)
        try:
            with Gathers(tile, [], None):
                found = self.backbone(read())
        except Reached:
            raise ValueError("backbone must have no gather: give it as a part of model") from None
        if self.where == "keep":
            self.kept[index] = found
        elif file is not None:
            save(found, file)
        return found

    def forget(self, indices: range) -> None:
        """After the last pass."""
        for index in indices:
            self.kept.pop(index, None)
            file = self._file(index)
            if file is not None:
                file.unlink(missing_ok=True)

    def _file(self, index: int) -> Path | None:
        return self.where / f"{self.name}_{index}.pt" if isinstance(self.where, Path) else None
