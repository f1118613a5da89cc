"""How fast ours is, beside eager PyTorch, torch.compile, scaled_dot_product_attention and the machine's floor."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ocr_kernels.bench import measure, report
from ocr_kernels.bench.cases import (
    CASES,
    MEMORY_FORMATS,
    NAMED,
    NETWORKS,
    OPS,
    PEERS,
    QUICK_CASES,
    QUICK_PEERS,
    QUICK_SUBJECTS,
    SUBJECTS,
    SWEEPS,
    TOGETHER,
    our_backends,
)
from ocr_kernels.bench.jobs import jobs
from ocr_kernels.bench.timing import duration
from ocr_kernels.core.backends import interpreting, use_backend

DTYPES = ("bfloat16", "float16", "float32")
RECORDED = {"commit", "date", "device", "devices", "failed", "limits", "missing", "quick", "results", "versions"}


def main(argv: Sequence[str]) -> int:
    args = _parse(argv)
    out = report.console()
    if args.compare:
        return _compare(args.compare[0], args.compare[1], out)
    status = 0
    if args.results:
        data = args.results
        out.print(report.origin(data))
        _print(data, out)
    else:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler that finds peaks notes each start on stderr
        with use_backend(None):  # ours are chosen here, or by the tensors: not by OCR_KERNELS_BACKEND
            data = _run(args, out)
        status = int(bool(data["missing"] or data["failed"]) or report.ours_failed(data["results"]))
    if args.plot:
        from ocr_kernels.bench import plot  # matplotlib takes a second

        for path in plot.draw(data, args.plot):
            out.print(f"wrote {path}")
    return status


def _run(args: argparse.Namespace, out: Console) -> dict[str, Any]:
    device = torch.device(args.device)
    seconds = (0.1 if args.quick else 0.3) if args.seconds is None else args.seconds
    backends = our_backends(device)
    out.print(
        f"{device}, {', '.join(args.dtype)}{', reduced sizes' if args.quick else ''}; ours: {', '.join(backends)}"
    )
    if backends == ["reference"]:
        out.print(
            f"The reference backend, plain PyTorch, is what runs on {device}: these times show its cost, "
            "not the kernels' (see `ocr-kernels info`)."
        )
    todo = jobs(device, args.dtype, args.memory_format, args.cases, args.subjects, args.peers, args.quick)
    data: dict[str, Any] = {**measure.record(args.commit), "device": args.device, "quick": args.quick}
    data |= {"limits": {}, "host": [], "missing": [str(job) for job in todo], "failed": {}, "results": []}
    _write(args.json, data)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    try:
        limits = {
            name: measure.measure_limits(device, getattr(torch, name), seconds) for name in dict.fromkeys(args.dtype)
        }
        data["limits"] = {name: vars(limit) for name, limit in limits.items()}
        if set(OPS) & set(args.subjects):
            with _recorded(data["failed"], "host times"):
                data["host"] = measure.host_times(todo[0].workload)
        start = time.perf_counter()
        with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as progress:
            for job in progress.track(todo, description=""):
                progress.update(progress.task_ids[0], description=str(job))
                with _recorded(data["failed"], str(job)):
                    data["results"] += measure.measure(job.workload, limits[job.dtype], seconds)
                data["missing"].remove(str(job))
                _write(args.json, data)
                if not out.is_terminal:
                    done, left = len(todo) - len(data["missing"]), len(data["missing"])
                    eta = (time.perf_counter() - start) / done * left
                    out.print(f"{done}/{len(todo)} {job}, about {eta:.0f} s to go")
                measure.require_device(device, f"Nothing runs on {device} after {job}.")
    except (KeyboardInterrupt, measure.DeviceLost) as stop:
        out.print(f"Stopped with {len(data['missing'])} of {len(todo)} measurements to go. {stop}".rstrip())
    data["load"].append(measure.load())
    _write(args.json, data)
    _print(data, out)
    return data


@contextmanager
def _recorded(failed: dict[str, str], name: str) -> Iterator[None]:
    """A run goes on where one measurement fails, out of memory or of a compiler most likely."""
    try:
        yield
    except Exception as error:
        failed[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        torch.compiler.reset()


def _print(data: dict[str, Any], out: Console) -> None:
    results = data["results"]
    for grid in report.tables(data):
        for part in grid.within(out.width):
            out.print(part.table())
    for dtype, limit in data["limits"].items():
        copy, rate = limit["bytes_per_second"] / 1e9, limit["flops_per_second"] / 1e12
        out.print(f"{dtype}: a large copy runs at {copy:.0f} GB/s, a large matrix product at {rate:.3g} TFLOP/s.")
    out.print(
        "The floor is what must be moved and computed at these rates; ± is the interquartile range, ~ a ratio of times "
        "that differ by less. "
        "sdpa is the fastest of its kernels, layout conversions included."
    )
    lines = {
        "Failed or wrong": report.problems(results),
        "Not measured": [f"{job}: {reason}" for job, reason in data["failed"].items()],
        "Not reached": data["missing"],
    }
    for title, items in lines.items():
        out.print(f"{title}: {len(items) or 'none'}")
        for item in items:
            out.print(f"  {item}")


def _compare(before: dict[str, Any], after: dict[str, Any], out: Console) -> int:
    out.print(f"old: {report.origin(before)}\nnew: {report.origin(after)}")
    for part in report.comparison(before, after).within(out.width):
        out.print(part.table())
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ocr-kernels bench", description=__doc__)
    names = [*CASES, *SWEEPS]
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=names,
        metavar="CASE",
        help=f"{', '.join(case.name for case in NAMED)}; sweeps: {', '.join(SWEEPS)}; default: all",
    )
    measurable = [name for name in SUBJECTS if name not in NETWORKS or importlib.util.find_spec("timm")]
    parser.add_argument(
        "--subjects",
        nargs="+",
        choices=list(SUBJECTS),
        metavar="SUBJECT",
        help=f"{', '.join(SUBJECTS)}; default: all, the networks ({', '.join(NETWORKS)}) where timm is installed; "
        f"with --quick {', '.join(QUICK_SUBJECTS)}",
    )
    every = [*PEERS, TOGETHER]
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=every,
        metavar="PEER",
        help=f"{', '.join(every)}; default: all, with --quick {' and '.join(QUICK_PEERS)}",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: bfloat16 on cuda, float32 on cpu")
    parser.add_argument("--memory-format", nargs="+", choices=MEMORY_FORMATS, default=["contiguous"])
    parser.add_argument(
        "--quick",
        action=argparse.BooleanOptionalAction,
        help=f"reduced sizes, few subjects and peers, {' and '.join(QUICK_CASES)} unless --cases; the default on cpu",
    )
    parser.add_argument("--seconds", type=duration, help="to spend on timing one pass; default: 0.3, 0.1 with --quick")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results, as they come")
    parser.add_argument("--commit", help="the commit to record; default: what git says")
    parser.add_argument("--results", type=_read, metavar="FILE", help="measure nothing: print, or plot, this file")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw PNGs of the results into DIR")
    parser.add_argument("--compare", nargs=2, type=_read, metavar=("OLD", "NEW"), help="print what changed")
    args = parser.parse_args(argv)

    if missing := [name for name in args.subjects or () if name not in measurable]:
        parser.error(f"--subjects: {', '.join(missing)} needs timm, which is not installed")
    if args.plot and not args.compare:
        _require_folder(parser, "--plot", args.plot, make=True)
    if args.results or args.compare:
        return args
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is visible to PyTorch")
    if interpreting():
        parser.error("TRITON_INTERPRET is set: the interpreter's times say nothing")
    if args.json:
        if args.json.is_dir():
            parser.error(f"--json: {args.json} is a folder")
        _require_folder(parser, "--json", args.json.absolute().parent)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ["bfloat16" if args.device == "cuda" else "float32"]
    args.quick = args.device == "cpu" if args.quick is None else args.quick
    cases = args.cases or (QUICK_CASES if args.quick else list(CASES))
    args.subjects = args.subjects or (QUICK_SUBJECTS if args.quick else measurable)
    args.peers = args.peers or (QUICK_PEERS if args.quick else every)
    sweeps = {sweep: [case.name for case in members] for sweep, members in SWEEPS.items()}
    args.cases = list(dict.fromkeys(name for case in cases for name in sweeps.get(case, [case])))
    return args


def _read(file: str) -> dict[str, Any]:
    """Results that a run wrote."""
    try:
        data = json.loads(Path(file).read_text())
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{file} cannot be read ({error.strerror})") from None
    except ValueError:
        raise argparse.ArgumentTypeError(f"{file} is no JSON") from None
    if not isinstance(data, dict) or not data.keys() >= RECORDED:
        raise argparse.ArgumentTypeError(f"{file} has no results of ocr-kernels bench")
    return data


def _require_folder(parser: argparse.ArgumentParser, option: str, folder: Path, make: bool = False) -> None:
    """One that can be written to, before anything is measured."""
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        parser.error(f"{option}: {folder} cannot be written to ({error.strerror})")


def _write(path: Path | None, data: dict[str, Any]) -> None:
    if path is None:
        return
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n")
    partial.replace(path)  # never half a file
