"""Runs the steps of a round: starts their processes, ends those that hang, replaces those that die.

It imports nothing of what it runs, so that no fault of a kernel, a library or PyTorch reaches it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from benchmarks.gpu.journal import VARIABLE, Journal

ROOT = Path(__file__).parent.parent.parent
LIBRARY = ROOT / "build" / "gpu" / "ocr_kernels" / "libocr_kernels_cpu.so"  # what a round builds; the GPU's beside it
GRACE_SECONDS = 10  # for what is under way when a step's time is up
TIME_UP = "time was up"
MOST_LINES = 20_000  # in the log, of one process: a failed assertion prints a line for each thread


@dataclass(frozen=True)
class Step:
    """Processes that share subjects, see `journal.Share`."""

    name: str
    command: Sequence[str]  # of Python: a module, and its arguments
    processes: int = 1
    limit: float = 60  # seconds for a subject
    tool: Sequence[str] = ()  # a program that runs Python, and its options
    variables: Mapping[str, str] = field(default_factory=dict)


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit."""
    places = [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin", *Path("/opt/nvidia").glob("nsight-compute/*")]
    return shutil.which(name, path=os.pathsep.join(map(str, places)))


def run(steps: Sequence[Step], journal: Journal, log: BinaryIO, end: float) -> None:
    """Run steps side by side until each has done what it can, at the latest shortly after `end`."""
    start = time.time()
    numbers = itertools.count()
    barren: Counter[str] = Counter()  # processes of a step that ended before their first subject
    running: list[_Process] = []
    for step in steps:
        if step.tool and not find_tool(step.tool[0]):
            journal.write(step=step.name, note=f"{step.tool[0]} is not on this machine")
        else:
            running += [_Process(step, next(numbers), journal, log, end) for _ in range(step.processes)]
    try:
        while running:
            time.sleep(0.05)
            journal.update()
            for process in [process for process in running if process.ended(end)]:
                running.remove(process)
                step = process.step
                barren[step.name] += process.settle()
                if process.name not in journal.done and time.time() < end and barren[step.name] < 3:
                    running.append(_Process(step, next(numbers), journal, log, end))
                if step not in [other.step for other in running]:
                    journal.write(step=step.name, seconds=round(time.time() - start, 1))
    finally:
        for process in running:
            process.settle()
        journal.update()


class _Process:
    """One process of a step. It leads a process group, so that what it started ends with it."""

    def __init__(self, step: Step, number: int, journal: Journal, log: BinaryIO, end: float) -> None:
        self.step, self.name = step, f"{step.name}.{number}"
        self._journal, self._log = journal, log
        self._reason: str | None = None  # why it was ended, if it was
        self._last_lines: deque[str] = deque(maxlen=4)
        share = {"journal": str(journal.path), "step": step.name, "process": self.name, "end": end, "limit": step.limit}
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", VARIABLE: json.dumps(share), **step.variables}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
        environment.pop("TRITON_INTERPRET", None)  # the kernels are to run on the GPU
        if LIBRARY.is_file():
            environment["OCR_KERNELS_LIBRARY"] = str(LIBRARY)
        tool = [find_tool(step.tool[0]) or step.tool[0], *step.tool[1:]] if step.tool else []
        self._popen = subprocess.Popen(
            [*tool, sys.executable, "-m", *step.command],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._popen.stdout is not None
        with self._popen.stdout as lines:
            for number, line in enumerate(lines):
                if number < MOST_LINES:
                    self._log.write(f"{self.name} | ".encode() + line.rstrip(b"\r\n") + b"\n")
                full = len(self._last_lines) == self._last_lines.maxlen
                if line.strip() and not (full and self._last_lines[0].startswith(("Fatal", "Timeout"))):
                    self._last_lines.append(line.decode(errors="replace").strip()[:200])

    def ended(self, end: float) -> bool:
        """Whether it is over: by itself, or because its subject takes too long or its step's time is up."""
        now, subject = time.time(), self._journal.processes.get(self.name)
        if subject and now > subject["time"] + self.step.limit + 1:
            self._reason = f"not done after {self.step.limit:g} s"
        elif now > end + GRACE_SECONDS:
            self._reason = TIME_UP
        return self._reason is not None or self._popen.poll() is not None

    def settle(self) -> bool:
        """End it with all that it started, and note what became of its subject; whether it never had one."""
        if self._popen.poll() is None:
            self._reason = self._reason or TIME_UP  # the whole round's
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        try:
            status = self._popen.wait(5)
            ending = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        except subprocess.TimeoutExpired:
            ending = "it cannot be ended"  # the driver holds it
        self._reader.join(1)
        self._journal.update()
        about = {"step": self.step.name, "process": self.name}
        reason = "; ".join([self._reason or ending, *self._last_lines])
        subject = self._journal.processes.get(self.name)
        if subject:
            state = "cut off" if self._reason == TIME_UP else "crashed"
            seconds = round(time.time() - subject["time"], 3)
            self._journal.write(**about, subject=subject["subject"], state=state, seconds=seconds, error=reason)
        if self.name in self._journal.done or self.name in self._journal.processes:
            return False
        self._journal.write(**about, note=f"a process ended before its first subject: {reason}")
        return True
