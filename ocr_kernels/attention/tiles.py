"""The attention's tiles: the file to tune. Chosen by machine code, so that no architecture spills; never measured."""

from __future__ import annotations

import functools
from dataclasses import replace

from ocr_kernels.core.tiles import (
    ANY,
    Problem,
    Tile,
    TileRule,
    TileTable,
    has_asynchronous_copies,
    has_wgmma,
    is_amd,
    is_rdna,
    padded,
)


def is_not_turing(problem: Problem) -> bool:
    """Whether a multiprocessor has more than 64 KiB of shared memory, or AMD's registers."""
    return has_asynchronous_copies(problem) or is_amd(problem)


def has_vectors(problem: Problem) -> bool:
    """Whether one address serves for several elements."""
    return problem.scattered < 2


def has_wgmma_and_vectors(problem: Problem) -> bool:
    return has_wgmma(problem) and has_vectors(problem)


# All regions if they are up to 256, in two tiles, then pixels, then channels. More regions come in one tile at a time.
FORWARD = TileTable(
    "attention.forward",
    {
        2: (
            Tile(regions=64, last_regions=64, channels=32, pixels=32, warps=4, stages=3, when=is_rdna),
            Tile(regions=128, up_to=ANY, channels=64, pixels=64, when=is_rdna),
            Tile(regions=128, last_regions=32, channels=64, pixels=128, warps=4, stages=3, when=has_wgmma_and_vectors),
            Tile(regions=128, last_regions=64, channels=64, pixels=128, stages=3, when=has_wgmma),
            Tile(regions=128, last_regions=128, channels=32, pixels=128, stages=4, when=has_wgmma),
            Tile(regions=64, last_regions=64, channels=32, pixels=128, warps=4, stages=3),
            Tile(regions=128, last_regions=64, channels=32, pixels=64, warps=4, stages=3, shared=128),
            Tile(regions=128, last_regions=128, channels=32, pixels=64, warps=4, stages=3),
            Tile(regions=128, up_to=ANY, channels=64, pixels=64, stages=3, shared=80),
            Tile(regions=128, up_to=ANY, channels=64, pixels=64),
        ),
        4: (
            Tile(regions=32, last_regions=32, channels=16, pixels=64, warps=4, stages=2, when=is_rdna),
            Tile(regions=64, up_to=ANY, channels=32, pixels=32, stages=2, when=is_rdna),
            Tile(regions=32, last_regions=32, channels=16, pixels=128, warps=4, stages=2, when=is_not_turing),
            Tile(regions=128, last_regions=32, channels=16, pixels=64, warps=4, stages=2, when=is_not_turing),
            Tile(regions=128, last_regions=64, channels=16, pixels=64, stages=2, when=is_not_turing),
            Tile(regions=128, last_regions=128, channels=16, pixels=64, warps=4, stages=2, when=is_not_turing),
            Tile(regions=64, last_regions=64, channels=32, pixels=32, stages=2),
            Tile(regions=64, up_to=ANY, channels=32, pixels=32, stages=2),
        ),
        8: (
            Tile(regions=32, last_regions=32, channels=16, pixels=16),
            Tile(regions=64, up_to=ANY, channels=16, pixels=16),
        ),
    },
)

# The maps of the backward pass: the same order.
MAPS = TileTable(
    "attention.maps",
    {
        2: (
            Tile(regions=128, last_regions=32, channels=64, pixels=128, stages=3, when=has_wgmma_and_vectors),
            Tile(regions=128, last_regions=64, channels=64, pixels=128, stages=3, when=has_wgmma_and_vectors),
            Tile(regions=128, last_regions=128, channels=64, pixels=64, stages=3, when=has_wgmma),
            Tile(regions=32, last_regions=32, channels=32, pixels=128, warps=4, stages=3),
            Tile(regions=64, last_regions=64, channels=32, pixels=64, warps=4, stages=3, when=has_vectors),
            Tile(regions=128, last_regions=64, channels=32, pixels=32, warps=4, stages=3),
            Tile(regions=128, up_to=ANY, channels=32, pixels=16, warps=4, stages=2, when=is_rdna),
            Tile(regions=128, last_regions=128, channels=32, pixels=32, warps=4, stages=3),
            Tile(regions=128, up_to=ANY, channels=32, pixels=64, stages=3, when=has_wgmma),
            Tile(regions=128, up_to=ANY, channels=64, pixels=16, stages=2),
        ),
        4: (
            Tile(regions=64, last_regions=64, channels=16, pixels=32, warps=4, stages=2, when=is_rdna),
            Tile(regions=128, last_regions=64, channels=16, pixels=16, warps=4, stages=2, when=is_rdna),
            Tile(regions=64, last_regions=64, channels=16, pixels=64, warps=4, stages=2, when=is_not_turing),
            Tile(regions=128, last_regions=32, channels=16, pixels=32, warps=4, stages=2, when=is_not_turing),
            Tile(regions=128, last_regions=64, channels=16, pixels=32, warps=4, stages=2, when=is_not_turing),
            Tile(regions=128, last_regions=128, channels=32, pixels=16, stages=2),
            Tile(regions=128, up_to=ANY, channels=16, pixels=16, stages=2),
        ),
        8: (
            Tile(regions=64, last_regions=64, channels=16, pixels=16),
            Tile(regions=128, up_to=ANY, channels=16, pixels=16),
        ),
    },
)

