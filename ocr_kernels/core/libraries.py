"""Find and load the compiled libraries, one for CPUs and one for GPUs, or say why not.

The one for GPUs needs the other, which has the ops' schemas, and symbols that a CPU build of PyTorch has not got.
"""

from __future__ import annotations

import functools
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

_NAMES = {"cpu": "compiled library", "cuda": "compiled library for GPUs"}


def library(device_type: str = "cpu") -> Path:
    """The file: in the package, unless the environment names another for CPUs; the one for GPUs lies beside that."""
    path = Path(os.environ.get("OCR_KERNELS_LIBRARY") or Path(__file__).parent.parent / "libocr_kernels_cpu.so")
    return path if device_type == "cpu" else path.with_name("libocr_kernels_cuda.so")


def problem(device_type: str = "cpu") -> str | None:
    """Why there are no compiled kernels for a type of device, found out by loading them once; None where they are.

    A library that is there and does not load is worth a warning. That for GPUs is not touched where there is no GPU.
    """
    if device_type == "cpu":
        return _absent("cpu") or _load("cpu")
    if device_type == "cuda":
        return problem() or _absent("cuda") or _no_gpu() or _load("cuda") or _other_gpu()
    return "its kernels are for CPUs and NVIDIA GPUs"


def _absent(device_type: str) -> str | None:
    path = library(device_type)
    if path.is_file():
        return None
    if device_type == "cpu" and os.environ.get("OCR_KERNELS_LIBRARY"):
        reason = f"OCR_KERNELS_LIBRARY names a file that is not there: {path}"
        _warn(reason)
        return reason
    return f"this installation contains no {_NAMES[device_type]} ({path}): {_build(device_type)}"


def _build(device_type: str) -> str:
    command = f"OCR_KERNELS_BUILD={device_type} pip install"
    if (Path(__file__).parents[2] / "setup.py").is_file():  # in its folder Python imports it, whatever is installed
        return f"`{command} -e .` builds it in this checkout, or says what it lacks"
    return f"`{command} .` from a checkout builds it, or says what it lacks"


@functools.cache
def _load(device_type: str) -> str | None:
    try:
        torch.ops.load_library(library(device_type))
    except OSError as error:
        name, cause = _NAMES[device_type], error.__cause__ or error  # PyTorch keeps what the system said for itself
        reason = f"the {name} was built for another PyTorch or another system ({cause}): {_build(device_type)}"
        _warn(f"{reason}. Until then the other backends run")
        return reason
    if device_type == "cpu":
        try:
            with ThreadPoolExecutor(1) as outside:  # of a trace that may be going on, which would record the call
                outside.submit(torch.ops.ocr_kernels_native.build_facts).result()
        except RuntimeError as error:  # OCR_KERNELS_ISA
            reason = str(error).splitlines()[0]
            _warn(f"{reason}. Until then the other backends run")
            return reason
    return None


@functools.cache
def _warn(message: str) -> None:
    """Once for each message."""
    warnings.warn(f"ocr_kernels: {message}", RuntimeWarning, stacklevel=2)


def _no_gpu() -> str | None:
    if torch.version.hip:
        return "its kernels are for NVIDIA GPUs, and this PyTorch is a ROCm build"
    return None if torch.cuda.is_available() else "no GPU is visible to PyTorch"


def _other_gpu() -> str | None:
    """Whether there is a GPU that the library was not built for."""
    architectures = facts("cuda")["architectures"]
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if capability < (7, 5) or not any(_runs_on(capability, name) for name in architectures.split()):
            return (
                f"{torch.cuda.get_device_name(index)} has capability {capability[0]}.{capability[1]}; its kernels "
                f"need 7.5 and were built for {architectures} (TORCH_CUDA_ARCH_LIST): {_build('cuda')}"
            )
    return None


def _runs_on(capability: tuple[int, int], architecture: str) -> bool:
    """sm_80 is machine code for 8.0 to 8.9, compute_80 is compiled for any later GPU, and sm_90a is for 9.0 alone."""
    kind, _, number = architecture.partition("_")
    digits = number.rstrip("af")
    built = int(digits[:-1]), int(digits[-1])
    if digits != number:
        return capability == built
    return capability >= built and (kind == "compute" or capability[0] == built[0])


def ops(device_type: str = "cpu") -> Any:
    """The libraries' ops. A program that was exported elsewhere comes here without having asked for a backend.

    Raises:
        RuntimeError: the kernels for this type of device are not there; the message says why.
    """
    reason = problem(device_type)
    if reason is not None:
        raise RuntimeError(f"backend 'native' cannot run on a {device_type} tensor: {reason}")
    return torch.ops.ocr_kernels_native


def facts(device_type: str = "cpu") -> dict[str, str]:
    """The library's version, its compiler, the PyTorch it was built with, and the instruction sets or architectures.

    Those of the library for GPUs are read from its file, so that they are known where it cannot be loaded.
    """
    if device_type == "cpu":
        lines = ops().build_facts()
    else:
        found = re.search(rb"version=[^\0]*architectures=[^\0]*", library(device_type).read_bytes())
        lines = found[0].decode() if found else ""
    return dict(line.split("=", 1) for line in lines.splitlines())
