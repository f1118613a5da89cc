"""Tables of the results: for the terminal, and as Markdown for the pages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from ocr_kernels.bench.cases import AUTOTUNED, BACKBONE, CHECKPOINTED, COMPILED, EAGER, PEERS, SDPA, TOGETHER, sweep_of
from ocr_kernels.bench.measure import EMPTY
from ocr_kernels.bench.timing import Timing

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SHORT = {"forward": "fwd", "backward": "bwd", "forward+backward": "both"}
HOST_BUDGETS = {"forward": 20e-6, "forward+backward": 60e-6}

Result = dict[str, Any]
Results = Sequence[Result]
Key = tuple[str, ...]


@dataclass
class Grid:
    """A table: the first `text` columns are aligned to the left."""

    title: str
    header: Sequence[str]
    text: int = 1
    rows: list[list[str]] = field(default_factory=list)

    def without_empty_columns(self) -> Grid:
        keep = [
            i for i, _ in enumerate(self.header) if i < self.text or any(row[i] not in ("", "-") for row in self.rows)
        ]
        return Grid(
            self.title, [self.header[i] for i in keep], self.text, [[row[i] for i in keep] for row in self.rows]
        )

    def within(self, width: int) -> list[Grid]:
        """Itself where a line holds all columns, else tables below one another, each with the columns of text."""
        widths = [2 + max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        text = list(range(self.text))
        parts = [text.copy()]
        for i in range(self.text, len(self.header)):
            if parts[-1] != text and 2 + sum(widths[j] for j in [*parts[-1], i]) > width:
                parts.append(text.copy())
            parts[-1].append(i)
        titles = [self.title, *["the same, continued"] * (len(parts) - 1)]
        return [
            Grid(title, [self.header[i] for i in part], self.text, [[row[i] for i in part] for row in self.rows])
            for title, part in zip(titles, parts, strict=True)
        ]

    def table(self) -> Table:
        from rich import box  # not everywhere that results are written as Markdown
        from rich.table import Table

        table = Table(title=self.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for i, name in enumerate(self.header):
            table.add_column(name, justify="left" if i < self.text else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        rule = ["---" if i < self.text else "---:" for i, _ in enumerate(self.header)]
        lines = ["| " + " | ".join(row) + " |" for row in (self.header, rule, *self.rows)]
        return "\n".join(lines)


def console() -> Console:
    """Standard output, 120 columns wide in a file or a pipe."""
    from rich.console import Console

    out = Console(highlight=False, markup=False)
    if not out.is_terminal:
        out.width = 120
    return out


def device_name(data: Mapping[str, Any]) -> str:
    names = (device["name"] for device in data["devices"] if device["device"].startswith(data["device"]))
    return next(names, str(data["device"]))


def origin(data: Mapping[str, Any]) -> str:
    """Where and when, in a line."""
    versions = [f"{name} {data['versions'][name]}" for name in ("torch", "triton", "driver") if data["versions"][name]]
    commit, _, dirty = data["commit"].partition("-")
    about = [f"commit {commit[:12]}{'-dirty' if dirty else ''}", data["date"][:10]]
    return ", ".join([device_name(data), *versions, *about, *(["reduced sizes"] if data["quick"] else [])])


# One measurement


def key(result: Result) -> Key:
    return tuple(str(result[name]) for name in ("subject", "case", "pass", "dtype", "memory_format"))


def grouped(results: Results, by: Callable[[Result], Key] = key) -> dict[Key, list[Result]]:
    """A measurement may have more than one line: the slow compilers are timed in a later round, beside ours again."""
    groups: dict[Key, list[Result]] = {}
    for result in results:
        groups.setdefault(by(result), []).append(result)
    return groups


class Ratio(NamedTuple):
    """How many times faster ours is than a peer, and whether the two differ by more than their spreads."""

    times: float
    peer: str
    differs: bool

    @classmethod
    def of(cls, peer: str, theirs: Mapping[str, float], ours: Mapping[str, float]) -> Ratio:
        return cls(theirs["median"] / ours["median"], peer, Timing(**theirs).differs(Timing(**ours)))

    def __str__(self) -> str:
        return f"{'' if self.differs else '~'}{self.times:.2f}x"


def times_faster(lines: Results, ours: str, peer: str) -> Ratio | None:
    """How many times faster ours is than a peer in the same rounds; than the fastest, if the peer is SDPA."""
    ratios = [
        Ratio.of(name, timing, line["times"][ours])
        for line in lines
        if ours in line["times"]
        for name, timing in line["times"].items()
        if name == peer or (peer == SDPA and name.startswith(f"{SDPA}-"))
    ]
    return min(ratios, default=None)


def share_of_floor(lines: Results, ours: str) -> float | None:
    timing = lines[0]["times"].get(ours)
    return lines[0]["floor"] / timing["median"] if timing else None


def problems(results: Results) -> list[str]:
    """What failed or was wrong, each thing once, and where."""
    places: dict[str, list[str]] = {}
    for result in results:
        for name, text in result["problems"].items():
            place = f"{result['case']} {result['subject']} {SHORT[result['pass']]}"
            places.setdefault(f"{name} {text}", []).append(place)
    return [f"{text} ({where[0] if len(where) == 1 else f'{len(where)} times'})" for text, where in places.items()]


def ours_failed(results: Results) -> bool:
    return any(name in result["ours"] for result in results for name in result["problems"])


# Tables


def tables(data: Mapping[str, Any]) -> list[Grid]:
    results: Results = data["results"]
    return [*speed(results), *memory(results), *host(data.get("host", [])), *networks(results), *summary(results)]


def speed(results: Results) -> list[Grid]:
    """A table for each subject, dtype, memory format and backend of ours, with a line for each case and pass."""
    grids = []
    same = grouped(results, lambda r: (r["subject"], r["dtype"], r["memory_format"]))
    for (subject, dtype, memory_format), members in same.items():
        for ours in members[0]["ours"]:
            title = f"{subject}, {dtype}, {memory_format}: {ours}, and how many times faster it is than its peers"
            header = ("case", "pass", "time [ms]", "GB/s", "TFLOP/s", "of floor", *PEERS, "slower than")
            grid = Grid(title, header, 2)
            for lines in grouped(members).values():
                grid.rows.append(_speed_row(lines, ours))
            grids.append(grid.without_empty_columns())
    return grids


def _speed_row(lines: Results, ours: str) -> list[str]:
    line = lines[0]
    row = [line["case"], SHORT[line["pass"]]]
    timing = line["times"].get(ours)
    if timing is None:
        return [*row, line["problems"][ours].split(":")[0], *[""] * (len(PEERS) + 4)]
    seconds = timing["median"]
    ratios = {peer: times_faster(lines, ours, peer) for peer in PEERS}
    broken = {name: text.split(":")[0] for part in lines for name, text in part["problems"].items()}
    cells = [_ratio(ratios[peer], broken.get(peer, "-")) for peer in PEERS]
    slower = ", ".join(r.peer.removeprefix(f"{SDPA}-") for r in ratios.values() if r and r.times < 1)
    return [
        *row,
        str(Timing(**timing)),
        _number(line["bytes"] / seconds, 1e9),
        _number(line["flops"] / seconds, 1e12),
        _percent(share_of_floor(lines, ours)),
        *cells,
        slower,
    ]


def networks(results: Results) -> list[Grid]:
    """Whole networks: eager and ours, each with the head's share of its time."""
    header = ["network", "image", "dtype", "format", "eager [ms]", "head", "ours [ms]", "head", "times faster"]
    grid = Grid("whole networks, and the OCR head's share of their time", header, 4)
    for lines in grouped([result for result in results if BACKBONE in result["times"]]).values():
        line, shape = lines[0], lines[0]["shape"]
        ours = line["ours"][0]
        if not {EAGER, ours} <= line["times"].keys():
            continue
        backbone, eager, folded = (line["times"][name]["median"] for name in (BACKBONE, EAGER, ours))
        faster = Ratio.of(EAGER, line["times"][EAGER], line["times"][ours])
        image = f"{4 * shape['height']}x{4 * shape['width']}"
        cells = [c for t in (eager, folded) for c in (_number(t, 1e-3), _percent(1 - backbone / t))]
        place = [line["subject"], image, _short_dtype(line["dtype"]), _short_format(line["memory_format"])]
        grid.rows.append([*place, *cells, str(faster)])
    return [grid] if grid.rows else []


