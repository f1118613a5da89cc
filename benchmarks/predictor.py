"""What a launch should take, from its machine code and its geometry. A model: nothing in it was measured.

A warp runs through its instructions in order, at the pace that its block's warps leave it, and waits where it needs what has
not arrived. That time, and the time for which the launch occupies each resource by itself, make an estimate.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from math import ceil, inf, prod
from multiprocessing import get_context
from typing import NamedTuple

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # compiled kernels, not interpreted ones

import torch

from benchmarks.codegen import ARCHITECTURES, Call, Launch, Resources, Shape, calls, instructions, measured
from ocr_kernels.bench.cases import CASES, SUBJECTS


@dataclass(frozen=True)
class Device:
    """Rates of a GPU: what its sheet says, times what a kernel is wont to reach. To be replaced by what a clock says."""

    architecture: str
    clock: float  # cycles a microsecond
    bandwidth: float  # bytes a microsecond that copies reach
    cache_bandwidth: float  # of the second-level cache
    products: float  # 16-bit multiply-adds a microsecond, dense: 70 % of the sheet's
    issued: float = 0.55  # instructions a cycle, of each of a multiprocessor's four schedulers
    special: float = 1 / 8  # of them exponentials and reciprocals of a warp
    shared_bytes: int = 128  # that shared memory moves in a cycle
    latency: float = 0.8  # microseconds that a load takes where many are under way
    cache: float = 25e6  # bytes: of launches on fewer, what they load was just written and lies in the second-level cache
    cache_latency: float = 0.4
    launch: float = 2.5  # microseconds


DEVICES = {
    "A100": Device("sm_80", 1410, 1.7e6, 4.0e6, 1.1e8, cache=20e6),
    "H100": Device("sm_90", 1700, 3.0e6, 5.5e6, 3.5e8),
    "H200": Device("sm_90", 1700, 4.3e6, 5.5e6, 3.5e8),
    "B200": Device("sm_100", 1850, 7.0e6, 10.0e6, 7.9e8, cache=60e6),
    # a wavefront of 64 takes a unit of 16 lanes four cycles
    "MI300X": Device("gfx942", 2100, 4.0e6, 10.0e6, 4.6e8, issued=0.25, special=1 / 16),
}

# How often a kernel's loops run, in the order in which they begin: products of arguments, divided and rounded up.
# A kernel that is not here has no loop; one entry serves all loops of a kernel.
LOOPS = {
    "reduce_splits": ["splits/BLOCK_S"],
    "gather_forward": ["split_length/BLOCK_N"],
    "gather_forward_many": ["split_length/BLOCK_N"],
    "gather_delta": ["C/BLOCK_C"],
    "gather_backward": ["C/BLOCK_C"],
    "gather_peaks": ["pixel_tiles/BLOCK_T"],
    "gather_backward_feats": ["K/BLOCK_K"],
    "attention_forward": ["D/BLOCK_C", "V/BLOCK_C"],
    "attention_forward_many": ["K/BLOCK_K", "D/BLOCK_C"],
    "attention_backward": ["split_length/BLOCK_N"],
    "attention_backward_maps": ["D/BLOCK_C", "V/BLOCK_C"],
    "attention_backward_many_maps": ["K/BLOCK_K", "D/BLOCK_C", "V/BLOCK_C", "K/BLOCK_K", "D/BLOCK_C", "V/BLOCK_C"],
    "attention_backward_regions": ["split_length/BLOCK_N"],
}


# Machine code


class Op(NamedTuple):
    """What the model knows of an instruction."""

    kind: str = ""
    size: int = 0  # bytes a lane of what moves; of a wait, how many copies may still be under way; multiply-adds a warp
    registers: frozenset[str] = frozenset()


@dataclass
class Loop:
    body: list[Op | Loop]
    times: int = 1

    def ops(self, weight: int = 1) -> Iterator[tuple[Op, int]]:
        """Every instruction in it, and how often it runs."""
        for part in self.body:
            if isinstance(part, Loop):
                yield from part.ops(weight * part.times)
            else:
                yield part, weight

    def loops(self) -> Iterator[Loop]:
        for part in self.body:
            if isinstance(part, Loop):
                yield part
                yield from part.loops()

    def count(self, *kinds: str) -> int:
        return sum(weight for op, weight in self.ops() if not kinds or op.kind in kinds)

    def bytes(self, *kinds: str) -> int:
        return sum(op.size * weight for op, weight in self.ops() if op.kind in kinds)

    def width(self, *kinds: str) -> float:
        """Bytes a lane that an instruction moves."""
        return self.bytes(*kinds) / max(1, self.count(*kinds))

    def conversions(self) -> int:
        """How often what was written to shared memory is read back."""
        kinds = [op.kind for op, _ in self.ops() if op.kind in ("to shared", "from shared")]
        return sum(a == "to shared" and b == "from shared" for a, b in zip(kinds, kinds[1:], strict=False))


SASS = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@(\S+)\s+)?([A-Z0-9_.a-z]+)\s*(.*?);")
SASS_KINDS = {
    "LDGSTS": "copy", "LDG": "load", "LD": "load", "STG": "store", "ST": "store", "RED": "store", "LDGDEPBAR": "commit",
    "BAR": "barrier", "LDS": "from shared", "LDSM": "from shared", "STS": "to shared", "STSM": "to shared",
    "MUFU": "special", "HMMA": "product", "HGMMA": "product",
}  # fmt: skip
SUFFIXES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
MATRICES = {"M88": 4, "MT88": 4, "2": 2, "4": 4}  # of LDSM and STSM: four bytes a lane, times how many


def read_sass(text: str) -> Loop:
    """A kernel's instructions, in its loops, as nvdisasm prints them."""
    ops: list[Op] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    end = 0
    for line in text.splitlines():
        if line.startswith(".L"):
            labels[line.rstrip(":")] = len(ops)
        elif found := SASS.search(line):
            predicate, name, operands = found.groups()
            if predicate == "!PT":  # never runs
                continue
            if target := re.search(r"BRA.*`\((\.L\w+)\)", line):
                jumps.append((len(ops), target[1]))
            ops.append(_sass_op(name, operands))
            if name == "EXIT" and not predicate:
                end = len(ops)
    spans = [(labels[label], at) for at, label in jumps if labels.get(label, at) < at < end]
    waits = [span for span in spans if span[1] - span[0] < 8]  # for a barrier in memory: no loops that compute
    return _nested(ops[:end], sorted(set(spans) - set(waits)))


