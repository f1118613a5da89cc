"""Every kernel compiles for every architecture, without spills and within its shared memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="compiles with Triton")
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_code(architecture: str) -> None:
    root = Path(__file__).parent.parent
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.codegen", architecture],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.count("kernel") >= 100
