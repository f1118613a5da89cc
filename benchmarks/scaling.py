"""How long a training step of the OCR block takes whose pixels are divided over many GPUs: a model, nothing measured.

    python -m benchmarks.scaling docs/images/scaling.svg

prints it and draws it. A GPU takes as long as its pixels' bytes or products do at the device's rates, pass by pass:
floors that no kernel beats. Then it waits for what is sent, which docs/sharding.md counts, over rings inside a node and
between nodes; nothing overlaps.
"""

from __future__ import annotations

import functools
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from ocr_kernels import modules
from ocr_kernels.bench.cases import SUBJECTS, Block, Case

GPUS = [2**i for i in range(10)]
MEGAPIXELS = (1, 10, 100)
STRIDE = 4  # of the backbone


class Cluster(NamedTuple):
    bandwidth: float = 3.0e12  # bytes a second of a GPU's memory: what copies reach on an H100
    rate: float = 9.9e14  # operations a second: its data sheet's for dense bfloat16
    node: int = 8  # GPUs
    inside: float = 450e9  # bytes a second that a GPU sends inside its node
    between: float = 50e9  # and to another
    latency: float = 5e-6  # seconds of each step of a ring


class Step(NamedTuple):
    compute: float  # seconds
    communication: float
    sent: float  # bytes of each GPU

    @property
    def seconds(self) -> float:
        return self.compute + self.communication


class Collective(NamedTuple):
    elements: int  # that each GPU puts in
    itemsize: int
    gathers: bool = False  # else reduces


def image(megapixels: float, regions: int = 19) -> Case:
    return Case(f"{megapixels} megapixels", 1, 512, 256, regions, math.ceil(megapixels * 1e6 / STRIDE**2), 1)


@functools.cache
def collectives(case: Case) -> list[Collective]:
    """Of a step: the gather's sums, forward and backward, the norms' statistics, and the parameters' gradients."""
    b, c, d, k = case.batch, case.channels, case.key_channels, case.regions
    sums = [Collective(b * k, 8), *[Collective(b * (c + 1) * k, 8)] * 2]
    norms = [Collective(rows * channels, 4, gathers=True) for channels in (d, d, c, c) for rows in (3, 2)]
    with torch.device("meta"):
        block = Block(modules, case)
    return [*sums, *norms, Collective(sum(parameter.numel() for parameter in block.parameters()), 4)]


def ring(size: float, gpus: int, cluster: Cluster) -> tuple[float, float]:
    """Seconds of an all-reduce of so many bytes, and bytes that each GPU sends: inside the nodes, then between them."""
    inside = min(gpus, cluster.node)
    nodes = math.ceil(gpus / inside)
    first, second = 2 * (inside - 1) / inside * size, 2 * (nodes - 1) / nodes * size / inside
    latency = 2 * (inside - 1 + nodes - 1) * cluster.latency
    return first / cluster.inside + second / cluster.between + latency, first + second


def step(case: Case, gpus: int, cluster: Cluster, measured: float | None = None) -> Step:
    """Of a GPU with the most pixels; `measured` seconds of one GPU with all of them take the place of the floors."""
    share = math.ceil(case.pixels / gpus)
    if measured is None:
        works = SUBJECTS["module"].work(replace(case, height=share, width=1), "forward+backward")
        compute = sum(max(2 * w.numbers / cluster.bandwidth, 2 * w.multiply_adds / cluster.rate) for w in works)
    else:
        compute = measured * share / case.pixels
    communication = sent = 0.0
    for elements, itemsize, gathers in collectives(case):
        # gathering is the second half of reducing what all put in
        seconds, size = ring(elements * itemsize * (gpus if gathers else 1), gpus, cluster)
        communication += seconds / (2 if gathers else 1)
        sent += size / (2 if gathers else 1)
    return Step(compute, communication, sent)


def table(cluster: Cluster) -> str:
    lines = ["GPUs  " + "".join(f"{f'{m} megapixels':>24}" for m in MEGAPIXELS) + "   sent by each"]
    for gpus in GPUS:
        steps = [step(image(m), gpus, cluster) for m in MEGAPIXELS]
        cells = [f"{1e3 * s.seconds:9.3f} ms, {100 * s.communication / s.seconds:3.0f} % sent" for s in steps]
        lines.append(f"{gpus:4d}  " + "".join(f"{cell:>24}" for cell in cells) + f"{steps[0].sent / 1e6:12.2f} MB")
    return "\n".join(lines)


def draw(cluster: Cluster, path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.hashsalt": "scaling", "svg.fonttype": "none"})  # the same file each time; text
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    times, sent = figure.subplots(1, 2)
    for megapixels, colour in zip(MEGAPIXELS, ("#0072B2", "#D55E00", "#009E73"), strict=True):
        steps = [step(image(megapixels), gpus, cluster) for gpus in GPUS]
        times.plot(GPUS, [1e3 * s.seconds for s in steps], "o-", color=colour, label=f"{megapixels} megapixels")
        times.plot(GPUS, [1e3 * steps[0].seconds / gpus for gpus in GPUS], ":", color=colour)
    sent.plot(GPUS, [s.sent / 1e6 for s in steps], "o-", color="#333333")
    times.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="ms of a step; dotted: divided by the GPUs")
    sent.set(xscale="log", xlabel="GPUs", ylabel="MB that each GPU sends, of any image", ylim=0)
    for axes in (times, sent):
        axes.set_xticks(GPUS, [str(gpus) for gpus in GPUS], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    times.legend()
    figure.suptitle("A model, nothing measured: OCR's block, K=19, C=512, H100's rates", fontsize=10)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    print(table(Cluster()))
    if len(sys.argv) > 1:
        draw(Cluster(), Path(sys.argv[1]))
