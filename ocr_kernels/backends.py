"""Which implementation runs an op: `reference`, `triton` or `native`, and why one cannot run here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from ocr_kernels import native

BACKENDS = ("reference", "triton", "native")
_FASTEST = {"cpu": "native", "cuda": "triton"}  # of those that no one asked for, what to try before the reference

_selected = os.environ.get("OCR_KERNELS_BACKEND") or None  # process-wide, like torch.backends' flags
_problems: dict[str, str | None] = {"reference": None}


Function = TypeVar("Function", bound=Callable[..., object])


def assume_constant_result(function: Function) -> Function:
    """`torch.compiler.assume_constant_result`, less its import of `torch._dynamo`, which takes a second."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def available_backends() -> dict[str, bool | str]:
    """Every backend with `True`, or with the sentence that says why it cannot run on this machine."""
    return {name: _problem(name) or True for name in BACKENDS}


@contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Run the calls inside the block that name no backend on `backend` (`None`: choose by device).

    The choice holds for the whole process, like PyTorch's own backend flags, so worker threads see it
    too. A backward pass runs on the backend of its forward pass, inside the block or after it.

    Raises:
        ValueError: `backend` is not the name of a backend.
        RuntimeError: it cannot run on this machine; the message says why.
    """
    global _selected
    if backend is not None:
        _require(backend)
    previous, _selected = _selected, backend
    try:
        yield
    finally:
        _selected = previous


def resolve_backend(device: torch.device, backend: str | None = None, implemented: Sequence[str] = BACKENDS) -> str:
    """The backend for tensors on `device`: the caller's, else the selected one, else the fastest there.

    `implemented` are those that have the op in question. A backend that somebody named runs or raises; only the
    automatic choice looks further.
    """
    name = backend if backend is not None else _selected
    if name is None:
        name = _FASTEST.get(device.type, "reference")
        return name if name in implemented and _problem(name) is None else "reference"
    _require(name)
    if name not in implemented:
        raise RuntimeError(f"backend {name!r} has no kernels for this op; {' and '.join(implemented)} have")
    if name == "triton" and device.type != "cuda" and not interpreting():
        raise RuntimeError(
            f"backend 'triton' cannot run on a {device.type} tensor: it needs a GPU tensor, or "
            "TRITON_INTERPRET=1 set before Python starts"
        )
    if name == "native" and device.type != "cpu":
        raise RuntimeError(f"backend 'native' cannot run on a {device.type} tensor: its kernels are for CPUs")
    return name


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on any device and slowly."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def _require(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, but is {name!r}")
    problem = _problem(name)
    if problem is not None:
        raise RuntimeError(f"backend {name!r} cannot run: {problem}")


@assume_constant_result
def _problem(name: str) -> str | None:
    """Why a backend cannot run on this machine, found out once; None where it can."""
    if name not in _problems:
        _problems[name] = _triton_problem() if name == "triton" else native.problem()
    return _problems[name]


def _triton_problem() -> str | None:
    try:
        import triton  # noqa: F401  (whether it imports is the question)
    except Exception as error:  # a broken installation raises anything
        return f"Triton does not import ({type(error).__name__}: {error}); `pip install triton` where it is supported"
    if interpreting() or torch.cuda.is_available():
        return None
    return "no GPU is visible to PyTorch; TRITON_INTERPRET=1 runs the kernels on the CPU, for tests"
