"""Launches of Triton kernels, prepared once for tensors of the same shapes, strides and dtypes.

On the host a launch can take longer than its kernel runs: its tile is chosen, and Triton asks each argument which
machine code it needs. Both follow from shapes, strides, dtypes and addresses, so neither is done twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

P = ParamSpec("P")
T = TypeVar("T")

MOST = 4096  # different launches that are kept

_prepared: dict[Any, Any] = {}
_MISSING = object()


def prepared(prepare: Callable[P, T]) -> Callable[P, T]:
    """`prepare`, called once for all tensors that are alike: of what it is given by position it may read no values.

    It takes tensors by position, and whatever else it depends on by name.
    """

    @functools.wraps(prepare)
    def recall(*tensors: Any, **others: Any) -> Any:
        dtypes = [t.dtype for t in tensors]
        precision = float32_precision() if torch.float32 in dtypes else None
        alike = [(t.shape, t.stride(), t.device) for t in tensors]
        key = (prepare, precision, *dtypes, *alike, *others.values())
        found = _prepared.get(key, _MISSING)  # in one step, since other threads may forget it
        if found is _MISSING:
            if len(_prepared) >= MOST:
                _prepared.clear()
            found = _prepared[key] = prepare(*tensors, **others)
        return found

    return recall


def forget_launches() -> None:
    """Where tiles are chosen otherwise from now on."""
    _prepared.clear()


def float32_precision() -> str:
    """Of products of float32 tiles: as PyTorch's own have it, IEEE by default."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


class Launch:
    """A kernel with its grid, and with all of its arguments but the tensors, which are its first."""

    def __init__(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        self.kernel = kernel
        self.programs = programs
        self.arguments = arguments
        self.constants = constants  # by name: the kernel's last arguments, and how it is compiled
        self.rest = (*arguments, *(constants[name] for name in kernel.arg_names if name in constants))
        self.compiled: dict[tuple[Any, ...], Callable[..., None]] = {}  # by what Triton specialises tensors on

    def __call__(self, *tensors: Tensor) -> None:
        kind = tuple([(t.dtype, t.data_ptr() % 16 == 0) for t in tensors])
        run = self.compiled.get(kind)
        if run is not None:
            run(*tensors, *self.rest)
            return
        compiled = self.kernel[(self.programs,)](*tensors, *self.arguments, **self.constants)
        if isinstance(compiled, CompiledKernel) and torch.version.hip is None:  # AMD's depend on lengths, too
            self.compiled[kind] = compiled[(self.programs, 1, 1)]
