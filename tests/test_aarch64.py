"""The kernels for CPUs on AArch64: compiled for it, and run in an emulator on what the public ops send them."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ops import DTYPES, Op, both_ops, native_on, over, pairwise
from test_parity import SIZES_AND_OPTIONS, check
from test_passes import CASES as PASSES_OVER
from test_passes import TestEachPass as EachPass
from torch import Tensor

from ocr_kernels.testing import poisoned_memory

ROOT = Path(__file__).parent.parent
CXX, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"  # Debian's g++-aarch64-linux-gnu and qemu-user
RESULTS = {"gather_forward": 2, "gather_backward": 2, "attention_forward": 1, "attention_backward": 3}  # come first
PASSES = {"activate": 1, "moments": 1, "gradient": 2, "through": 1, "softmax": 1, "softmax_backward": 1}

pytestmark = [native_on("cpu"), pytest.mark.xdist_group("aarch64")]


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = [name for name in (CXX, EMULATOR) if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}")
    file = tmp_path_factory.mktemp("aarch64") / "cpu_kernels_alone"
    sources = [ROOT / "tests" / "cpu_kernels_alone.cpp", *sorted(ROOT.glob("csrc/*/cpu_kernels.cpp"))]
    flags = ["-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=off", "-Wall", "-Werror", "-static"]
    subprocess.run([CXX, *flags, *sources, "-o", file], check=True)
    return file


def memory(tensor: Tensor) -> Tensor:
    """From a tensor's first element to its last, in one dimension."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.detach().as_strided((elements,), (1,))


def as_matrices(tensor: Tensor | None) -> Tensor | None:
    """`[B, rows, columns]`."""
    if tensor is None:
        return None
    return tensor[None] if tensor.dim() == 2 else tensor.flatten(2)


def emulated(program: Path, kernel: str, count: int) -> Callable[..., None]:
    """What takes the place of the compiled library's op, whose first arguments are so many results."""

    def packed(tensor: Tensor | None) -> bytes:
        if tensor is None:
            return bytes(64)
        described = DTYPES.index(tensor.dtype), *tensor.shape, *tensor.stride()
        data = memory(tensor).view(torch.uint8).numpy().tobytes()
        return struct.pack("8q", len(data), *described) + data

    def call(*arguments: Any) -> None:
        numbers = [argument for argument in arguments if isinstance(argument, float)]
        tensors = [as_matrices(argument) for argument in arguments[: len(arguments) - len(numbers)]]
        sent = b"".join(map(packed, tensors)) + struct.pack(f"{len(numbers)}d", *numbers)
        printed = subprocess.run([EMULATOR, program, kernel], input=sent, check=True, stdout=subprocess.PIPE).stdout
        for result in tensors[:count]:
            if result is not None:
                target = memory(result)
                data, printed = printed[: target.nbytes], printed[target.nbytes :]
                target.copy_(torch.frombuffer(bytearray(data), dtype=target.dtype))

    return call


@pytest.fixture
def on_aarch64(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel, count in RESULTS.items():
        op, direction = kernel.split("_")
        monkeypatch.setattr(f"ocr_kernels.{op}.native.{direction}", emulated(program, kernel, count))
    passes = {f"block_{name}": emulated(program, f"block_{name}", count) for name, count in PASSES.items()}
    monkeypatch.setattr("ocr_kernels.block.native._ops", SimpleNamespace(**passes))


CASES = SIZES_AND_OPTIONS | {
    "peak": (0, 1e3),  # between them the errors are a few numbers' luck, on any processor
    "channels": (16, 17, 66),
    "regions": (2, 7, 19, 129),
    "spatial": ((16,), (5, 13), (43, 31)),
}


@pytest.mark.slow
@both_ops
@over(thinned=[pairwise(**CASES)], wide=[])
@pytest.mark.usefixtures("on_aarch64")
def test_parity(op: Op, case: dict[str, Any]) -> None:
    with poisoned_memory():
        check(op, ("native", "cpu"), case)


@pytest.mark.slow
@over(thinned=[pairwise(**PASSES_OVER | {"channels": (2, 5, 17, 70), "pixels": (3, 33, 129, 300)})], wide=[])
@pytest.mark.usefixtures("on_aarch64")
def test_passes_of_the_block(case: dict[str, Any]) -> None:
    for name in PASSES:
        getattr(EachPass(), f"test_{name}")(case)
