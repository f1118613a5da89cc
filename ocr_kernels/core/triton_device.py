"""What the Triton kernels of all ops are made of: matrices in memory, tiles of them, products, sums of splits."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ocr_kernels.core.backends import interpreting


class Matrix(NamedTuple):
    """A matrix in memory, of which kernels load and store tiles."""

    base: Any  # its address
    height: Any
    width: Any
    stride_row: Any
    stride_column: Any


@triton.jit
def aligned(x, ALIGNMENT: tl.constexpr):
    """x, which the launcher found to be a multiple of ALIGNMENT: by itself Triton learns of multiples of 16 only."""
    return x // ALIGNMENT * ALIGNMENT if ALIGNMENT > 1 else x


@triton.jit
def image_of(base, strides, image, height, width, ALIGNMENT: tl.constexpr, INT64: tl.constexpr):
    """One image of a tensor [B, height, width]. Offsets inside a tile are 64-bit where they need it: INT64."""
    OFFSET: tl.constexpr = tl.int64 if INT64 else tl.int32
    return Matrix(
        base + image * aligned(strides[0], ALIGNMENT),
        height,
        aligned(width, ALIGNMENT),
        tl.cast(aligned(strides[1], ALIGNMENT), OFFSET),
        tl.cast(strides[2], OFFSET),
    )


@triton.jit
def rows_of(base, height, width, row_length):
    """A contiguous matrix [height, row_length], of which `width` columns count."""
    return Matrix(base, height, width, row_length, 1)


@triton.jit
def transposed(matrix):
    return Matrix(matrix.base, matrix.width, matrix.height, matrix.stride_column, matrix.stride_row)


@triton.jit
def tile_pointers(matrix, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Addresses of the [ROWS, COLUMNS] tile whose corner is (row, column), which is always addressed in 64 bits."""
    corner = tl.cast(row, tl.int64) * matrix.stride_row + tl.cast(column, tl.int64) * matrix.stride_column
    rows = tl.arange(0, ROWS)[:, None] * matrix.stride_row
    return matrix.base + corner + rows + tl.arange(0, COLUMNS)[None, :] * matrix.stride_column


