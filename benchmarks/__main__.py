"""`python -m benchmarks`: how fast each op is, beside eager PyTorch, torch.compile and the machine's floor."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import measure, report
from benchmarks.cases import CASES, OPS, PASSES, QUICK_CASES
from ocr_kernels.backends import interpreting

DTYPES = ("bfloat16", "float16", "float32")


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    seconds = 0.1 if args.quick else 0.3
    out = report.console()
    backends = measure.our_backends(device)
    out.print(f"{device}, {args.dtype}{', reduced sizes' if args.quick else ''}; ours: {', '.join(backends)}")
    if backends == ["reference"]:
        out.print(
            f"The reference backend, plain PyTorch, is what runs on {device}: these times show its cost, "
            "not the kernels' (see `ocr-kernels info`)."
        )

    record = measure.record(args.commit)
    limits = measure.measure_limits(device, dtype, seconds)
    results: list[dict[str, Any]] = []
    todo = [(CASES[name], op, what) for name in args.cases for op in OPS for what in PASSES]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    try:
        with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as progress:
            task = progress.add_task("", total=len(todo))
            for case, op, what in todo:
                progress.update(task, description=f"{case.name} {op.name} {what}")
                case = case.quick() if args.quick else case
                results.append(measure.measure(op, case, what, dtype, device, limits, seconds))
                progress.advance(task)
                if not out.is_terminal:
                    out.print(f"{len(results)}/{len(todo)} {case.name} {op.name} {what}")
                if args.json:
                    complete = len(results) == len(todo)
                    _write(args.json, {**record, **_settings(args), **vars(limits), "complete": complete}, results)
    except KeyboardInterrupt:
        out.print(f"Stopped after {len(results)} of {len(todo)} measurements.")

    out.print(report.details(results), report.summary(results))
    out.print(
        f"Copy {limits.bytes_per_second / 1e9:.0f} GB/s, matrix product {limits.flops_per_second / 1e12:.2f} TFLOP/s; "
        "the floor is what an op must move and compute at these rates. ± is the interquartile range."
    )
    for line in report.problems(results):
        out.print(line, markup=False)
    return int(len(results) < len(todo) or report.ours_failed(results))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on cuda, float32 on cpu")
    parser.add_argument(
        "--quick",
        action=argparse.BooleanOptionalAction,
        help=f"reduced sizes, and only {' and '.join(QUICK_CASES)} unless --cases; the default on cpu",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results, as they come")
    parser.add_argument("--commit", help="the commit to record; default: what git says")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is visible to PyTorch")
    if interpreting():
        parser.error("TRITON_INTERPRET is set: the interpreter's times say nothing")
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"--json: {args.json.parent} is no directory")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    args.quick = args.device == "cpu" if args.quick is None else args.quick
    args.cases = args.cases or (QUICK_CASES if args.quick else list(CASES))
    return args


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"device": args.device, "dtype": args.dtype, "quick": args.quick}


def _write(path: Path, header: dict[str, Any], results: report.Results) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({**header, "results": results}, indent=1) + "\n")
    partial.replace(path)  # never half a file


if __name__ == "__main__":
    sys.exit(main())
