"""Machine code without a GPU: every kernel, at every configuration the launchers choose, for any architecture.

The launchers run on meta tensors, so they decide as they would on the GPU; their launches are recorded instead of run,
compiled by Triton for the architecture, and measured.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # compiled kernels, not interpreted ones

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import ocr_kernels.attention.triton
import ocr_kernels.gather.triton
import ocr_kernels.tiles
from ocr_kernels.tiles import DeviceFacts

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

ARCHITECTURES = {
    "sm_75": (GPUTarget("cuda", 75, 32), DeviceFacts(40, 65536, False)),
    "sm_80": (GPUTarget("cuda", 80, 32), DeviceFacts(108, 166912, True)),
    "sm_86": (GPUTarget("cuda", 86, 32), DeviceFacts(84, 101376, True)),
    "sm_89": (GPUTarget("cuda", 89, 32), DeviceFacts(128, 101376, True)),
    "sm_90": (GPUTarget("cuda", 90, 32), DeviceFacts(132, 232448, True)),
    "sm_100": (GPUTarget("cuda", 100, 32), DeviceFacts(148, 232448, True)),
    "sm_120": (GPUTarget("cuda", 120, 32), DeviceFacts(170, 101376, True)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), DeviceFacts(304, 65536, True)),
}


@dataclass(frozen=True)
class Shape:
    """Sizes, dtype and memory format at which both ops are launched."""

    dtype: torch.dtype
    regions: int
    spatial: tuple[int, int] = (128, 256)
    memory_format: torch.memory_format = torch.contiguous_format
    batch: int = 2
    channels: int = 512
    key_channels: int = 256

    def __str__(self) -> str:
        layout = "channels last" if self.memory_format == torch.channels_last else "contiguous"
        return f"{TYPES[self.dtype]}, K={self.regions}, {self.spatial[0]}x{self.spatial[1]}, {layout}"

    def launch(self) -> None:
        """Run both ops forward and backward on meta tensors."""
        from ocr_kernels.attention import registration as attention
        from ocr_kernels.gather import registration as gather

        def pixels(channels: int) -> Tensor:
            shape = (self.batch, channels, *self.spatial)
            return torch.empty(shape, dtype=self.dtype, device="meta", memory_format=self.memory_format)

        feats, logits, query = pixels(self.channels), pixels(self.regions), pixels(self.key_channels)
        key = query.new_empty((self.batch, self.key_channels, self.regions))
        out, stats = gather._forward(feats, logits, 1.0, "triton")
        gather._backward(out, feats, logits, out, stats, 1.0, True, True, "triton")
        context = attention._forward(query, key, key, None, "triton")
        attention._backward(context, query, key, key, None, True, True, True, "triton")


# One shape for every row of the tile tables, and what else changes the machine code.
SHAPES = (
    *(Shape(torch.bfloat16, regions) for regions in (19, 59, 120, 171, 1203)),
    *(Shape(torch.float16, regions) for regions in (19, 171)),
    *(Shape(torch.float32, regions) for regions in (19, 59, 120, 171, 1203)),
    *(Shape(torch.float64, regions) for regions in (19, 171, 1203)),
    Shape(torch.bfloat16, 19, memory_format=torch.channels_last),
    Shape(torch.bfloat16, 171, memory_format=torch.channels_last),
    Shape(torch.bfloat16, 19, spatial=(119, 119)),
)


@dataclass(frozen=True)
class Launch:
    """One kernel launch: what Triton's just-in-time compiler would make of its arguments."""

    kernel: JITFunction[Any]
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible_by_16: tuple[str, ...]
    options: tuple[tuple[str, int], ...]

    def compile(self, target: GPUTarget) -> Any:
        position = {name: (index,) for index, name in enumerate(self.kernel.arg_names)}
        source = ASTSource(
            self.kernel,
            dict(self.signature),
            {position[name]: value for name, value in self.constants},
            {position[name]: [["tt.divisibility", 16]] for name in self.divisible_by_16},
        )
        return triton.compile(source, target=target, options=dict(self.options))


