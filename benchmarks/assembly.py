"""Machine code as a model of time needs it: the instructions that move, wait or multiply, in their loops."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import NamedTuple

LOADS = "load", "copy"  # to registers, and to shared memory while others are computed with
MEMORY = *LOADS, "store"
UNSIZED = "", "barrier", "special"


class Op(NamedTuple):
    """An instruction."""

    kind: str = ""
    size: int = 0  # bytes a lane; multiply-adds a warp; of a wait, how many groups of loads may still be under way
    registers: frozenset[str] = frozenset()
    closes: bool = False  # a group of loads, as waits count them


@dataclass
class Loop:
    """A part of a kernel; the whole of it is a loop that runs once."""

    body: list[Op | Loop]
    times: int = 1

    def ops(self, weight: int = 1) -> Iterator[tuple[Op, int]]:
        """Every instruction of one turn, and how often it runs."""
        for part in self.body:
            if isinstance(part, Loop):
                yield from part.ops(weight * part.times)
            else:
                yield part, weight

    def loops(self) -> Iterator[Loop]:
        """All inside it, in their order."""
        for part in self.body:
            if isinstance(part, Loop):
                yield part
                yield from part.loops()

    def count(self, *kinds: str) -> int:
        return sum(weight for op, weight in self.ops() if not kinds or op.kind in kinds)

    def sizes(self, *kinds: str) -> int:
        return sum(op.size * weight for op, weight in self.ops() if op.kind in kinds)

    def width(self, *kinds: str) -> float:
        """Bytes a lane that an instruction moves."""
        return self.sizes(*kinds) / max(1, self.count(*kinds))

    def conversions(self) -> int:
        """How often what was written to shared memory is read back."""
        kinds = [op.kind for op, _ in self.ops() if op.kind in ("to shared", "from shared")]
        return sum(before == "to shared" and after == "from shared" for before, after in pairwise(kinds))


def read_code(text: str) -> Loop:
    """A kernel: SASS as nvdisasm prints it, or AMD's assembly."""
    return read_amd(text) if ".amdgcn_target" in text else read_sass(text)


SASS = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@(?P<predicate>\S+)\s+)?(?P<name>[A-Z][\w.]+)(?P<operands>.*);")
SASS_KINDS = {
    "LDGSTS": "copy", "LDG": "load", "LD": "load", "STG": "store", "ST": "store", "RED": "store", "BAR": "barrier",
    "LDS": "from shared", "LDSM": "from shared", "STS": "to shared", "STSM": "to shared",
    "MUFU": "special", "HMMA": "product", "HGMMA": "product",
}  # fmt: skip
SASS_SIZES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


def read_sass(text: str) -> Loop:
    """What jumps back is a loop, but not what waits for a barrier in memory: short, it may lie behind the rest."""
    ops: list[Op] = []
    labels: dict[str, int] = {}
    jumps: dict[int, str] = {}
    exits: list[int] = []
    for line in text.splitlines():
        if line.startswith(".L"):
            labels[line.split(":")[0]] = len(ops)
        found = SASS.search(line)
        if not found or found["predicate"] == "!PT":  # which never runs
            continue
        if target := re.search(r"BRA.*`\((\.L\w+)\)", line):
            jumps[len(ops)] = target[1]
        if found["name"] == "EXIT" and not found["predicate"]:
            exits.append(len(ops))
        ops.append(_sass_op(found["name"], found["operands"]))
    ops = ops[: max(exits, default=len(ops)) + 1]  # without subroutines
    lengths = {at: at - labels.get(label, at + 1) for at, label in jumps.items() if at < len(ops)}
    waits = {at for at, length in lengths.items() if 0 <= length < 8}
    ways_back = {at + 1 for at in waits}
    return _nested(ops, [(at - length, at) for at, length in lengths.items() if length >= 8 and at not in ways_back])


