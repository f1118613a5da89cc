"""The block's tiles: the file to tune. Chosen so that no architecture spills registers; never measured."""

from __future__ import annotations

from ocr_kernels.core.tiles import ANY, Problem, Tile, TileTable, has_wgmma, is_rdna, is_scattered

MOST = 256  # regions, and channels of keys, that fit in a program's registers
FEW = {2: 64, 4: 64, 8: 32}  # regions that fit beside two tiles of channels, by the bytes of a number


def has_scattered_wgmma(problem: Problem) -> bool:
    return has_wgmma(problem) and is_scattered(problem)


# All of D and all regions, then pixels, then channels; `outputs` are channels of q.
WEIGHTS = TileTable(
    "block.weights",
    {
        2: (
            Tile(regions=32, channels=64, outputs=64, pixels=128, stages=3, when=has_wgmma),
            Tile(regions=64, channels=64, outputs=32, pixels=128, stages=2, when=has_wgmma),
            Tile(regions=256, channels=64, outputs=64, pixels=64, stages=3, when=has_wgmma),
            Tile(regions=256, channels=32, outputs=32, pixels=64, stages=2),
        )
    },
)

# As many outputs and pixels as registers hold, regions by 64. Each pixel of feats and z is scattered or not.
FUSE = TileTable(
    "block.fuse",
    {
        2: (
            Tile(regions=64, channels=64, outputs=128, pixels=128, stages=3, when=has_scattered_wgmma),
            Tile(regions=64, up_to=192, channels=64, outputs=128, pixels=128, stages=2, when=has_scattered_wgmma),
            Tile(regions=64, up_to=256, channels=32, outputs=128, pixels=128, stages=2, when=has_scattered_wgmma),
            Tile(regions=64, channels=64, outputs=256, pixels=128, stages=3, when=has_wgmma),
            Tile(regions=64, up_to=192, channels=64, outputs=256, pixels=128, stages=2, when=has_wgmma),
            Tile(regions=64, up_to=256, channels=32, outputs=256, pixels=128, stages=2, when=has_wgmma),
            Tile(regions=64, channels=32, outputs=128, pixels=128, stages=3),
            Tile(regions=64, up_to=256, channels=32, outputs=128, pixels=128, stages=2),
        )
    },
)

# A product with nothing else in it.
LINEAR = TileTable(
    "block.linear",
    {
        2: (
            Tile(channels=64, outputs=128, pixels=128, stages=3, when=has_wgmma),
            Tile(channels=32, outputs=128, pixels=128, stages=2),
        )
    },
)

# Of kernels that have no product: they go over a map once.
_PASSES = (
    Tile(channels=32, pixels=64, warps=4, when=is_scattered),
    Tile(channels=32, pixels=128, warps=4),
)
PASS = TileTable("block.pass", {2: _PASSES, 4: _PASSES, 8: (Tile(channels=32, pixels=32, warps=4),)})

# Of kernels that add up what those left of splits of the pixels, so many splits at a time.
PARTS = Tile(channels=32, pixels=32, warps=4)

# All regions, then pixels, then channels of keys. Here and below pixels are scattered or not.
REGION_WEIGHTS = TileTable(
    "block.region_weights",
    {
        2: (
            Tile(regions=256, channels=32, pixels=32, stages=2, when=is_rdna),
            Tile(regions=64, channels=64, pixels=128, stages=2, when=has_wgmma),
            Tile(regions=64, channels=32, pixels=64, stages=2),
            Tile(regions=256, channels=32, pixels=64, stages=2, when=is_scattered),
            Tile(regions=256, channels=32, pixels=64, warps=4, stages=3, when=has_wgmma),
            Tile(regions=256, channels=32, pixels=64, stages=2),
        ),
        4: (
            Tile(regions=64, channels=32, pixels=64, stages=2),
            Tile(regions=256, channels=16, pixels=16, stages=2),
        ),
        8: (Tile(regions=256, channels=16, pixels=16),),
    },
)

# Regions at a time, then pixels, then channels of contexts.
CONTEXTS = TileTable(
    "block.contexts",
    {
        2: (
            Tile(regions=32, channels=128, pixels=64, warps=4),
            Tile(regions=32, up_to=ANY, channels=128, pixels=64, warps=4, stages=3, when=is_scattered),
            Tile(regions=32, up_to=ANY, channels=128, pixels=128, warps=4, stages=3, when=has_wgmma),
            Tile(regions=32, up_to=ANY, channels=128, pixels=64, warps=4, stages=3),
        ),
        4: (Tile(regions=32, up_to=ANY, channels=64, pixels=64, stages=2),),
        8: (Tile(regions=16, up_to=ANY, channels=32, pixels=32),),
    },
)

# All regions, then pixels, then channels of contexts.
CONTEXTS_GRADIENT = TileTable(
    "block.contexts_gradient",
    {
        2: (
            Tile(regions=64, channels=32, pixels=128, warps=4, stages=2, when=has_wgmma),
            Tile(regions=64, channels=16, pixels=64, warps=4, stages=2, when=is_rdna),
            Tile(regions=64, channels=32, pixels=64, warps=4, stages=2),
        ),
        4: (
            Tile(regions=64, channels=16, pixels=32, stages=2, when=is_scattered),
            Tile(regions=64, channels=32, pixels=32, stages=2),
        ),
        8: (Tile(regions=32, channels=16, pixels=16),),
    },
)

# All regions, then pixels, then regions of the product.
SOFTMAX_GRADIENT = TileTable(
    "block.softmax_gradient",
    {
        2: (
            Tile(regions=64, channels=32, pixels=128, stages=2, when=has_wgmma),
            Tile(regions=128, channels=32, pixels=64, stages=2),
            Tile(regions=256, channels=32, pixels=32, stages=2, when=is_scattered),
            Tile(regions=256, channels=32, pixels=32, warps=4, stages=2),
        ),
        4: (
            Tile(regions=64, channels=16, pixels=64, stages=2),
            Tile(regions=256, channels=16, pixels=16, stages=2),
        ),
        8: (Tile(regions=256, channels=16, pixels=16),),
    },
)
