"""What images can be read from: tensors, arrays in memory or in files, and readers with windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ocr_kernels.tiled.resize import needed, places, resize
from ocr_kernels.tiled.tiles import Tile


class Source:
    """An image `[C, H, W]`, of which one tile at a time is read.

    `image` has a `shape` and slices, as tensors, NumPy's arrays and memmaps, zarr's and HDF5's have; or
    `read(window=)`, `count`, `height` and `width`, as rasterio's datasets have.

    Raises:
        TypeError: `image` has neither.
        ValueError: its shape is no `[C, H, W]`.
    """

    def __init__(self, image: Any, prepare: Callable[[Any], Tensor] | None) -> None:
        self.image = image
        self.prepare: Callable[[Any], Tensor] = as_batch if prepare is None else prepare
        self.has_windows: bool = all(hasattr(image, name) for name in ("read", "count", "height", "width"))
        if self.has_windows:
            shape = (image.count, image.height, image.width)
        elif hasattr(image, "shape") and hasattr(image, "__getitem__"):
            shape = tuple(image.shape)
        else:
            raise TypeError(
                "image must have a shape and slices, or read(window=), count, height and width, "
                f"but is {type(image).__name__}"
            )
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"image must have shape [C, H, W], but has {shape}")
        self.shape: tuple[int, ...] = tuple(map(int, shape))

    def read(self, tile: Tile, size: tuple[int, ...], device: torch.device | None) -> Tensor:
        """A tile of the image resized to `size`, as the model takes it, `[1, C, h, w]`.

        Beyond the resized image its last rows and columns are repeated.
        """
        at = [
            places(slice(span.start, min(span.stop, length)), (length, source))
            for span, length, source in zip(tile, size, self.shape[1:], strict=True)
        ]
        (top, bottom), (left, right) = ((part.start, part.stop) for part in map(needed, at))
        if self.has_windows:
            pixels = self.image.read(window=((top, bottom), (left, right)))
        else:
            pixels = self.image[:, top:bottom, left:right]
        found = self.prepare(pixels)
        if not isinstance(found, Tensor):
            raise TypeError(f"prepare must return a tensor, but returned {type(found).__name__}")
        if not found.is_floating_point():
            raise TypeError(f"prepare must return a floating tensor, but returned {found.dtype}")
        if found.dim() != 4 or found.shape[0] != 1 or tuple(found.shape[2:]) != (bottom - top, right - left):
            expected = f"[1, C, {bottom - top}, {right - left}]"
            raise ValueError(f"prepare must return a tensor {expected}, but returned {tuple(found.shape)}")
        found = found if device is None else found.to(device)
        found = resize(resize(found, 2, at[0] - top), 3, at[1] - left)
        beyond = (0, tile.columns.size - found.shape[3], 0, tile.rows.size - found.shape[2])
        return F.pad(found, beyond, mode="replicate") if any(beyond) else found


def as_batch(pixels: Any) -> Tensor:
    """float32 `[1, C, h, w]`, of pixels as they were read."""
    if hasattr(pixels, "strides") and hasattr(pixels, "astype"):  # NumPy's: PyTorch does not take all of its arrays
        pixels = pixels.astype(pixels.dtype.newbyteorder("="), order="C", copy=False)
    tensor = pixels if isinstance(pixels, Tensor) else torch.tensor(pixels)  # a copy: arrays may be read-only
    return tensor.float().unsqueeze(0)
