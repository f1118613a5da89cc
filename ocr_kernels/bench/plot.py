"""Pictures of the results: bars against peers, roofline, memory, cost against N and against K."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from ocr_kernels.bench.cases import AUTOTUNED, BACKBONE, COMPILED, EAGER, NETWORKS, OPS, SDPA, SUBJECTS, sweep_of
from ocr_kernels.bench.report import Result, device_name, grouped

# Okabe and Ito's colours, which colour-blind people tell apart
COLOURS = {
    EAGER: "#999999",
    COMPILED: "#56B4E9",
    AUTOTUNED: "#0072B2",
    "checkpoint": "#F0E442",
    SDPA: "#CC79A7",
    "reference": "#E69F00",
    "triton": "#D55E00",
    "native": "#009E73",
}
MARKERS = dict(zip(SUBJECTS, "osD^dvP*", strict=True))
PEAK, SAVED = "peak_bytes", "saved_bytes"
SOURCE = "Source"  # the PNG's text with the digest of the results that it shows


def digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def draw(data: Mapping[str, Any], directory: Path, prefix: str = "") -> list[Path]:
    """Write what the results have data for, in their first dtype and memory format."""
    directory.mkdir(parents=True, exist_ok=True)
    results = data["results"]
    if not results:
        return []
    first = results[0]["dtype"], results[0]["memory_format"]
    lines = [r for r in results if (r["dtype"], r["memory_format"]) == first and r["times"]]
    setting = f"{device_name(data)}, {first[0]}, {first[1]}{', reduced sizes' if data['quick'] else ''}"
    named = [line for line in lines if not sweep_of(line["case"])]
    layers = [subject for subject in SUBJECTS if subject not in NETWORKS]
    figures = {f"bars-{s}": _bars(s, [r for r in named if r["subject"] == s], setting) for s in layers}
    figures["networks"] = _networks([line for line in named if BACKBONE in line["times"]], setting)
    figures["roofline"] = _roofline(named, data["limits"][first[0]], setting)
    figures["memory"] = _memory([r for r in named if r["pass"] == "forward+backward"], setting)
    figures["scaling"] = _scaling([line for line in lines if sweep_of(line["case"])], setting)
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            paths.append(directory / f"{prefix}{name}.png")
            figure.savefig(paths[-1], dpi=90, metadata={SOURCE: digest(data)})
    return paths


def _times(lines: Iterable[Result]) -> dict[str, float]:
    """Seconds of each variant; of SDPA's kernels the fastest."""
    times: dict[str, float] = {}
    for line in lines:
        for name, timing in line["times"].items():
            variant = SDPA if name.startswith(f"{SDPA}-") else name
            if variant != SDPA:
                times.setdefault(variant, timing["median"])
            else:
                times[variant] = min(timing["median"], times.get(variant, timing["median"]))
    return {variant: times[variant] for variant in COLOURS if variant in times}


def _ours(name: str, line: Result) -> str:
    return f"ours ({name})" if name in line["ours"] else name


def _axes(figure: Figure, rows: int, columns: int) -> list[Axes]:
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
    return axes


def _grouped_bars(ax: Axes, values: dict[str, dict[str, float]], variants: list[str], line: Result) -> None:
    """A group of bars for each case, one for each variant."""
    width = 0.84 / len(variants)
    for i, variant in enumerate(variants):
        places = [g + (i - (len(variants) - 1) / 2) * width for g, case in enumerate(values) if variant in values[case]]
        heights = [case[variant] for case in values.values() if variant in case]
        ax.bar(
            places, heights, width, color=COLOURS[variant], label=_ours(variant, line), edgecolor="white", linewidth=0.3
        )
    ax.set_xticks(range(len(values)), list(values), rotation=25, ha="right", rotation_mode="anchor")
    ax.set_xlim(-0.6, len(values) - 0.4)


