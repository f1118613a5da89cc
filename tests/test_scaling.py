"""The limits of the model of many GPUs, and that it counts what is really sent."""

from __future__ import annotations

import time
from collections.abc import Iterator
from math import prod
from pathlib import Path

import pytest
import torch
from sharded_worker import Traffic
from torch import distributed

from benchmarks.scaling import GPUS, MEGAPIXELS, Cluster, collectives, draw, image, ring, step
from ocr_kernels import GatherState, modules
from ocr_kernels.bench.cases import SUBJECTS, Block, Case
from ocr_kernels.block import Layer, Norm, ocr_block

CLUSTER = Cluster()
SMALL = Case("small", 2, 16, 8, 3, 6, 5)


@pytest.fixture
def group() -> Iterator[distributed.ProcessGroup]:
    """Of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def test_one_gpu_takes_what_was_measured() -> None:
    block = Block(modules, SMALL)
    inputs = [torch.randn(shape) for shape in SUBJECTS["module"].input_shapes(SMALL)]
    start = time.perf_counter()
    block(*inputs).sum().backward()
    measured = time.perf_counter() - start
    assert step(SMALL, 1, CLUSTER, measured) == (measured, 0, 0)


def test_one_gpu_takes_the_floor() -> None:
    """At a rate without limit, the bytes of both forward passes and the backward pass."""
    case = image(1)
    seconds = SUBJECTS["module"].bytes(case, "forward+backward", torch.bfloat16) / CLUSTER.bandwidth
    assert step(case, 1, CLUSTER._replace(rate=float("inf"))).seconds == pytest.approx(seconds)


@pytest.mark.parametrize("megapixels", MEGAPIXELS)
def test_no_more_than_perfect(megapixels: float) -> None:
    one = step(image(megapixels), 1, CLUSTER)
    for gpus in GPUS:
        many = step(image(megapixels), gpus, CLUSTER)
        assert many.seconds >= many.compute >= one.seconds / gpus
    nothing_waits = CLUSTER._replace(inside=float("inf"), between=float("inf"), latency=0)
    assert step(image(megapixels), 64, nothing_waits).seconds == pytest.approx(one.seconds / 64, rel=0.02)


def test_ring() -> None:
    """Of two GPUs each sends everything once; more nodes reduce what the GPUs of one have each left."""
    seconds, sent = ring(1e6, 2, CLUSTER)
    assert (seconds, sent) == (pytest.approx(1e6 / CLUSTER.inside + 2 * CLUSTER.latency), 1e6)
    seconds, sent = ring(1e6, 16, CLUSTER)
    assert sent == pytest.approx(1e6 * (14 / 8 + 1 / 8))
    assert seconds == pytest.approx(14 / 8 * 1e6 / CLUSTER.inside + 1e6 / 8 / CLUSTER.between + 16 * CLUSTER.latency)
    assert ring(1e6, 1, CLUSTER) == (0, 0)


def test_collectives_are_those_that_run(group: distributed.ProcessGroup) -> None:
    """Those of the gather and of the norms; FSDP's and DDP's are the parameters."""
    b, c, d, k = SMALL.batch, SMALL.channels, SMALL.key_channels, SMALL.regions
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
    gathered = [prod(event.input_shapes[1]) for event in profile.events() if event.name == "c10d::_allgather_base_"]
    reduces, gathers = ([e for e in collectives(SMALL)[:-1] if e.gathers == kind] for kind in (False, True))
    assert [(elements, size) for _, elements, size in traffic.calls] == [(e.elements, e.itemsize) for e in reduces]
    assert sorted(gathered) == sorted(e.elements for e in gathers)


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws")
    draw(CLUSTER, tmp_path / "scaling.svg")
    assert "A model, nothing measured" in (tmp_path / "scaling.svg").read_text()
