"""The benchmark of `segment_tiled`'s memory runs, and its picture is of the committed figures."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("matplotlib", reason="draws")

from benchmarks import tiled


def test_it_measures_both_kinds() -> None:
    rows = tiled.measured([64])
    assert [(row["side"], row["kind"], row["tiles"]) for row in rows] == [(64, "tiled", 1), (64, "whole", 1)]
    assert all(row["peak_bytes"] > 2**26 and row["seconds"] > 0 for row in rows)
    assert tiled.figure({"rows": rows}).axes


def test_memory_does_not_grow_with_the_picture() -> None:
    rows = json.loads(tiled.RESULTS.read_text())["rows"]
    peaks = {row["side"]: row["peak_bytes"] for row in rows if row["kind"] == "tiled"}
    assert max(peaks) ** 2 >= 100 * min(peaks) ** 2
    assert max(peaks.values()) <= 1.25 * min(peaks.values())
    assert tiled.PICTURE.is_file()
