"""Large maps of a training step on a CPU take the place of the last step's, and of nothing that anybody still has."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack, to_dlpack

from ocr_kernels import reference, replace_ocr_modules, use_backend
from ocr_kernels.core import memory

SIDES = 12, 16


@pytest.fixture(autouse=True)
def small_maps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(memory, "LEAST", 1024)
    monkeypatch.setattr(memory, "_is_on", True)
    memory._kept.clear()
    yield
    memory._kept.clear()


@pytest.fixture(scope="module")
def block() -> nn.Module:
    torch.manual_seed(0)
    module = reference.SpatialOCR(16, 8, 24)
    replace_ocr_modules(module, example_inputs=inputs(0))
    return module


def inputs(seed: int, memory_format: torch.memory_format = torch.contiguous_format) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    feats = torch.randn(2, 16, *SIDES, generator=generator).contiguous(memory_format=memory_format)
    return feats.requires_grad_(), torch.randn(2, 16, 5, 1, generator=generator)


def step(module: nn.Module, feats: Tensor, regions: Tensor) -> list[Tensor]:
    """z, and gradients."""
    torch.manual_seed(0)
    z = module(feats, regions)
    return [z.detach(), *torch.autograd.grad(z.square().sum(), [feats, *module.parameters()])]


def bits(tensors: list[Tensor]) -> list[bytes]:
    return [tensor.detach().contiguous().numpy().tobytes() for tensor in tensors]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", ["reference", None])
def test_steps_use_the_same_memory(block: nn.Module, backend: Any, memory_format: torch.memory_format) -> None:
    made = [inputs(seed, memory_format) for seed in range(5)]
    with use_backend(backend):
        with memory.new_memory():
            expected = [bits(step(block, *each)) for each in made]
        found, addresses = [], []
        for each in made:
            found.append(bits(step(block, *each)))
            addresses.append({kept.storage.data_ptr() for kept in memory._kept})
    assert found == expected
    assert addresses[0]
    assert addresses[1:] == addresses[:1] * 4


def given_to_numpy(z: Tensor) -> Callable[[], Any]:
    array = z.numpy()
    return lambda: array.tobytes()


def given_to_dlpack(z: Tensor) -> Callable[[], Any]:
    other = from_dlpack(to_dlpack(z))
    return lambda: bits([other])


def given_as_a_view(z: Tensor) -> Callable[[], Any]:
    row = z[1, 3]
    return lambda: bits([row])


def given_as_a_storage(z: Tensor) -> Callable[[], Any]:
    storage = z.untyped_storage()
    return lambda: bytes(storage)


def given_to_a_process(z: Tensor) -> Callable[[], Any]:
    handle = z.share_memory_().untyped_storage()._share_filename_cpu_()
    theirs = torch.UntypedStorage._new_shared_filename_cpu(*handle)
    return lambda: bytes(theirs)


@pytest.mark.parametrize(
    "give", [given_to_numpy, given_to_dlpack, given_as_a_view, given_as_a_storage, given_to_a_process]
)
def test_what_anybody_has_stays(block: nn.Module, give: Callable[[Tensor], Callable[[], Any]]) -> None:
    z, *gradients = step(block, *inputs(1))
    look = give(z)
    before, others = look(), bits(gradients)
    del z
    for seed in range(2, 5):
        step(block, *inputs(seed))
    assert look() == before
    assert bits(gradients) == others


def test_several_graphs_at_a_time(block: nn.Module) -> None:
    """Each forward pass keeps its own maps until its backward pass has read them, twice if that is wanted."""
    made = [inputs(seed) for seed in range(3)]
    with memory.new_memory():
        expected = [bits(step(block, *each)) for each in made]
    step(block, *inputs(7))
    torch.manual_seed(0)
    outputs = []
    for each in made:
        torch.manual_seed(0)
        outputs.append(block(*each))
    for again in (True, False):
        for z, each, known in zip(outputs, made, expected, strict=True):
            wanted = [each[0], *block.parameters()]
            gradients = torch.autograd.grad(z.square().sum(), wanted, retain_graph=again)
            assert bits([z, *gradients]) == known


def test_threads(block: nn.Module) -> None:
    """They ask at the same time, and none gets what another has."""
    found: list[bool] = []

    def run(number: int) -> None:
        for _ in range(300):
            held = [memory.reused(torch.empty(2048)).fill_(number) for _ in range(3)]
            found.append(all(bool((each == number).all()) for each in held))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 1200
    assert len(memory._kept) <= 12


def test_memory_of_other_sizes_goes_back(block: nn.Module) -> None:
    step(block, *inputs(0))
    sizes = {kept.bytes for kept in memory._kept}
    for _ in range(memory.RECENT + 1):
        memory.reused(torch.empty(7, 1024))
    assert {kept.bytes for kept in memory._kept} == {7 * 4096}
    assert 7 * 4096 not in sizes


def test_a_storage_of_another_size_is_not_used() -> None:
    address = memory.reused(torch.empty(2048)).untyped_storage().resize_(16).data_ptr()
    assert memory.reused(torch.empty(2048)).data_ptr() != address
    assert len(memory._kept) == 1


def test_what_is_reused_is_like_what_was_made() -> None:
    memory.reused(torch.empty(2, 8, 6, 50))
    made = torch.empty(2, 6, 50, 8).permute(0, 3, 1, 2)
    address = memory._kept[0].storage.data_ptr()
    found = memory.reused(made)
    assert found.data_ptr() == address
    assert (found.shape, found.stride(), found.dtype) == (made.shape, made.stride(), made.dtype)
    assert not found._is_view()
    assert not found.requires_grad


@pytest.mark.parametrize("why", ["small", "off", "deterministic", "not told", "in a transform", "elsewhere"])
def test_new_memory(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    def reused(tensor: Tensor) -> Tensor:
        assert memory.reused(tensor) is tensor
        return tensor

    if why == "small":
        reused(torch.empty(255))
    elif why == "off":
        with memory.new_memory():
            reused(torch.empty(2048))
    elif why == "deterministic":
        torch.use_deterministic_algorithms(True)
        try:
            reused(torch.empty(2048))
        finally:
            torch.use_deterministic_algorithms(False)
    elif why == "not told":
        monkeypatch.setattr(memory, "_alone", lambda: None)
        reused(torch.empty(2048))
    elif why == "in a transform":
        torch.func.vmap(lambda x: x + reused(torch.empty(2048)).sum() * 0)(torch.zeros(2))
    else:
        reused(torch.empty(2048, device="meta"))
        reused(nn.Parameter(torch.empty(2048)))
    assert not memory._kept


def test_pytorch_tells_who_holds_memory() -> None:
    """By a private function; without it every map would be new."""
    assert memory._alone() is not None
