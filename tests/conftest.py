"""Which package is tested, and where its ops run: on the GPU, without one in Triton's interpreter, and on the CPU."""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several workers, which share the cores
    os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).parent.parent
if str(ROOT) not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
    # the checkout, which `python -m` puts first, goes last: `ocr_kernels` comes from there only if it is not installed
    sys.path[:] = [*(path for path in sys.path if path and Path(path) != ROOT), str(ROOT)]

import pytest
import torch
from hypothesis import HealthCheck, settings
from ops import native_on

import ocr_kernels

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be reproducible
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:  # what it compiled for an op that has changed since is no test of it
    inductor_cache = tempfile.TemporaryDirectory()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = inductor_cache.name


def pytest_report_header() -> str:
    return f"package: {Path(ocr_kernels.__file__).parent}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test that is to be thinned most cases are `wide`. The slow ones go first, so that none begins at the end."""
    grids: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("thinned"):
            grids.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for grid in grids.values():
        for item in set(grid) - pairwise_items(grid):
            item.add_marker("wide")
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pairwise_items(grid: list[pytest.Item]) -> set[pytest.Item]:
    """A few in which every two arguments occur together; an op on a backend counts as one argument."""
    covered = {}
    for item in grid:
        arguments = {name: repr(value) for name, value in item.callspec.params.items()}
        subject = tuple(arguments.pop(name, None) for name in ("op", "target", "kernels", "block_target"))
        arguments = [subject, *arguments.items()]
        covered[item] = set(itertools.combinations(arguments, 2))
    left = set().union(*covered.values())
    chosen = set()
    while left:
        best = max(grid, key=lambda item: len(covered[item] & left))
        left -= covered[best]
        chosen.add(best)
    return chosen


GPU = [
    pytest.param(("triton", "cuda"), marks=pytest.mark.gpu),
    pytest.param(("reference", "cuda"), marks=pytest.mark.gpu),
]
NATIVE = [pytest.param(("native", "cpu"), marks=native_on("cpu"))]
TARGETS = [("reference", "cpu"), ("triton", "cpu"), *NATIVE]
if torch.cuda.is_available():
    TARGETS[1:2] = GPU
BLOCK_TARGETS = list(TARGETS)
if torch.cuda.is_available():
    TARGETS.append(pytest.param(("native", "cuda"), marks=[pytest.mark.gpu, native_on("cuda")]))


@pytest.fixture(params=TARGETS, ids="-".join)
def target(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(backend, device)"""
    return request.param


@pytest.fixture(params=TARGETS[1:], ids="-".join)
def kernels(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(backend, device) of the compiled backends, the plain reference on a CPU left out."""
    return request.param


@pytest.fixture(params=BLOCK_TARGETS, ids="-".join)
def block_target(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(backend, device) of the block, which has no compiled kernels for GPUs."""
    return request.param


settings.register_profile(  # however slow the machine
    "default",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
    max_examples=150,
    derandomize=True,
)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=2_000, derandomize=False)
settings.load_profile("default")