def _sass_op(name: str, operands: str) -> Op:
    base, *suffixes = name.split(".")
    if base in ("UBLKCP", "UTMALDG"):
        raise NotImplementedError("the model knows no TMA")
    if name == "DEPBAR.LE" and operands.startswith("SB0"):
        return Op("wait", int(operands.split(",")[1], 16))
    registers = frozenset(re.findall(r"\bR\d+", operands))
    kind = SASS_KINDS.get(base, "")
    size = next((SUFFIXES[suffix] for suffix in suffixes if suffix in SUFFIXES), 4)
    if base in ("LDSM", "STSM"):
        size = 4 * int(suffixes[-1]) if suffixes[-1].isdigit() else 4
    if kind == "product":
        shape = next(suffix for suffix in suffixes if suffix[0].isdigit())
        m, n, k = map(int, shape.split("x")) if "x" in shape else (16, 8, int(shape[3:]))
        size = m * n * k // (4 if base == "HGMMA" else 1)  # four warps share one
    if kind == "load":
        first = int(operands.split(",")[0].removeprefix("R")) if operands.startswith("R") else 0
        registers = frozenset(f"R{first + i}" for i in range(max(1, size // 4)))
    return Op(kind, size, registers)


def _nested(ops: list[Op], spans: list[tuple[int, int]]) -> Loop:
    """Loops out of the spans between their first instructions and the last jumps back to these."""
    last = {first: max(end for begin, end in spans if begin == first) for first, _ in spans}
    root = Loop([])
    open_: list[tuple[int, Loop]] = [(len(ops), root)]
    for at, op in enumerate(ops):
        if at in last:
            loop = Loop([])
            open_[-1][1].body.append(loop)
            open_.append((last[at], loop))
        open_[-1][1].body.append(op)
        while len(open_) > 1 and at >= open_[-1][0]:
            open_.pop()
    return root


def count_loops(kernel: Loop, call: Call) -> None:
    """Say of each loop how often it runs."""
    assert isinstance(call.launch, Launch)
    values = call.numbers | {name: call.launch.constant(name) for name, _ in call.launch.signature}
    values = call.numbers | {name: v for name, v in values.items() if v is not None}
    loops, rules = list(kernel.loops()), LOOPS.get(call.launch.name, [])
    if len(rules) == 1:
        rules = rules * len(loops)
    if len(loops) != len(rules):
        raise ValueError(f"{call.launch.name} has {len(loops)} loops, and LOOPS says of {len(rules)} how often they run")
    for loop, rule in zip(loops, rules, strict=True):
        above, below = (prod(values[name] for name in part.split("*")) for part in rule.split("/"))
        loop.times = max(1, -(-above // below))


# A warp's way through it


@dataclass
class Warp:
    pace: float  # microseconds an instruction
    latency: float
    time: float = 0.0
    group: int = 0  # of copies
    under_way: list[tuple[Op, int, float]] = field(default_factory=list)  # issued and not waited for: group, arrival
    most: dict[int, int] = field(default_factory=dict)  # by loop: bytes a lane that are under way at a time
    left: dict[int, float] = field(default_factory=dict)  # and the fewest that still are after a wait

    def run(self, loop: Loop, inside: tuple[int, ...] = ()) -> None:
        inside = (*inside, id(loop))
        for turn in range(simulated := min(loop.times, 4)):
            begin = self.time
            if turn == simulated - 1:  # all turns are like it
                self.left.pop(id(loop), None)
            for part in loop.body:
                if isinstance(part, Loop):
                    self.run(part, inside)
                else:
                    self.step(part, inside)
        rest = (loop.times - simulated) * (self.time - begin)
        self.time += rest
        self.under_way = [(op, group, arrival + rest) for op, group, arrival in self.under_way]

    def step(self, op: Op, inside: tuple[int, ...]) -> None:
        if op.kind == "wait":
            needed = [load for load in self.under_way if load[0].kind == "copy" and load[1] < self.group - op.size]
        else:
            needed = [load for load in self.under_way if load[0].kind == "load" and load[0].registers & op.registers]
        if needed:
            self.time = max([self.time, *(arrival for *_, arrival in needed)])
            self.under_way = [load for load in self.under_way if load not in needed]
            for loop in inside:
                self.left[loop] = min(self.left.get(loop, inf), sum(load.size for load, *_ in self.under_way))
        self.time += self.pace
        self.group += op.kind == "commit"
        if op.kind in ("load", "copy"):
            self.under_way.append((op, self.group, self.time + self.latency))
            for loop in inside:
                self.most[loop] = max(self.most.get(loop, 0), sum(load.size for load, *_ in self.under_way))


# Estimates


@dataclass(frozen=True)
class Estimate:
    """Of one launch. What is said of a loop is of the one that loads most, or of the kernel where there is none."""

    call: Call
    resident: int = 0  # blocks a multiprocessor
    spilled: int = 0
    waves: float = 0.0
    last_wave: float = 1.0  # its share of full
    loops: bool = False  # whether there is a loop that loads
    instructions: float = 0.0  # a byte that the loop moves
    in_flight: int = 0  # bytes a multiprocessor
    left: float = 0.0  # of them, after the loop has waited
    load_width: float = 0.0  # bytes a lane
    store_width: float = 0.0
    conversions: int = 0
    barriers: int = 0
    time: float = 0.0  # microseconds
    floor: float = 0.0  # that its bytes take
    limit: str = ""

    def __str__(self) -> str:
        name = f"{self.call.launch:.50}" if isinstance(self.call.launch, str) else str(self.call.launch)
        times = f"{self.time:7.1f}{self.floor:6.1f}{100 * self.floor / self.time:4.0f}  {self.limit}"
        if isinstance(self.call.launch, str):
            return f"{name:90}{times}"
        left = f"{self.left / 1024:5.0f}" if self.loops else "    -"
        return (
            f"{name:51}{self.resident:3}{self.waves:7.2f}{100 * self.last_wave:4.0f}{self.instructions:6.3f}"
            f"{self.in_flight / 1024:5.0f}{left}{self.load_width:5.1f}{self.store_width:5.1f}"
            f"{self.conversions:3}{self.barriers:3}{times}"
        )


HEADER = f"{'':51}blk  waves   % in/B   KB left load store cv ba   us floor   % limit"


def estimate(call: Call, device: Device, found: Resources, kernel: Loop) -> Estimate:
    """The launch on the device. Of `kernel` it takes how often its loops run from the call."""
    assert isinstance(call.launch, Launch)
    on = ARCHITECTURES[device.architecture]
    warps = dict(call.launch.options)["num_warps"]
    lanes = warps * on.target.warp_size
    count_loops(kernel, call)
    schedulers = 4 * device.issued * device.clock
    warp = Warp(max(warps, 4) / schedulers, device.latency if call.bytes > device.cache else device.cache_latency)
    warp.run(kernel)

    busy = {  # microseconds for which a block occupies a multiprocessor, or all blocks the whole device
        "issue": kernel.count() * warps / schedulers,
        "exp": kernel.count("special") * warps / (4 * device.special * device.clock),
        "shared": kernel.bytes("to shared", "from shared", "copy") * lanes / (device.shared_bytes * device.clock),
        "products": kernel.bytes("product") * warps * on.facts.multiprocessors / device.products,
    }
    requested = kernel.bytes("load", "copy", "store") * lanes
    floor = min(call.bytes, requested * call.programs) / device.bandwidth  # not all of a tensor may be touched
    together = on.facts.multiprocessors * found.blocks
    full, rest = divmod(call.programs, together)

    def wave(programs: int) -> dict[str, float]:
        blocks = ceil(programs / on.facts.multiprocessors)
        shared = {name: blocks * time for name, time in busy.items()}
        memory = {"memory": floor * programs / call.programs, "cache": requested * programs / device.cache_bandwidth}
        return {"loads": warp.time, **memory, **shared}

    def joined(times: dict[str, float]) -> float:
        return float(sum(time**4 for time in times.values()) ** 0.25)  # what is nearly as busy delays it too

    first = wave(min(call.programs, together))
    time = full * joined(first) + (joined(wave(rest)) if rest else 0) + device.launch
    loading = [loop for loop in kernel.loops() if loop.times > 1 and loop.count("load", "copy")]
    main = max(loading, key=lambda loop: loop.times * loop.bytes("load", "copy"), default=kernel)
    blocks = min(found.blocks, ceil(call.programs / on.facts.multiprocessors))
    moved = main.bytes("load", "copy", "store") * on.target.warp_size
    return Estimate(
        call, found.blocks, found.spilled, call.programs / together, rest / together if rest else 1.0, bool(loading),
        main.count() / max(1, moved), warp.most.get(id(main), 0) * lanes * blocks,
        warp.left.get(id(main), 0) * lanes * blocks, main.width("load", "copy"), kernel.width("store"),
        main.conversions(), main.count("barrier"),
        time, floor, "launch" if device.launch > time / 2 else max(first, key=lambda name: first[name]),
    )  # fmt: skip


def predict(call: Call, device: Device) -> Estimate:
    """Compile a launch, and estimate it; an operation of PyTorch's takes its bytes."""
    if isinstance(call.launch, str):
        floor = call.bytes / device.bandwidth
        return Estimate(call, time=floor + device.launch, floor=floor, limit="PyTorch")
    compiled = call.launch.compile(ARCHITECTURES[device.architecture].target)
    return estimate(call, device, measured(device.architecture, compiled), read_sass(instructions(compiled)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predictor", description=__doc__.splitlines()[0])
    parser.add_argument("devices", nargs="*", choices=[*DEVICES, []], help="default: all")
    parser.add_argument("--case", nargs="+", choices=CASES, default=["cityscapes-inference", "ade20k"])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32", "float64"], default="bfloat16")
    args = parser.parse_args(argv)
    dtype = getattr(torch, args.dtype)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for name in args.devices or DEVICES:
            device = DEVICES[name]
            for case in args.case:
                shape = Shape(CASES[case], dtype)
                print(f"{f'{name}: {shape}':49.49}{HEADER.strip():>71}")
                for (op, direction), run in shape.passes().items():
                    made = list(pool.map(partial(predict, device=device), calls(device.architecture, run)))
                    total = sum(one.time for one in made)
                    floor = SUBJECTS[op].bytes(CASES[case], direction, dtype) / device.bandwidth
                    print(*(f"  {one}" for one in made), sep="\n")
                    print(f"  {f'= {op} {direction}':90}{total:7.1f}{floor:6.1f}{100 * floor / total:4.0f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
