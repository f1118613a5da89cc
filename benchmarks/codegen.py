"""Machine code without a GPU: every kernel launch of an op, compiled for an architecture and measured.

The launchers run on meta tensors, so they take the same decisions as on a GPU; their launches are recorded instead
of run, and compiled by Triton for any target.
"""

from __future__ import annotations

import contextlib
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import ocr_kernels.attention.triton
import ocr_kernels.gather.triton
from ocr_kernels.tiles import DeviceFacts


@dataclass(frozen=True)
class Architecture:
    """A GPU as the launchers and the compiler see it."""

    name: str
    target: GPUTarget
    facts: DeviceFacts


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("sm_75", GPUTarget("cuda", 75, 32), DeviceFacts(40, 65536, False)),
        Architecture("sm_80", GPUTarget("cuda", 80, 32), DeviceFacts(108, 166912, True)),
        Architecture("sm_86", GPUTarget("cuda", 86, 32), DeviceFacts(84, 101376, True)),
        Architecture("sm_89", GPUTarget("cuda", 89, 32), DeviceFacts(128, 101376, True)),
        Architecture("sm_90", GPUTarget("cuda", 90, 32), DeviceFacts(132, 232448, True)),
        Architecture("sm_100", GPUTarget("cuda", 100, 32), DeviceFacts(148, 232448, True)),
        Architecture("sm_120", GPUTarget("cuda", 120, 32), DeviceFacts(170, 101376, True)),
        Architecture("gfx942", GPUTarget("hip", "gfx942", 64), DeviceFacts(304, 65536, True)),
    )
}


@dataclass(frozen=True)
class Launch:
    """One kernel launch: enough to compile it as Triton's own just-in-time compiler would."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]

    def compile(self, target: GPUTarget) -> Any:
        position = {name: (index,) for index, name in enumerate(self.kernel.arg_names)}
        source = ASTSource(
            self.kernel,
            dict(self.signature),
            {position[name]: value for name, value in self.constants},
            {position[name]: [["tt.divisibility", 16]] for name in self.divisible},
        )
        return triton.compile(source, target=target, options=dict(self.options))


@dataclass(frozen=True)
class Resources:
    """What a program needs, read from the machine code."""

    registers: int  # per thread
    spilled: int  # bytes of local memory per thread (NVIDIA), registers spilled (AMD)
    shared: int  # bytes per program


def resources(compiled: Any) -> Resources:
    if "cubin" not in compiled.asm:
        text = compiled.asm["amdgcn"]
        spilled = sum(int(count) for count in re.findall(r"\.vgpr_spill_count:\s*(\d+)", text))
        registers = max(int(count) for count in re.findall(r"\.vgpr_count:\s*(\d+)", text))
        return Resources(registers, spilled, compiled.metadata.shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [_cuobjdump(), "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return Resources(usage["REG"], usage["STACK"] + usage["LOCAL"], compiled.metadata.shared)


def _cuobjdump() -> str:
    return str(pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def launches(architecture: Architecture, run: Callable[[], object]) -> list[Launch]:
    """The kernel launches that `run` makes on `architecture`; `run` must use meta tensors."""
    recorded: list[Launch] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", lambda kernel, *args, **kwargs: recorded.append(_launch(kernel, args, kwargs))))
        for module in (ocr_kernels.gather.triton, ocr_kernels.attention.triton, ocr_kernels.tiles):
            stack.enter_context(mock.patch.object(module, "device_facts", lambda _: architecture.facts))
        run()
    return list(dict.fromkeys(recorded))


def _launch(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    signature, constants, divisible = {}, {}, []
    kwargs = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    for parameter, value in [*zip(kernel.params, args), *((kernel.params[kernel.arg_names.index(n)], v) for n, v in kwargs.items())]:
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + _NAMES[value.dtype]
            divisible.append(name)
        elif isinstance(value, float):
            signature[name] = parameter.annotation_type
        elif value == 1:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                divisible.append(name)
    return Launch(kernel, tuple(signature.items()), tuple(constants.items()), tuple(divisible), tuple(options.items()))


_NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def op_launches(
    architecture: Architecture, dtype: torch.dtype, channels: int, key_channels: int, regions: int,
    logits_dtype: torch.dtype | None = None, batch: int = 2, spatial: tuple[int, int] = (128, 256),
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Iterator[Launch]:
    """Every launch of both ops, forward and backward, at one shape."""
    def empty(*shape: int, dtype: torch.dtype = dtype, **kwargs: Any) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True, **kwargs)

    feats = empty(batch, channels, *spatial, memory_format=memory_format)
    logits = empty(batch, regions, *spatial, dtype=logits_dtype or dtype, memory_format=memory_format)
    query = empty(batch, key_channels, *spatial, memory_format=memory_format)
    key, value = empty(batch, key_channels, regions), empty(batch, key_channels, regions)

    def run() -> None:
        from ocr_kernels.gather import registration as gather
        from ocr_kernels.attention import registration as attention
        with torch.no_grad():
            out, stats = gather._forward(feats, logits, 1.0, "triton")
            gather._backward(out, feats, logits, out, stats, 1.0, True, True, "triton")
            out = attention._forward(query, key, value, None, "triton")
            attention._backward(out, query, key, value, None, True, True, True, "triton")

    yield from launches(architecture, run)