def _sass_op(name: str, operands: str) -> Op:
    base, *suffixes = name.split(".")
    if base in ("UBLKCP", "UTMALDG"):
        raise ValueError(
            f"{name} moves a tile whose size is in a descriptor, not in the instruction: it cannot be counted"
        )
    if name == "DEPBAR.LE" and "SB0" in operands:
        return Op("wait", int(operands.split(",")[1], 16))
    kind = SASS_KINDS.get(base, "")
    registers = re.findall(r"\bR\d+", operands)
    if kind in UNSIZED:
        return Op(kind, registers=frozenset(registers), closes=base == "LDGDEPBAR")
    size = next((SASS_SIZES[suffix] for suffix in suffixes if suffix in SASS_SIZES), 4)
    if base in ("LDSM", "STSM"):  # of one, two or four matrices
        size = 4 * int(suffixes[-1]) if suffixes[-1].isdigit() else 4
    elif kind == "product":  # tcgen05's shapes are not in its instructions
        shape = next(suffix for suffix in suffixes if suffix[0].isdigit())
        size = prod(map(int, shape.split("x"))) // 4 if "x" in shape else 128 * int(shape[3:])  # four warps share one
    elif kind == "load" and registers:
        first = int(registers[0][1:])
        registers = [f"R{first + i}" for i in range(max(1, size // 4))]
    return Op(kind, size, frozenset(registers))


# Scalar instructions, which a unit of their own runs, are left out.
AMD = re.compile(r"^\s+(?P<name>(?:s_waitcnt|s_barrier|(?:v|global|buffer|flat|ds)_)\w*)(?P<operands>.*)")
AMD_KINDS = {
    r"(global|buffer|flat)_load": "copy",  # waited for by their number, as NVIDIA's copies to shared memory
    r"(global|buffer|flat)_(store|atomic)": "store",
    r"s_barrier": "barrier",
    r"ds_read": "from shared",
    r"ds_write": "to shared",
    r"v_(exp|rcp|log|rsq|sqrt)_": "special",
    r"v_mfma_": "product",
}
AMD_SIZES = {r"x4|b128": 16, r"x3|b96": 12, r"x2|b64": 8, r"short|[ub]16": 2, r"byte|[ub]8": 1}


def read_amd(text: str) -> Loop:
    """Blocks are in any order, but a comment names the header of the loop that each is in."""
    ops: list[Op] = []
    spans: dict[str, tuple[int, int]] = {}
    label, headers = "", set[str]()
    for line in text.splitlines():
        if line.startswith((".LBB", "; %bb")):
            label, headers = line.split(":")[0].removeprefix(".L"), set()
        headers |= set(re.findall(r"(?:Header=|Parent Loop )(BB\w+)", line))
        if "Loop Header" in line:
            headers.add(label)
        if found := AMD.search(line):
            for header in headers:
                spans[header] = spans.get(header, (len(ops), 0))[0], len(ops)
            ops.append(_amd_op(found["name"], found["operands"]))
    return _nested(ops, list(spans.values()))


def _amd_op(name: str, operands: str) -> Op:
    if name == "s_waitcnt" and (allowed := re.search(r"vmcnt\((\d+)\)", operands)):
        return Op("wait", int(allowed[1]))
    kind = next((kind for start, kind in AMD_KINDS.items() if re.match(start, name)), "")
    if kind in UNSIZED:
        return Op(kind)
    size = next((size for part, size in AMD_SIZES.items() if re.search(part, name)), 4)
    if kind == "product":
        size = prod(map(int, re.findall(r"\d+", re.findall(r"\d+x\d+x\d+", name)[0])))
    elif name.startswith(("ds_read2", "ds_write2")):
        size *= 2
    return Op(kind, size, closes=kind in ("copy", "store"))


def _nested(ops: list[Op], spans: list[tuple[int, int]]) -> Loop:
    """Loops out of the spans between their first and their last instructions."""
    last = {first: max(end for begin, end in spans if begin == first) for first, _ in spans}
    root = Loop([])
    around = [(len(ops), root)]
    for at, op in enumerate(ops):
        if at in last:
            loop = Loop([])
            around[-1][1].body.append(loop)
            around.append((last[at], loop))
        around[-1][1].body.append(op)
        while around[-1][0] <= at:
            around.pop()
    return root
