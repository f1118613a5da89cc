"""Every kernel compiles for every architecture: without spills, within its shared memory, on its matrix units.

And what the launchers decide: tiles, grids, steps.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from fresh import python

pytest.importorskip("triton", reason="compiles with Triton")

from benchmarks.codegen import ARCHITECTURES, BlockShape, Shape
from ocr_kernels.attention import tiles as attention
from ocr_kernels.bench.cases import Case
from ocr_kernels.block.triton_inference import PIXELS_AT_ONCE, pixels_at_once
from ocr_kernels.core.backends import interpreting
from ocr_kernels.core.tiles import Problem, Tile, TileTable
from ocr_kernels.core.triton_host import numbers_of, split
from ocr_kernels.gather import tiles as gather


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_code(architecture: str) -> None:
    process = python("-m", "benchmarks.codegen", "--quick", architecture)
    assert process.returncode == 0, process.stdout + process.stderr
    lines = process.stdout.splitlines()
    assert max(map(len, lines)) <= 120
    assert sum(line.startswith("    ") for line in lines) >= 110


@pytest.mark.parametrize(
    ("architecture", "registers", "shared", "num_warps", "tensor_memory", "blocks"),
    [
        ("sm_90", 128, 0, 8, 0, 2),  # 65536 registers
        ("sm_90", 129, 0, 8, 0, 1),  # registers come by 8, so that a quarter holds 3 warps
        ("sm_90", 32, 0, 8, 0, 8),  # 2048 threads
        ("sm_90", 32, 0, 1, 0, 32),
        ("sm_90", 32, 75 * 1024, 4, 0, 3),  # 228 KiB, of which 1 KiB a block is the system's
        ("sm_90", 32, 76 * 1024, 4, 0, 2),
        ("sm_100", 32, 0, 4, 256, 2),  # 512 columns of tensor memory
        ("sm_75", 32, 32 * 1024, 4, 0, 2),
        ("sm_75", 32, 0, 8, 0, 4),  # 1024 threads
        ("gfx942", 128, 0, 4, 0, 4),  # 4 wavefronts on each of 4 units
        ("gfx1100", 256, 0, 4, 0, 5),  # 1536 registers a lane on each of 4 units, by 24
        ("gfx1100", 32, 48 * 1024, 4, 0, 2),  # 128 KiB
    ],
)
def test_resident_blocks(
    architecture: str, registers: int, shared: int, num_warps: int, tensor_memory: int, blocks: int
) -> None:
    assert ARCHITECTURES[architecture].resident_blocks(registers, shared, num_warps, tensor_memory) == blocks


def test_few_variants() -> None:
    """200 sizes of images compile a kernel once for each alignment (1, 2, 4, 8, 16), two where two tensors' matter."""
    lines = python("-m", "benchmarks.codegen", "--variants", "sm_90").stdout.splitlines()
    counts = {name: int(count) for count, name in (line.split() for line in lines[1:])}
    assert len(counts) == 21
    assert counts.pop("block_linear") <= 9
    for name in ("apply", "gradient_sums", "gradient"):
        assert counts.pop(f"block_{name}") <= 10  # with dropout's mask, and without
    assert max(counts.values()) <= 5


