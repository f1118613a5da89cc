"""The attention's tiles: the file to tune. Chosen so that no architecture spills registers; never measured."""

from __future__ import annotations

import functools

from ocr_kernels.core.triton_host import ANY, Problem, Tile, TileTable, has_large_shared_memory, padded


def has_few_channels(problem: Problem) -> bool:
    return problem.channels <= 32


# All regions if they are up to 256, then pixels, then channels.
FORWARD = TileTable(
    {
        2: (
            Tile(regions=32, channels=32, pixels=64, stages=2, when=has_few_channels),
            Tile(regions=32, channels=64, pixels=128, stages=2),
            Tile(regions=128, channels=64, pixels=64, stages=2),
            Tile(regions=256, channels=64, pixels=64),
            Tile(regions=128, up_to=ANY, channels=64, pixels=64),
        ),
        4: (
            Tile(regions=32, channels=32, pixels=32, stages=2),
            Tile(regions=64, channels=32, pixels=32, warps=4, stages=2),
            Tile(regions=128, channels=32, pixels=32, stages=2),
            Tile(regions=256, channels=32, pixels=16, stages=2),
            Tile(regions=128, up_to=ANY, channels=32, pixels=16, stages=2),
        ),
        8: (
            Tile(regions=256, channels=16, pixels=16),
            Tile(regions=128, up_to=ANY, channels=16, pixels=16),
        ),
    }
)

# The maps of the backward pass: the same order.
MAPS = TileTable(
    {
        2: (
            Tile(regions=128, channels=64, pixels=64, stages=2),
            Tile(regions=256, channels=64, pixels=32, stages=2),
            Tile(regions=128, up_to=ANY, channels=64, pixels=32),
        ),
        4: (
            Tile(regions=128, channels=32, pixels=32, stages=2),
            Tile(regions=256, channels=32, pixels=16, stages=2),
            Tile(regions=128, up_to=ANY, channels=16, pixels=16, stages=2),
        ),
        8: (
            Tile(regions=256, channels=16, pixels=16),
            Tile(regions=128, up_to=ANY, channels=16, pixels=16),
        ),
    }
)

# Sums over pixels: all regions if they are up to 256, then as many channels as registers hold.
SUMS = TileTable(
    {
        2: (
            Tile(regions=32, channels=128, pixels=32, stages=2),
            Tile(regions=64, channels=128, pixels=64, stages=2),
            Tile(regions=128, channels=128, pixels=32, stages=2),
            Tile(regions=256, channels=128, pixels=32),
            Tile(regions=128, up_to=ANY, channels=128, pixels=32, stages=2),
        ),
        4: (
            Tile(regions=256, channels=64, pixels=16, stages=2),
            Tile(regions=128, up_to=ANY, channels=64, pixels=16, stages=2),
        ),
        8: (
            Tile(regions=256, channels=32, pixels=16),
            Tile(regions=128, up_to=ANY, channels=32, pixels=16),
        ),
    }
)


@functools.cache
def one_pass(problem: Problem) -> list[Tile]:
    """Tiles of the backward pass in one kernel, the widest first: all channels, values and regions, and some pixels.

    There are none where dkey and dvalue do not fit in a program's registers.
    """
    regions, channels, outputs = map(padded, (problem.regions, problem.channels, problem.outputs))
    pixel_bytes = (channels + outputs) * problem.itemsize  # of a pixel's query and incoming gradient
    most = 32768 if has_large_shared_memory(problem) else 16384
    if pixel_bytes * regions > 32768:
        return []
    return [Tile(regions, channels, outputs, pixels) for pixels in (64, 32, 16) if pixel_bytes * pixels <= most]
