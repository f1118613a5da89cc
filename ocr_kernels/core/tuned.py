"""The file in which `ocr-kernels tune` leaves the tiles that it found to be faster on this machine's GPU."""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

VARIABLE = "OCR_KERNELS_TILES"
SIZES = ("regions", "channels", "outputs", "pixels", "warps", "stages")  # that a tile of the file may have
Key = tuple[str | int, ...]  # a rule's name and a problem's key


def file(device: str) -> Path | None:
    """Where the tiles for a GPU are, or would be; None: `OCR_KERNELS_TILES` is empty."""
    given = os.environ.get(VARIABLE)
    if given is not None:
        return Path(given) if given else None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "ocr_kernels" / f"tiles-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def compiler() -> str:
    """What the tiles were compiled by: another one may need more registers for the same."""
    return f"triton {importlib.import_module('triton').__version__}"


@functools.cache
def read(device: str) -> Mapping[Key, Mapping[str, int]]:
    """Sizes by rule and problem; none without a file of this GPU and compiler.

    Raises:
        ValueError: the file is none of `ocr-kernels tune`.
    """
    path = file(device) if device else None
    if path is None or not path.is_file():
        return {}
    data = _load(path)
    if problem(data, device):
        return {}
    return {(row["rule"], *row["problem"]): row["tile"] for row in data["tiles"]}


def problem(data: Mapping[str, Any], device: str) -> str | None:
    """Why the tiles of a file are not for this GPU and compiler, if they are not."""
    made_for = data["device"], data["compiler"]
    return None if made_for == (device, compiler()) else f"made for {' and '.join(made_for)}"


def state(path: Path | None, device: str) -> str:
    """What is to be said of a file."""
    if path is None or not path.is_file():
        return "none; `ocr-kernels tune` finds some"
    try:
        data = _load(path)
    except ValueError as error:
        return str(error)
    unfit = problem(data, device)
    return f"{f'ignored, {unfit}' if unfit else len(data['tiles'])} ({path})"


def write(device: str, rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Add rows of a rule, a problem, a tile and its share of the time before, in place of those for the same."""
    old = _load(path) if path.is_file() else None
    kept = {} if old is None or problem(old, device) else {(row["rule"], *row["problem"]): row for row in old["tiles"]}
    kept |= {(row["rule"], *row["problem"]): row for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    data = {"device": device, "compiler": compiler(), "tiles": list(kept.values())}
    partial.write_text(json.dumps(data, indent=1) + "\n")
    partial.replace(path)  # never half a file
    read.cache_clear()


def _load(path: Path) -> Any:
    try:
        data = json.loads(path.read_text())
        texts = [data["device"], data["compiler"], *(row["rule"] for row in data["tiles"])]
        numbers = [number for row in data["tiles"] for number in (*row["problem"], *row["tile"].values())]
        names = {name for row in data["tiles"] for name in row["tile"]}
        if all(type(t) is str for t in texts) and all(type(n) is int for n in numbers) and names <= set(SIZES):
            return data
        reason = "a value is of the wrong kind"
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise ValueError(f"{path} is no file of tiles, delete it or run `ocr-kernels tune` again ({reason})")
