"""What is made of a module's own tensors: operations that are run again on their present values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

aten: Any = torch.ops.aten


class Ref(NamedTuple):
    """A result of a program, or one of several of that call."""

    at: int
    item: int | None = None


@dataclasses.dataclass(frozen=True)
class Call:
    """One operation of a program; among its arguments are `Ref`s."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()

    def __reduce__(self) -> Any:
        function = self.function.name() if isinstance(self.function, torch._ops.OpOverload) else self.function
        return _call, (function, self.args, self.kwargs)

    def run(self, results: Sequence[Any], device: torch.device, exact: torch.dtype, *leading: Any) -> Any:
        """`exact` is the dtype of what float32 was where the module was traced."""
        args = [_value(arg, results, exact) for arg in self.args]
        kwargs = {name: device if name == "device" else _value(arg, results, exact) for name, arg in self.kwargs}
        return self.function(*leading, *args, **kwargs)


def _call(function: Any, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> Call:
    """For unpickling: PyTorch's operations go by their names."""
    if isinstance(function, str):
        name, _, overload = function.removeprefix("aten::").partition(".")
        function = getattr(getattr(aten, name), overload or "default")
    return Call(function, args, kwargs)


def _value(arg: Any, results: Sequence[Any], exact: torch.dtype) -> Any:
    if isinstance(arg, Ref):
        return results[arg.at] if arg.item is None else results[arg.at][arg.item]
    if isinstance(arg, (list, tuple)):
        return [_value(each, results, exact) for each in arg]
    return exact if arg is torch.float32 else arg


class Program(NamedTuple):
    """Which of the module's tensors, by their paths, and what is made of them, in order; with the results' numbers."""

    sources: tuple[tuple[int, str], ...]
    calls: tuple[tuple[int, Call], ...]
    length: int

    def run(self, module: nn.Module, exact: torch.dtype) -> list[Any]:
        """The results, in float32 or float64."""
        results: list[Any] = [None] * self.length
        for at, path in self.sources:
            tensor = tensor_at(module, path).detach()
            results[at] = tensor.to(exact) if tensor.is_floating_point() else tensor
        device = results[self.sources[0][0]].device
        for at, call in self.calls:
            results[at] = call.run(results, device, exact)
        return results

    def pruned(self, wanted: Any) -> Program:
        """What `wanted` needs of it."""
        needed = _references(wanted)
        calls = []
        for at, call in reversed(self.calls):
            if at in needed:
                needed |= _references((call.args, call.kwargs))
                calls.append((at, call))
        return Program(tuple(s for s in self.sources if s[0] in needed), tuple(reversed(calls)), self.length)


def _references(tree: Any) -> set[int]:
    """The numbers of the results that are referred to."""
    if isinstance(tree, Ref):
        return {tree.at}
    if isinstance(tree, Call):
        return _references((tree.args, tree.kwargs))
    return set().union(*map(_references, tree)) if isinstance(tree, (list, tuple)) else set()


def tensor_at(module: nn.Module, path: str) -> Tensor:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name)
    return found  # type: ignore[no-any-return]


class Window(NamedTuple):
    """Which pixels a convolution takes that gives as many as it takes."""

    padding: tuple[int, ...]
    dilation: tuple[int, ...]


def channel_norm(x: Tensor, shape: list[int], weight: Any, bias: Any, eps: float) -> Tensor:
    """LayerNorm of the channels of `[B, C, K]`."""
    return F.layer_norm(x.mT, shape, weight, bias, eps).mT