# Sums over pixels: all regions if they are up to 256, in two tiles, then as many channels as registers hold.
SUMS = TileTable(
    "attention.sums",
    {
        2: (
            Tile(regions=64, last_regions=64, up_to=ANY, channels=128, pixels=32, stages=3, resident=2, when=is_rdna),
            Tile(regions=64, last_regions=64, channels=128, pixels=32, stages=3),
            Tile(regions=128, last_regions=32, channels=128, pixels=64, stages=3, when=has_wgmma_and_vectors),
            Tile(regions=128, last_regions=64, channels=128, pixels=64, stages=3, when=has_wgmma_and_vectors),
            Tile(regions=128, last_regions=128, channels=128, pixels=64, stages=3, when=has_wgmma_and_vectors),
            Tile(regions=128, last_regions=64, channels=128, pixels=32, stages=3),
            Tile(regions=128, last_regions=128, channels=64, pixels=32, stages=3),
            Tile(regions=64, last_regions=64, up_to=ANY, channels=128, pixels=32, stages=3, resident=2),
        ),
        4: (
            Tile(regions=64, last_regions=64, up_to=ANY, channels=64, pixels=16, stages=2, resident=2, when=is_rdna),
            Tile(regions=64, last_regions=64, channels=64, pixels=16, stages=2, resident=2),
            Tile(regions=128, last_regions=32, channels=64, pixels=32, stages=2),
            Tile(regions=128, last_regions=64, channels=64, pixels=16, stages=2, resident=2),
            Tile(regions=128, last_regions=128, channels=64, pixels=16, stages=2, when=is_not_turing),
            Tile(regions=128, last_regions=128, channels=32, pixels=16, stages=2),
            Tile(regions=64, last_regions=64, up_to=ANY, channels=64, pixels=16, stages=2, resident=2),
        ),
        8: (
            Tile(regions=64, last_regions=64, up_to=ANY, channels=32, pixels=16, resident=2, when=is_rdna),
            Tile(regions=128, last_regions=128, channels=32, pixels=16, resident=2),
            Tile(regions=64, last_regions=64, up_to=ANY, channels=32, pixels=16, resident=2),
        ),
    },
)


@functools.cache
def of_either(problem: Problem) -> Problem:
    """The problem of a kernel whose tiles of the query's channels and of the values' are as long."""
    return replace(problem, channels=max(problem.channels, problem.outputs))


# In one pass, where there are few regions: a program holds all channels, values and regions, and some pixels at a time.
# RDNA, whose lanes hold the operands of a product twice, has no registers for it.


def _bytes(problem: Problem) -> int:
    """Of key and value in a program, whose sums dkey and dvalue are."""
    regions, channels, outputs = map(padded, (problem.regions, problem.channels, problem.outputs))
    return (channels + outputs) * regions * problem.itemsize


def _forward_in_one_pass(problem: Problem) -> Tile | None:
    regions, channels, outputs = map(padded, (problem.regions, problem.channels, problem.outputs))
    if problem.itemsize > 2 or regions > 128 or _bytes(problem) > 32768 or is_rdna(problem):
        return None
    pixels = min(128 if has_asynchronous_copies(problem) else 64, 8192 // max(channels, outputs, 2 * regions))
    if problem.scattered or not has_asynchronous_copies(problem):
        return Tile(regions, channels, outputs, pixels, stages=1)
    return Tile(regions, channels, outputs, pixels, warps=4, stages=3)


def _backward_in_one_pass(problem: Problem) -> Tile | None:
    """Where sums of all pixels fit in a program's registers; addresses take some of them, too."""
    regions, channels, outputs = map(padded, (problem.regions, problem.channels, problem.outputs))
    is_float32, scattered, size = problem.itemsize > 2, problem.scattered, _bytes(problem)
    if is_float32:
        most = 32768 if regions == 16 and scattered < 2 and has_asynchronous_copies(problem) else 16384
    else:
        most = 65536 if has_wgmma_and_vectors(problem) else 32768
    if regions > 128 or size > most or is_rdna(problem):
        return None
    if is_float32 or not has_asynchronous_copies(problem):
        step, stages = 8192, 1
    elif has_wgmma(problem):
        step, stages = 32768 if scattered else 65536, 3
    else:
        step, stages = (32768, 1) if scattered else (16384, 3)
    if scattered == 2 and not is_float32:
        regions = max(32, regions)  # of 16 it spills
    pixels = min(
        32 if is_amd(problem) else 64,
        (1024 if is_float32 or scattered == 2 else 2048) // regions,
        step // (2 * max(channels, outputs) * problem.itemsize),
    )
    return Tile(regions, channels, outputs, 16 if size > 32768 else max(16, pixels), stages=stages)


FORWARD_IN_ONE_PASS = TileRule("attention.forward_in_one_pass", _forward_in_one_pass, ("pixels",))
BACKWARD_IN_ONE_PASS = TileRule("attention.backward_in_one_pass", _backward_in_one_pass, ("pixels",))
