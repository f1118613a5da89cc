"""PyTorch's tools around a model: FLOP counter, profiler, checkpointing, data parallelism."""

from __future__ import annotations

import copy
import datetime
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fresh import run
from ops import Op, both_ops
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import ocr_kernels
from ocr_kernels import modules, reference, use_backend

INPUTS = (torch.Size([4, 8, 6, 7]), torch.Size([4, 8, 5, 1]))


def spatial_ocr() -> nn.Module:
    return modules.SpatialOCR(8, 4, 6, dropout=0.0, norm_layer=functools.partial(nn.GroupNorm, 2))


def replaced_head() -> nn.Module:
    head = reference.OCRHead(8, 5, 8, 4, dropout=0.0, norm_layer=functools.partial(nn.GroupNorm, 2))
    ocr_kernels.replace_ocr_modules(head, example_inputs=torch.randn(INPUTS[0]))
    return head


models = pytest.mark.parametrize("build", [spatial_ocr, replaced_head])


def example(build: Callable[[], nn.Module]) -> tuple[nn.Module, list[Tensor]]:
    """A model in float64 and the inputs of four images; the same ones in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().double()
        inputs = [torch.randn(size, dtype=torch.float64) for size in INPUTS]
    return model, inputs[:1] if build is replaced_head else inputs


def loss(output: Tensor | list[Tensor]) -> Tensor:
    return sum(out.square().mean() for out in (output if isinstance(output, list) else [output]))


def ran(profile: torch.profiler.profile) -> set[str]:
    names = {event.name for event in profile.events()}
    return {name.removeprefix("ocr_kernels::") for name in names if name.startswith("ocr_kernels::")}


# Counting and tracing


@both_ops
def test_flops_are_those_of_the_definitions_products(op: Op, target: tuple[str, str]) -> None:
    """Forward, and backward for every subset of gradients."""
    backend, device = target
    inputs = op.inputs(channels=4, regions=3, spatial=(2, 5), device=device)
    for wanted in range(1 << len(inputs)):
        tensors = [t.detach().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(inputs)]
        counts = []
        for call in (op.on(backend), op.definition):
            with FlopCounterMode(display=False, custom_mapping=ocr_kernels.flop_formulas()) as counter:
                out = call(*tensors)
                if wanted:
                    out.sum().backward()
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("first", ["ocr_kernels", "torch.utils.flop_counter"])
def test_flops_in_either_order_of_imports(first: str) -> None:
    """Importing this library does not import the counter, which imports Triton; imported before, it counts unasked."""
    mapping = "ocr_kernels.flop_formulas()" if first == "ocr_kernels" else "None"
    code = f"""
import {first}, sys, torch
print("triton" in sys.modules)
import ocr_kernels, torch.utils.flop_counter
with torch.utils.flop_counter.FlopCounterMode(display=False, custom_mapping={mapping}) as counter:
    ocr_kernels.spatial_gather(torch.ones(2, 3, 5), torch.ones(2, 7, 5))
print(counter.get_total_flops())
"""
    loaded, count = run(code).split()
    assert int(count) == 2 * 2 * 3 * 5 * 7
    assert first != "ocr_kernels" or loaded == "False"


@both_ops
def test_profiler_names_the_ops(op: Op, target: tuple[str, str]) -> None:
    backend, device = target
    inputs = op.inputs(device=device, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        op.on(backend)(*inputs).sum().backward()
    assert ran(profile) == {op.name, op.name + "_backward"}


# Checkpointing and data parallelism


@models
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(target: tuple[str, str], build: Callable[[], nn.Module], reentrant: bool) -> None:
    backend, device = target
    model, inputs = example(build)
    model.to(device)
    inputs = [t.to(device).requires_grad_() for t in inputs]
    wanted = [*inputs, *model.parameters()]
    with use_backend(backend):
        loss(model(*inputs)).backward()
        expected = [t.grad for t in wanted]
        for tensor in wanted:
            tensor.grad = None
        checkpoint(lambda *x: loss(model(*x)), *inputs, use_reentrant=reentrant).backward()
    torch.testing.assert_close([t.grad for t in wanted], expected)


def train_in_parallel(rank: int, store: str) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    for build in (spatial_ocr, replaced_head):
        for sharded in (False, True):
            compare_steps(rank, build, sharded)
    torch.distributed.barrier()
    os._exit(0)  # taking gloo's threads down sometimes aborts the process


def compare_steps(rank: int, build: Callable[[], nn.Module], sharded: bool) -> None:
    """A step on half the images in each process leads to the parameters of a step on all."""
    alone, inputs = example(build)
    model = copy.deepcopy(alone)
    if sharded:
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        for child in model.children():
            if list(child.parameters()):
                fully_shard(child, mesh=mesh)
        parallel = fully_shard(model, mesh=mesh)
    else:
        parallel = nn.parallel.DistributedDataParallel(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(parallel, [t[2 * rank : 2 * rank + 2] for t in inputs])
    assert "pixel_region_attention_backward" in ran(profile)
    step(alone, inputs)
    for found, expected in zip(model.parameters(), alone.parameters(), strict=True):
        assert isinstance(found, DTensor) == sharded
        torch.testing.assert_close(found.full_tensor() if sharded else found.detach(), expected.detach())


def step(model: nn.Module, inputs: list[Tensor]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loss(model(*inputs)).backward()
    optimizer.step()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="PyTorch is built without gloo")
def test_data_parallelism(tmp_path: Path) -> None:
    """DistributedDataParallel and FSDP2, of our module and of a replaced one."""
    processes = torch.multiprocessing.spawn(train_in_parallel, (str(tmp_path / "store"),), nprocs=2, join=False)
    end = time.monotonic() + 120
    try:
        while not processes.join(timeout=5):  # raises what a process raised
            assert time.monotonic() < end, "not done after two minutes"
    finally:
        for process in processes.processes:
            process.kill()
