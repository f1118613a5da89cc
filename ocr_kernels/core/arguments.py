"""Checks of an op's arguments. Every error names the argument, what was expected and what came."""

from __future__ import annotations

from torch import Tensor

from ocr_kernels.core.layout import DTYPES


def check_tensors(**arguments: object) -> None:
    for name, argument in arguments.items():
        if not isinstance(argument, Tensor):
            raise TypeError(f"{name} must be a tensor, but is {type(argument).__name__}")


def check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, but is {tensor.dtype}")


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, but is on {tensor.device}")


def check_shape(name: str, tensor: Tensor, layout: str, matches: bool) -> None:
    if not matches:
        raise ValueError(f"{name} must have shape {layout}, but has {tuple(tensor.shape)}")
