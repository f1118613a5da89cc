"""A picture that is larger than memory is to hold, segmented in tiles with the regions of the whole picture.

python examples/large_image.py 2048 folder   (pixels along a side, a multiple of 4; a folder for the files)

The network is small and untrained: what is shown is that memory does not grow with the picture, and that up to 2048
pixels the classes are those of the whole picture in one piece.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor, nn

from ocr_kernels import segment_tiled
from ocr_kernels.modules import OCRHead

STRIPE = 512  # rows of the picture that are drawn at a time


class Picture:
    """A file of NumPy's `[3, H, W]`, opened for each read: what stays mapped counts as the process's memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shape = np.load(path, mmap_mode="r").shape

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.load(self.path, mmap_mode="r")[index].copy()


def draw(path: Path, side: int) -> None:
    """Fields of plain colours, and noise."""
    generator = np.random.default_rng(0)
    colours = generator.permuted(np.linspace(20, 200, 11).astype(np.uint8))
    open_memmap(path, mode="w+", dtype=np.uint8, shape=(3, side, side))
    columns = np.arange(side) // 700
    for top in range(0, side, STRIPE):
        rows = np.arange(top, min(top + STRIPE, side))
        field = (rows[:, None] // 300 * 7 + columns * 5) % 11
        noise = generator.integers(0, 40, (3, len(rows), side), dtype=np.uint8)
        picture = np.stack([colours[(field * factor) % 11] for factor in (1, 3, 7)])
        open_memmap(path, mode="r+")[:, top : top + len(rows)] = picture + noise


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 4, stride=4), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.head = OCRHead(in_channels=16, num_classes=5, mid_channels=16, key_channels=8)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)  # larger than usual: all classes occur

    def forward(self, image: Tensor) -> list[Tensor]:
        logits: list[Tensor] = self.head(self.stem(image))
        return logits


def prepare(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).float().div_(127.5).sub_(1).unsqueeze(0)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # of Linux, in KiB


def differ(network: Network, picture: Picture, classes: np.ndarray, side: int) -> float:
    """Share of the first pixels whose classes the network changes where it sees these alone."""
    with torch.inference_mode():
        logits = network(prepare(picture[:, :side, :side]))[-1]
    alone = nn.functional.interpolate(logits, scale_factor=4, mode="bilinear")[0].argmax(0)
    return float((alone.numpy() != classes[:side, :side]).mean())


def main(side: int, folder: Path) -> None:
    torch.manual_seed(9)
    network = Network().eval()
    started = time.perf_counter()
    draw(folder / "picture.npy", side)
    picture = Picture(folder / "picture.npy")
    print(f"{side} x {side}: {3 * side**2 / 2**20:.0f} MiB, drawn in {time.perf_counter() - started:.1f} s")

    segment_tiled(network, torch.zeros(3, 1024, 1024), prepare=lambda pixels: pixels.unsqueeze(0), margin=16, stride=4)
    one_tile = peak()  # of Python, PyTorch and one tile
    result = segment_tiled(network, picture, prepare=prepare, margin=16, stride=4, out=folder / "classes.npy")
    print(f"{result.tiles} tiles in {result.seconds:.1f} s; {result.seam}")
    print(f"peak memory {peak():.0f} MiB, after one tile {one_tile:.0f} MiB")

    classes = np.load(result.out, mmap_mode="r")
    some = classes[::7, ::7]
    print("shares of the classes:", *(np.bincount(some.ravel(), minlength=5) / some.size).round(3))
    if side <= 2048:
        print(f"pixels of another class than in one piece: {differ(network, picture, classes, side):.1e}")
        print(f"and in a first tile on its own: {differ(network, picture, classes, 1024):.1e}")


if __name__ == "__main__":
    side = int(sys.argv[1]) if len(sys.argv) > 1 else 2048
    if side < 4 or side % 4:
        sys.exit(f"the pixels along a side must be a multiple of 4, the network's stride, but are {side}")
    if len(sys.argv) > 2:
        main(side, Path(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(side, Path(folder))
