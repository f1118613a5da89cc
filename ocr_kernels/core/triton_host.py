"""What the launchers of the Triton kernels share: dtypes, splits, alignment, and facts about the device."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ocr_kernels.core.backends import interpreting
from ocr_kernels.core.layout import statistics_dtype
from ocr_kernels.core.tiles import NEVER_FUSED, DeviceFacts, Tile, padded
from ocr_kernels.core.triton_device import sum_splits_kernel
from ocr_kernels.core.triton_launch import Launch, float32_precision, prepared

TL = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# In float16 a softmax weight under 2**-14 would be subnormal and one under 2**-24 zero. Weights are at most 1,
# so they go into a product multiplied by 2**15 and come out of it divided.
FLOAT16_LIFT = 2.0**15


@functools.cache
def device_facts(device: torch.device) -> DeviceFacts:
    if device.type != "cuda" or interpreting():
        return DeviceFacts(2, 232448, (9, 0))  # the interpreter: splits enough to be tested, tiles as on a large GPU
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    capability = None if torch.version.hip else torch.cuda.get_device_capability(device)
    multiprocessors, shared_memory = int(properties["multiprocessor_count"]), int(properties["max_shared_mem"])
    name, warp_size = torch.cuda.get_device_properties(device).name, int(properties["warpSize"])
    return DeviceFacts(multiprocessors, shared_memory, capability, name, warp_size)


# Dtypes


@dataclass(frozen=True, eq=False)  # `numbers_of` has one object for each: a launch looks them up
class Numbers:
    """The numbers that a kernel computes with; a constant of it."""

    dot: tl.dtype  # of tiles that enter products
    accumulator: tl.dtype  # of sums and softmax statistics
    lift: float  # what softmax weights are multiplied by where they are rounded
    input_precision: str  # of float32 tiles, as `float32_precision` has it

    @property
    def itemsize(self) -> int:
        """Bytes of an element that enters a product."""
        return int(self.dot.primitive_bitwidth) // 8


def numbers_of(*tensors: Tensor) -> Numbers:
    """Products in float64 if any tensor's dtype is that, else in that of the first; sums in the statistics' dtype."""
    dtype = tensors[0].dtype
    precision = float32_precision() if dtype == torch.float32 else "ieee"
    has_matrix_units = device_facts(tensors[0].device).has_matrix_units
    return _numbers_of(dtype, statistics_dtype(*tensors), has_matrix_units, precision)


@functools.cache
def _numbers_of(dtype: torch.dtype, accumulator: torch.dtype, matrix_units: bool, precision: str) -> Numbers:
    dot = dtype
    if accumulator == torch.float64 or (dtype.itemsize == 2 and not matrix_units):  # float32 holds 16 bits exactly
        dot = accumulator
    return Numbers(tl_dtype(dot), tl_dtype(accumulator), FLOAT16_LIFT if dtype == torch.float16 else 1.0, precision)


def tl_dtype(dtype: torch.dtype) -> tl.dtype:
    if dtype not in TL:
        raise TypeError(f"the kernels take float64, float32, bfloat16 or float16, but not {dtype}")
    return TL[dtype]


# Addresses


def alignment(*tensors: Tensor) -> int:
    """The largest power of two up to 16 that divides the pixels and the strides of tensors [B, channels, N].

    It is 1 in channels last, where the channels' own number decides how many are loaded at once.
    """
    return math.gcd(16, *(length for t in tensors for length in (t.shape[2], *t.stride()[:2])))


def has_scattered_pixels(*tensors: Tensor) -> bool:
    """Whether each pixel of tensors [B, channels, N], in one memory format, has an address of its own in a tile."""
    return alignment(*tensors) == 1 and tensors[0].stride(1) != 1


def requires_int64_offsets(tile: Tile, *tensors: Tensor) -> bool:
    """Whether an offset inside a tile of tensors [B, rows, columns] can pass 2**31."""
    last = max(tile.regions, tile.channels, tile.outputs, tile.pixels) - 1
    return any(last * (strides[1] + strides[2]) >= 2**31 for strides in map(Tensor.stride, tensors))


def constants(
    tile: Tile, numbers: Numbers, pixel_tensors: Sequence[Tensor], region_tensors: Sequence[Tensor] = ()
) -> dict[str, Any]:
    """Arguments of a launch that loads or stores tiles of these tensors, [B, channels, N] and [B, channels, K]."""
    return tile.arguments | {
        "NUMBERS": numbers,
        "ALIGNMENT": alignment(*pixel_tensors),
        "INT64": requires_int64_offsets(tile, *pixel_tensors, *region_tensors),
    }


def cdiv(length: int, block: int) -> int:
    """`triton.cdiv`, which takes two microseconds on the host."""
    return -(-length // block)


def round_up(length: int, multiple: int = 16) -> int:
    """Rows of partial results have a multiple of 16, so that they are stored with one address for several."""
    return cdiv(length, multiple) * multiple


def aligned_rows(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors [B, channels, K] with such rows, zeros at the end: then one address serves for several."""
    batch, channels, regions = first.shape
    if regions % 16 == 0 and first.stride(2) == second.stride(2) == 1:
        return first, second
    rows = first.new_zeros((batch, channels + second.shape[1], round_up(regions)))
    for part, tensor in ((rows[:, :channels], first), (rows[:, channels:], second)):
        if tensor.shape[1]:  # `torch.cat` fills nothing where rows of one channel count as contiguous
            part[..., :regions].copy_(tensor)
    return rows[:, :channels], rows[:, channels:]


# Splits


def split(length: int, block: int, programs: int, wanted: int) -> tuple[int, int]:
    """Cut `length` into splits of whole blocks so that `programs` times as many programs fill `wanted` or a multiple.

    Returns (length of a split, number of splits); none is empty.
    """
    blocks = cdiv(length, block)
    splits = cdiv(programs, wanted) * wanted // programs
    split_length = cdiv(blocks, min(blocks, splits)) * block
    return split_length, cdiv(length, split_length)


def sum_splits(out: Tensor, partial: Tensor, below: Tensor | None = None, top: int = 0) -> None:
    """Fill `out` [B, C, K] with the sums over the splits of `partial` [B, splits, C, rows of 16], in a fixed order.

    `below` [B, V, K] is filled with those of the rows from `top` on, a multiple of 16.
    """
    top = out.shape[1] if below is None else top
    tensors = out, out if below is None else below, partial
    _sum_splits_launch(*tensors, top=top, rows_below=0 if below is None else below.shape[1])(*tensors)


@prepared
def _sum_splits_launch(out: Tensor, below: Tensor, partial: Tensor, *, top: int, rows_below: int) -> Launch:
    batch, channels, regions = out.shape
    splits = partial.shape[1]
    block_s, block_k = padded(splits, 128), padded(regions, 32)
    block_c = min(16, 65536 // (block_s * block_k * partial.itemsize))  # many independent loads
    return Launch(
        sum_splits_kernel, batch * cdiv(top + rows_below, block_c) * cdiv(regions, block_k),
        out.stride(), below.stride(), partial.stride(), channels, regions, top, rows_below, splits,
        BLOCK_S=block_s, BLOCK_C=block_c, BLOCK_K=block_k, num_warps=8, **NEVER_FUSED,
    )  # fmt: skip
