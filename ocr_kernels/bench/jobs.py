"""What there is to measure, in order: the most telling first, since time may be short."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch

from ocr_kernels.bench.cases import AUTOTUNED, CASES, EAGER, NETWORKS, OPS, SUBJECTS, Workload, sweep_of


@dataclass(frozen=True)
class Job:
    """One workload; its passes are measured together."""

    workload: Workload
    rank: int

    @property
    def dtype(self) -> str:
        return str(self.workload.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        work = self.workload
        slow = f" {AUTOTUNED}" if AUTOTUNED in work.peers else ""
        return f"{work.subject.name} {work.case.name} {self.dtype} {work.memory_format}{slow}"


def jobs(
    device: torch.device,
    dtypes: Sequence[str],
    memory_formats: Sequence[str],
    cases: Sequence[str],
    subjects: Sequence[str],
    peers: Sequence[str],
    quick: bool = False,
) -> list[Job]:
    """Every combination. What compiles for long is late, beside ours once more."""
    found = []
    combinations = list(product(dtypes, memory_formats))
    fast = tuple(peer for peer in peers if peer != AUTOTUNED)
    for combination, name, subject in product(combinations, cases, subjects):
        if name not in (SUBJECTS[subject].cases or cases):
            continue
        dtype, memory_format = combination
        case = CASES[name].quick() if quick else CASES[name]
        work = Workload(SUBJECTS[subject], case, getattr(torch, dtype), device, memory_format, fast)
        is_op, sweep, first = subject in OPS, sweep_of(name), name == cases[0]
        rank = 4 if subject in NETWORKS else 0 if first else 3 if sweep else 1 if is_op else 4
        if combination != combinations[0]:
            rank = 2 if first and is_op else rank + 10
        if not sweep:
            found.append(Job(work, rank))
        elif is_op:  # against eager alone; a module's convolutions do not depend on K
            found.append(Job(replace(work, peers=(EAGER,)), rank))
        if AUTOTUNED in peers and device.type == "cuda" and not sweep:
            found.append(Job(replace(work, peers=(AUTOTUNED,)), max(rank, 5)))
    return sorted(found, key=lambda job: job.rank)
