"""The compiled kernels for GPUs without a GPU: run on a CPU, thread by thread, and translated to machine code."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parent.parent
SOURCES = [ROOT / "csrc" / op / "cuda.cu" for op in ("gather", "attention")]
CXX = os.environ.get("CXX", "c++")


def run_all(commands: Sequence[Sequence[object]]) -> list[str]:
    """What each of the commands prints; they run at once."""
    # a preloaded sanitizer is for this process alone
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    started = [
        subprocess.Popen(
            [str(part) for part in command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands
    ]
    printed = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(printed)
    return printed


@pytest.fixture(scope="module")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that takes the place of the one for CPUs."""
    if sys.platform != "linux" or shutil.which(CXX) is None:
        pytest.skip("needs Linux and a C++ compiler")
    folder = tmp_path_factory.mktemp("host")
    flags = [
        "-std=c++17",
        "-O2",
        "-fPIC",
        "-Wall",
        "-Werror",
        "-fvisibility=hidden",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
    ]
    flags += [f"-isystem{path}" for path in include_paths()]
    sources = [*SOURCES, ROOT / "tests" / "gpu_on_host.cpp"]
    objects = [folder / f"{source.parent.name}.o" for source in sources]
    run_all([[CXX, *flags, "-x", "c++", "-c", s, "-o", o] for s, o in zip(sources, objects, strict=True)])
    library = folder / "libgpu_on_host.so"
    torch_libraries = Path(torch.__file__).parent / "lib"
    run_all([[CXX, "-shared", *objects, f"-L{torch_libraries}", "-ltorch_cpu", "-o", library]])
    return library


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "selection", "backwards"),
    [
        (["test_parity.py", "test_values.py"], "native", False),
        (["test_autograd.py"], "native and (gradcheck or subset)", False),
        (["test_parity.py"], "native and (layout or splits)", True),
    ],
    ids=["parity", "gradients", "threads-in-reverse"],
)
def test_tests_on_a_cpu(host_library: Path, files: list[str], selection: str, backwards: bool) -> None:
    """The tests of any backend, run by these kernels. Threads take turns, from the last to the first if in reverse."""
    environment = (
        os.environ | {"OCR_KERNELS_LIBRARY": str(host_library)} | ({"OCR_BACKWARDS": "1"} if backwards else {})
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", selection]
    process = subprocess.run(
        [*command, *(str(ROOT / "tests" / file) for file in files)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout[-8000:] + process.stderr[-2000:]
    assert re.search(r"^\d+ passed(, \d+ deselected)? in", process.stdout, re.MULTILINE), process.stdout[-500:]


# ptxas keeps a kernel within the registers that let two blocks run on a multiprocessor, and parks what is left over.
MOST_SPILLED = 256  # bytes of a thread


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_machine_code(architecture: int, tmp_path: Path) -> None:
    """The kernels compile, and hardly spill registers."""
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas=-v", "-cubin"]
    flags += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
    for printed in run_all([["nvcc", *flags, s, "-o", tmp_path / f"{s.parent.name}.cubin"] for s in SOURCES]):
        spilled = {
            name: int(stored)
            for name, stored in re.findall(
                r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores", printed, re.DOTALL
            )
        }
        assert len(spilled) >= 20
        assert {name: stored for name, stored in spilled.items() if stored > MOST_SPILLED} == {}
