"""The benchmarks' jobs as subjects of a round: `first`, ours and eager in every named case, and `later`, everything."""

from __future__ import annotations

import argparse
import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.journal import Failed, Journal, Share, work
from ocr_kernels.bench import measure
from ocr_kernels.bench.cases import CASES, COMPILED, EAGER, MEMORY_FORMATS, NAMED, NETWORKS, OPS, PEERS, SUBJECTS
from ocr_kernels.bench.jobs import Job, jobs

STEPS = ("times", "peers")  # in which first and later jobs are run
DEVICE, DTYPE = torch.device("cuda"), "bfloat16"
FIRST = (*OPS, "folded-module")  # every kernel is in one of them
LIMITS, HOST = "a large copy and a large product", "host times"  # subjects beside the jobs
SECONDS = 0.2  # to spend on timing one pass


def first(device: torch.device) -> list[Job]:
    return jobs(device, [DTYPE], list(MEMORY_FORMATS), [case.name for case in NAMED], FIRST, [EAGER])


def later(device: torch.device) -> list[Job]:
    subjects = [name for name in SUBJECTS if name not in NETWORKS or importlib.util.find_spec("timm")]
    return jobs(device, [DTYPE], list(MEMORY_FORMATS), list(CASES), subjects, PEERS)


def subjects(todo: Sequence[Job], journal: Journal) -> dict[str, Callable[[], Any]]:
    return {str(job): partial(measure_job, job, journal) for job in todo}


def measure_job(job: Job, journal: Journal) -> list[dict[str, Any]]:
    """The job's lines of the results, also if it fails half way."""
    lines: list[dict[str, Any]] = []
    try:
        for line in measure.measure(job.workload, limits(job.workload.device, journal), SECONDS):
            lines.append(line)
    except Exception as error:
        raise Failed(f"{type(error).__name__}: {error}", lines) from error
    ours = {f"{name} {line['problems'][name]}" for line in lines for name in line["ours"] if name in line["problems"]}
    if ours:
        raise Failed("; ".join(sorted(ours)), lines)
    return lines


@functools.cache
def limits(device: torch.device, journal: Journal) -> measure.Limits:
    """What the first process of the first step measured."""
    found = journal.results(STEPS[0]).get(LIMITS)
    return measure.Limits(**found) if found else measure.measure_limits(device, getattr(torch, DTYPE), SECONDS)


def launch(job: Job) -> None:
    """Each of ours once, forward, and forward with backward."""
    workload = replace(job.workload, peers=())
    for function in workload.variants().values():
        for what in workload.subject.passes[::2]:
            measure.run(what, function, workload.inputs())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=("first", "later"))
    args = parser.parse_args()
    share = Share()
    share.journal.update()
    if args.which == "first":
        found = {LIMITS: lambda: vars(limits(DEVICE, share.journal))} | subjects(first(DEVICE), share.journal)
    else:
        workload = replace(first(DEVICE)[0].workload, peers=(EAGER, COMPILED))
        found = {HOST: lambda: measure.host_times(workload)} | subjects(later(DEVICE), share.journal)
    work(found, share)


if __name__ == "__main__":
    main()
