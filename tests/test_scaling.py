"""The model of many processes: its limits, and what it says is sent."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sharded_worker import Traffic
from torch import distributed

pytest.importorskip("matplotlib", reason="draws")

from benchmarks import scaling
from ocr_kernels import GatherState, modules
from ocr_kernels.bench.cases import Case
from ocr_kernels.block import Layer, Norm, ocr_block


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


@pytest.fixture
def group() -> Iterator[distributed.ProcessGroup]:
    """Of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def test_collectives_are_those_that_run(group: distributed.ProcessGroup) -> None:
    """Those of the gather and of the norms; the last one is of the parameters' gradients."""
    case = Case("small", 2, 16, 8, 3, 6, 5)
    b, c, d, k = case.batch, case.channels, case.key_channels, case.regions
    shapes = [(b, c, 6, 5), (b, k, 6, 5), (b, d, k), (d, c), (d, d), (c, d), (c, 2 * c)]
    x, logits, regions, pixel_in, pixel_out, up, fusing = (torch.randn(shape, requires_grad=True) for shape in shapes)
    norm = Norm(group=group)
    with Traffic() as traffic:
        state = GatherState()
        state.update(x, logits)
        state.all_reduce().result().sum().backward()
    first, second, *others = (Layer(weight, norm=norm) for weight in (pixel_in, pixel_out, up, fusing))
    with torch.profiler.profile(record_shapes=True) as profile:
        ocr_block(x, regions, regions, [first, second], *others).sum().backward()
    gathered = [
        math.prod(event.input_shapes[1]) for event in profile.events() if event.name == "c10d::_allgather_base_"
    ]
    *of_pixels, parameters = scaling.collectives(case)
    reduces, gathers = ([each for each in of_pixels if each.gathers == kind] for kind in (False, True))
    assert [(elements, size) for _, elements, size in traffic.calls] == [each[:2] for each in reduces]
    assert sorted(gathered) == sorted(each.elements for each in gathers)
    assert parameters.elements == sum(weight.numel() for weight in modules.SpatialOCR(c, d, c).parameters())


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
