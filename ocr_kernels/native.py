"""Find and load the compiled library, or say why not."""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path
from typing import Any

import torch

_BUILD = "`OCR_KERNELS_BUILD=cpu pip install --no-build-isolation` from a checkout builds it, or says what it lacks"


def library() -> Path:
    """The file: beside this one, unless the environment names another."""
    return Path(os.environ.get("OCR_KERNELS_LIBRARY") or Path(__file__).with_name("libocr_kernels_cpu.so"))


@functools.cache
def problem() -> str | None:
    """Why the compiled library is not there, found out by loading it once; None where it is.

    A library that is there and does not load is worth a warning.
    """
    path = library()
    if not path.is_file():
        return f"this installation contains no compiled library ({path}): {_BUILD}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        reason = f"the compiled library was built for another PyTorch or another system ({error}): {_BUILD}"
        warnings.warn(f"ocr_kernels: {reason}. Until then the other backends run", RuntimeWarning, stacklevel=2)
        return reason
    return None


def ops() -> Any:
    """The library's ops. A program that was exported elsewhere comes here without having asked for a backend.

    Raises:
        RuntimeError: the library is not there; the message says why.
    """
    reason = problem()
    if reason is not None:
        raise RuntimeError(f"backend 'native' cannot run: {reason}")
    return torch.ops.ocr_kernels_native


def facts() -> dict[str, str]:
    """The library's version, its compiler, the PyTorch it was built with, its instruction sets and the one in use."""
    return dict(line.split("=", 1) for line in ops().build_facts().splitlines())