# What the launchers decide, seen in launches that are not run.


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """The name and the grid of each kernel that is launched from here on; none of them runs."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if not interpreting():
        pytest.skip("records in Triton's interpreter; set TRITON_INTERPRET=1")
    found: list[tuple[str, tuple[int, ...]]] = []
    monkeypatch.setattr(
        interpreter.GridExecutor, "__call__", lambda self, *_, **__: found.append((self.fn.__name__, self.grid))
    )
    return found


@pytest.mark.parametrize("regions", [5, 150, 300], ids=["one-pass", "maps", "many"])
def test_any_number_of_images(grids: list[tuple[str, tuple[int, ...]]], regions: int) -> None:
    """CUDA takes 65,535 programs at most along a grid's second and third axis."""
    batch = 70_000
    case = Case("small", batch, channels=80, key_channels=80, regions=regions, height=1, width=2)
    for kind in (Shape, BlockShape)[: 2 if regions <= 256 else 1]:  # the block's kernels hold no more regions
        kind(case, torch.bfloat16).launch()
    assert len({name for name, _ in grids}) == {5: 11, 150: 12, 300: 10}[regions]
    for _, grid in grids:
        assert grid[0] < 2**31
        assert max((*grid[1:], 1)) <= 65_535
        assert grid[0] >= batch


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 6, 40, 70_000])
@pytest.mark.parametrize("pixels", [1, 1030, 256 * 512, 130 * 130])
def test_steps_of_the_block(batch: int, pixels: int) -> None:
    """Equal but for the last, and as aligned as the image itself."""
    step = pixels_at_once(batch, pixels)
    assert step % 128 == 0
    assert batch * step <= max(PIXELS_AT_ONCE, 1024 * batch)
    steps = -(-pixels // step)
    assert steps * step - pixels < 128 * steps


def test_unknown_dtypes_fail_by_name() -> None:
    with pytest.raises(TypeError, match=r"float64, float32, bfloat16 or float16, but not torch\.int8"):
        numbers_of(torch.zeros(1, dtype=torch.int8))
    with pytest.raises(TypeError, match=r"torch\.float8_e5m2"):
        numbers_of(torch.zeros(1, dtype=torch.float8_e5m2))


@pytest.mark.parametrize(
    ("table", "all_regions"),
    [
        (gather.FORWARD, (1, 32, 33, gather.FEW)),
        (gather.FORWARD_MANY, (gather.FEW + 1, 128, 150, 160, 161, 193, 256, 257, 5000)),
        *(
            (table, (1, 32, 33, 150, 256, 257, 5000))
            for table in (gather.BACKWARD, attention.FORWARD, attention.MAPS, attention.SUMS)
        ),
    ],
)
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("scattered", [0, 1, 2])
def test_tiles_for_any_problem(table: TileTable, all_regions: tuple[int, ...], itemsize: int, scattered: int) -> None:
    """One or more, none larger than the problem, on any architecture."""
    for architecture, regions in itertools.product(ARCHITECTURES.values(), all_regions):
        problem = Problem(itemsize, architecture.facts, channels=20, regions=regions, scattered=scattered)
        tiles = table.candidates(problem)
        assert tiles[0] == table.choose(problem)
        for tile in tiles:
            assert tile.channels <= 32
            assert tile.regions <= max(16, 2 * regions - 1)
            assert tile.shared * 1024 <= architecture.facts.shared_memory


@pytest.mark.parametrize(("architecture", "lanes"), [("sm_90", 256), ("gfx942", 512), ("gfx1100", 512)])
def test_warps_of_rdna_are_half_of_cdna_s(architecture: str, lanes: int) -> None:
    facts = ARCHITECTURES[architecture].facts
    assert Tile(regions=64).cut_to(Problem(2, facts, channels=20, regions=5)).warps * facts.warp_size == lanes


@pytest.mark.parametrize(
    ("regions", "first", "last"),
    [(1, 16, 16), (32, 16, 16), (33, 32, 32), (128, 64, 64), (129, 128, 32), (160, 128, 32)],
)
def test_two_tiles_of_regions(regions: int, first: int, last: int) -> None:
    problem = Problem(2, ARCHITECTURES["sm_90"].facts, channels=20, regions=regions)
    tile = Tile(regions=128, last_regions=32).cut_to(problem)
    assert (tile.regions, tile.last_regions) == (first, last)
    assert regions <= tile.all_regions


@pytest.mark.parametrize("programs", [1, 3, 4, 131, 132, 133, 200, 1000])
@pytest.mark.parametrize("length", [1, 100, 16900, 1 << 20])
def test_splits_fill_a_wave(programs: int, length: int) -> None:
    """None is empty, all pixels are in one, and where pixels suffice no wave is begun that the splits do not fill."""
    split_length, splits = split(length, 32, programs, 132)
    assert split_length % 32 == 0
    assert (splits - 1) * split_length < length <= splits * split_length
    waves = -(-programs // 132)
    assert programs * splits <= waves * 132
    if length >= 1 << 20 and programs <= 66:
        assert programs * splits > 0.9 * 132 - programs
