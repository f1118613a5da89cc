"""Large results are in large pages."""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ocr_kernels import modules, spatial_gather
from ocr_kernels.core import pages
from ocr_kernels.core.pages import LARGE, in_large_pages


def is_in_large_pages(tensor: Tensor) -> bool:
    """Whether Linux was asked for such pages in the middle of a tensor."""
    place, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= place < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("no mapping holds the tensor")


@pytest.fixture
def on_request() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.is_file() or "[never]" in setting.read_text():
        pytest.skip("this system has no large pages")


@pytest.mark.usefixtures("on_request")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_results_and_gradients_are_in_large_pages(memory_format: torch.memory_format) -> None:
    side = 512  # 2^24 numbers, 64 MiB: more than an allocator keeps
    feats = torch.randn(1, 64, side, side).contiguous(memory_format=memory_format).requires_grad_()
    (dfeats,) = torch.autograd.grad(spatial_gather(feats, torch.randn(1, 2, side, side)).sum(), feats)
    assert is_in_large_pages(dfeats)
    z = modules.SpatialOCR(64, 4, 64).to(memory_format=memory_format)(feats, torch.randn(1, 64, 2, 1))
    assert is_in_large_pages(z)
    (dfeats,) = torch.autograd.grad(z.sum(), feats)
    assert is_in_large_pages(dfeats)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    calls: list[tuple[int, int, int]] = []
    monkeypatch.setattr(pages, "_madvise", lambda: lambda *call: calls.append(call))
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 14, raising=False)
    return calls


def test_only_whole_pages_of_large_tensors_are_asked_for(asked: Any) -> None:
    small, large = torch.empty(LARGE // 4 - 1), torch.empty(LARGE // 4 + 5000)
    assert in_large_pages(small) is small
    assert asked == []
    assert in_large_pages(large) is large
    ((start, size, advice),) = asked
    assert advice == 14
    assert start % mmap.PAGESIZE == size % mmap.PAGESIZE == 0
    assert large.data_ptr() <= start < large.data_ptr() + mmap.PAGESIZE
    assert 0 <= large.data_ptr() + large.nbytes - (start + size) < mmap.PAGESIZE


def test_what_has_no_memory_is_left_alone(asked: Any) -> None:
    with FakeTensorMode():
        in_large_pages(torch.empty(LARGE))
    in_large_pages(torch.empty(LARGE, device="meta"))
    assert asked == []


def test_another_system_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    pages._madvise.cache_clear()
    try:
        assert pages._madvise() is None
        tensor = torch.ones(LARGE)
        assert in_large_pages(tensor) is tensor
    finally:
        pages._madvise.cache_clear()
