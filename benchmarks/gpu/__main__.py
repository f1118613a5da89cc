"""`make gpu`: on a machine with a GPU, everything that needs one, in nine minutes.

Each step runs in processes of its own, what matters most first. What they find is written as they find it to
`round.jsonl`, what they print to `round.log`; from these `report.md` is made, a page for people, and the results.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from benchmarks.gpu import runner
from benchmarks.gpu.journal import JOURNAL, LOG, Journal, Line
from benchmarks.gpu.runner import Step

CORES = os.cpu_count() or 1
SANITIZER = ("compute-sanitizer", "--target-processes", "application-only", "--report-api-errors", "no")
PYTEST = ("pytest", "-p", "benchmarks.gpu.pytest_share", "-p", "no:cacheprovider", "-m", "gpu", "--tb=short")


@dataclass(frozen=True)
class Stage:
    """Steps side by side, and the seconds that they have, with those that stages before them left."""

    seconds: float
    steps: Sequence[Step]


def stages(commit: str, capability: str) -> list[Stage]:
    prepare, times = "benchmarks.gpu.prepare", "benchmarks.gpu.times"
    architecture = {"TORCH_CUDA_ARCH_LIST": capability}
    one_thread = {"OMP_NUM_THREADS": "1"}  # in each of many processes
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor an allocation, with an end that can be seen
    return [
        Stage(
            110,
            [
                Step("build", [prepare, "libraries"], limit=150, variables=architecture),
                Step("compile", [prepare, "kernels"], max(1, CORES - 4), variables=one_thread),
            ],
        ),
        Stage(
            55,
            [
                Step("machine", [prepare, "machine", "--commit", commit]),
                Step("smoke", ["benchmarks.gpu.smoke"], 4, limit=30),
                Step("memcheck", ["benchmarks.gpu.smoke"], 6, limit=45, tool=SANITIZER, variables=uncached),
            ],
        ),
        Stage(110, [Step("times", [times, "first"])]),
        Stage(120, [Step("tests", PYTEST, max(1, min(12, CORES - 2)), limit=90, variables=one_thread)]),
        Stage(45, [Step("profile", ["benchmarks.gpu.profile"], limit=40)]),
        Stage(80, [Step("peers", [times, "later"], limit=90)]),
        Stage(20, []),  # for the page, and what was under way
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for what was found")
    parser.add_argument("--commit", default="", help="the commit to record; default: what git says")
    parser.add_argument("--seconds", type=float, default=540, help="for the whole round; default: %(default)s")
    args = parser.parse_args(argv)
    start = time.time()
    gpu = find_gpu()
    if isinstance(gpu, str):
        print(f"No GPU round: {gpu}.", file=sys.stderr)
        return 1

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out.resolve()
    about = {"gpu": gpu["name"], "commit": args.commit, "seconds": args.seconds}
    journal = play(stages(args.commit, gpu["capability"]), about, out, start)
    subprocess.run([sys.executable, "-m", "benchmarks.gpu.page", out], cwd=runner.ROOT)
    print(f"{time.time() - start:.0f} s")
    return int(any(line["state"] in ("failed", "crashed") for line in journal.ended.values()))


def play(plan: Sequence[Stage], about: Mapping[str, Any], out: Path, start: float) -> Journal:
    """Run the stages one after another. Each ends when it was planned to, so that it has what others left of theirs."""
    (out / JOURNAL).write_bytes(b"")
    with (out / LOG).open("wb", buffering=0) as log:
        journal = Journal(out / JOURNAL, functools.partial(tell, log))
        journal.write(about={**about, "steps": [step.name for stage in plan for step in stage.steps]})
        scale = about["seconds"] / sum(stage.seconds for stage in plan)
        end = start
        try:
            for stage in plan:
                end += stage.seconds * scale
                runner.run(stage.steps, journal, log, end)
        except KeyboardInterrupt:
            print("Stopped.")
    return journal


def find_gpu() -> dict[str, Any] | str:
    """The GPU that PyTorch sees, asked for in a process of its own, or why there is none."""
    code = """
import json, torch
if not torch.cuda.is_available():
    raise SystemExit("no GPU is visible to PyTorch")
capability = "{}.{}".format(*torch.cuda.get_device_capability())
print(json.dumps({"name": torch.cuda.get_device_name(), "capability": capability}))
"""
    try:
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return "PyTorch does not answer"
    if process.returncode != 0:
        return (process.stderr.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
    found: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return found


def tell(log: BinaryIO, line: Line) -> None:
    """A line, here and in the log, for each subject that has ended."""
    error = f": {line['error']}" if "error" in line else ""
    if "state" in line:
        text = f"{line['step']} {line['state']} {line['subject']} ({line['seconds']:.1f} s){error}"
    elif "note" in line:
        text = f"{line['step']}: {line['note']}"
    else:
        return
    print(text, flush=True)
    log.write(f"{text}\n".encode())


if __name__ == "__main__":
    sys.exit(main())
