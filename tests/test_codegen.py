"""Every kernel compiles for every architecture: without spills, within its shared memory, on its matrix units."""

from __future__ import annotations

import pytest
from fresh import python

pytest.importorskip("triton", reason="compiles with Triton")

from benchmarks.codegen import ARCHITECTURES


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=() if name == "sm_90" else pytest.mark.wide) for name in ARCHITECTURES]
)
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
    ],
)
def test_resident_blocks(
    architecture: str, registers: int, shared: int, num_warps: int, tensor_memory: int, blocks: int
) -> None:
    assert ARCHITECTURES[architecture].resident_blocks(registers, shared, num_warps, tensor_memory) == blocks
