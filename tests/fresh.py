"""A fresh Python that imports what these tests import: the same `ocr_kernels`, and their own modules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ocr_kernels

TESTS = Path(__file__).parent
PYTHONPATH = os.pathsep.join(str(path) for path in (Path(ocr_kernels.__file__).parent.parent, TESTS.parent))
OURS = ("TRITON_INTERPRET", "OCR_KERNELS_BACKEND", "OCR_KERNELS_ISA")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python *arguments`, without the variables that these tests were started with."""
    clean = {name: value for name, value in os.environ.items() if name not in OURS}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=TESTS,  # which `python -m` and `python -c` put before everything else
        env=clean | {"PYTHONPATH": PYTHONPATH} | environment,
        capture_output=True,
        text=True,
    )


def run(code: str, **environment: str) -> str:
    """The output of `code`."""
    process = python("-c", code, **environment)
    assert process.returncode == 0, process.stderr
    return process.stdout
