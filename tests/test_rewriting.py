"""Rewritten methods: which functions have copies, and that they are the functions they were."""

from __future__ import annotations

import functools
import inspect
import linecache
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from module_results import CountOps
from torch import Tensor, nn

from ocr_kernels import reference, replace_ocr_modules
from ocr_kernels.models.rewriting import Rewriter


class Gather(nn.Module):
    def forward(self, feats: Tensor, logits: Tensor, *, scale: float = 1.0) -> Tensor:
        """Feats `[B, C, N]`, logits `[B, K, N]`."""
        return self.__summed(feats, F.softmax(scale * logits, dim=2))

    def __summed(self, feats: Tensor, weights: Tensor) -> Tensor:
        return weights @ feats.permute(0, 2, 1)


class Above(Gather):
    def forward(self, *args: Tensor, **kwargs: float) -> Tensor:
        return super().forward(*args, **kwargs)


class NamedAbove(Gather):
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


class WithoutGradients(nn.Module):
    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)
    def forward(self, feats: Tensor, logits: Tensor) -> Tensor:
        return torch.bmm(logits.softmax(2), feats.permute(0, 2, 1))


class Nested(nn.Module):
    def forward(self, feats: Tensor, logits: Tensor) -> Tensor:
        weights = logits.softmax(2)
        return (lambda x: torch.bmm(weights, x))(feats.permute(0, 2, 1))


class Generating(nn.Module):
    def forward(self, feats: Tensor, logits: Tensor) -> Tensor:
        x, scores = (t.flatten(2) for t in (feats, logits))
        return torch.bmm(scores.softmax(2), x.permute(0, 2, 1))


class Yielding(nn.Module):
    def forward(self, feats: Tensor, logits: Tensor) -> Any:
        yield torch.bmm(logits.softmax(2), feats.permute(0, 2, 1))


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


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 6, 15), torch.randn(2, 4, 15)


@pytest.mark.parametrize("module_class", [Gather, Above, reference.SpatialGather, reference.ObjectAttentionBlock])
def test_a_copy_is_the_function_with_one_parameter_more(module_class: type[nn.Module]) -> None:
    copies = Rewriter().copies([module_class])
    assert module_class.forward in copies
    for original, copy in copies.items():
        assert copy is not original
        assert inspect.signature(copy) == inspect.signature(original)
        assert copy.__globals__ is original.__globals__
        assert copy.__code__.co_firstlineno == original.__code__.co_firstlineno
        assert copy.__code__.co_varnames[1:] == original.__code__.co_varnames
        assert copy.__code__.co_argcount == original.__code__.co_argcount + 1


@pytest.mark.parametrize(
    "kind", [Above, NamedAbove, InPlace, Augmented, Assigned, Out, WithoutGradients, Generating, Static, Neighbour]
)
def test_what_is_followed(kind: type[nn.Module]) -> None:
    module, arguments = kind(), inputs()
    expected = module(*(t.clone() for t in arguments))
    assert replace_ocr_modules(module)
    with CountOps() as ops:
        torch.testing.assert_close(module(*(t.clone() for t in arguments)), expected)
    assert ops.gather == 1


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Decorated, "its forward is wrapped by a decorator of"),
        (Nested, "has a function that uses weights"),
        (Yielding, "has a Yield"),
    ],
)
def test_what_is_not_followed(kind: type[nn.Module], reason: str) -> None:
    assert reason in replace_ocr_modules(kind()).left_alone[0].reason


def test_a_file_that_changed_since_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line.replace("weights @ feats", "weights @ -feats") for line in linecache.getlines(__file__)]
    monkeypatch.setattr(linecache, "getlines", lambda *_: lines)
    copies = Rewriter().copies([Gather])
    assert Gather._Gather__summed not in copies  # type: ignore[attr-defined]
    monkeypatch.setattr(linecache, "getlines", lambda *_: [])
    assert Rewriter().copies([Gather]) == {}
    assert Rewriter().why_not(Gather) == "its source is not at hand"


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
    ("module", "fused"),
    [
        (Converted(), 0),
        (OwnSoftmax(), 0),
        (Attention(), 1),
        (Attention(normed=False), 1),
        (Unscaled(), 1),
        (OverPixels(), 0),
        (Tempered(), 0),
        (UsedAgain(), 1),
        (InLoop(), 2),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_statements_are_followed(module: nn.Module, fused: int) -> None:
    arguments = torch.randn(2, 15, 4), torch.randn(2, 4, 3), torch.randn(2, 3, 6)
    expected = module(*arguments)
    replace_ocr_modules(module)
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


def test_an_error_in_forward_points_to_its_line() -> None:
    module = Gather()
    replace_ocr_modules(module)
    with pytest.raises(IndexError) as error:
        module(torch.randn(2), torch.randn(2))
    assert "F.softmax(scale * logits, dim=2)" in "".join(traceback.format_exception(error.value))
