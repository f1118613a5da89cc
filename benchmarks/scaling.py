"""What dividing an image over processes should give: time, memory and bytes of a training step of OCR. A model.

`python -m benchmarks.scaling` prints the table and draws docs/images/scaling.png. A step is the gather and step 4,
forward and backward, of one image whose rows are divided over the processes (docs/sharding.md). What one process takes
of a pixel is measured, by a result file, or the floor of a GPU divided by the share of it that is assumed; what links
take is their sheet's. No run of several machines was measured.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from ocr_kernels import modules
from ocr_kernels.bench.cases import CASES, SUBJECTS, Block, Case
from ocr_kernels.bench.report import Grid

ROOT = Path(__file__).parent.parent
MEASURED = ROOT / "benchmarks" / "results" / "amd-epyc-module.json"
PICTURE = ROOT / "docs" / "images" / "scaling.png"
CASE = CASES["cityscapes-half"]
STRIDE = 4  # pixels of the image to one of the maps, in each direction
PROCESSES = tuple(2**i for i in range(10))
MEGAPIXELS = (1, 10, 100)


@dataclass(frozen=True)
class Link:
    bandwidth: float  # bytes a second in each direction
    latency: float  # seconds of one message


@dataclass(frozen=True)
class Machine:
    """Processes that each have a device of their own, some of them within one node."""

    name: str
    seconds: float  # of one pixel of the maps, of a training step in one process
    bytes: float  # of one pixel: the peak beside the inputs, and these
    memory: float  # bytes of one process's device
    node: int  # processes
    inside: Link
    between: Link


def measured(file: Path = MEASURED) -> Machine:
    """Nodes like the CPU of a result file, on Ethernet."""
    lines = json.loads(file.read_text())["results"]
    line = next(r for r in lines if (r["subject"], r["case"], r["pass"]) == ("module", CASE.name, "forward+backward"))
    (ours,) = line["ours"]
    ethernet = Link(1.25e9, 50e-6)  # 10 Gbit/s
    per_pixel = line["times"][ours]["median"] / CASE.pixels, line["peak_bytes"][ours] / CASE.pixels + _inputs(CASE, 4)
    return Machine("EPYC, 2 cores, float32, 10 Gbit/s", *per_pixel, 16e9, 1, ethernet, ethernet)


def assumed(share: float = 0.6) -> Machine:
    """Nodes of 8 H100 whose kernels reach a share of the floor, with bfloat16; the bytes of a pixel are the CPU's."""
    works = SUBJECTS["module"].work(CASE, "forward+backward")
    floor = sum(max(2 * work.numbers / 3.0e12, 2 * work.multiply_adds / 7.0e14) for work in works)  # of a second
    per_pixel = floor / share / CASE.pixels, measured().bytes / 2
    name = f"H100, bfloat16, {share:.0%} of the floor assumed"
    return Machine(name, *per_pixel, 80e9, 8, Link(450e9, 5e-6), Link(50e9, 10e-6))


def _inputs(case: Case, itemsize: int) -> int:
    return (case.channels + case.regions) * itemsize


class Collective(NamedTuple):
    """What each process hands to the others at once, whatever the number of pixels; it is added up, or gathered."""

    elements: int
    itemsize: int
    gathers: bool = False


@functools.cache
def collectives(case: Case) -> list[Collective]:
    """Of a step: the gather's sums, forward and backward; the norms' statistics, which are gathered, for the same bits
    always; the gradients of the parameters."""
    b, c, d, k = case.batch, case.channels, case.key_channels, case.regions
    sums = [Collective(b * k, 8), *[Collective(b * (c + 1) * k, 8)] * 2]
    norms = [Collective(rows * channels, 4, gathers=True) for channels in (d, d, c, c) for rows in (3, 2)]
    with torch.device("meta"):
        block = Block(modules, case)
    return [*sums, *norms, Collective(sum(parameter.numel() for parameter in block.parameters()), 4)]


def reduction(size: float, processes: int, link: Link) -> float:
    """Seconds until `size` bytes of each process are added up in all: by a ring, or by trees where that is sooner."""
    ring = 2 * (processes - 1) * (link.latency + size / processes / link.bandwidth)
    trees = 2 * math.ceil(math.log2(processes)) * link.latency + 2 * size / link.bandwidth
    return min(ring, trees)


def gathering(size: float, processes: int, link: Link) -> float:
    """Seconds until each process has what all had."""
    return math.ceil(math.log2(processes)) * link.latency + (processes - 1) * size / link.bandwidth


