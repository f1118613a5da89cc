"""The gather's tiles: the file to tune. Chosen so that no architecture spills registers; never measured."""

from __future__ import annotations

from ocr_kernels.core.tiles import (
    ANY,
    Tile,
    TileTable,
    has_asynchronous_copies,
    has_wgmma,
    is_amd,
    is_rdna,
    is_scattered,
)

FEW = 64
"""Regions up to which their maxima are found on the way."""


# All regions, then as many channels as registers hold.
FORWARD = TileTable(
    "gather.forward",
    {
        2: (
            Tile(regions=32, channels=128, pixels=32, warps=4, stages=2, resident=2, when=is_rdna),
            Tile(regions=64, channels=128, pixels=32, stages=2, when=is_rdna),
            Tile(regions=32, channels=128, pixels=64, stages=3, when=is_scattered),
            Tile(regions=32, channels=256, pixels=64, stages=3, shared=112),
            Tile(regions=64, channels=128, pixels=64, stages=3, shared=80),
            Tile(regions=32, channels=128, pixels=32, warps=4, stages=2, resident=2),
            Tile(regions=64, channels=128, pixels=64, stages=2),
        ),
        4: (
            Tile(regions=64, channels=64, pixels=16, stages=2, resident=2, when=is_scattered),
            Tile(regions=32, channels=128, pixels=16, warps=4, stages=2, resident=2),
            Tile(regions=64, channels=64, pixels=16, stages=2, resident=2),
        ),
        8: (Tile(regions=64, channels=32, pixels=16, resident=2),),
    },
)

# All regions if they are up to 256, in two tiles, then as many channels as registers hold. Logits are scattered or not.
FORWARD_MANY = TileTable(
    "gather.forward_many",
    {
        2: (
            Tile(regions=64, last_regions=64, channels=128, pixels=32, stages=3),
            Tile(regions=128, last_regions=64, channels=128, pixels=16, stages=3, when=is_scattered),
            Tile(regions=128, last_regions=32, channels=256, pixels=16, stages=4, when=has_wgmma),
            Tile(regions=128, last_regions=64, channels=256, pixels=16, stages=4, when=has_wgmma),
            Tile(regions=128, last_regions=64, channels=128, pixels=16, stages=3),
            Tile(regions=128, last_regions=128, channels=64, pixels=16, stages=2, when=is_scattered),
            Tile(regions=128, last_regions=128, channels=128, pixels=32, stages=2, when=has_wgmma),
            Tile(regions=128, last_regions=128, channels=64, pixels=16, stages=2),
            Tile(regions=128, last_regions=64, up_to=ANY, channels=128, pixels=32, stages=3, when=has_wgmma),
            Tile(regions=128, last_regions=64, up_to=ANY, channels=128, pixels=16, stages=3),
        ),
        4: (
            Tile(regions=64, last_regions=64, channels=64, pixels=16),
            Tile(regions=128, last_regions=64, channels=32, pixels=16, when=is_scattered),
            Tile(regions=128, last_regions=64, channels=64, pixels=16),
            Tile(regions=128, last_regions=128, channels=32, pixels=16, when=is_scattered),
            Tile(regions=128, last_regions=128, channels=64, pixels=16),
            Tile(regions=128, last_regions=64, up_to=ANY, channels=32, pixels=16),
        ),
        8: (Tile(regions=64, last_regions=64, up_to=ANY, channels=32, pixels=16),),
    },
)

# All regions if they are up to 256, then pixels, then channels. Pixels are scattered or not.
BACKWARD = TileTable(
    "gather.backward",
    {
        2: (
            Tile(regions=128, channels=32, pixels=32, when=is_rdna),
            Tile(regions=128, up_to=ANY, channels=64, pixels=32, when=is_rdna),
            Tile(regions=32, channels=32, pixels=64, warps=4, stages=3, when=is_amd),
            Tile(regions=64, channels=32, pixels=64, stages=3, when=is_scattered),
            Tile(regions=32, channels=64, pixels=128, stages=3, when=has_asynchronous_copies),
            Tile(regions=64, channels=64, pixels=64, stages=3, when=has_wgmma),
            Tile(regions=64, channels=32, pixels=64, stages=3),
            Tile(regions=256, channels=64, pixels=64, stages=3, when=has_wgmma),
            Tile(regions=128, channels=64, pixels=64),
            Tile(regions=256, channels=64, pixels=32),
            Tile(regions=128, up_to=ANY, channels=64, pixels=64, stages=3, shared=96),
            Tile(regions=128, up_to=ANY, channels=64, pixels=32),
        ),
        4: (
            Tile(regions=128, up_to=ANY, channels=16, pixels=16, when=is_rdna),
            Tile(regions=32, channels=32, pixels=32, warps=4, stages=2),
            Tile(regions=64, channels=32, pixels=32, stages=2),
            Tile(regions=128, channels=16, pixels=16, stages=2),
            Tile(regions=256, channels=32, pixels=16),
            Tile(regions=128, up_to=ANY, channels=16, pixels=16),
        ),
        8: (
            Tile(regions=32, up_to=ANY, channels=16, pixels=16, when=is_rdna),
            Tile(regions=128, channels=16, pixels=16),
            Tile(regions=256, channels=16, pixels=16, shared=96),
            Tile(regions=128, up_to=ANY, channels=16, pixels=16, shared=96),
            Tile(regions=64, up_to=ANY, channels=16, pixels=16),
        ),
    },
)