HEADLINE = {
    ("module", "forward+backward"): "module, training step",
    ("head", "forward+backward"): "head, training step",
    ("module", "forward"): "module, inference",
    ("folded-head", "forward"): "head, inference",
    ("hrnet_w18", "forward"): "HRNet-W18, inference",
    ("hrnet_w48", "forward"): "HRNet-W48, inference",
}


def headline(files: Sequence[Mapping[str, Any]]) -> Grid:
    """Module, head and networks at one case, each from the newest file that has it."""
    case = "cityscapes-half"
    grid = Grid(
        "",
        ["", "format", "eager [ms]", "torch.compile [ms]", "ours [ms]", "both [ms]", "saved for backward", "commit"],
        2,
    )
    devices = set()
    for (subject, what), label in HEADLINE.items():
        for memory_format in ("contiguous", "channels_last"):
            place = (subject, case, what, "float32", memory_format)
            having = [data for data in files if not data["quick"] and place in grouped(data["results"])]
            if not having:
                continue
            data = max(having, key=lambda data: str(data["date"]))
            line = grouped(data["results"])[place][0]
            name = line["ours"][0]
            devices.add(f"{device_name(data)}, PyTorch {data['versions']['torch']}")
            shown = [line["times"].get(each) for each in (EAGER, COMPILED, name, TOGETHER)]
            best = _fastest(shown)
            saved = line["saved_bytes"].get(name), line["saved_bytes"].get(EAGER)
            kept = "-" if saved[0] is None else f"{_number(saved[0], 2**20)} of {_number(saved[1], 2**20)} MiB"
            cells = [_milliseconds(timing, best) for timing in shown]
            grid.rows.append([label, _short_format(memory_format), *cells, kept, f"`{data['commit'][:8]}`"])
    grid.title = f"1x512x128x256, K=19, float32, {'; '.join(sorted(devices))}; median ± interquartile range, "
    grid.title += "in bold where it is faster than the others by more than that"
    return grid.without_empty_columns()