def communication(machine: Machine, processes: int, case: Case = CASE) -> float:
    """Seconds of a step: within nodes, and between as many processes of each as share a node's links."""
    inside, nodes = min(processes, machine.node), math.ceil(processes / machine.node)
    total = 0.0
    for elements, itemsize, gathers in collectives(case):
        size = elements * itemsize
        if gathers:
            total += gathering(size, nodes, machine.between) + gathering(nodes * size, inside, machine.inside)
        else:
            total += reduction(size, inside, machine.inside) + reduction(size / inside, nodes, machine.between)
    return total


@dataclass(frozen=True)
class Step:
    processes: int
    megapixels: float
    compute: float  # seconds
    communication: float
    memory: float  # bytes of the process that has most rows

    @property
    def seconds(self) -> float:
        return self.compute + self.communication


def step(machine: Machine, processes: int, megapixels: float, case: Case = CASE) -> Step:
    """One training step of an image twice as wide as high; nothing of what is sent is hidden behind products."""
    height = round(math.sqrt(megapixels * 1e6 / 2) / STRIDE)
    pixels = math.ceil(height / processes) * 2 * height  # rows are not divided
    seconds = communication(machine, processes, case)
    return Step(processes, megapixels, pixels * machine.seconds, seconds, pixels * machine.bytes)


def table(machine: Machine) -> Grid:
    rows = []
    for megapixels in MEGAPIXELS:
        alone = step(machine, 1, megapixels)
        for processes in PROCESSES[::3]:
            found = step(machine, processes, megapixels)
            rows.append(
                [
                    f"{megapixels}", f"{processes}", f"{found.seconds * 1e3:.3g}", f"{found.communication * 1e3:.3g}",
                    f"{alone.seconds / found.seconds:.3g}", f"{found.memory / 2**20:.3g}",
                ]
            )  # fmt: skip
    heads = ["megapixels", "processes", "step ms", "of it sending", "times faster", "MiB each"]
    return Grid(f"{machine.name}: a model", heads, text=0, rows=rows)


def draw(machines: Sequence[Machine]) -> Figure:
    """Steps in a second and memory, against the number of processes."""
    figure = Figure(figsize=(4.2 * len(machines), 6.4), layout="constrained")
    axes = figure.subplots(2, len(machines), squeeze=False, sharex=True)
    colours = dict(zip(MEGAPIXELS, ("#009E73", "#0072B2", "#D55E00"), strict=True))  # Okabe and Ito's
    for (time, memory), machine in zip(axes.T, machines, strict=True):
        for megapixels, colour in colours.items():
            steps = [step(machine, processes, megapixels) for processes in PROCESSES]
            label = f"{megapixels} megapixel{'s' * (megapixels > 1)}"
            time.plot(PROCESSES, [s.seconds * 1e3 for s in steps], "o-", markersize=3, color=colour, label=label)
            ideal = [steps[0].seconds * 1e3 / processes for processes in PROCESSES]
            time.plot(PROCESSES, ideal, ":", linewidth=1, color=colour)
            memory.plot(PROCESSES, [s.memory / 2**30 for s in steps], "o-", markersize=3, color=colour)
        memory.axhline(machine.memory / 2**30, color="#999999", linestyle="--", linewidth=1)
        memory.annotate("memory", (PROCESSES[-1], machine.memory / 2**30), ha="right", va="bottom", color="#666666")
        time.set_title(machine.name, fontsize=9)
        for ax, what in ((time, "ms for a step"), (memory, "GiB in each process")):
            ax.set(xscale="log", yscale="log", ylabel=what)
            ax.xaxis.set_major_locator(LogLocator(2, numticks=12))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.xaxis.set_major_formatter("{x:.0f}")
            ax.grid(alpha=0.3)
            ax.spines[["top", "right"]].set_visible(False)
        memory.set_xlabel("processes")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle("One image's rows over processes: a model, no measurement (dotted: nothing sent)", fontsize=10)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--share", type=float, default=0.6, help="of the floor that an H100 reaches; default: 0.6")
    parser.add_argument("--out", type=Path, default=PICTURE, help="where the picture goes")
    args = parser.parse_args(argv)
    machines = [measured(), assumed(args.share)]
    for machine in machines:
        grid = table(machine)
        print(f"{grid.title}\n\n{grid.markdown()}\n")
    draw(machines).savefig(args.out, dpi=110)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
