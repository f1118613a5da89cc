"""What a round found, on a page: `python -m benchmarks.gpu.page DIR` writes it, and the results, from its journal."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.journal import JOURNAL, LOG, STATES, Journal, Line
from benchmarks.gpu.times import FIRST, HOST, LIMITS, STEPS
from ocr_kernels.bench.cases import COMPILED, EAGER, sweep_of
from ocr_kernels.bench.report import Grid, Results, grouped, share_of_floor, times_faster

MOST = 25  # entries of a list
LOSSES = 8  # of what to change
SANITIZER = re.compile(r"memcheck\.\d+ \| =+ ((?:Invalid|Misaligned|Error|ERROR SUMMARY: [1-9]).*)")


def write(out: Path) -> str:
    """Write the page, and the results in the form of those in benchmarks/results; the page."""
    journal = Journal(out / JOURNAL)
    journal.update()
    results = collect(journal)
    if results["results"]:
        name = re.sub(r"[^a-z0-9]+", "-", journal.about["gpu"].lower()).strip("-")
        (out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    text = "\n\n".join(blocks(journal, results["results"], out / LOG)) + "\n"
    (out / "report.md").write_text(text)
    return text


def collect(journal: Journal) -> dict[str, Any]:
    """What `ocr-kernels bench --json` would have written."""
    record = journal.results("machine").get("machine") or {"commit": journal.about["commit"]}
    found = {step: journal.results(step) for step in STEPS}
    limits, host = found[STEPS[0]].pop(LIMITS, None), found[STEPS[1]].pop(HOST, [])
    ended = [pair for step in STEPS for pair in journal.of(step).items()]
    return {
        **record,
        "device": "cuda",
        "quick": False,
        "limits": {"bfloat16": limits} if limits else {},
        "host": host,
        "missing": list(dict.fromkeys(subject for step in STEPS for subject in journal.unreached(step))),
        "failed": {subject: line.get("error", "") for subject, line in ended if line["state"] != "passed"},
        "results": [line for step in STEPS for lines in found[step].values() for line in lines],
    }


def blocks(journal: Journal, results: Results, log: Path) -> Iterator[str]:
    about = journal.about
    yield f"# Round on {about['gpu']}"
    record = journal.results("machine").get("machine", {})
    versions = [f"{name} {version}" for name, version in record.get("versions", {}).items() if version]
    yield ", ".join([f"commit {record.get('commit', about['commit'])}", *versions, f"{about['seconds']} s at most"])
    limits = journal.results(STEPS[0]).get(LIMITS)
    if limits:
        copy, product = limits["bytes_per_second"] / 1e9, limits["flops_per_second"] / 1e12
        yield f"A large copy ran at {copy:.0f} GB/s, a large product in bfloat16 at {product:.0f} TFLOP/s."
    yield _steps(journal).markdown()
    problems = [*_problems(journal), *_sanitizer(log)]
    yield "## What went wrong\n" + _list(problems)
    if results:
        yield (
            "## Speed\nThe faster of ours, t(riton) or n(ative): its time, the floor's share of that, "
            "and how many times faster it is than eager and than torch.compile, ~ where the spreads overlap.\n\n"
            + _speed(results).markdown()
        )
    kernels = journal.results("profile")
    if results:
        yield "## What to change first\nWhere most time is lost over the floor.\n\n" + _list(_losses(results, kernels))
    if kernels:
        yield "## Kernels of those furthest from their floor\n" + _kernels(kernels).markdown()
    unreached = {step: journal.unreached(step) for step in about["steps"]}
    yield "## Not reached\n" + _list(
        [f"{step}: {len(names)}, from {names[0]} on" for step, names in unreached.items() if names]
    )


def _steps(journal: Journal) -> Grid:
    grid = Grid("", ["step", *STATES, "not reached", "seconds", "note"])
    for step in journal.about["steps"]:
        counts = Counter(line["state"] for line in journal.of(step).values())
        unreached = str(len(journal.unreached(step)) or "") if step in journal.subjects else "all"
        about = str(journal.seconds.get(step, "")), journal.notes.get(step, "")
        grid.rows.append([step, *(str(counts[state] or "") for state in STATES), unreached, *about])
    return grid


def _problems(journal: Journal) -> list[str]:
    """What failed, the worst first; a test with all its parameters as one, and whatever else has the same error."""
    found: dict[tuple[str, str, str], list[Line]] = {}
    for (step, subject), line in journal.ended.items():
        test, parameters, _ = subject.partition("[")
        found.setdefault((line["state"], step, test if parameters else line.get("error", "")), []).append(line)
    problems = []
    for state in ("crashed", "failed", "cut off"):
        for (_, step, _), lines in (item for item in found.items() if item[0][0] == state):
            times = f" ({len(lines)} times)" if len(lines) > 1 else ""
            text = f"{step} {state}: {lines[0]['subject']}{times}: {lines[0].get('error', '')[:300]}"
            problems.append(text.replace("\n", " "))
    return problems


def _sanitizer(log: Path) -> list[str]:
    """What compute-sanitizer said, each thing once."""
    found = SANITIZER.findall(log.read_text(errors="replace")) if log.exists() else []
    return [f"memcheck: {text}" for text in dict.fromkeys(found)][:6]


def _speed(results: Results) -> Grid:
    """A line for each subject and case of those timed first, a column for each memory format and pass."""
    columns = {
        (memory_format, what): f"{name} {short}"
        for memory_format, name in (("contiguous", "NCHW"), ("channels_last", "NHWC"))
        for what, short in (("forward", "fwd"), ("backward", "bwd"))
    }
    grid = Grid("", ["subject", "case", *columns.values()], 2)
    for (subject, case), lines in grouped(results, lambda line: (line["subject"], line["case"])).items():
        if subject not in FIRST or sweep_of(case):
            continue
        cells = grouped(lines, lambda line: (line["memory_format"], line["pass"]))
        grid.rows.append([subject, case, *(_cell(cells.get(column, [])) for column in columns)])
    return grid


def _cell(lines: Results) -> str:
    if not lines:
        return ""
    timed = [(share, name) for name in lines[0]["ours"] if (share := share_of_floor(lines, name)) is not None]
    if not timed:
        return "; ".join(f"{name} {text.partition(':')[0]}" for name, text in lines[0]["problems"].items())
    share, name = max(timed)
    ratios = (times_faster(lines, name, peer) for peer in (EAGER, COMPILED))
    cells = [str(ratio) if ratio else "-" for ratio in ratios]
    return " ".join([name[0], f"{lines[0]['times'][name]['median'] * 1e6:.0f} us", f"{share:.0%}", *cells])


def _losses(results: Results, kernels: dict[str, Sequence[dict[str, Any]]]) -> list[str]:
    """Of each subject and case that which loses most, and what its longest kernel waits for."""
    found: dict[tuple[str, str], tuple[float, str]] = {}
    for line in results:
        times = {name: line["times"][name]["median"] for name in line["ours"] if name in line["times"]}
        if not times or line["subject"] not in FIRST or sweep_of(line["case"]):
            continue
        name = min(times, key=times.__getitem__)
        lost, key = times[name] - line["floor"], (line["subject"], line["case"])
        slower = [peer for peer in (EAGER, COMPILED) if (ratio := times_faster([line], name, peer)) and ratio.times < 1]
        text = f"{' '.join(key)} {line['memory_format']} {line['pass']}: {name} loses {lost * 1e6:.0f} us"
        text += f", slower than {' and '.join(slower)}" if slower else ""
        profiled = [
            k for job, ks in kernels.items() if job.startswith(f"{name} {' '.join(key)}") for k in ks if k["us"]
        ]
        if profiled:
            longest = max(profiled, key=lambda kernel: float(kernel["us"]))
            text += f"; {longest['kernel']} takes {longest['us']:.3g} us and waits for {longest['stall']}"
        found[key] = max(found.get(key, (0.0, "")), (lost, text))
    return [text for lost, text in sorted(found.values(), reverse=True)[:LOSSES] if lost > 0]


def _kernels(found: dict[str, Sequence[dict[str, Any]]]) -> Grid:
    header = ["job", "kernel", "us", "DRAM", "SM", "warps", "waits for"]
    grid = Grid("", header, 2)
    for job, kernels in found.items():
        for kernel in kernels:
            numbers = [kernel[name] for name in ("us", "dram", "sm", "occupancy")]
            units = ("", "%", "%", "%")
            cells = ("" if n is None else f"{n:.3g}{unit}" for n, unit in zip(numbers, units, strict=True))
            grid.rows.append([job, kernel["kernel"], *cells, kernel["stall"] or ""])
    return grid


def _list(entries: Sequence[str]) -> str:
    more = [f"and {len(entries) - MOST} more, see {JOURNAL}"] if len(entries) > MOST else []
    return "\n".join(f"* {entry}" for entry in [*entries[:MOST], *more]) or "Nothing."


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
