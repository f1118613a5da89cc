"""Faster tiles for this machine's GPU, found by timing, in a file that the kernels read from then on."""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ocr_kernels.attention.tiles
import ocr_kernels.block.tiles
import ocr_kernels.gather.tiles
from ocr_kernels.bench import measure
from ocr_kernels.bench.cases import CASES, MEMORY_FORMATS, NAMED, OPS, SUBJECTS, Pass, Workload
from ocr_kernels.bench.timing import Timing, duration
from ocr_kernels.core import tuned
from ocr_kernels.core.backends import available_backends, interpreting
from ocr_kernels.core.tiles import Problem, Tile, TileRule

RULES = [
    value
    for op in (ocr_kernels.gather, ocr_kernels.attention, ocr_kernels.block)
    for value in vars(op.tiles).values()
    if isinstance(value, TileRule)
]
DEFAULT_CASES = ("cityscapes-inference", "cityscapes-training", "ade20k")


def neighbours(tile: Tile, problem: Problem, free: Sequence[str]) -> Iterator[Tile]:
    """The tiles that differ from it in one thing."""
    steps: dict[str, tuple[int, ...]] = {
        name: (getattr(tile, name) // 2, 2 * getattr(tile, name)) for name in free if getattr(tile, name)
    }
    if 0 < tile.all_regions < problem.regions:  # the kernel loops over them, or has a program for each part
        steps["regions"] = tile.regions // 2, 2 * tile.regions
    for name, sizes in steps.items():
        for size in sizes:
            other = tile.resized({name: max(16, size)}).cut_to(problem)
            if other != tile:
                yield other
    for warps in (tile.warps // 2, 2 * tile.warps):
        if 2 <= warps <= 16:
            yield replace(tile, warps=warps)
    for stages in (tile.stages - 1, tile.stages + 1):
        if 1 <= stages <= 5:
            yield replace(tile, stages=stages)


def climb(tile: Tile, problem: Problem, free: Sequence[str], cost: Callable[[Tile], float | None]) -> Tile:
    """Go to the cheapest neighbour as long as there is a cheaper one. A tile that costs None cannot be used."""
    costs = {tile: cost(tile)}
    while True:
        for other in neighbours(tile, problem, free):
            if other not in costs:
                costs[other] = cost(other)
        usable = {other: price for other, price in costs.items() if price is not None}
        best = min(usable, key=usable.__getitem__, default=tile)
        if best == tile:
            return tile
        tile = best


def difference(rule: TileRule, problem: Problem, tile: Tile) -> dict[str, int]:
    """The sizes of a tile that are not the rule's own."""
    own = rule.rule(problem)
    return {name: getattr(tile, name) for name in tuned.SIZES if getattr(tile, name) != getattr(own, name)}


def _forget_launches() -> None:
    """They were prepared with the tiles that were chosen before."""
    from ocr_kernels.core.triton_launch import forget_launches  # which imports Triton

    forget_launches()


@contextmanager
def taken(rule: TileRule, problem: Problem, tile: Tile | None) -> Iterator[None]:
    """Inside this context the rule chooses this tile."""
    before = rule.choose(problem)
    rule.chosen[problem] = tile
    _forget_launches()
    try:
        yield
    finally:
        rule.chosen[problem] = before
        _forget_launches()


class Trial:
    """One pass of a workload, run and timed with other tiles."""

    def __init__(self, workload: Workload, what: Pass, seconds: float) -> None:
        self.workload, self.what, self.seconds = workload, what, seconds
        self.function = workload.ours("triton")
        self.inputs = workload.inputs()
        if isinstance(self.function, nn.Module):
            self.function.train(what != "forward")
        self.expected = self.run()

    def run(self) -> tuple[Tensor, ...]:
        return measure.run("forward" if self.what == "forward" else "forward+backward", self.function, self.inputs)

    def choices(self) -> list[tuple[TileRule, Problem, Tile]]:
        """What is chosen on the way."""
        for rule in RULES:
            rule.chosen.clear()
        _forget_launches()
        self.run()
        return [(rule, problem, tile) for rule in RULES for problem, tile in rule.chosen.items() if tile]

    def is_right(self) -> bool:
        """Whether the results are those of the first run, but for what another order of sums does to them."""
        bound = 8 * torch.finfo(self.workload.dtype).eps
        lengths = [float(tensor.double().norm()) for tensor in self.expected]
        least = 0.01 * max(lengths)  # of what is compared with: there are gradients that are all rounding errors
        differences = [float((a - b).double().norm()) for a, b in zip(self.run(), self.expected, strict=True)]
        return all(d <= bound * max(length, least) for d, length in zip(differences, lengths, strict=True))

    def cost(self, rule: TileRule, problem: Problem, start: Tile, tile: Tile) -> float | None:
        """Its time as a part of the one with `start`: 1 if it hardly differs, None if it cannot be used."""
        device = self.workload.device
        if tile == start:
            return 1.0
        try:
            with taken(rule, problem, tile):
                if not self.is_right():
                    return None
            before, after = self._times(rule, problem, (start, tile))
        except Exception:  # out of registers or shared memory, in whatever words of the compiler
            measure.require_device(device, f"Nothing runs on {device} after {rule.name} with {tile}.")
            return None
        return after.median / before.median if after.differs(before) else 1.0

    def _times(self, rule: TileRule, problem: Problem, tiles: Sequence[Tile]) -> list[Timing]:
        def prepare(tile: Tile, inputs: measure.Inputs) -> Callable[[], object]:
            call = measure.prepare(self.what, self.function, inputs)

            def timed() -> object:
                with taken(rule, problem, tile):
                    return call()

            return timed

        calls = {str(i): functools.partial(prepare, tile) for i, tile in enumerate(tiles)}
        times = measure.time_interleaved(calls, [self.inputs], self.workload.device, self.seconds)
        return list(times.values())


def tune(trial: Trial, done: set[tuple[TileRule, Problem]]) -> Iterator[dict[str, Any]]:
    """Rows for the file, of all that the pass chooses and that is not done yet."""
    for rule, problem, start in trial.choices():
        if (rule, problem) in done:
            continue
        done.add((rule, problem))
        cost = functools.partial(trial.cost, rule, problem, start)
        best = climb(start, problem, rule.free, cost)
        print(f"  {rule.name:32} {described(start)}", end="")
        if best == start:
            print(": none is faster")
            continue
        ratio = cost(best)  # once more, since the luckiest of many was taken
        if ratio is None or ratio >= 1:
            print(": none is faster for sure")
            continue
        print(f" -> {described(best)}: {1 / ratio:.2f}x", flush=True)
        yield {"rule": rule.name, "problem": problem.key, "tile": difference(rule, problem, best), "time": ratio}


def described(tile: Tile) -> str:
    """Its sizes, in a line."""
    return " ".join(f"{name}={size}" for name in tuned.SIZES if (size := getattr(tile, name)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cases = f"{', '.join(case.name for case in NAMED)}; default: {', '.join(DEFAULT_CASES)}"
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", default=DEFAULT_CASES, help=cases)
    subjects = (*OPS, "module")
    parser.add_argument("--subjects", nargs="+", choices=subjects, default=subjects, help="default: all")
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "float16", "float32"), default=["bfloat16"])
    parser.add_argument("--memory-format", nargs="+", choices=MEMORY_FORMATS, default=["contiguous"])
    parser.add_argument("--seconds", type=duration, default=0.05, help="to spend on timing one tile; default: 0.05")
    parser.add_argument("--file", type=Path, help=f"default: {tuned.VARIABLE}, or one for this GPU in ~/.cache")


def _problem() -> str | None:
    """Why nothing can be tuned here."""
    if not torch.cuda.is_available():
        return "no GPU is visible to PyTorch"
    if interpreting():
        return "TRITON_INTERPRET is set: the interpreter's times say nothing"
    state = available_backends("cuda")["triton"]
    return None if state is True else str(state)


def main(args: argparse.Namespace) -> int:
    reason = _problem()
    if reason is not None:
        print(f"ocr-kernels tune: {reason}", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    name = torch.cuda.get_device_properties(device).name
    path = args.file or tuned.file(name)
    if path is None:
        print(f"ocr-kernels tune: {tuned.VARIABLE} is empty: nowhere to write", file=sys.stderr)
        return 2
    done: set[tuple[TileRule, Problem]] = set()
    for dtype, memory_format, case, subject in itertools.product(
        args.dtype, args.memory_format, args.cases, args.subjects
    ):
        passes: tuple[Pass, ...] = ("forward", "backward" if subject in OPS else "forward+backward")
        workload = Workload(SUBJECTS[subject], CASES[case], getattr(torch, dtype), device, memory_format)
        for what in passes:
            print(f"{subject} {case} {dtype} {memory_format} {what}", flush=True)
            for row in tune(Trial(workload, what, args.seconds), done):
                tuned.write(name, [row], path)
    print(f"Tiles that this GPU takes from now on: {tuned.state(path, name)}")
    return 0