def cases(results: Results) -> list[Grid]:
    """For each dtype and format a line for each measurement: milliseconds, the fastest in bold, and bytes."""
    grids = []
    named = [result for result in results if not sweep_of(result["case"])]
    for (dtype, memory_format), members in grouped(named, lambda r: (r["dtype"], r["memory_format"])).items():
        ours = list(dict.fromkeys(name for line in members for name in line["ours"]))
        peers = [EAGER, COMPILED, AUTOTUNED, CHECKPOINTED, SDPA]
        header = [
            "subject",
            "case",
            "pass",
            *peers,
            *ours,
            TOGETHER,
            "of floor",
            "saved [MB]",
            "of eager's",
            "peak of eager's",
        ]
        grid = Grid(f"{dtype}, {memory_format} [ms]", header, 3)
        for lines in grouped(members).values():
            line = lines[0]
            found = {name: timing for each in reversed(lines) for name, timing in each["times"].items()}
            kernels = [name for name in found if name.startswith(f"{SDPA}-")]
            if kernels:
                found[SDPA] = min((found[name] for name in kernels), key=lambda timing: float(timing["median"]))
            shown = {name: found[name] for name in (*peers, *ours, TOGETHER) if name in found}
            best = _fastest(shown.values())
            times = [_milliseconds(shown.get(name), best) for name in (*peers, *ours, TOGETHER)]
            name = line["ours"][0]
            saved, peak = (
                (values.get(name), values.get(EAGER)) for values in (line["saved_bytes"], line["peak_bytes"])
            )
            grid.rows.append(
                [
                    *(
                        line["subject"],
                        line["case"],
                        SHORT[line["pass"]],
                        *times,
                        _percent(share_of_floor(lines, name)),
                    ),
                    *(_number(saved[0], 1e6), _share(*saved), _share(*peak)),
                ]
            )
        grids.append(grid.without_empty_columns())
    return grids


