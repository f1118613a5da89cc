"""Rewritten methods: which classes have them, and that they are the methods they were."""

from __future__ import annotations

import functools
import inspect
import linecache
import threading
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from module_results import CountOps
from torch import Tensor, nn

from ocr_kernels import reference
from ocr_kernels.recognition import Recognition, current, place_of_current
from ocr_kernels.replace import _is_direct, replace_ocr_modules
from ocr_kernels.rewriting import rewritten_methods


class Gather(nn.Module):
    def forward(self, feats: Tensor, logits: Tensor, *, scale: float = 1.0) -> Tensor:
        """Feats `[B, C, N]`, logits `[B, K, N]`."""
        return self.__summed(feats, F.softmax(scale * logits, dim=2))

    def __summed(self, feats: Tensor, weights: Tensor) -> Tensor:
        return weights @ feats.permute(0, 2, 1)


class Above(Gather):
    def forward(self, *args: Tensor, **kwargs: float) -> Tensor:
        return super().forward(*args, **kwargs)


class AboveAll(Gather):
    def forward(self, feats: Tensor, logits: Tensor) -> Tensor:
        super().eval()
        return super().forward(feats, logits)


class InPlace(nn.Module):
    def forward(self, feats: Tensor, logits: Tensor) -> Tensor:
        logits.mul_(0.5)
        return torch.bmm(logits.softmax(2), feats.permute(0, 2, 1))


class Augmented(nn.Module):
    def forward(self, feats: Tensor, logits: Tensor) -> Tensor:
        logits *= 0.5
        return torch.bmm(logits.softmax(2), feats.permute(0, 2, 1))


class Assigned(nn.Module):
    def forward(self, feats: Tensor, logits: Tensor) -> Tensor:
        logits[0] = 0
        return torch.bmm(logits.softmax(2), feats.permute(0, 2, 1))


class Out(nn.Module):
    def forward(self, feats: Tensor, logits: Tensor) -> Tensor:
        torch.mul(logits, 0.5, out=logits)
        return torch.bmm(logits.softmax(2), feats.permute(0, 2, 1))


def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


class Decorated(nn.Module):
    @decorator
    def forward(self, feats: Tensor, logits: Tensor) -> Tensor:
        return torch.bmm(logits.softmax(2), feats.permute(0, 2, 1))


class Static(nn.Module):
    def forward(self, feats: Tensor, logits: Tensor) -> Tensor:
        return self.summed(feats, logits)

    @staticmethod
    def summed(feats: Tensor, logits: Tensor) -> Tensor:
        return torch.bmm(logits.softmax(2), feats.permute(0, 2, 1))


def summed(feats: Tensor, logits: Tensor) -> Tensor:
    return torch.bmm(logits.softmax(2), feats.permute(0, 2, 1))


class Neighbour(nn.Module):
    def forward(self, feats: Tensor, logits: Tensor) -> Tensor:
        return summed(feats, logits)


class WithChild(nn.Module):
    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child

    def forward(self, feats: Tensor, logits: Tensor) -> Tensor:
        return torch.bmm(F.softmax(self.child(logits), 2), feats.permute(0, 2, 1))


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 6, 15), torch.randn(2, 4, 15)


@pytest.mark.parametrize("module_class", [Gather, Above, reference.SpatialGather, reference.ObjectAttentionBlock])
def test_what_is_rewritten(module_class: type[nn.Module]) -> None:
    methods = rewritten_methods(module_class)
    assert methods is not None
    for name, method in methods.items():
        original = Gather.forward if name.startswith("_ocr_kernels_super") else getattr(module_class, name)
        assert method is not original
        assert inspect.signature(method) == inspect.signature(original)
        assert method.__globals__ is original.__globals__
        assert method.__code__.co_firstlineno == original.__code__.co_firstlineno


@pytest.mark.parametrize(
    "module",
    [
        *(kind() for kind in (AboveAll, InPlace, Augmented, Assigned, Out, Decorated, Static, Neighbour)),
        *(WithChild(child) for child in (nn.Softmax(2), nn.ReLU(inplace=True), nn.Sequential(Gather()))),
    ],
    ids=lambda module: type(getattr(module, "child", module)).__name__,
)
def test_what_needs_the_mode(module: nn.Module) -> None:
    assert not _is_direct(module)


@pytest.mark.parametrize("child", [nn.Identity(), nn.ReLU(), nn.Dropout(0.1), nn.Conv1d(4, 4, 1)])
def test_children_that_do_not(child: nn.Module) -> None:
    assert _is_direct(WithChild(child))


