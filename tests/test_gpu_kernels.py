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
SOURCES = [ROOT / "csrc" / op / "gpu.cu" for op in ("gather", "attention")]
CXX = os.environ.get("CXX", "c++")


def run_all(*commands: Sequence[object], **environment: str) -> list[str]:
    """What each of the commands prints; they run at once."""
    # a preloaded sanitizer is for this process alone
    clean = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"} | environment
    started = [
        subprocess.Popen(
            [str(part) for part in command], env=clean, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for command in commands
    ]
    printed = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(printed)
    return printed


@pytest.fixture(scope="session")
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
    run_all(*([CXX, *flags, "-x", "c++", "-c", s, "-o", o] for s, o in zip(sources, objects, strict=True)))
    library = folder / "libgpu_on_host.so"
    torch_libraries = Path(torch.__file__).parent / "lib"
    run_all([CXX, "-shared", *objects, f"-L{torch_libraries}", "-ltorch_cpu", "-o", library])
    return library


TESTS = {
    "test_parity.py": "native",
    "test_values.py": "native",
    "test_autograd.py": "native and (gradcheck or subset)",
    "test_native.py": "anything or refused or what_cpp",
}


def pytest_with(selection: str, file: str, grid: str = "not wide") -> list[object]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ROOT]
    return [*command, "-k", selection, "-m", grid, ROOT / "tests" / file]


def assert_nothing_was_skipped(printed: str) -> None:
    assert re.search(r"^\d+ passed(, \d+ deselected)? in", printed, re.MULTILINE), printed[-2000:]


@pytest.mark.slow
@pytest.mark.xdist_group("host_library")
@pytest.mark.parametrize("grid", ["not wide", pytest.param("wide or not wide", marks=pytest.mark.wide)])
def test_tests_on_a_cpu(host_library: Path, grid: str) -> None:
    """The tests of the kernels for CPUs, run by these."""
    commands = (pytest_with(selection, file, grid) for file, selection in TESTS.items())
    for printed in run_all(*commands, OCR_KERNELS_LIBRARY=str(host_library)):
        assert_nothing_was_skipped(printed)


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.xdist_group("host_library")
def test_threads_in_reverse(host_library: Path) -> None:
    """They take turns from the last to the first, so that one that does not wait for another finds other numbers."""
    command = pytest_with("native and (contiguous or splits)", "test_parity.py")
    (printed,) = run_all(command, OCR_KERNELS_LIBRARY=str(host_library), OCR_BACKWARDS="1")
    assert_nothing_was_skipped(printed)


# ptxas keeps a kernel within the registers that let two blocks run on a multiprocessor, and parks what is left over.
MAX_SPILLED = 384  # bytes of a thread


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.wide
@pytest.mark.parametrize("architecture", [90, 80, 100])
def test_machine_code(architecture: int, tmp_path: Path) -> None:
    """The kernels compile, and hardly spill registers."""
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas=-v", "-cubin"]
    flags += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
    commands = (["nvcc", *flags, source, "-o", tmp_path / f"{source.parent.name}.cubin"] for source in SOURCES)
    for printed in run_all(*commands):
        spilled = {
            name: int(stored)
            for name, stored in re.findall(
                r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores", printed, re.DOTALL
            )
        }
        assert len(spilled) >= 20
        assert {name: stored for name, stored in spilled.items() if stored > MAX_SPILLED} == {}