def _fastest(timings: Iterable[Mapping[str, float] | None]) -> Mapping[str, float] | None:
    """The one that is faster than all others by more than the spreads, if there is one."""
    known = sorted(filter(None, timings), key=lambda timing: timing["median"])
    if len(known) < 2 or not all(Timing(**known[0]).differs(Timing(**other)) for other in known[1:]):
        return None
    return known[0]


def _milliseconds(timing: Mapping[str, float] | None, best: Mapping[str, float] | None) -> str:
    if timing is None:
        return "-"
    return f"**{Timing(**timing)}**" if timing is best else str(Timing(**timing))


def _share(part: float | None, whole: float | None) -> str:
    return "-" if part is None or not whole else f"{part / whole:.0%}"


def memory(results: Results) -> list[Grid]:
    """Saved for the backward pass, peak and first call, of ours beside eager and torch.compile."""
    header = ["subject", "case", "pass", "saved [MB]", "peak [MB]", "first call [s]"]
    timed = {name for result in results for name in result["times"]}
    peers = [name for name in (EAGER, COMPILED, CHECKPOINTED) if name in timed]
    grid = Grid(
        f"{' / '.join(['ours', *peers])}: saved for backward besides the inputs, the allocator's peak, first call",
        header,
        3,
    )
    for lines in grouped(results).values():
        line = lines[0]
        if line["pass"] == "backward" or sweep_of(line["case"]):
            continue
        names = [line["ours"][0], *peers]
        saved, peak, first = (
            [_number(line[what].get(name), unit) for name in names]
            for what, unit in (("saved_bytes", 1e6), ("peak_bytes", 1e6), ("first_call", 1))
        )
        cells = ("-" if set(values) <= {"-"} else " / ".join(values) for values in (saved, peak, first))
        grid.rows.append([line["subject"], line["case"], SHORT[line["pass"]], *cells])
    return [grid.without_empty_columns()] if grid.rows else []


def host(lines: Results) -> list[Grid]:
    """Microseconds per call on tiny inputs."""
    if not lines:
        return []
    variants = list(dict.fromkeys(name for line in lines for name in line["times"]))
    grid = Grid("host time per call on tiny inputs [us]", ["op", "pass", *variants, "budget of no kernels"], 2)
    for line in lines:
        budget = HOST_BUDGETS[line["pass"]]
        verdict = "met" if line["times"][EMPTY]["median"] <= budget else "missed"
        times = (_number(line["times"].get(name, {}).get("median"), 1e-6) for name in variants)
        grid.rows.append([line["subject"], SHORT[line["pass"]], *times, f"{budget * 1e6:.0f}, {verdict}"])
    return [grid]


def summary(results: Results) -> list[Grid]:
    """For each dtype, format and backend a line for each subject and pass: mean and worst over the named cases."""
    grids = []
    named = [result for result in results if not sweep_of(result["case"])]
    for (dtype, memory_format), members in grouped(named, lambda r: (r["dtype"], r["memory_format"])).items():
        for ours in members[0]["ours"]:
            title = f"{dtype}, {memory_format}: times faster {ours} is, in geometric mean over the cases and at worst"
            header = ["subject", "pass", "cases", *(h for peer in PEERS for h in (peer, "worst"))]
            grid = Grid(title, [*header, "of floor", "worst", "lost"], 2)
            for (subject, what), part in grouped(members, lambda r: (r["subject"], r["pass"])).items():
                grid.rows.append([subject, SHORT[what], *_summary_cells(list(grouped(part).values()), ours)])
            grids.append(grid.without_empty_columns())
    return grids