@dataclass(frozen=True)
class Resources:
    """What the machine code of one launch needs."""

    shape: str
    kernel: str
    tiles: str
    registers: int  # per thread
    spilled: int  # per thread: bytes of local memory (NVIDIA), registers (AMD)
    shared: int  # bytes per program


def launches(architecture: str, run: Callable[[], None]) -> list[Launch]:
    """The different kernel launches that `run` makes on an architecture; its tensors must be meta tensors."""
    recorded: list[Launch] = []
    facts = ARCHITECTURES[architecture][1]

    def record(kernel: JITFunction[Any], *args: Any, **kwargs: Any) -> None:
        recorded.append(_launch(kernel, args, kwargs))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", record))
        for module in (ocr_kernels.gather.triton, ocr_kernels.attention.triton, ocr_kernels.tiles):
            stack.enter_context(mock.patch.object(module, "device_facts", return_value=facts))
        run()
    return list(dict.fromkeys(recorded))


def _launch(kernel: JITFunction[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisible = []
    for parameter in kernel.params:
        name, value = parameter.name, arguments.pop(parameter.name)
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            divisible.append(name)
        elif isinstance(value, float):
            signature[name] = parameter.annotation_type
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                divisible.append(name)
    options = {name: arguments[name] for name in ("num_warps", "num_stages") if name in arguments}
    return Launch(kernel, tuple(signature.items()), tuple(constants.items()), tuple(divisible), tuple(options.items()))


def measure(architecture: str, shape: Shape) -> list[Resources]:
    """Compile what both ops launch at `shape`."""
    rows = []
    for launch in launches(architecture, shape.launch):
        registers, spilled, shared = _resources(launch.compile(ARCHITECTURES[architecture][0]))
        sizes = [f"{name[6:]}={value}" for name, value in launch.constants if name.startswith("BLOCK_")]
        sizes += [f"{name[4:]}={value}" for name, value in launch.options]
        rows.append(Resources(str(shape), launch.kernel.__name__, " ".join(sizes), registers, spilled, shared))
    return rows


def _resources(compiled: Any) -> tuple[int, int, int]:
    """(registers, spilled, shared) of a compiled kernel."""
    if "cubin" not in compiled.asm:
        counts = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", compiled.asm["amdgcn"]))
        return int(counts["vgpr_count"]), int(counts["vgpr_spill_count"]), compiled.metadata.shared
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        )
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", dump.stdout)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"], compiled.metadata.shared


def allowed_spills(row: Resources) -> int:
    """16-bit kernels spill nothing; others, bound by arithmetic, may keep a few values in local memory.

    So may those of an odd number of pixels, which hold an address for every element, and those of more than 256
    regions, which hold two passes of the softmax. All of it stays in the first-level cache.
    """
    if "K=1203" in row.shape:
        return 96
    return 32 if row.shape.startswith(("fp32", "fp64")) or "119x119" in row.shape else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codegen", description=__doc__.splitlines()[0])
    parser.add_argument("architectures", nargs="*", choices=[*ARCHITECTURES, []], help="default: all")
    names = parser.parse_args(argv).architectures or list(ARCHITECTURES)
    failures = 0
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for name in names:
            print(f"{name:52}{'tiles':44} regs spill shared")
            limit = ARCHITECTURES[name][1].shared_memory
            for rows in pool.map(measure, [name] * len(SHAPES), SHAPES):
                print(f"  {rows[0].shape}")
                for row in rows:
                    bad = row.spilled > allowed_spills(row) or row.shared > limit
                    failures += bad
                    numbers = f"{row.registers:5}{row.spilled:6}{row.shared:7}"
                    print(f"    {row.kernel:48}{row.tiles:44}{numbers}{'  <- too much' if bad else ''}")
    print(f"{failures} launches spill too much or exceed the shared memory")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
