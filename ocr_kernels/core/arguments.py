"""Checks of an op's arguments. Every error names the argument, what was expected and what came."""

from __future__ import annotations

import sys
from numbers import Real

import torch
from torch import Tensor, nn

from ocr_kernels.core.layout import DTYPES


def check_tensors(**arguments: object) -> None:
    for name, argument in arguments.items():
        if not isinstance(argument, Tensor):
            raise TypeError(f"{name} must be a tensor, but is {type(argument).__name__}")
        if argument.layout != torch.strided or argument.is_nested:
            raise TypeError(f"{name} must be dense, but is {'nested' if argument.is_nested else argument.layout}")


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is a DTensor, without importing what makes them."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def split_scale(scale: object, scores: Tensor) -> tuple[Tensor, float]:
    """`scores` and the number to multiply them by; a tensor of one element is multiplied in, so that it is trained."""
    if isinstance(scale, (torch.SymInt, torch.SymFloat)):
        return scores, scale  # type: ignore[return-value]  # a float, once it is known
    if isinstance(scale, Real):
        return scores, float(scale)
    if not isinstance(scale, Tensor):
        raise TypeError(f"scale must be a number or a tensor of one element, but is {type(scale).__name__}")
    if scale.numel() != 1 or not scale.is_floating_point():
        raise TypeError(
            f"scale must be a number or a floating tensor of one element, but is {scale.dtype} {tuple(scale.shape)}"
        )
    return scores * scale.reshape(()).to(scores.device), 1.0


def check_dtype(name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> None:
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, but is {tensor.dtype}")
    if dtype not in (None, tensor.dtype):
        raise TypeError(f"{name} must be {dtype} here, but is {tensor.dtype}")


def check_same_dtype(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype}, but has {tensor.dtype}")


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, but is on {tensor.device}")


def check_shape(name: str, tensor: Tensor, layout: str, matches: bool) -> None:
    if not matches:
        raise ValueError(f"{name} must have shape {layout}, but has {tuple(tensor.shape)}")
