"""Why the slowest are slow: Nsight Compute's counters of the kernels that come least close to their floor."""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.gpu import times
from benchmarks.gpu.journal import Failed, Journal, Share, Skipped, work
from benchmarks.gpu.runner import find_tool
from ocr_kernels.bench import measure

SUBJECTS = 6
LAUNCHES = 12  # of a subject, at most
SHORTEST = 10e-6  # of the floors: below, what is seen is how long a launch takes at all
OPTIONS = "--clock-control none --profile-from-start off --target-processes application-only --page raw --csv"
SECTIONS = ("SpeedOfLight", "Occupancy", "WarpStateStats")
COLUMNS = {
    "us": r"gpu__time_duration\.sum",
    "dram": r"(gpu__dram|dram__)_?throughput\.avg\.pct_of_peak_sustained_elapsed",
    "sm": r"sm__throughput\.avg\.pct_of_peak_sustained_elapsed",
    "occupancy": r"sm__warps_active\.avg\.pct_of_peak_sustained_active",
}
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")


def slowest(journal: Journal) -> list[tuple[str, str]]:
    """Jobs and backends of ours, those furthest from their floor first; one of each subject and case."""
    found: dict[tuple[str, str], float] = {}
    for job, lines in journal.results(times.STEPS[0]).items():
        if job == times.LIMITS:
            continue
        for line in lines:
            for name in line["ours"]:
                if name in line["times"] and line["floor"] > SHORTEST:
                    share = line["floor"] / line["times"][name]["median"]
                    found[job, name] = min(share, found.get((job, name), share))
    one_of_each: dict[str, tuple[str, str]] = {}
    for job, name in sorted(found, key=found.__getitem__):
        one_of_each.setdefault(job.rsplit(maxsplit=2)[0], (job, name))
    return list(one_of_each.values())


def profile(job: str, backend: str) -> list[dict[str, Any]]:
    """Run a job's passes under Nsight Compute; a line for each kernel."""
    tool = find_tool("ncu")
    if tool is None:
        raise Skipped("ncu is not on this machine")
    command = [tool, *OPTIONS.split(), "--print-units", "base", "--launch-count", str(LAUNCHES)]
    command += [word for section in SECTIONS for word in ("--section", section)]
    command += [sys.executable, "-m", "benchmarks.gpu.profile", "--launch", job, backend]
    process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(process.stdout)
    lines = parse(process.stdout)
    if process.returncode != 0 or not lines:
        raise Failed("; ".join(process.stdout.splitlines()[-3:]) or f"exit status {process.returncode}", lines)
    return lines


def parse(text: str) -> list[dict[str, Any]]:
    """The kernels in what `ncu --page raw --csv` printed: microseconds, percentages, and what most warps waited for."""
    table = text[text.find('"ID"') :] if '"ID"' in text else ""
    kernels = []
    for row in csv.DictReader(table.splitlines()):
        if not row["ID"]:  # the units
            continue
        numbers = {}
        for name, value in row.items():
            if re.fullmatch(r"[\d.,]+", value or ""):
                numbers[name] = float(value.replace(",", ""))
        kernel: dict[str, Any] = {"kernel": row["Kernel Name"]}
        for column, pattern in COLUMNS.items():
            kernel[column] = next((value for name, value in numbers.items() if re.fullmatch(pattern, name)), None)
        if kernel["us"] is not None:
            kernel["us"] /= 1e3
        stalls = {match[1]: value for name, value in numbers.items() if (match := STALL.fullmatch(name))}
        stalls.pop("selected", None)  # is no stall
        kernel["stall"] = max(stalls, key=stalls.__getitem__, default=None)
        kernels.append(kernel)
    return kernels


def launch(job: str, backend: str) -> None:
    """What is profiled: the job's passes, once everything is compiled."""
    found = next(one for one in times.first(times.DEVICE) if str(one) == job)
    workload = replace(found.workload, peers=())
    function, inputs = workload.variants()[backend], workload.inputs()
    what = workload.subject.passes[-1]
    if isinstance(function, torch.nn.Module):
        function.train(what != "forward")
    measure.run(what, function, inputs)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    measure.run(what, function, inputs)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--launch", nargs=2, metavar=("JOB", "BACKEND"))
    args = parser.parse_args()
    if args.launch:
        launch(*args.launch)
        return
    share = Share()
    share.journal.update()
    chosen = slowest(share.journal)[:SUBJECTS]
    work({f"{backend} {job}": partial(profile, job, backend) for job, backend in chosen}, share)


if __name__ == "__main__":
    main()
