"""Tiles: how much of a problem a kernel's program holds at a time, and how a kernel's tile is chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ocr_kernels.core import tuned


class DeviceFacts(NamedTuple):
    """What tiles depend on."""

    multiprocessors: int
    shared_memory: int  # bytes that one program may use
    capability: tuple[int, int] | None  # compute capability; None: AMD's
    name: str = ""  # of a GPU that is there, for which tiles may have been tuned
    warp_size: int = 32

    @property
    def is_rdna(self) -> bool:
        """Whether it is AMD's with warps of 32 lanes, which have half of the registers of CDNA's 64 each."""
        return self.capability is None and self.warp_size == 32

    @property
    def has_matrix_units(self) -> bool:
        """Whether Triton multiplies 16-bit tiles on them."""
        return self.capability is None or self.capability >= (8, 0)


@dataclass(frozen=True)
class Problem:
    """What the choice of a tile depends on."""

    itemsize: int  # bytes of an element that enters a product
    device: DeviceFacts
    channels: int
    regions: int = 0
    outputs: int = 0  # channels that are made from others, or those of an attention's values
    scattered: int = 0  # tiles take more registers: 1, for wider elements or an address for few; 2, for one each

    @property
    def key(self) -> tuple[int, ...]:
        """What it is on any device."""
        return self.itemsize, self.channels, self.regions, self.outputs, int(self.scattered)


def always(problem: Problem) -> bool:
    return True


def has_wgmma(problem: Problem) -> bool:
    """Whether matrix units read their operands from shared memory: wgmma, and its successor tcgen05."""
    capability = problem.device.capability
    return capability is not None and (9, 0) <= capability < (12, 0)


def has_asynchronous_copies(problem: Problem) -> bool:
    """Whether loads can go past registers, into shared memory."""
    capability = problem.device.capability
    return capability is not None and capability >= (8, 0)


def is_amd(problem: Problem) -> bool:
    return problem.device.capability is None


def is_rdna(problem: Problem) -> bool:
    return problem.device.is_rdna


def is_scattered(problem: Problem) -> bool:
    return problem.scattered > 0


ANY = 1 << 62  # number of regions


@dataclass(frozen=True)
class Tile:
    """How much of each dimension a program holds at a time, in powers of two, and how it runs."""

    regions: int = 0
    channels: int = 0
    outputs: int = 0
    pixels: int = 0
    warps: int = 8
    stages: int = 1  # of the pipeline of loads: from three on, some are under way while others are waited for
    last_regions: int = 0  # a second tile of them, where a power of two holds too many
    resident: int = 1  # programs that a multiprocessor holds at a time
    shared: int = 0  # KiB of shared memory, where not every GPU has as much
    up_to: int = 0  # the most regions that the tile is for, by default those that it holds
    when: Callable[[Problem], bool] = field(default=always, compare=False)

    def fits(self, problem: Problem) -> bool:
        has_memory = self.shared * 1024 <= problem.device.shared_memory
        return problem.regions <= (self.up_to or self.all_regions) and has_memory and self.when(problem)

    @property
    def all_regions(self) -> int:
        return self.regions + self.last_regions

    def cut_to(self, problem: Problem) -> Tile:
        """The tile, no larger than the problem; two tiles of regions are halves of those that one would hold.

        Warps of RDNA have half of the registers, so there are two for each.
        """
        regions, last_regions = self.regions and padded(problem.regions, self.regions), self.last_regions
        if last_regions and problem.regions <= self.regions:
            regions = last_regions = max(16, regions // 2)
        return replace(
            self,
            regions=regions,
            last_regions=last_regions,
            warps=self.warps * (2 if is_rdna(problem) else 1),
            channels=self.channels and padded(problem.channels, self.channels),
            outputs=self.outputs and padded(problem.outputs, self.outputs),
        )

    def resized(self, sizes: Mapping[str, int]) -> Tile:
        """The tile with other sizes, by name."""
        others: dict[str, Any] = {**sizes}
        return replace(self, **others)

    @property
    def arguments(self) -> dict[str, int]:
        """As arguments of a launch."""
        sizes = {"BLOCK_K": self.regions, "BLOCK_L": self.last_regions, "BLOCK_C": self.channels}
        sizes |= {"BLOCK_O": self.outputs, "BLOCK_N": self.pixels}
        blocks = {name: size for name, size in sizes.items() if size}
        return blocks | {"num_warps": self.warps, "num_stages": self.stages} | NEVER_FUSED


# A product and a sum that become one instruction are rounded once. A score would then be another number in the backward
# pass than in the forward one, by as much as its rounding, which is no small number where the score is large.
NEVER_FUSED = {"enable_fp_fusion": False}


class TileRule:
    """How a kernel's tile is chosen: a rule says which, unless `ocr-kernels tune` has found a faster one."""

    def __init__(self, name: str, rule: Callable[[Problem], Tile | None], free: tuple[str, ...]) -> None:
        self.name = name
        self.rule = rule  # None: the kernel cannot run
        self.free = free  # sizes that may change: the kernel loops over that dimension, or has a program for each part
        self.chosen: dict[Problem, Tile | None] = {}

    def choose(self, problem: Problem) -> Tile | None:
        if problem not in self.chosen:
            tile = self.rule(problem)
            sizes = tuned.read(problem.device.name).get((self.name, *problem.key), {})
            self.chosen[problem] = tile and tile.resized(sizes)
        return self.chosen[problem]


class TileTable(TileRule):
    """Tiles by the bytes of an element that enters a product. The first that fits is taken."""

    def __init__(self, name: str, tiles: Mapping[int, Sequence[Tile]]) -> None:
        super().__init__(name, lambda problem: self.candidates(problem)[0], ("channels", "outputs", "pixels"))
        self.tiles = tiles

    def choose(self, problem: Problem) -> Tile:
        tile = super().choose(problem)
        assert tile is not None
        return tile

    def candidates(self, problem: Problem) -> list[Tile]:
        """All that could be taken."""
        return [tile.cut_to(problem) for tile in self.tiles[problem.itemsize] if tile.fits(problem)]


def padded(size: int, most: int = 1 << 30) -> int:
    """A tile's length along a dimension of `size`: a power of two from 16, the least a matrix unit takes, to `most`."""
    return max(16, min(1 << (size - 1).bit_length(), most))