@triton.jit
def tile_mask(matrix, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which elements of the tile lie inside the matrix."""
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    return (rows < matrix.height)[:, None] & (columns < matrix.width)[None, :]


@triton.jit
def load_tile(matrix, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The [ROWS, COLUMNS] tile, with zeros where it lies outside the matrix."""
    pointers = tile_pointers(matrix, row, column, ROWS, COLUMNS)
    return tl.load(pointers, mask=tile_mask(matrix, row, column, ROWS, COLUMNS), other=0.0)


@triton.jit
def store_tile(matrix, tile, row, column):
    """Store the part of the tile inside the matrix, rounded to its dtype."""
    pointers = tile_pointers(matrix, row, column, tile.shape[0], tile.shape[1])
    mask = tile_mask(matrix, row, column, tile.shape[0], tile.shape[1])
    tl.store(pointers, narrow(tile, matrix.base.dtype.element_ty), mask=mask)


# Triton's interpreter multiplies bfloat16 tiles as the integers that store them, and truncates when it narrows to
# bfloat16; the two functions below do there what a GPU does.
INTERPRETING = tl.constexpr(interpreting())


@triton.jit
def add_product(total, a, b, NUMBERS: tl.constexpr):
    """total + a @ b."""
    a = a.to(NUMBERS.dot)
    b = b.to(NUMBERS.dot)
    if INTERPRETING:
        a = a.to(NUMBERS.accumulator)
        b = b.to(NUMBERS.accumulator)
    return tl.dot(a, b, total, input_precision=NUMBERS.input_precision, out_dtype=NUMBERS.accumulator)


@triton.jit
def product(a, b, NUMBERS: tl.constexpr):
    """a @ b, in the accumulators' dtype."""
    return add_product(tl.zeros([a.shape[0], b.shape[1]], NUMBERS.accumulator), a, b, NUMBERS)


@triton.jit
def part_of_sum(tile, n0, N):
    """A product that is added up by itself before others are added, since one long chain of sums is less exact.

    Zeros for what lies outside the N pixels are what keeps Triton from making it one chain.
    """
    return tl.where((n0 + tl.arange(0, tile.shape[1]) < N)[None, :], tile, 0.0)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """x in DTYPE, rounded to nearest even."""
    if INTERPRETING and DTYPE == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def finite(maximum):
    """What scores are lowered by before they are exponentiated: 0 where none is above -inf, since inf - inf is NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def exponential(x):
    """exp(x); in float32 as the GPU's own exponential has it, which takes those below 2**-126 as 0."""
    return tl.exp(x) if x.dtype == tl.float64 else tl.exp2(x * 1.4426950408889634)


@triton.jit
def tile_of_program(TILES, N, BLOCK_N: tl.constexpr):
    """What a program makes: one of TILES tiles of something, of the pixels from n0 on, of an image."""
    # pixels vary slowest, so that programs which share a tile of them run together
    program = tl.program_id(0) // TILES
    n0 = program % tl.cdiv(N, BLOCK_N) * BLOCK_N
    return tl.program_id(0) % TILES, n0, tl.cast(program // tl.cdiv(N, BLOCK_N), tl.int64)


@triton.jit
def split_of_program(C, K, splits, split_length, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    """What a program sums: the corner of its tile [BLOCK_C, BLOCK_K], its split among all images', its first pixel."""
    # channels vary fastest, so that programs which share a tile of regions run together
    program = tl.program_id(0)
    c0 = (program % tl.cdiv(C, BLOCK_C)) * BLOCK_C
    program //= tl.cdiv(C, BLOCK_C)
    k0 = (program % tl.cdiv(K, BLOCK_K)) * BLOCK_K
    program //= tl.cdiv(K, BLOCK_K)
    return c0, k0, program, (program % splits) * split_length


@triton.jit(do_not_specialize=["splits"])
def sum_splits_kernel(
    out,  # [B, C, K]
    below,  # [B, V, K]: of the rows from `top` on
    partial,  # [B, splits, at least top + V, row_length]
    out_strides, below_strides, partial_strides,
    C, K, top, V, splits,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add up the splits in a fixed order. All columns of a row are read, so that one load takes several."""
    c0, k0, program, _ = split_of_program(top + V, K, 1, 0, BLOCK_C, BLOCK_K)
    image = tl.cast(program, tl.int64)
    c, k = c0 + tl.arange(0, BLOCK_C), k0 + tl.arange(0, BLOCK_K)
    rows = partial + image * partial_strides[0] + tl.cast(c, tl.int64)[None, :] * partial_strides[2]
    sums = tl.zeros([BLOCK_C, BLOCK_K], partial.dtype.element_ty)
    for s0 in range(0, splits, BLOCK_S):
        split = tl.cast(s0 + tl.arange(0, BLOCK_S), tl.int64)[:, None]
        inside = ((split < splits) & (c < top + V)[None, :])[:, :, None] & (k < partial_strides[2])
        pieces = (rows + split * partial_strides[1])[:, :, None] + k  # [BLOCK_S, BLOCK_C, BLOCK_K]
        sums += tl.sum(tl.load(pieces, mask=inside, other=0.0), 0)
    if c0 < top:
        store_tile(image_of(out, out_strides, image, C, K, 1, False), sums, c0, k0)
    else:
        store_tile(image_of(below, below_strides, image, V, K, 1, False), sums, c0 - top, k0)


@triton.jit
def column_of(vector, c0, C, BLOCK_C: tl.constexpr):
    """[BLOCK_C, 1] of a vector [C], zeros after it."""
    c = c0 + tl.arange(0, BLOCK_C)
    return tl.load(vector + c, mask=c < C, other=0.0)[:, None]


@triton.jit
def masked(grad, taken, SLOPE: tl.constexpr):
    """The gradient of what an activation was taken of. NaN lets it pass, as in PyTorch."""
    if SLOPE != 1:
        grad = tl.where(taken <= 0, grad * SLOPE if SLOPE != 0 else 0.0, grad)
    return grad


@triton.jit
def add_bias(total, bias, o0, OUTPUTS):
    """total + bias[o], a [pixels, outputs] tile."""
    o = o0 + tl.arange(0, total.shape[1])
    return total + tl.load(bias + o, mask=o < OUTPUTS, other=0.0)[None, :]


@triton.jit
def activated(x, SLOPE: tl.constexpr):
    """x where it is positive, SLOPE * x elsewhere. NaN stays."""
    if SLOPE == 0:  # 0 for -inf, too
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif SLOPE != 1:
        x = tl.where(x > 0, x, x * SLOPE)
    return x
