"""Which implementation runs an op: `reference`, `triton` or `native`, and why one cannot run here."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, TypeVar, cast, get_args

import torch
from torch import Tensor

from ocr_kernels.core import libraries
from ocr_kernels.core.calls import is_exported
from ocr_kernels.core.layout import is_channels_last

Backend: TypeAlias = Literal["reference", "triton", "native"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
# Tried in this order when no backend is named; then the reference.
_FASTEST: dict[str, tuple[Backend, ...]] = {"cpu": ("native",), "cuda": ("triton", "native")}

_default = cast("Backend | None", os.environ.get("OCR_KERNELS_BACKEND") or None)  # calls say what is wrong with it
_overrides: dict[
    object, Backend | None
] = {}  # of the blocks of `use_backend` that are open, in the order of their start
_selected = _default  # process-wide, like torch.backends' flags
_lock = threading.Lock()
_log = logging.getLogger("ocr_kernels")
_said: set[str] = set()
_problems: dict[tuple[str, str | None], str | None] = {}  # of backends on types of devices, or on this machine


Function = TypeVar("Function", bound=Callable[..., object])


def assume_constant_result(function: Function) -> Function:
    """`torch.compiler.assume_constant_result`, less its import of Dynamo, which takes a second."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def available_backends(device_type: str | None = None) -> dict[Backend, bool | str]:
    """Every backend with `True`, or with the sentence that says why it cannot run on this machine.

    With a `device_type`, `"cpu"` or `"cuda"`, why it cannot run on its tensors.

    Examples:
        >>> available_backends()["reference"]
        True
    """
    return {name: _problem(name, device_type) or True for name in BACKENDS}


@contextmanager
def use_backend(backend: Backend | None) -> Iterator[None]:
    """Run the calls inside the block that name no backend on `backend` (`None`: choose by device).

    The choice holds for the whole process, like PyTorch's own backend flags, so worker threads see it
    too. Of several open blocks, in whatever threads, the one that was entered last decides; none outlasts its block.
    A backward pass runs on the backend of its forward pass, inside the block or after it.

    Raises:
        ValueError: `backend` is not the name of a backend.
        RuntimeError: it cannot run on this machine; the message says why.

    Examples:
        >>> with use_backend("reference"):
        ...     regions = spatial_gather(torch.randn(1, 8, 4, 4), torch.randn(1, 3, 4, 4))
    """
    if backend is not None:
        _require(backend)
    block = object()
    _override(lambda: _overrides.update({block: backend}))
    try:
        yield
    finally:
        _override(lambda: _overrides.pop(block))


def _override(change: Callable[[], object]) -> None:
    global _selected
    with _lock:
        change()
        _selected = [_default, *_overrides.values()][-1]


def resolve_backend(
    device: torch.device, backend: Backend | None = None, implemented: Sequence[Backend] = BACKENDS
) -> Backend:
    """The backend for tensors on `device`: the caller's, else the selected one, else the fastest there.

    `implemented` are those that have the op in question. A backend that somebody named runs or raises; only the
    automatic choice looks further.
    """
    kind = device.type
    name = backend if backend is not None else _selected
    if name is None:
        for name in _FASTEST.get(kind, ()):
            if name in implemented and _problem(name, kind) is None:
                return name
        if implemented is BACKENDS and kind in _FASTEST:
            _say_what_runs(kind)
        return "reference"
    problem = _problem(name, kind)
    if problem is not None or name not in implemented:
        _require(name)
        if name not in implemented:
            raise RuntimeError(f"backend {name!r} has no kernels for this op; {' and '.join(implemented)} have")
        raise RuntimeError(f"backend {name!r} cannot run on a {kind} tensor: {problem}")
    return name


@assume_constant_result
def _say_what_runs(device_type: str) -> None:
    """Once, where no kernels are there for a type of device: nothing else tells that they were left out."""
    if device_type not in _said:
        _said.add(device_type)
        reasons = "; ".join(f"{name}: {_problem(name, device_type)}" for name in _FASTEST[device_type])
        _log.warning("ocr_kernels: running on plain PyTorch, backend 'reference', on %s. %s", device_type, reasons)


def is_offered(implemented: Sequence[Backend], by_default: bool = True) -> bool:
    """Whether a module that has another way, too, is to use an op with these backends: a selected one is among them."""
    return by_default if _selected is None else _selected in implemented


@functools.cache
def implementation(op: str, backend: Backend, device_type: str, implemented: Sequence[Backend] = BACKENDS) -> Any:
    """The module that has an op's kernels for one backend, once it is known to run on that type of device."""
    return importlib.import_module(
        f"ocr_kernels.{op}.{resolve_backend(torch.device(device_type), backend, implemented)}"
    )


def left_to_compiler(pixels: Tensor, backend: Backend | None = None, *, is_of_images: bool | None = None) -> bool:
    """Whether a call is part of a program that torch.compile makes for a CPU, where plain PyTorch is faster than an op.

    Inductor lays pixels out channels last for its convolutions, whatever the program says, and plain products read what
    they get; for an op it writes what the op reads in the program's layout as well. Those copies cost several times
    what the kernels save. A backend that somebody named stays, and so do images `[B, C, *S]` that are channels last;
    `is_of_images` says whether these are such, if the number of dimensions does not.
    """
    return (
        torch.compiler.is_compiling()
        and backend is None
        and _selected is None
        and pixels.is_cpu
        and not is_exported()
        and not ((pixels.dim() > 3 if is_of_images is None else is_of_images) and is_channels_last(pixels))
    )


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on any device and slowly."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def _require(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, but is {name!r}")
    problem = _problem(name, None)
    if problem is not None:
        raise RuntimeError(f"backend {name!r} cannot run: {problem}")


@assume_constant_result
def _problem(name: str, device_type: str | None) -> str | None:
    """Why a backend cannot run on tensors of a type, or if None on any here, found out once; None where it can."""
    try:
        return _problems[name, device_type]
    except KeyError:
        problem = _problems[name, device_type] = _find_problem(name, device_type)
        return problem


def _find_problem(name: str, device_type: str | None) -> str | None:
    if name == "reference":
        return None
    if name == "native":
        return libraries.problem(device_type or "cpu")  # the library for GPUs needs that for CPUs
    problem = _triton_problem() if device_type is None else _problem(name, None)
    if problem is None and device_type not in (None, "cuda") and not interpreting():
        return "it needs a GPU tensor, or TRITON_INTERPRET=1 set before Python starts"
    return problem


def _triton_problem() -> str | None:
    try:
        import triton  # noqa: F401  (whether it imports is the question)
    except Exception as error:  # a broken installation raises anything
        return f"Triton does not import ({type(error).__name__}: {error}); `pip install triton` where it is supported"
    if interpreting() or torch.cuda.is_available():
        return None
    return "no GPU is visible to PyTorch; TRITON_INTERPRET=1 runs the kernels on the CPU, for tests"
