"""Tables of the results."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.measure import COMPILED, EAGER

SHORT = {"forward": "fwd", "forward+backward": "fwd+bwd"}

Results = Sequence[dict[str, Any]]


def console() -> Console:
    """Standard output, 120 columns wide in a file or a pipe."""
    out = Console(highlight=False)
    if not out.is_terminal:
        out.width = 120
    return out


def details(results: Results) -> Table:
    """One line per measurement: milliseconds with their spread, and ours against the peers and the floor."""
    variants = list(dict.fromkeys(name for result in results for name in (*result["times"], *result["problems"])))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in ("case", "op", "pass"):
        table.add_column(title, no_wrap=True)
    for title in (*(f"{name} [ms]" for name in variants), "vs eager", "vs compile", "of floor"):
        table.add_column(title.replace("[", r"\["), justify="right")
    for result in results:
        table.add_row(
            *(result[key] for key in ("case", "op")),
            SHORT[result["pass"]],
            *(_time(result, name) for name in variants),
            *(_times_faster(_speedup(result, peer)) for peer in (EAGER, COMPILED)),
            _percent(_share(result)),
        )
    return table


def summary(results: Results) -> Table:
    """One line per op and pass: ours against the peers in geometric mean and at worst, and against the floor."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in ("op", "pass", "ours", "cases"):
        table.add_column(title)
    for title in ("vs eager", "worst", "vs compile", "worst", "of floor", "worst"):
        table.add_column(title, justify="right")
    for key in dict.fromkeys((result["op"], result["pass"], result["ours"]) for result in results):
        group = [result for result in results if (result["op"], result["pass"], result["ours"]) == key]
        cells = []
        for peer in (EAGER, COMPILED):
            speedups = [s for r in group if (s := _speedup(r, peer)) is not None]
            cells += [_times_faster(_geometric_mean(speedups)), _times_faster(min(speedups, default=None))]
        shares = [s for r in group if (s := _share(r)) is not None]
        cells += [_percent(_geometric_mean(shares)), _percent(min(shares, default=None))]
        table.add_row(*key, str(len(group)), *cells)
    return table


def problems(results: Results) -> list[str]:
    """What failed or was wrong, each thing once, and where."""
    places: dict[str, list[str]] = {}
    for result in results:
        for name, text in result["problems"].items():
            place = f"{result['case']} {result['op']} {SHORT[result['pass']]}"
            places.setdefault(f"{name} {text}", []).append(place)
    return [f"{text} ({where[0] if len(where) == 1 else f'{len(where)} times'})" for text, where in places.items()]


def ours_failed(results: Results) -> bool:
    return any(name not in (EAGER, COMPILED) for result in results for name in result["problems"])


def _time(result: dict[str, Any], variant: str) -> str:
    timing = result["times"].get(variant)
    if timing is None:
        return str(result["problems"].get(variant, "")).split(":")[0]
    return f"{timing['median'] * 1e3:.3f} ±{timing['spread']:.0%}"


def _speedup(result: dict[str, Any], peer: str) -> float | None:
    ours, theirs = result["times"].get(result["ours"]), result["times"].get(peer)
    return theirs["median"] / ours["median"] if ours and theirs else None


def _share(result: dict[str, Any]) -> float | None:
    ours = result["times"].get(result["ours"])
    return result["floor"] / ours["median"] if ours else None


def _geometric_mean(values: Iterable[float]) -> float | None:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def _times_faster(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
