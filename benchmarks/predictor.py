"""What a launch should take, from its machine code and its geometry. A model: nothing in it was measured.

A warp runs through its instructions in order, at the pace that its block's warps leave it, and waits where it needs
what has not arrived. That time, and the times for which the launch occupies each resource, make an estimate.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import chain
from math import ceil
from multiprocessing import get_context
from typing import NamedTuple

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # compiled kernels, not interpreted ones

import torch

from benchmarks import codegen
from benchmarks.assembly import LOADS, MEMORY, Loop, Op, read_code
from benchmarks.codegen import ARCHITECTURES, BlockShape, Call, Launch, Resources, Shape, TrainingShape
from ocr_kernels.bench.cases import CASES, SUBJECTS, Case, Pass, Work, block_work
from ocr_kernels.bench.tune import RULES, climb, described, taken
from ocr_kernels.core.tiles import Problem, Tile, TileRule


@dataclass(frozen=True)
class Device:
    """Rates of a GPU, as its sheet and others' kernels let expect. To be replaced by what a clock says."""

    architecture: str
    clock: float  # cycles a microsecond
    bandwidth: float  # bytes a microsecond that copies reach
    cache_bandwidth: float  # of the second-level cache
    products: float  # 16-bit multiply-adds a microsecond, dense: 70 % of the sheet's
    wide_products: float  # the same in float32, of PyTorch's products
    issued: float = 0.55  # instructions a cycle, of each of a multiprocessor's four schedulers
    special: float = 1 / 8  # of them exponentials and reciprocals
    shared_bytes: int = 128  # that shared memory moves in a cycle
    latency: float = 0.8  # microseconds that a load takes where many are under way
    cache: float = 25e6  # bytes: smaller launches find in the second-level cache what others have just written
    cache_latency: float = 0.4
    launch: float = 2.5  # microseconds

    def least(self, bytes: int, multiply_adds: int, itemsize: int) -> tuple[float, float]:
        """Microseconds that moving these bytes takes, and computing these products."""
        return bytes / self.bandwidth, multiply_adds / (self.products if itemsize == 2 else self.wide_products)


DEVICES = {
    "A100": Device("sm_80", 1410, 1.7e6, 4.0e6, 1.1e8, 6.8e6, cache=20e6),
    "H100": Device("sm_90", 1700, 3.0e6, 5.5e6, 3.5e8, 2.3e7),
    "H200": Device("sm_90", 1700, 4.3e6, 5.5e6, 3.5e8, 2.3e7),
    "B200": Device("sm_100", 1850, 7.0e6, 10.0e6, 7.9e8, 2.8e7, cache=60e6),
    # 16 lanes take four cycles for the 64 of a wavefront
    "MI300X": Device("gfx942", 2100, 4.0e6, 10.0e6, 4.6e8, 5.7e7, issued=0.25, special=1 / 16),
}

# How often a kernel's loops run, in the order in which they begin: quotients of arguments, rounded up. Where there is
# only one, it serves all loops of the kernel.
LOOPS = {
    "sum_splits": ["splits/BLOCK_S"],
    "gather_forward": ["split_length/BLOCK_N"],
    "gather_forward_many": ["split_length/BLOCK_N"],
    "gather_merge": [],
    "gather_delta": ["C/BLOCK_C"],
    "gather_backward": ["C/BLOCK_C"],
    "gather_peaks": ["pixel_tiles/BLOCK_T"],
    "gather_backward_feats": ["K/BLOCK_K"],
    "attention_forward": ["D/BLOCK_C", "V/BLOCK_C"],
    "attention_forward_few": ["split_length/BLOCK_N"],
    "attention_forward_many": ["K/BLOCK_K", "D/BLOCK_C"],
    "attention_backward": ["split_length/BLOCK_N"],
    "attention_backward_maps": ["D/BLOCK_C", "V/BLOCK_C"],
    "attention_backward_many_maps": ["K/BLOCK_K", "D/BLOCK_C", "V/BLOCK_C", "K/BLOCK_K", "D/BLOCK_C", "V/BLOCK_C"],
    "attention_backward_regions": ["split_length/BLOCK_N"],
    "block_moments": ["split_length/BLOCK_N"],
    "block_norm": ["parts/BLOCK_N"],
    "block_apply": [],
    "block_gradient_sums": ["split_length/BLOCK_N"],
    "block_norm_gradient": ["parts/BLOCK_N"],
    "block_gradient": [],
    "block_region_weights": ["D/BLOCK_C"],
    "block_contexts": ["K/BLOCK_K"],
    "block_contexts_gradient": ["Y/BLOCK_C"],
    "block_softmax_gradient": ["K/BLOCK_C"],
    "block_weights": ["C/BLOCK_C", "D/BLOCK_O"],
    "block_fuse": ["C/BLOCK_C", "Y/BLOCK_C"],
    "block_linear": ["C/BLOCK_C"],
}


