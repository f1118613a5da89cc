"""`make gpu`: the compiled libraries for this GPU, every test and benchmark that needs one, in nine minutes at most.

Everything it found is on disk afterwards.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

TOTAL_SECONDS = 500  # for all steps, of the 540 that a round may take
BUILD_SECONDS = 120
TEST_SECONDS = 270
GRACE_SECONDS = 10  # between asking a step to stop and ending it
BENCHMARKS = ["--device", "cuda", "--memory-format", "contiguous", "channels_last"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_round", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for the results")
    parser.add_argument("--commit", help="the commit to record; default: what git says")
    args = parser.parse_args(argv)
    start = time.monotonic()
    try:
        import torch
    except ImportError as error:
        return _refuse(f"{sys.executable} has no PyTorch ({error})")
    if not torch.cuda.is_available():
        return _refuse("no GPU is visible to PyTorch")
    try:
        from benchmarks import measure, report
    except ImportError as error:
        return _refuse(f"{sys.executable} lacks a package of the extra `bench` ({error})")

    args.out.mkdir(parents=True, exist_ok=True)
    build, libraries = _build(args.out, torch.cuda.get_device_capability())
    record = measure.record(args.commit)
    (args.out / "machine.json").write_text(json.dumps(record, indent=1) + "\n")
    machine = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    results = args.out / f"{machine}.json"

    junit = args.out / "tests.xml"
    # a package that one test file lacks must not cost the others
    pytest = ["pytest", "-m", "gpu", "--continue-on-collection-errors", f"--junitxml={junit}"]
    if importlib.util.find_spec("xdist"):  # most of the time goes into compiling kernels
        pytest += ["-n", str(min(12, os.cpu_count() or 1))]
    tests = _step(pytest, args.out / "tests.log", TEST_SECONDS)
    benchmarks = _step(
        ["benchmarks", *BENCHMARKS, "--json", str(results), "--commit", record["commit"]],
        args.out / "benchmarks.log",
        TOTAL_SECONDS - (time.monotonic() - start),
    )

    out = report.console()
    out.print(f"\n{torch.cuda.get_device_name()}, commit {record['commit']}, {time.monotonic() - start:.0f} s")
    out.print(f"build       {_outcome(build)}; {', '.join(libraries) or 'no library'}")
    out.print(f"tests       {_outcome(tests)}; {_count(junit)}")
    out.print(f"benchmarks  {_outcome(benchmarks)}; {results if results.exists() else 'no results'}")
    if results.exists():
        data = json.loads(results.read_text())
        for grid in report.summary(data["results"]):
            out.print(grid.table())
        out.print(f"Not reached: {len(data['missing'])} workloads")
    return int(any(status != 0 for status in (build, tests, benchmarks)))


def _refuse(reason: str) -> int:
    print(f"No GPU round: {reason}.", file=sys.stderr)
    return 1


def _build(out: Path, capability: tuple[int, int]) -> tuple[int | None, list[str]]:
    """Build the compiled libraries for this GPU alone, for the steps that follow; the exit status, and their names."""
    folder = out.resolve() / "build" / "ocr_kernels"
    for path in folder.glob("*.so"):  # an earlier round's
        path.unlink()
    with tempfile.TemporaryDirectory() as objects:
        command = ["setup", "build_ext", f"--build-lib={folder.parent}", f"--build-temp={objects}"]
        environment = {"OCR_KERNELS_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": "{}.{}".format(*capability)}
        status = _step(command, out / "build.log", BUILD_SECONDS, environment)
    libraries = sorted(path.name for path in folder.glob("*.so"))
    if libraries:
        os.environ["OCR_KERNELS_LIBRARY"] = str(folder / "libocr_kernels_cpu.so")
    return status, libraries


def _step(module: list[str], log: Path, seconds: float, variables: Mapping[str, str] | None = None) -> int | None:
    """Run a module of the checkout with its output here and in `log`; its exit status, or None if its time was up.

    It leads a process group of its own, so that what it started ends with it.
    """
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(root), **(variables or {})}
    environment.pop("TRITON_INTERPRET", None)  # the kernels are to run on the GPU
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *module],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        reader = threading.Thread(target=_tee, args=(process.stdout, file), daemon=True)
        reader.start()
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)  # pytest and the benchmarks then report what they have
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            reader.join()


def _tee(lines: TextIO, file: TextIO) -> None:
    with lines:
        for line in lines:
            print(line, end="", flush=True)
            print(line, end="", flush=True, file=file)


def _outcome(status: int | None) -> str:
    if status is None:
        return "stopped, time was up"
    return "passed" if status == 0 else f"failed (exit status {status})"


def _count(junit: Path) -> str:
    """The numbers of a JUnit report."""
    try:
        suite = next(ET.parse(junit).iter("testsuite"))
    except (OSError, ET.ParseError, StopIteration):
        return "no report"
    total, failed, errors, skipped = (int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped"))
    return f"{total - failed - errors - skipped} passed, {failed} failed, {errors} errors, {skipped} skipped"


if __name__ == "__main__":
    sys.exit(main())
