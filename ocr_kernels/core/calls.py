"""What calling a module runs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class StandIn:
    """What gives the same results as the forward of a module's class."""

    def logits(self, classifier: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """What a classifier makes of the result; None where it has to be called with that."""
        return None


def is_plain_call(module: nn.Module) -> bool:
    """Whether calling `module` runs its class's forward, or what stands in for it, and nothing else."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or has_own_forward(module)
        or type(module).__call__ is not nn.Module.__call__
        or module._compiled_call_impl is not None
        or torch.nn.modules.module._has_any_global_hook()
    )


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module's forward is the instance's own, not its class's, nor what stands in for that."""
    forward = vars(module).get("forward")
    return not (forward is None or isinstance(forward, StandIn)) or isinstance(module, torch.fx.GraphModule)


def is_recorded() -> bool:
    """Whether the call becomes part of a program that is to run elsewhere."""
    return torch.jit.is_tracing() or is_exported()  # type: ignore[attr-defined, no-untyped-call]


def is_exported() -> bool:
    """Whether torch.export traces the call. Its public function is true under any torch.compile of PyTorch 2.11."""
    return torch.compiler._is_exporting_flag


_apart = 0  # threads and blocks that want modules taken apart
_counting = threading.Lock()


@contextlib.contextmanager
def taken_apart() -> Iterator[None]:
    """In here, modules that have one op for their layers run these one by one."""
    _count(1)
    try:
        yield
    finally:
        _count(-1)


def _count(change: int) -> None:
    global _apart
    with _counting:
        _apart += change


def is_taken_apart() -> bool:
    return _apart > 0
