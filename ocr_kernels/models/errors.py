"""How far one result of a module is off another."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Errors(NamedTuple):
    """Of the output that is nearest its bound, or furthest beyond it: how far it is off, and the module's own is."""

    error: float
    eager_error: float | None  # in the module's dtype, against float64; None where that could not be run
    relative_error: float  # to the largest value
    bound: float

    def why_not(self) -> str | None:
        if self.error <= self.bound:
            return None
        return f"its outputs would be off by {self.error:.1e} (relative {self.relative_error:.1e})"


def errors(found: Any, expected: Any, exact: Callable[[], Any]) -> Errors:
    """How far `found` is off, from float64 if `exact` gives something near `expected`, else from `expected`."""
    outputs = _outputs(expected)
    eps = max([torch.finfo(t.dtype).eps for t in outputs], default=0.0)
    truth = None
    if eps > torch.finfo(torch.float64).eps:  # nothing is more exact than that
        try:
            truth = _outputs(exact())
            pairs = zip(outputs, truth, strict=True)
            if max((relative_error(*pair) for pair in pairs), default=0.0) > min(0.5, 64 * eps**0.5):
                truth = None
        except Exception:  # a module may do anything in another dtype
            truth = None
    worst = Errors(0.0, None if truth is None else 0.0, 0.0, 0.0)
    for i, (ours, eager) in enumerate(zip(_outputs(found), outputs, strict=True)):
        error, largest = distance(ours, eager if truth is None else truth[i])
        eager_error = None if truth is None else distance(eager, truth[i])[0]
        bound = 4 * eps**0.5 * largest if eager_error is None else 4 * eager_error + 8 * eps * largest
        each = Errors(error, eager_error, error / (largest or 1.0), bound)
        worst = max(worst, each, key=_share)
    return worst


def _share(of: Errors) -> tuple[float, float]:
    return (of.error / of.bound if of.bound else of.error and math.inf), of.bound


def _outputs(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor) and t.is_floating_point()]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value."""
    error, largest = distance(found, expected)
    return error / (largest or 1.0)


def distance(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """The largest difference, and the largest finite value.

    What is not finite on one side alone, or differs there, is off by infinity, as is another shape.
    """
    if found.shape != expected.shape:
        return math.inf, 0.0
    if not expected.numel():
        return 0.0, 0.0
    a, b = found.detach().double(), expected.detach().double()
    same = (a == b) | (a.isnan() & b.isnan())
    error = (a - b).abs().masked_fill(same, 0).nan_to_num(nan=math.inf, posinf=math.inf).max().item()
    return error, b.abs().nan_to_num(nan=0.0, posinf=0.0).max().item()
