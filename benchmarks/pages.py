"""Write benchmarks/RESULTS.md, the README's table and the pictures from the result files in benchmarks/results."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ocr_kernels.bench import plot, report

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
PAGE = ROOT / "benchmarks" / "RESULTS.md"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pages", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if something would change")
    if parser.parse_args(argv).check:
        found = stale()
        print("\n".join(f"{path} is not what the result files give" for path in found) or "up to date")
        return int(bool(found))
    for file in result_files():
        plot.draw(json.loads(file.read_text()), RESULTS, f"{file.stem}-")
    try:
        text = render(README.read_text())
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    README.write_text(text)
    PAGE.write_text(page())
    return 0


def stale() -> list[Path]:
    """The pages and the pictures that are not what the result files give."""
    written = {README: render(README.read_text()), PAGE: page()}
    found = [file for file, text in written.items() if not file.is_file() or file.read_text() != text]
    for file in result_files():
        expected = plot.digest(json.loads(file.read_text()))
        pictures = sorted(RESULTS.glob(f"{file.stem}-*.png"))
        found += [picture for picture in pictures if _digest_of(picture) != expected]
    return found


def result_files() -> list[Path]:
    """GPUs first: there our kernels run."""
    files = sorted(RESULTS.glob("*.json"))
    return sorted(files, key=lambda file: json.loads(file.read_text())["device"] == "cpu")


def render(readme: str) -> str:
    """The README with the table between the markers made anew."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{README.name} needs the two lines {BEGIN} and {END}")
    grid = report.headline([json.loads(file.read_text()) for file in result_files()])
    return "\n".join((before + BEGIN, f"{grid.title}.", "", grid.markdown(), END + after))


INTRODUCTION = """# Results

Written by `make report` from the files in `benchmarks/results`, which `ocr-kernels bench --json FILE` made. Times are
medians in milliseconds with their interquartile range, in bold where one is faster than all others by more than that;
~ marks a ratio of two that differ by less. Ours are named by their backend. Nothing is timed before its result has
passed the float64 oracle. The floor is what must be moved and computed at the copy bandwidth and the matrix rate of the
same run: more than 100 % is where a convolution beats the matrix product. Saved bytes are those kept for the backward
pass besides the inputs. Peaks are those of PyTorch's allocator, in which the compiled library's own tiles and partial
sums do not count. **No GPU has been measured.**
"""


def page() -> str:
    """benchmarks/RESULTS.md."""
    sections = [_section(file.stem, json.loads(file.read_text())) for file in result_files()]
    return "\n\n".join((INTRODUCTION.rstrip(), *sections)) + "\n"


def _section(machine: str, data: dict[str, Any]) -> str:
    lines = [f"## {report.origin(data)}", ""]
    kernels = any(name != "reference" for result in data["results"] for name in result["ours"])
    if data["device"] == "cpu":
        load = " and ".join(f"{value:.1f}" for value in data["load"] if value is not None)
        ours = "Only the `reference` backend, plain PyTorch, runs on this machine: what it costs, not the kernels. "
        lines += [
            f"{'' if kernels else ours}{_threads(data)}; load average {load or 'unknown'} before and after.",
            "",
        ]
    for grid in (*report.cases(data["results"]), *report.networks(data["results"])):
        lines += [f"{grid.title}.", "", grid.markdown(), ""]
    lost = report.losses(data["results"])
    if lost:
        lines += [f"Slower than eager PyTorch or torch.compile: {'; '.join(lost)}.", ""]
    for dtype, limit in data["limits"].items():
        copy, rate = limit["bytes_per_second"] / 1e9, limit["flops_per_second"] / 1e12
        lines += [f"Floor ({dtype}): a copy at {copy:.0f} GB/s, a matrix product at {rate:.3g} TFLOP/s."]
    not_measured = len(data["missing"]) + len(data["failed"])
    if not_measured:
        lines += [f"Not measured, for lack of time or because they failed: {not_measured} workloads."]
    names = [picture.stem.removeprefix(f"{machine}-") for picture in sorted(RESULTS.glob(f"{machine}-*.png"))]
    always, with_kernels = ("memory", "bars-folded-module", "networks"), ("bars-gather", "bars-attention")
    shown = [name for name in names if name in always or (kernels and name in with_kernels)]
    if shown:
        lines += ["", *(f"![{name.replace('-', ' ')}](results/{machine}-{name}.png)" for name in shown)]
    linked = [f"[{name}](results/{machine}-{name}.png)" for name in names if name not in shown]
    lines += ["", f"More: {', '.join([*linked, f'[all figures](results/{machine}.json)'])}."]
    return "\n".join(lines)


def _threads(data: dict[str, Any]) -> str:
    threads = next(device["threads"] for device in data["devices"] if device["device"] == "cpu")
    return f"{threads} thread{'s' if threads > 1 else ''}"


def _digest_of(picture: Path) -> str:
    with Image.open(picture) as image:
        image.load()
        return str(image.info.get(plot.SOURCE))


if __name__ == "__main__":
    sys.exit(main())
