"""The model of many processes: its limits, and what it says is sent."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="draws")

from benchmarks import scaling
from ocr_kernels import modules
from ocr_kernels.bench.cases import CASES


@pytest.fixture(params=["measured", "assumed"])
def machine(request: pytest.FixtureRequest) -> scaling.Machine:
    return getattr(scaling, request.param)()


def test_one_process_takes_what_was_measured_and_sends_nothing() -> None:
    machine = scaling.measured()
    megapixels = scaling.CASE.pixels * scaling.STRIDE**2 / 1e6
    alone = scaling.step(machine, 1, megapixels)
    assert alone.communication == 0
    assert alone.seconds == pytest.approx(machine.seconds * scaling.CASE.pixels, rel=0.01)
    assert alone.memory == pytest.approx(machine.bytes * scaling.CASE.pixels, rel=0.01)


@pytest.mark.parametrize("megapixels", scaling.MEGAPIXELS)
def test_no_step_is_faster_than_its_share(machine: scaling.Machine, megapixels: float) -> None:
    alone = scaling.step(machine, 1, megapixels)
    for processes in scaling.PROCESSES:
        found = scaling.step(machine, processes, megapixels)
        assert alone.seconds / processes <= found.seconds
        assert found.memory >= alone.memory / processes
        assert found.communication == scaling.step(machine, processes, 2 * megapixels).communication


def test_what_is_sent() -> None:
    case = CASES["cityscapes-training"]
    b, c, d, k = 2, 512, 256, 19
    sizes = scaling.sent(case, 2)
    assert sizes["gather"] == 8 * (b * k + 2 * b * (c + 1) * k)
    assert sizes["attention"] == 2 * (b * d * k + b * d * k)
    module = modules.SpatialOCR(c, d, c)
    assert sizes["weights"] == 2 * sum(weight.numel() for weight in module.parameters() if weight.dim() == 4)


@pytest.mark.parametrize("size", [1, 1e3, 1e9])
def test_reductions(size: float) -> None:
    link = scaling.Link(1e9, 1e-5)
    assert scaling.reduction(size, 1, link) == scaling.gathering(size, 1, link) == 0
    times = [scaling.reduction(size, processes, link) for processes in scaling.PROCESSES]
    assert times == sorted(times)
    for processes, time in zip(scaling.PROCESSES, times, strict=True):
        assert time >= 2 * (processes - 1) / processes * size / link.bandwidth
        assert time >= math.log2(processes) * link.latency


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "scaling.png"
    assert scaling.main(["--out", str(picture), "--share", "0.5"]) == 0
    assert "50% of the floor assumed: a model" in capsys.readouterr().out
    assert picture.stat().st_size > 10_000
    assert scaling.PICTURE.is_file()