def losses(results: Results) -> list[str]:
    """Where eager PyTorch or torch.compile is faster, with how many times faster ours is than it."""
    found = []
    for (subject, case, what, dtype, memory_format), lines in grouped(results).items():
        for ours in lines[0]["ours"]:
            ratios = {peer: times_faster(lines, ours, peer) for peer in (EAGER, COMPILED)}
            slower = [f"{r} {peer}" for peer, r in ratios.items() if r and r.times < 1]
            if slower:
                where = f"{subject} {SHORT[what]} {case} {_short_dtype(dtype)} {_short_format(memory_format)}"
                found.append(f"{where} ({', '.join(slower)})")
    return found


def _summary_cells(cases: list[list[Result]], ours: str) -> list[str]:
    cells, lost = [str(len(cases))], set()
    for peer in PEERS:
        ratios = {i: r.times for i, lines in enumerate(cases) if (r := times_faster(lines, ours, peer))}
        lost |= {i for i, ratio in ratios.items() if ratio < 1}
        cells += [_times(geometric_mean(ratios.values())), _times(min(ratios.values(), default=None))]
    shares = [share for lines in cases if (share := share_of_floor(lines, ours)) is not None]
    return [*cells, _percent(geometric_mean(shares)), _percent(min(shares, default=None)), str(len(lost))]


def comparison(old: Mapping[str, Any], new: Mapping[str, Any]) -> Grid:
    """What changed between two runs: ours, measurement by measurement, and the peers in geometric mean as a control."""
    grid = Grid("changes", ["subject", "case", "pass", "variant", "old [ms]", "new [ms]", "new/old", "change"], 4)
    before, after = (
        {(*key(line), name): timing for line in data["results"] for name, timing in line["times"].items()}
        for data in (old, new)
    )
    ours = {name for data in (old, new) for line in data["results"] for name in line["ours"]}
    control = []
    for place in dict.fromkeys((*before, *after)):
        subject, case, what, dtype, memory_format, name = place
        if name not in ours:
            if place in before and place in after:
                control.append(after[place]["median"] / before[place]["median"])
            continue
        row = [subject, case, SHORT[what], f"{name} {_short_dtype(dtype)} {_short_format(memory_format)}"]
        if place not in before or place not in after:
            row += [_number(times.get(place, {}).get("median"), 1e-3) for times in (before, after)]
            grid.rows.append([*row, "-", "only in one"])
            continue
        a, b = before[place], after[place]
        change = b["median"] / a["median"]
        same = abs(change - 1) <= 0.02 or not Timing(**a).differs(Timing(**b))
        verdict = "same" if same else "slower" if change > 1 else "faster"
        grid.rows.append([*row, *(_number(t["median"], 1e-3) for t in (a, b)), f"{change:.2f}", verdict])
    mean = geometric_mean(control)
    if mean:
        grid.rows.append(["control", f"{len(control)} peers", "", "", "", "", f"{mean:.2f}", "the machine"])
    return grid


def geometric_mean(values: Iterable[float]) -> float | None:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def _ratio(value: Ratio | None, missing: str) -> str:
    if value is None:
        return missing
    name = value.peer.removeprefix(f"{SDPA}-")
    return f"{value} {name}" if name != value.peer else str(value)


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _number(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{value / unit:.3g}" if value / unit < 1000 else f"{value / unit:.0f}"


def _short_dtype(dtype: str) -> str:
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}.get(dtype, dtype)


def _short_format(memory_format: str) -> str:
    return {"contiguous": "NCHW", "channels_last": "NHWC"}.get(memory_format, memory_format)