def count_turns(kernel: Loop, name: str, numbers: dict[str, int]) -> None:
    """Say of each loop how often it runs."""
    loops = list(kernel.loops())
    if name not in LOOPS:
        raise ValueError(f"LOOPS has no row for {name}: how often do its {len(loops)} loops run?")
    rules = LOOPS[name] * len(loops) if len(LOOPS[name]) == 1 else LOOPS[name]
    if len(loops) != len(rules):
        raise ValueError(f"{name} has {len(loops)} loops, but LOOPS says of {len(rules)} how often they run")
    for loop, rule in zip(loops, rules, strict=True):
        length, block = (numbers[argument] for argument in rule.split("/"))
        loop.times = -(-length // block)


class Load(NamedTuple):
    op: Op
    group: int
    arrival: float

    def is_needed(self, op: Op, group: int) -> bool:
        """Whether an instruction waits for it, when `group` is the next group of loads to be closed."""
        if op.kind == "wait":
            return self.op.kind == "copy" and self.group < group - op.size
        return self.op.kind == "load" and not self.op.registers.isdisjoint(op.registers)


@dataclass
class Warp:
    """One that runs a kernel, and what it has under way in the main loop."""

    pace: float  # microseconds an instruction
    latency: float
    main: Loop
    time: float = 0.0
    waited: float = 0.0  # of it
    group: int = 0
    loads: list[Load] = field(default_factory=list)  # issued, and not waited for
    most: int = 0  # bytes a lane that are under way in the main loop at a time
    left: int | None = None  # and the fewest that still are after a wait

    def run(self, loop: Loop, in_main: bool = False) -> None:
        in_main = in_main or loop is self.main
        turns = min(loop.times, 16)
        for turn in range(turns):
            if turn in (0, 4):  # from the fifth on they are alike, but for a rhythm of two, three or four stages
                first, time, waited = turn, self.time, self.waited
            if loop is self.main:
                self.left = None
            for part in loop.body:
                if isinstance(part, Loop):
                    self.run(part, in_main)
                else:
                    self.step(part, in_main)
        rest = (loop.times - turns) / (turns - first)
        self.waited += rest * (self.waited - waited)
        self.loads = [load._replace(arrival=load.arrival + rest * (self.time - time)) for load in self.loads]
        self.time += rest * (self.time - time)

    def step(self, op: Op, in_main: bool) -> None:
        needed = [load for load in self.loads if load.is_needed(op, self.group)]
        if needed:
            wait = max(0.0, max(load.arrival for load in needed) - self.time)
            self.time, self.waited = self.time + wait, self.waited + wait
            self.loads = [load for load in self.loads if not load.is_needed(op, self.group)]
            if in_main:
                left = sum(load.op.size for load in self.loads)
                self.left = left if self.left is None else min(left, self.left)
        self.time += self.pace
        if op.kind in LOADS:
            self.loads.append(Load(op, self.group, self.time + self.latency))
            if in_main:
                self.most = max(self.most, sum(load.op.size for load in self.loads))
        self.group += op.closes


@dataclass(frozen=True)
class Estimate:
    """Of one launch. The main loop is the one that loads most; where none loads, it is the whole kernel."""

    call: Call
    time: float  # microseconds
    floor: float  # that its bytes take
    limit: str
    resources: Resources | None = None  # from here on, not of an operation of PyTorch's
    waves: float = 0.0
    last_wave: float = 1.0  # its share of full
    instructions: float = 0.0  # of the main loop, a byte that it moves
    in_flight: int = 0  # bytes a multiprocessor, at most
    left: int | None = None  # of them, once it has waited; None: there is no loop
    load_width: float = 0.0  # bytes a lane
    store_width: float = 0.0  # the kernel's
    conversions: int = 0  # through shared memory
    barriers: int = 0

    def __str__(self) -> str:
        times = f"{self.time:7.1f}{self.floor:6.1f}{100 * self.floor / self.time:4.0f}  {self.limit}"
        if not self.resources:
            return f"{self.call.launch!s:87}{times}"
        left = "-" if self.left is None else f"{self.left / 1024:.0f}"
        launch = f"{self.call.launch!s:50.50}{self.resources.blocks:3}{self.waves:6.2f}{100 * self.last_wave:4.0f}"
        loop = f"{self.instructions:6.3f}{self.in_flight / 1024:4.0f}{left:>4}{self.load_width:5.1f}"
        return f"{launch}{loop}{self.store_width:5.1f}{self.conversions:3}{self.barriers:3}{times}"


# Blocks that are resident, waves, the last one's share of full; of the main loop: instructions a byte, KB in flight at
# most and left after a wait, bytes a load and (the kernel's) a store, conversions through shared memory, barriers.
HEADER = f"{'tiles':23}blk waves   % in/B  KB left load store cv ba   us floor   %  limit"


def estimate(call: Call, device: Device) -> Estimate:
    """Compile a launch, and say what it takes; an operation of PyTorch's takes as long as its bytes or products."""
    if isinstance(call.launch, str):
        floor, products = device.least(call.bytes, call.multiply_adds, call.itemsize)
        return Estimate(call, joined({"": floor, "products": products}) + device.launch, floor, "PyTorch")
    compiled = call.launch.compile(ARCHITECTURES[device.architecture].target)
    resources = codegen.measured(device.architecture, compiled)
    return estimate_of(call, device, resources, read_code(codegen.instructions(compiled)))


def estimate_of(call: Call, device: Device, resources: Resources, kernel: Loop) -> Estimate:
    """The same of what was compiled."""
    assert isinstance(call.launch, Launch)
    count_turns(kernel, call.launch.name, call.numbers)
    on = ARCHITECTURES[device.architecture]
    multiprocessors = on.facts.multiprocessors
    warps = dict(call.launch.options)["num_warps"]
    lanes = warps * on.target.warp_size
    loops = [loop for loop in kernel.loops() if loop.times > 1 and loop.count(*LOADS)]
    main = max(loops, key=lambda loop: loop.times * loop.sizes(*LOADS), default=kernel)
    schedulers = 4 * device.issued * device.clock  # instructions a microsecond
    latency = device.latency if call.bytes > device.cache else device.cache_latency
    warp = Warp(max(warps, 4) / schedulers, latency, main)
    warp.run(kernel)

    block = {  # microseconds for which a block occupies a multiprocessor's
        "issue": kernel.count() * warps / schedulers,
        "exp": kernel.count("special") * warps / (4 * device.special * device.clock),
        "shared": kernel.sizes("to shared", "from shared", "copy") * lanes / (device.shared_bytes * device.clock),
        "products": kernel.sizes("product") * warps * multiprocessors / device.products,
    }
    requested = kernel.sizes(*MEMORY) * lanes
    program = {  # and the whole device's
        "memory": min(call.bytes / call.programs, requested) / device.bandwidth,  # a tensor may be touched in part
        "cache": requested / device.cache_bandwidth,
    }

    def wave(programs: int) -> dict[str, float]:
        each = ceil(programs / multiprocessors)
        occupied = {name: time * each for name, time in block.items()}
        return {"loads": warp.time, **occupied, **{name: time * programs for name, time in program.items()}}

    together = multiprocessors * resources.blocks
    full, rest = divmod(call.programs, together)
    waves = [wave(together)] * full + [wave(rest)] * (rest > 0)
    time = device.launch + sum(map(joined, waves))
    limit = "launch" if device.launch > time / 2 else max(waves[0], key=lambda name: waves[0][name])
    if limit == "loads" and warp.waited < warp.time / 2:
        limit = "issue"
    resident = lanes * min(resources.blocks, ceil(call.programs / multiprocessors))
    return Estimate(
        call,
        time,
        program["memory"] * call.programs,
        limit,
        resources,
        call.programs / together,
        rest / together or 1.0,
        main.count() / max(1, main.sizes(*MEMORY) * on.target.warp_size),
        warp.most * resident,
        (warp.most if warp.left is None else warp.left) * resident if loops else None,
        main.width(*LOADS),
        kernel.width("store"),
        main.conversions(),
        main.count("barrier"),
    )


def joined(times: dict[str, float]) -> float:
    """How long it takes to occupy things for these times: longer than the longest where another is nearly as long."""
    return float(sum(time**4 for time in times.values()) ** 0.25)


def faults(found: Estimate, device: Device) -> list[str]:
    """What a launch should not be; all but spills matter only where its bytes take longer than launching it."""
    launch, resources = found.call.launch, found.resources
    if not isinstance(launch, Launch) or not resources:
        return []
    numbers, alignment = launch.constant("NUMBERS"), launch.constant("ALIGNMENT")
    widest = min(16, alignment * numbers.itemsize) if numbers and alignment else 0
    matters, in_loop = found.floor > device.launch, found.left is not None
    problems = {
        "spills": resources.spilled > codegen.allowed_spills(device.architecture, launch, resources),
        "its loop waits for all that is under way": matters and found.left == 0,
        f"its loop loads fewer than {widest} bytes at once": matters and in_loop and found.load_width < 0.9 * widest,
        "its last wave is less than 60 % full": matters and found.waves > 1 and found.last_wave < 0.6,
    }
    return [problem for problem, present in problems.items() if present]


def floor_of(device: Device, case: Case, op: str, direction: Pass, dtype: torch.dtype) -> float:
    """Microseconds that its inputs and outputs take, each moved once, or its products."""
    pixels = case.batch * case.pixels
    _, block = block_work(case)
    if op == "inference":  # to logits, of as many classes as regions
        classifier = pixels * case.channels * case.regions
        works = [Work(pixels * (case.channels + case.regions), block.multiply_adds + classifier)]
    elif op == "training":
        works = [block if direction == "forward" else Work(3 * pixels * case.channels, 2 * block.multiply_adds)]
    else:
        works = SUBJECTS[op].work(case, direction)
    return sum(max(device.least(work.numbers * dtype.itemsize, work.multiply_adds, dtype.itemsize)) for work in works)


def search(device: Device, run: Callable[[], None], estimates: Callable[[list[Call]], Iterable[Estimate]]) -> None:
    """Print the tiles that are best by the model, each with the time of all that `run` launches."""

    def cost(rule: TileRule, problem: Problem, tile: Tile) -> float | None:
        with taken(rule, problem, tile):
            made = codegen.calls(device.architecture, run)
        try:
            found = list(estimates(made))
        except Exception:  # of the compiler, which gives up in many ways, or of what the model cannot count
            return None
        return None if any("spills" in faults(one, device) for one in found) else sum(one.time for one in found)

    for rule in RULES:
        rule.chosen.clear()
    codegen.calls(device.architecture, run)
    for rule, problem, tile in [(r, p, t) for r in RULES for p, t in r.chosen.items() if t]:
        costs = cache(partial(cost, rule, problem))
        best = climb(tile, problem, rule.free, costs)
        change = f" -> {described(best)}: {costs(best):.1f} us" if best != tile else ""
        print(f"  {rule.name:32} {described(tile)}: {costs(tile) or float('nan'):.1f} us{change}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predictor", description=__doc__.splitlines()[0])
    parser.add_argument("devices", nargs="*", choices=[*DEVICES, []], help="default: all")
    parser.add_argument("--case", nargs="+", choices=CASES, default=["cityscapes-inference", "ade20k"])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32", "float64"], default="bfloat16")
    parser.add_argument("--search", action="store_true", help="look for better tiles, which takes minutes for a pass")
    args = parser.parse_args(argv)
    dtype = getattr(torch, args.dtype)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for name in args.devices or DEVICES:
            device = DEVICES[name]
            for case in args.case:
                shapes = [kind(CASES[case], dtype) for kind in (Shape, BlockShape, TrainingShape)]
                print(f"{name}: {shapes[0]}\n{'':27}{HEADER}")
                for (op, direction), run in chain(*(shape.passes().items() for shape in shapes)):
                    if args.search:
                        print(f"{op} {direction}")
                        search(device, run, partial(pool.map, partial(estimate, device=device)))
                        continue
                    made = codegen.calls(device.architecture, run)
                    estimates = list(pool.map(partial(estimate, device=device), made))
                    for one in estimates:
                        print(one, *(f"  ^ {fault}" for fault in faults(one, device)), sep="\n")
                    total = sum(one.time for one in estimates)
                    floor = floor_of(device, CASES[case], op, direction, dtype)
                    print(f"{f'= {op} {direction}':87}{total:7.1f}{floor:6.1f}{100 * floor / total:4.0f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
