"""`ocr-kernels tune`: the search, the file that it writes, and that kernels take what is in the file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh import python

pytest.importorskip("triton", reason="the tiles are those of Triton's kernels")

from ocr_kernels.attention import tiles as attention
from ocr_kernels.bench import tune
from ocr_kernels.bench.cases import SUBJECTS, Case, Pass, Workload
from ocr_kernels.bench.timing import Timing
from ocr_kernels.cli import main
from ocr_kernels.core import tuned
from ocr_kernels.core.tiles import DeviceFacts, Problem, Tile
from ocr_kernels.gather import tiles as gather

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = "Some GPU"
PROBLEM = Problem(2, DeviceFacts(132, 232448, (9, 0), GPU), channels=512, regions=19)
TILE = Tile(regions=32, channels=256, pixels=64, stages=3)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "new" / "tiles.json"
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    tuned.read.cache_clear()
    yield path
    tuned.read.cache_clear()
    for rule in tune.RULES:
        rule.chosen.clear()


def row(rule: str = "gather.forward", problem: Problem = PROBLEM, **tile: int) -> dict[str, Any]:
    return {"rule": rule, "problem": problem.key, "tile": tile, "time": 0.9}


# The search


def test_neighbours_differ_in_one_size_that_may_change() -> None:
    found = list(tune.neighbours(TILE, PROBLEM, ("channels", "pixels")))
    assert len(found) == len(set(found)) == 8
    for tile in found:
        (name,) = (name for name in tuned.SIZES if getattr(tile, name) != getattr(TILE, name))
        assert name != "regions"  # all of them are held
        assert getattr(tile, name) in (getattr(TILE, name) // 2, getattr(TILE, name) * 2, 2, 4)


def test_neighbours_are_no_larger_than_the_problem_and_no_smaller_than_a_matrix_unit() -> None:
    small = replace(PROBLEM, channels=16)
    for tile in tune.neighbours(replace(TILE, channels=16, pixels=16), small, ("channels", "pixels")):
        assert tile.channels == 16
        assert tile.pixels in (16, 32)


def test_regions_may_change_where_a_program_does_not_hold_all() -> None:
    many = replace(PROBLEM, regions=1000)
    assert {tile.regions for tile in tune.neighbours(TILE, many, ())} == {16, 32, 64}


def test_climbs_to_the_cheapest_tile() -> None:
    def cost(tile: Tile) -> float | None:
        if tile.warps == 4:
            return None  # does not compile
        return 1 + abs(math.log2(tile.pixels / 256)) + abs(tile.stages - 2) / 8 + abs(math.log2(tile.channels / 128))

    best = tune.climb(TILE, PROBLEM, ("channels", "pixels"), cost)
    assert best == replace(TILE, channels=128, pixels=256, stages=2)


def test_stays_where_nothing_is_cheaper() -> None:
    assert tune.climb(TILE, PROBLEM, ("channels", "pixels"), lambda tile: 1.0) == TILE
    assert tune.climb(TILE, PROBLEM, ("channels",), lambda tile: 1.0 if tile == TILE else None) == TILE


def test_what_was_taken_is_given_back() -> None:
    """Also where nothing had been chosen yet."""
    problem = replace(PROBLEM, regions=7, device=PROBLEM.device._replace(name=""))
    gather.FORWARD.chosen.pop(problem, None)
    with tune.taken(gather.FORWARD, problem, TILE):
        assert gather.FORWARD.choose(problem) == TILE
    assert gather.FORWARD.choose(problem) == gather.FORWARD.rule(problem)


# Trials, in the interpreter

CASE = Case("small", 2, 32, 16, 5, 6, 7)


@pytest.mark.parametrize("subject", ["gather", "attention"])
@pytest.mark.parametrize("what", ["forward", "backward"])
def test_finds_the_tile_that_the_clock_likes(
    file: Path, monkeypatch: pytest.MonkeyPatch, subject: str, what: Pass
) -> None:
    """The results are those of before with every tile that is tried."""
    trial = tune.Trial(Workload(SUBJECTS[subject], CASE, torch.float32, DEVICE), what, 0.0)
    tried = []

    def times(rule: Any, problem: Problem, tiles: tuple[Tile, Tile]) -> list[Timing]:
        tried.append(tiles[1])
        return [Timing(1 + tile.pixels + tile.stages, 0.0) for tile in tiles]

    monkeypatch.setattr(trial, "_times", times)
    done: set[Any] = set()
    rows = list(tune.tune(trial, done))
    assert rows
    assert tried
    assert list(tune.tune(trial, done)) == []
    for found, (rule, problem) in zip(rows, sorted(done, key=lambda pair: tune.RULES.index(pair[0])), strict=False):
        own = rule.rule(problem)
        assert replace(own, **found["tile"]).pixels == 16
        assert found["time"] < 1


def test_wrong_results_and_errors_are_never_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = tune.Trial(Workload(SUBJECTS["gather"], CASE, torch.float32, DEVICE), "forward", 0.0)
    ((rule, problem, tile),) = trial.choices()
    other = replace(tile, pixels=2 * tile.pixels)
    right = trial.run()
    monkeypatch.setattr(trial, "_times", lambda *_: [Timing(1.0, 0.0), Timing(0.5, 0.0)])
    assert trial.cost(rule, problem, tile, other) == 0.5
    monkeypatch.setattr(trial, "_times", lambda *_: [Timing(1.0, 0.1), Timing(0.95, 0.1)])
    assert trial.cost(rule, problem, tile, other) == 1.0  # within the spread

    for wrong in (torch.nan, 1.01):
        monkeypatch.setattr(trial, "run", lambda wrong=wrong: tuple(wrong * t for t in right))
        assert trial.cost(rule, problem, tile, other) is None

    def fail() -> tuple[torch.Tensor, ...]:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(trial, "run", fail)
    assert trial.cost(rule, problem, tile, other) is None
    assert rule.choose(problem) == tile


def test_times_both_tiles_under_the_clock() -> None:
    trial = tune.Trial(Workload(SUBJECTS["gather"], CASE, torch.float32, DEVICE), "backward", 0.0)
    rule, problem, tile = trial.choices()[-1]
    before, after = trial._times(rule, problem, (tile, replace(tile, pixels=16)))
    assert before.median > 0
    assert after.median > 0
    assert rule.choose(problem) == tile


# The file


def test_kernels_take_what_is_in_the_file(file: Path) -> None:
    own = gather.FORWARD.rule(PROBLEM)
    assert own is not None
    assert gather.FORWARD.choose(PROBLEM) == own
    gather.FORWARD.chosen.clear()
    tuned.write(GPU, [row(pixels=32, stages=2), row("attention.forward_in_one_pass", pixels=16)], file)
    assert gather.FORWARD.choose(PROBLEM) == replace(own, pixels=32, stages=2)
    assert gather.BACKWARD.choose(PROBLEM) == gather.BACKWARD.rule(PROBLEM)
    other = replace(PROBLEM, regions=20)
    assert gather.FORWARD.choose(other) == gather.FORWARD.rule(other)
    unnamed = replace(PROBLEM, device=PROBLEM.device._replace(name=""))  # compiled for, not there
    assert gather.FORWARD.choose(unnamed) == own


def test_a_kernel_that_cannot_run_is_not_tuned_into_one_that_can(file: Path) -> None:
    many = replace(PROBLEM, channels=256, outputs=256, regions=1000)
    tuned.write(GPU, [row("attention.forward_in_one_pass", many, pixels=16)], file)
    assert attention.FORWARD_IN_ONE_PASS.choose(many) is None


def test_scattered_pixels_may_be_a_comparison(file: Path) -> None:
    problem = replace(PROBLEM, scattered=True)
    tuned.write(GPU, [row(problem=problem, pixels=16)], file)
    assert gather.FORWARD.choose(problem).pixels == 16


def test_rows_are_added_and_replaced(file: Path) -> None:
    tuned.write(GPU, [row(pixels=32)], file)
    tuned.write(GPU, [row(pixels=16), row("gather.backward", warps=4)], file)
    assert tuned.read(GPU) == {
        ("gather.forward", *PROBLEM.key): {"pixels": 16},
        ("gather.backward", *PROBLEM.key): {"warps": 4},
    }
    assert tuned.state(file, GPU) == f"2 ({file})"
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_tiles_of_another_gpu_or_compiler_are_ignored_and_replaced(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned.write(GPU, [row(pixels=32)], file)
    assert tuned.read("Another GPU") == {}
    assert f"ignored, made for {GPU} and triton " in tuned.state(file, "Another GPU")
    monkeypatch.setattr(tuned, "compiler", lambda: "triton 9.9")
    tuned.read.cache_clear()
    assert tuned.read(GPU) == {}
    tuned.write(GPU, [row(warps=4)], file)
    assert list(tuned.read(GPU).values()) == [{"warps": 4}]


def test_without_a_file_nothing_is_tuned(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuned.read(GPU) == {}
    assert tuned.state(file, GPU).startswith("none")
    monkeypatch.setenv(tuned.VARIABLE, "")
    assert tuned.file(GPU) is None
    monkeypatch.delenv(tuned.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(file.parent))
    assert tuned.file("NVIDIA H100 80GB HBM3") == file.parent / "ocr_kernels" / "tiles-nvidia-h100-80gb-hbm3.json"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"device": 1, "compiler": "triton", "tiles": []}',
        '{"device": "a", "compiler": "b", "tiles": [{}]}',
        '{"device": "a", "compiler": "b", "tiles": [{"rule": "r", "problem": [1], "tile": {"pixels": "32"}}]}',
        '{"device": "a", "compiler": "b", "tiles": [{"rule": "r", "problem": [1], "tile": {"when": 1}}]}',
        '{"device": "a", "compiler": "b", "tiles": [{"rule": "r", "problem": 1, "tile": {"pixels": 32}}]}',
    ],
)
def test_a_file_of_something_else_is_an_error_that_says_what_to_do(file: Path, content: str) -> None:
    file.parent.mkdir()
    file.write_text(content)
    with pytest.raises(ValueError, match=r"is no file of tiles, delete it or run `ocr-kernels tune` again"):
        tuned.read(GPU)
    assert str(file) in tuned.state(file, GPU)
    with pytest.raises(ValueError, match="is no file of tiles"):
        tuned.write(GPU, [row(pixels=32)], file)
    assert file.read_text() == content


def test_names_of_rules_are_different() -> None:
    names = [rule.name for rule in tune.RULES]
    assert len(set(names)) == len(names) > 12
    json.dumps(names)


# The command


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune for")
def test_the_command_says_why_it_cannot_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune"]) == 2
    assert capsys.readouterr().err == "ocr-kernels tune: no GPU is visible to PyTorch\n"
    result = python("-m", "ocr_kernels", "tune")  # without the interpreter, which it must not advise
    assert (result.returncode, result.stderr) == (2, "ocr-kernels tune: no GPU is visible to PyTorch\n")
    assert python("-m", "ocr_kernels", "tune", "--cases", "nowhere").returncode == 2


def test_the_command_does_not_tune_the_interpreter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["tune"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="tunes for a GPU")
@pytest.mark.gpu
def test_the_command_on_a_gpu(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--cases", "interactive", "--subjects", "gather", "--seconds", "0.01"]) == 0
    assert "gather.forward" in capsys.readouterr().out
