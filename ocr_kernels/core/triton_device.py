"""What the Triton kernels of all ops are made of: addresses of tiles, loads, stores and products."""

from __future__ import annotations

import triton
import triton.language as tl

from ocr_kernels.core.backends import interpreting


@triton.jit
def aligned(x, ALIGNMENT: tl.constexpr):
    """x, which the launcher found to be a multiple of ALIGNMENT: by itself Triton learns of multiples of 16 only."""
    return x // ALIGNMENT * ALIGNMENT if ALIGNMENT > 1 else x


@triton.jit
def image_of(base, image, stride_b, stride_c, ALIGNMENT: tl.constexpr):
    """One image of a tensor [B, channels, N]: its address and its channel stride."""
    return base + image * aligned(stride_b, ALIGNMENT), aligned(stride_c, ALIGNMENT)


@triton.jit
def tile_pointers(
    base, row, column, stride_row, stride_column,
    INT64: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Addresses of the [ROWS, COLUMNS] tile of a matrix at `base` whose corner is (row, column).

    The corner is always addressed in 64 bits, offsets inside the tile only where they need it: INT64.
    """
    base += tl.cast(row, tl.int64) * stride_row + tl.cast(column, tl.int64) * stride_column
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    if INT64:
        rows = rows.to(tl.int64)
        columns = columns.to(tl.int64)
    return base + rows[:, None] * stride_row + columns[None, :] * stride_column


@triton.jit
def tile_mask(row, column, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which elements of the tile lie inside a matrix [height, width]."""
    return (row + tl.arange(0, ROWS) < height)[:, None] & (column + tl.arange(0, COLUMNS) < width)[None, :]


@triton.jit
def load_tile(
    base, row, column, height, width, stride_row, stride_column,
    INT64: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The tile, with zeros where it lies outside the matrix [height, width]."""
    pointers = tile_pointers(base, row, column, stride_row, stride_column, INT64, ROWS, COLUMNS)
    return tl.load(pointers, mask=tile_mask(row, column, height, width, ROWS, COLUMNS), other=0.0)


@triton.jit
def store_tile(
    base, tile, row, column, height, width, stride_row, stride_column,
    INT64: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store the part of the tile inside the matrix [height, width], rounded to its dtype."""
    pointers = tile_pointers(base, row, column, stride_row, stride_column, INT64, ROWS, COLUMNS)
    mask = tile_mask(row, column, height, width, ROWS, COLUMNS)
    tl.store(pointers, narrow(tile, base.dtype.element_ty), mask=mask)


# Triton's interpreter multiplies bfloat16 tiles as the integers that store them, and truncates when it narrows to
# bfloat16; the two functions below do there what a GPU does.
INTERPRETING = tl.constexpr(interpreting())


@triton.jit
def product(a, b, accumulator, INPUT_PRECISION: tl.constexpr):
    """accumulator + a @ b, in the accumulator's dtype."""
    if INTERPRETING:
        a = a.to(accumulator.dtype)
        b = b.to(accumulator.dtype)
    return tl.dot(a, b, accumulator, input_precision=INPUT_PRECISION, out_dtype=accumulator.dtype)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """x in DTYPE, rounded to nearest even."""
    if INTERPRETING and DTYPE == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)
