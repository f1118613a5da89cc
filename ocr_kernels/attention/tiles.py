"""The attention's tiles: the file to tune. Chosen by machine code, so that no architecture spills; never measured."""

from __future__ import annotations

import functools
from dataclasses import replace

from ocr_kernels.core.tiles import ANY, Problem, Tile, TileRule, TileTable, has_wgmma, padded

# All regions if they are up to 256, then pixels, then channels.
FORWARD = TileTable(
    "attention.forward",
    {
        2: (
            Tile(regions=256, channels=64, pixels=128, stages=3, when=has_wgmma),
            Tile(regions=64, channels=64, pixels=128, stages=3),
            Tile(regions=256, channels=32, pixels=64, stages=3),
            Tile(regions=128, up_to=ANY, channels=64, pixels=64, stages=3, shared=80),
            Tile(regions=128, up_to=ANY, channels=64, pixels=64),
        ),
        4: (
            Tile(regions=64, channels=32, pixels=32, stages=2),
            Tile(regions=128, channels=32, pixels=32, stages=2),
            Tile(regions=256, channels=32, pixels=16, stages=2, shared=96),
            Tile(regions=64, up_to=ANY, channels=32, pixels=32, stages=2),
        ),
        8: (Tile(regions=64, up_to=ANY, channels=16, pixels=16),),
    },
)

# The maps of the backward pass: the same order.
MAPS = TileTable(
    "attention.maps",
    {
        2: (
            Tile(regions=128, channels=64, pixels=64, stages=3),
            Tile(regions=256, channels=64, pixels=64, stages=3, when=has_wgmma),
            Tile(regions=256, channels=32, pixels=32, stages=3),
            Tile(regions=128, up_to=ANY, channels=32, pixels=64, stages=3, when=has_wgmma),
            Tile(regions=128, up_to=ANY, channels=64, pixels=16, stages=2),
        ),
        4: (
            Tile(regions=128, channels=32, pixels=16, stages=2),
            Tile(regions=256, channels=32, pixels=16, stages=2),
            Tile(regions=128, up_to=ANY, channels=16, pixels=16, stages=2),
        ),
        8: (
            Tile(regions=256, channels=16, pixels=16),
            Tile(regions=128, up_to=ANY, channels=16, pixels=16),
        ),
    },
)

# Sums over pixels: all regions if they are up to 256, then as many channels as registers hold.
SUMS = TileTable(
    "attention.sums",
    {
        2: (
            Tile(regions=128, channels=128, pixels=32, stages=3),
            Tile(regions=256, channels=128, pixels=64, stages=3, when=has_wgmma),
            Tile(regions=256, channels=128, pixels=32),
            Tile(regions=128, up_to=ANY, channels=128, pixels=32, stages=3),
        ),
        4: (
            Tile(regions=256, channels=64, pixels=16, stages=2),
            Tile(regions=128, up_to=ANY, channels=64, pixels=16, stages=2),
        ),
        8: (
            Tile(regions=256, channels=32, pixels=16),
            Tile(regions=128, up_to=ANY, channels=32, pixels=16),
        ),
    },
)


@functools.cache
def of_either(problem: Problem) -> Problem:
    """The problem of a kernel whose tiles of the query's channels and of the values' are as long."""
    return replace(problem, channels=max(problem.channels, problem.outputs))


def has_asynchronous_copies(problem: Problem) -> bool:
    """Whether loads can go past registers, into shared memory."""
    capability = problem.device.capability
    return capability is not None and capability >= (8, 0)


# In one pass, where there are few regions: a program holds all channels, values and regions, and some pixels at a time.


def _is_one_pass(problem: Problem) -> bool:
    """Whether dkey and dvalue fit in a program's registers, and key and value in its shared memory."""
    regions, channels, outputs = map(padded, (problem.regions, problem.channels, problem.outputs))
    return regions <= 128 and (channels + outputs) * regions * problem.itemsize <= 32768


def _forward_in_one_pass(problem: Problem) -> Tile | None:
    if problem.itemsize > 2 or not _is_one_pass(problem):
        return None
    regions, channels, outputs = map(padded, (problem.regions, problem.channels, problem.outputs))
    pixels = min(128, 8192 // max(channels, outputs, 2 * regions))
    if problem.scattered or not has_asynchronous_copies(problem):
        return Tile(regions, channels, outputs, pixels, stages=1)
    return Tile(regions, channels, outputs, pixels, warps=4, stages=3)


def _backward_in_one_pass(problem: Problem) -> Tile | None:
    if not _is_one_pass(problem):
        return None
    regions, channels, outputs = map(padded, (problem.regions, problem.channels, problem.outputs))
    if problem.itemsize > 2 or not has_asynchronous_copies(problem):
        step, stages = 8192, 1
    elif has_wgmma(problem):
        step, stages = 32768 if problem.scattered else 65536, 3
    else:
        step, stages = (32768, 1) if problem.scattered else (16384, 3)
    pixels = max(16, min(64, 2048 // regions, step // (2 * max(channels, outputs) * problem.itemsize)))
    return Tile(regions, channels, outputs, pixels, stages=stages)


FORWARD_IN_ONE_PASS = TileRule("attention.forward_in_one_pass", _forward_in_one_pass, ("pixels",))
BACKWARD_IN_ONE_PASS = TileRule("attention.backward_in_one_pass", _backward_in_one_pass, ("pixels",))
