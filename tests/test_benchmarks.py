"""The benchmarks' own arithmetic, gate and command lines."""

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import gpu_round, measure, report
from benchmarks.cases import CASES, OPS, PASSES, Case, Op, Pass

GATHER, ATTENTION = OPS
TINY = Case("tiny", 1, 8, 4, 3, 6, 7)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("op", "what", "megabytes", "gigaflops"),
    [
        (GATHER, "forward", 139, 2.5),
        (GATHER, "forward+backward", 139 + 278, 2.5 + 5.1),
        (ATTENTION, "forward", 134, 2.5),
        (ATTENTION, "forward+backward", 134 + 201, 2.5 + 6.4),
    ],
)
def test_floors_of_cityscapes_inference(op: Op, what: Pass, megabytes: float, gigaflops: float) -> None:
    case = CASES["cityscapes-inference"]
    assert op.bytes(case, what, torch.bfloat16) / 1e6 == pytest.approx(megabytes, abs=1)
    assert op.flops(case, what) / 1e9 == pytest.approx(gigaflops, abs=0.1)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_wrong_and_failing_variants_are_not_timed(op: Op) -> None:
    def wrong(*inputs: torch.Tensor) -> torch.Tensor:
        return 1.001 * op.definition(*inputs)

    def failing(*_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no compiler\nand a long story")

    functions = {"right": op.definition, "wrong": wrong, "failing": failing}
    inputs = op.inputs(TINY, torch.float32, CPU)
    for what in PASSES:
        problems = measure._problems(op, what, functions, inputs)
        assert problems.pop("failing") == "failed: RuntimeError: no compiler"
        assert problems.pop("wrong").startswith("wrong: ")
        assert problems == {}


def test_a_quick_run_writes_its_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # what it does is not tested here
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(measure, "our_backends", lambda _: ["reference"])
    file = tmp_path / "cpu.json"
    arguments = ["--device", "cpu", "--quick", "--cases", "interactive", "--json", str(file), "--commit", "abc"]
    assert command.main(arguments) == 0
    written = json.loads(file.read_text())
    assert (written["commit"], written["complete"], written["dtype"]) == ("abc", True, "float32")
    assert {"backends", "devices", "versions", "date", "bytes_per_second"} <= written.keys()
    assert [(r["op"], r["pass"]) for r in written["results"]] == [(op.name, what) for op in OPS for what in PASSES]
    assert all(r["times"].keys() == {"eager", "compile", "reference"} for r in written["results"])
    printed = capsys.readouterr().out
    assert "interactive" in printed
    assert max(map(len, printed.splitlines())) <= 120


def test_ratios_and_shares() -> None:
    result = {
        "case": "tiny",
        "op": "gather",
        "pass": "forward",
        "ours": "triton",
        "floor": 0.5,
        "times": {
            name: {"median": m, "spread": 0.0} for name, m in (("eager", 2.0), ("compile", 4.0), ("triton", 1.0))
        },
        "problems": {},
    }
    slower = {**result, "times": {**result["times"], "triton": {"median": 4.0}}}
    cells = [next(iter(column.cells)) for column in report.summary([result, slower]).columns]
    assert cells[3:] == ["2", "1.00x", "0.50x", "2.00x", "1.00x", "25%", "12%"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_round_without_a_gpu_says_so_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_round.main(["--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == "No GPU round: no GPU is visible to PyTorch.\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("statuses", "status"), [((0, 0), 0), ((1, 0), 1), ((0, None), 1)])
def test_gpu_round_ends_with_a_table_and_its_verdict(
    statuses: tuple[int | None, ...],
    status: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = iter(statuses)

    def step(module: list[str], log: Path, seconds: float) -> int | None:
        assert 0 < seconds <= gpu_round.TOTAL_SECONDS
        if module[0] == "pytest":
            report = '<testsuites><testsuite tests="9" failures="1" errors="0" skipped="2"/></testsuites>'
            (log.parent / "tests.xml").write_text(report)
        else:
            Path(module[module.index("--json") + 1]).write_text('{"results": []}')
        return next(steps)

    monkeypatch.setattr(gpu_round, "_step", step)
    monkeypatch.setattr(measure, "record", lambda commit: {"commit": commit})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert gpu_round.main(["--out", str(tmp_path), "--commit", "abc"]) == status
    printed = capsys.readouterr().out
    assert "NVIDIA H200, commit abc" in printed
    assert "6 passed, 1 failed, 0 errors, 2 skipped" in printed
    assert ("time was up" in printed) == (None in statuses)
    assert json.loads((tmp_path / "machine.json").read_text()) == {"commit": "abc"}
    assert (tmp_path / "nvidia-h200.json").exists()


def test_a_step_is_logged_and_stopped_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "step.py"
    module.write_text("import sys, time\nprint('started')\nif len(sys.argv) > 1: time.sleep(60)\nsys.exit(3)\n")
    monkeypatch.chdir(tmp_path)
    assert gpu_round._step(["step"], tmp_path / "a.log", 60) == 3
    start = time.monotonic()
    assert gpu_round._step(["step", "sleep"], tmp_path / "b.log", 3) is None
    assert time.monotonic() - start < 20
    assert (tmp_path / "a.log").read_text() == "started\n"
    assert (tmp_path / "b.log").read_text().startswith("started\n")
