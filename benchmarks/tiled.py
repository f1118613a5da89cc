"""Memory and time of `segment_tiled` against the size of the picture, beside the picture in one piece.

    python -m benchmarks.tiled [--sides 1024 2048 ...] [--json FILE]

Each size runs in a process of its own, on one thread; the picture and the classes are files. The network is small, so
that time is mostly that of reading and of the convolutions at the full resolution. With a file, the picture of what is
in it goes to docs/images/tiled.png.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.lib.format import open_memmap
from torch import Tensor, nn

from ocr_kernels import segment_tiled
from ocr_kernels.bench import measure
from ocr_kernels.modules import OCRHead

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "tiled" / "amd-epyc.json"
PICTURE = ROOT / "docs" / "images" / "tiled.png"
SIDES = (1024, 2048, 4096, 10240)
WHOLE = 4096
"""The longest side that is tried in one piece."""


class File:
    """A picture `[3, H, W]`, opened for each read: what stays mapped counts as memory of the process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shape: tuple[int, ...] = np.load(path, mmap_mode="r").shape

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.load(self.path, mmap_mode="r")[index].copy()  # type: ignore[no-any-return]


def network() -> nn.Module:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 16, 4, stride=4), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
    return nn.Sequential(stem, OCRHead(in_channels=16, num_classes=19, mid_channels=64, key_channels=32)).eval()


def prepare(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).float().div_(255).unsqueeze(0)


def draw(path: Path, side: int) -> None:
    generator = np.random.default_rng(0)
    open_memmap(path, mode="w+", dtype=np.uint8, shape=(3, side, side))
    for top in range(0, side, 512):
        rows = generator.integers(0, 256, (3, min(512, side - top), side), dtype=np.uint8)
        open_memmap(path, mode="r+")[:, top : top + 512] = rows


def run(kind: str, folder: Path) -> dict[str, Any]:
    """In a process of its own."""
    torch.set_num_threads(1)
    model, picture = network(), File(folder / "picture.npy")
    started = time.perf_counter()
    if kind == "tiled":
        tiles = segment_tiled(
            model, picture, tile=1024, margin=32, stride=4, prepare=prepare, out=folder / "classes.npy"
        ).tiles
    else:
        tiles = 1
        with torch.inference_mode():
            logits = model(prepare(picture[:]))[-1]
            classes = nn.functional.interpolate(logits, scale_factor=4, mode="bilinear").argmax(1)
        np.save(folder / "classes.npy", classes[0].to(torch.uint8).numpy())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"tiles": tiles, "seconds": time.perf_counter() - started, "peak_bytes": peak}


def measured(sides: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    for side in sides:
        with tempfile.TemporaryDirectory() as folder:
            draw(Path(folder) / "picture.npy", side)
            for kind in ("tiled", "whole")[: 2 if side <= WHOLE else 1]:
                command = [sys.executable, "-m", "benchmarks.tiled", "--run", kind, folder]
                ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
                rows.append({"side": side, "kind": kind, **json.loads(ended.stdout)})
                print(rows[-1], flush=True)
    return rows


def figure(data: dict[str, Any]) -> Figure:
    """Peak memory against the picture's size."""
    made = Figure(figsize=(5.2, 3.2), layout="constrained")
    ax = made.subplots()
    for kind, colour, label in (("whole", "#999999", "in one piece"), ("tiled", "#009E73", "segment_tiled")):
        rows = [row for row in data["rows"] if row["kind"] == kind]
        peaks = [row["peak_bytes"] / 2**30 for row in rows]
        ax.plot([row["side"] ** 2 / 1e6 for row in rows], peaks, "o-", color=colour, label=label)
    ax.set(xscale="log", ylim=(0, None), xlabel="megapixels of the picture", ylabel="GiB, peak of the process")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    ax.set_title("Memory of a small network, Python and PyTorch included", fontsize=10)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiled", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES)
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--run", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.run:
        print(json.dumps(run(args.run[0], Path(args.run[1]))))
        return 0
    data = {"machine": measure.record(None), "rows": measured(args.sides)}
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(data, indent=1) + "\n")
        figure(data).savefig(PICTURE, dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())