def _bars(subject: str, lines: list[Result], setting: str) -> Figure | None:
    """Time as a multiple of the floor, a panel for the forward and one for the backward pass where there is one."""
    if not lines:
        return None
    passes = [what for what in ("forward", "backward") if any(line["pass"] == what for line in lines)]
    figure = Figure(figsize=(10, 1 + 2.6 * len(passes)), layout="constrained")
    figure.suptitle(f"{subject}: time as a multiple of the floor, lower is better\n{setting}")
    for ax, what in zip(_axes(figure, len(passes), 1), passes, strict=True):
        values = {
            part[0]["case"]: {name: time / part[0]["floor"] for name, time in _times(part).items()}
            for part in grouped([line for line in lines if line["pass"] == what]).values()
        }
        variants = [name for name in COLOURS if any(name in times for times in values.values())]
        if not variants:
            continue
        _grouped_bars(ax, values, variants, lines[0])
        ax.axhline(1, color="black", linewidth=1)
        ax.annotate("floor", (1, 1), xycoords=("axes fraction", "data"), xytext=(3, -4), textcoords="offset points")
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}x")
        ax.yaxis.set_minor_locator(NullLocator())
        ax.set_ylim(bottom=0.7 * min(1.0, *(time for times in values.values() for time in times.values())))
        ax.set_ylabel(what)
    for ax in figure.axes[:-1]:
        ax.tick_params(labelbottom=False)
    handles, labels = max((ax.get_legend_handles_labels() for ax in figure.axes), key=lambda pair: len(pair[1]))
    figure.axes[0].legend(handles, labels, ncols=5, frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def _networks(lines: list[Result], setting: str) -> Figure | None:
    """Time of whole networks; of eager and ours, which share the backbone, its part below the head's."""
    if not lines:
        return None
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(f"Whole networks: backbone pale where it is the same, OCR head above, lower is better\n{setting}")
    (ax,) = _axes(figure, 1, 1)
    labels: list[str] = []
    for line in lines:
        backbone = line["times"][BACKBONE]["median"] * 1e3
        for name, seconds in _times([line]).items():
            colour, place = COLOURS[name], len(labels)
            # what a compiler makes of the backbone is not known
            part = backbone if name == EAGER or name in line["ours"] else 0.0
            ax.bar(place, part, 0.8, color=colour, alpha=0.35)
            ax.bar(place, max(0.0, seconds * 1e3 - part), 0.8, bottom=part, color=colour)
            size = f"{4 * line['shape']['height']}x{4 * line['shape']['width']}"
            labels.append(f"{line['subject']}\n{size}\n{_ours(name, line)}")
    ax.set_xticks(range(len(labels)), labels, fontsize=8)
    ax.set_ylabel("ms")
    return figure


def _roofline(lines: list[Result], limits: Mapping[str, float], setting: str) -> Figure | None:
    """Achieved FLOP/s against FLOP per byte that must move, of eager and ours, below the roofs of this machine."""
    if not lines:
        return None
    figure = Figure(figsize=(8, 5), layout="constrained")
    (ax,) = _axes(figure, 1, 1)
    bandwidth, rate = limits["bytes_per_second"], limits["flops_per_second"]
    intensities = [line["flops"] / line["bytes"] for line in lines]
    ridge = rate / bandwidth
    xs = [min(*intensities, ridge) / 2, ridge, max(*intensities, ridge) * 2]
    ax.plot(xs, [min(x * bandwidth, rate) / 1e12 for x in xs], color="black", linewidth=1.2)
    ax.annotate(
        f"copy {bandwidth / 1e9:.0f} GB/s, product {rate / 1e12:.3g} TFLOP/s",
        (xs[2], rate / 1e12),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
    )
    labels = set()
    for line in lines:
        if line["pass"] == "forward+backward":
            continue
        for name, seconds in _times([line]).items():
            if name != EAGER and name not in line["ours"]:
                continue
            label = f"{line['subject']}, {_ours(name, line)}"
            ax.scatter(
                line["flops"] / line["bytes"],
                line["flops"] / seconds / 1e12,
                marker=MARKERS[line["subject"]],
                s=34,
                facecolor=COLOURS[name] if line["pass"] == "forward" else "none",
                edgecolor=COLOURS[name],
                label="" if label in labels or line["pass"] != "forward" else label,
            )
            if line["pass"] == "forward":
                labels.add(label)
    ax.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="TFLOP/s")
    ax.set_title(f"Roofline: filled forward, hollow backward\n{setting}")
    ax.legend(frameon=False, fontsize=9)
    return figure


