"""What the launchers of the Triton kernels share: tile sizes, splits, alignment, and facts about the device."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ocr_kernels.core.backends import interpreting

# In float16 a softmax weight under 2**-14 would be subnormal and one under 2**-24 zero. Weights are at most 1,
# so they go into a product multiplied by 2**15 and come out of it divided.
FLOAT16_LIFT = 2.0**15


TL = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def alignment(*tensors: Tensor) -> int:
    """The largest power of two up to 16 that divides the pixels and the strides of tensors [B, channels, N].

    It is 1 in channels last, where the channels' own number decides how many are loaded at once.
    """
    return math.gcd(16, *(length for t in tensors for length in (t.shape[2], *t.stride()[:2])))


def requires_int64_offsets(*extents: int) -> bool:
    """Whether an offset inside a tile can pass 2**31, given its extents (last index times stride, summed)."""
    return max(extents) >= 2**31


def extent(rows: int, stride_row: int, columns: int, stride_column: int) -> int:
    """The largest offset inside a tile of `rows` by `columns` elements."""
    return (rows - 1) * abs(stride_row) + (columns - 1) * abs(stride_column)


def padded(size: int, most: int) -> int:
    """A tile's length along a dimension of `size`: a power of two from 16, the least a matrix unit takes, to `most`."""
    return max(16, min(1 << (size - 1).bit_length(), most))


def round_up(length: int, multiple: int) -> int:
    """Rows of partial sums are padded to a multiple of 16, so that they are stored with one address for several."""
    return -(-length // multiple) * multiple


def dot_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype in which tiles enter products: float64 if any tensor's is, else the first tensor's.

    Where no matrix unit takes 16-bit tiles, they are multiplied as float32, which holds them exactly.
    """
    if any(t.dtype == torch.float64 for t in tensors):
        return torch.float64
    dtype = tensors[0].dtype
    return dtype if dtype.itemsize > 2 or device_facts(tensors[0].device).matrix_units else torch.float32


def lift(dtype: torch.dtype) -> float:
    return FLOAT16_LIFT if dtype == torch.float16 else 1.0


def input_precision() -> str:
    """How float32 tiles are multiplied: as PyTorch's own float32 matrix products are, IEEE by default."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def split(length: int, block: int, programs: int, wanted: int) -> tuple[int, int]:
    """Cut `length` into chunks of whole blocks so that `programs` times as many programs reach `wanted`.

    Returns (chunk, number of chunks); no chunk is empty.
    """
    blocks = triton.cdiv(length, block)
    chunk = triton.cdiv(blocks, max(1, min(blocks, triton.cdiv(wanted, programs)))) * block
    return chunk, triton.cdiv(length, chunk)


class Blocks(NamedTuple):
    """Tile sizes along channels, regions and pixels, and how a program runs."""

    channels: int
    regions: int
    pixels: int
    num_warps: int
    num_stages: int

    def arguments(self) -> dict[str, int]:
        """As arguments of a launch."""
        return {
            "BLOCK_C": self.channels,
            "BLOCK_K": self.regions,
            "BLOCK_N": self.pixels,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


# For each size of a tile's elements in bytes: (channels, pixels, num_warps, num_stages) where the region tile holds
# up to 32, 64, 128 and 256 regions, and where more than 256 come in tiles of 128. Chosen so that registers do not spill
# on any architecture.
TileTable = Mapping[int, tuple[tuple[int, int, int, int], ...]]


def blocks_from(table: TileTable, channels: int, regions: int, itemsize: int, most_regions: int = 256) -> Blocks:
    """Tiles for `channels` channels and all regions up to `most_regions`."""
    many = regions > most_regions
    block_k = most_regions // 2 if many else padded(regions, most_regions)
    row = -1 if many else max(block_k.bit_length() - 6, 0)
    block_c, pixels, num_warps, num_stages = table[itemsize][row]
    return Blocks(padded(channels, block_c), block_k, pixels, num_warps, num_stages)


class DeviceFacts(NamedTuple):
    """What tile sizes depend on."""

    multiprocessors: int
    shared_memory: int  # bytes that one program may use
    matrix_units: bool  # whether they take 16-bit tiles; Triton uses none before compute capability 8.0


@functools.cache
def device_facts(device: torch.device) -> DeviceFacts:
    if device.type != "cuda" or interpreting():
        return DeviceFacts(2, 232448, True)  # the interpreter: splits enough to be tested, tiles as on a large GPU
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    matrix_units = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return DeviceFacts(int(properties["multiprocessor_count"]), int(properties["max_shared_mem"]), matrix_units)