def test_a_file_that_changed_since_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line.replace("weights @ feats", "weights @ -feats") for line in linecache.getlines(__file__)]
    monkeypatch.setattr(linecache, "getlines", lambda *_: lines)
    rewritten_methods.cache_clear()
    assert rewritten_methods(Gather) is None
    monkeypatch.setattr(linecache, "getlines", lambda *_: [])
    rewritten_methods.cache_clear()
    assert rewritten_methods(Gather) is None
    rewritten_methods.cache_clear()


class Attention(nn.Module):
    def __init__(self, normed: bool = True) -> None:
        super().__init__()
        self.normed = normed

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = torch.matmul(query, key)
        if self.normed:
            weights = weights * query.shape[2] ** -0.5
        weights = F.softmax(weights, dim=-1)
        context = torch.bmm(weights, value).permute(0, 2, 1)
        return context.contiguous()


class Unscaled(Attention):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = torch.matmul(query, key)
        weights = torch.softmax(weights, -1)
        return torch.matmul(weights, value)


class OverPixels(Attention):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = torch.matmul(query, key)
        weights = torch.softmax(weights, 1)
        return torch.matmul(weights, value)


class Tempered(Attention):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = torch.matmul(query, key)
        weights = query[:1, :1, :1] * weights
        weights = F.softmax(weights, dim=-1)
        return torch.matmul(weights, value)


class UsedAgain(Attention):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = torch.matmul(query, key)
        weights = F.softmax(weights, dim=-1)
        context = torch.matmul(weights, value)
        return context + weights.sum()


class InLoop(Attention):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        for _ in range(2):
            weights = torch.matmul(query, key)
            weights = F.softmax(weights, dim=-1)
            context = torch.matmul(weights, value)
        return context


class Converted(Attention):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = torch.matmul(query, key)
        weights = scores.softmax(-1, torch.float64)
        return torch.matmul(weights, value.double())


class OwnSoftmax(Attention):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = torch.matmul(query, key)
        weights = self.softmax(weights, -1)
        return torch.matmul(weights, value)

    def softmax(self, scores: Tensor, axis: int) -> Tensor:
        return 2 * scores.softmax(axis)


@pytest.mark.parametrize(
    ("module", "joined", "fused"),
    [
        (Converted(), False, 0),
        (OwnSoftmax(), True, 0),
        (Attention(), True, 1),
        (Attention(normed=False), True, 1),
        (Unscaled(), True, 1),
        (OverPixels(), True, 0),
        (Tempered(), True, 0),
        (UsedAgain(), False, 1),
        (InLoop(), False, 2),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_statements_are_joined(module: nn.Module, joined: bool, fused: int) -> None:
    arguments = torch.randn(2, 15, 4), torch.randn(2, 4, 3), torch.randn(2, 3, 6)
    expected = module(*arguments)
    replace_ocr_modules(module)
    methods = rewritten_methods(type(module).__mro__[1])
    assert methods is not None
    assert ("_ocr_kernels_attended" in methods["forward"].__code__.co_names) == joined
    with CountOps() as ops:
        torch.testing.assert_close(module(*arguments), expected)
    assert (ops.gather, ops.attention) == (0, fused)


@pytest.mark.parametrize("module_class", [Gather, Above])
def test_one_call_is_fused_and_leaves_nothing(module_class: type[nn.Module]) -> None:
    module, (feats, logits) = module_class(), inputs()
    expected = module(feats, logits, scale=0.5)
    replace_ocr_modules(module)
    with CountOps() as ops:
        torch.testing.assert_close(module(feats, logits, scale=0.5), expected)
        assert (ops.gather, ops.attention) == (1, 0)
        torch.testing.assert_close(module._Gather__summed(feats, F.softmax(0.5 * logits, 2)), expected)  # called alone
        assert (ops.gather, ops.attention) == (1, 0)
    assert current() is None


def test_an_error_in_forward_leaves_nothing_and_points_to_its_line() -> None:
    module = Gather()
    replace_ocr_modules(module)
    with pytest.raises(IndexError) as error:
        module(torch.randn(2), torch.randn(2))
    assert current() is None
    assert "F.softmax(scale * logits, dim=2)" in "".join(traceback.format_exception(error.value))


def test_threads_do_not_share_a_recognition() -> None:
    seen = []
    place = place_of_current()
    place.recognition = Recognition()
    try:
        thread = threading.Thread(target=lambda: seen.append(current()))
        thread.start()
        thread.join()
    finally:
        place.recognition = None
    assert seen == [None]