def _memory(lines: list[Result], setting: str) -> Figure | None:
    """What training holds besides the inputs: saved between the passes, and at the peak where an allocator tells."""
    kinds = [(s, kind) for kind in (SAVED, PEAK) for s in OPS if any(_known(r, s, kind) for r in lines)]
    if not kinds:
        return None
    figure = Figure(figsize=(10, 3.4 * (len(kinds) + 1) // 2), layout="constrained")
    figure.suptitle(f"Memory of forward and backward besides the inputs, lower is better\n{setting}")
    for ax, (subject, kind) in zip(_axes(figure, (len(kinds) + 1) // 2, 2), kinds, strict=False):
        values: dict[str, dict[str, float]] = {}
        for line in lines:
            if _known(line, subject, kind):
                named = values.setdefault(line["case"], {})
                named |= {n: b / 1e6 for n, b in line[kind].items() if n in COLOURS and b is not None}
        variants = [name for name in COLOURS if any(name in sizes for sizes in values.values())]
        _grouped_bars(ax, values, variants, lines[0])
        ax.set_title(f"{subject}: {'saved for backward' if kind == SAVED else 'peak of the allocator'}", fontsize=10)
        ax.set_ylabel("MB")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=5, frameon=False, loc="outside lower center")
    return figure


def _known(line: Result, subject: str, kind: str) -> bool:
    return line["subject"] == subject and any(size is not None for size in line[kind].values())


def _scaling(lines: list[Result], setting: str) -> Figure | None:
    """Time of forward and backward against the number of pixels and of regions."""
    lines = [line for line in lines if line["pass"] == "forward+backward"]
    if not lines:
        return None
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(f"Forward and backward against N and against K\n{setting}")
    for ax, sweep in zip(_axes(figure, 1, 2), ("pixels", "regions"), strict=True):
        for subject, style in zip(OPS, ("-", "--"), strict=True):
            part = [line for line in lines if line["subject"] == subject and sweep_of(line["case"]) == sweep]
            variants = list(dict.fromkeys(name for line in part for name in _times([line])))
            for name in (*variants, "floor"):
                shown = [line for line in part if name in line["times"] or name == "floor"]
                ax.plot(
                    [_size(line, sweep) for line in shown],
                    [(line["floor"] if name == "floor" else line["times"][name]["median"]) * 1e3 for line in shown],
                    color=COLOURS.get(name, "black"),
                    linestyle=style,
                    linewidth=1 if name == "floor" else 1.8,
                    marker="" if name == "floor" else MARKERS[subject],
                    markersize=4,
                    label=f"{subject}, {_ours(name, part[0])}" if part else "",
                )
        some = next((line["shape"] for line in lines if sweep_of(line["case"]) == sweep), None)
        if some is None:
            continue
        others = f"K={some['regions']}" if sweep == "pixels" else f"N={some['height'] * some['width']}"
        ax.set(xscale="log", yscale="log", ylabel="ms", xlabel="pixels N" if sweep == "pixels" else "regions K")
        ax.set_title(f"C={some['channels']}, D={some['key_channels']}, {others}", fontsize=10)
    figure.axes[0].legend(frameon=False, fontsize=9)
    return figure


def _size(line: Result, sweep: str) -> int:
    shape = line["shape"]
    return int(shape["regions"] if sweep == "regions" else shape["height"] * shape["width"])
