"""Machine code without a GPU: every kernel, at every configuration the launchers choose, for any architecture.

The launchers run on meta tensors, so they decide as they would on the GPU; their launches are recorded instead of run,
compiled by Triton for the architecture, and measured.
"""

from __future__ import annotations

import argparse
import itertools
import os
import pkgutil
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # compiled kernels, not interpreted ones

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import ocr_kernels.attention.triton
import ocr_kernels.block.triton
import ocr_kernels.block.triton_inference
import ocr_kernels.block.triton_norms
import ocr_kernels.core.triton_host
import ocr_kernels.core.triton_launch
import ocr_kernels.gather.triton
from ocr_kernels.bench.cases import CASES, Case, Pass
from ocr_kernels.block.norms import Settings
from ocr_kernels.core.layout import statistics_dtype
from ocr_kernels.core.tiles import DeviceFacts

NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}
FORMATS = {torch.contiguous_format: "contiguous", torch.channels_last: "channels last"}

# What to look for in PTX, which ptxas translates one to one, or in AMD's assembly.
MATRIX = {
    "mma": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "mfma": r"\bv_mfma_",
    "wmma": r"\bv_wmma_",
}
COPIES = {"cp.async": r"\bcp\.async\.c[ag]\b", "TMA": r"\bcp\.async\.bulk\."}


OPS = (
    ocr_kernels.gather.triton,
    ocr_kernels.attention.triton,
    ocr_kernels.block.triton,
    ocr_kernels.block.triton_inference,
    ocr_kernels.block.triton_norms,
)
REGISTERS = 2048  # of a multiprocessor, for each lane of a warp


class Architecture(NamedTuple):
    target: GPUTarget
    facts: DeviceFacts
    threads: int  # that a multiprocessor holds
    blocks: int  # that it holds
    reserved: int = 1024  # bytes of its shared memory that the system takes for each block
    registers: int = REGISTERS
    granule: int = 8  # by which each of its quarters gives out its own
    shared: int = 0  # bytes of its shared memory, where a block may not have all of it

    def resident_blocks(self, registers: int, shared: int, num_warps: int, tensor_memory: int = 0) -> int:
        """How many blocks a multiprocessor holds at a time."""
        given = -(-registers // self.granule) * self.granule
        limits = [self.blocks, 4 * (self.registers // 4 // given) // num_warps]
        limits.append(self.threads // (num_warps * self.target.warp_size))
        if shared + self.reserved:
            has = self.shared or self.facts.shared_memory + self.reserved
            limits.append(has // (shared + self.reserved))
        if tensor_memory:
            limits.append(512 // tensor_memory)
        return min(limits)


ARCHITECTURES = {
    "sm_75": Architecture(GPUTarget("cuda", 75, 32), DeviceFacts(40, 65536, (7, 5)), 1024, 16, reserved=0),
    "sm_80": Architecture(GPUTarget("cuda", 80, 32), DeviceFacts(108, 166912, (8, 0)), 2048, 32),
    "sm_86": Architecture(GPUTarget("cuda", 86, 32), DeviceFacts(84, 101376, (8, 6)), 1536, 16),
    "sm_89": Architecture(GPUTarget("cuda", 89, 32), DeviceFacts(128, 101376, (8, 9)), 1536, 24),
    "sm_90": Architecture(GPUTarget("cuda", 90, 32), DeviceFacts(132, 232448, (9, 0)), 2048, 32),
    "sm_100": Architecture(GPUTarget("cuda", 100, 32), DeviceFacts(148, 232448, (10, 0)), 2048, 32),
    "sm_120": Architecture(GPUTarget("cuda", 120, 32), DeviceFacts(170, 101376, (12, 0)), 1536, 24),
    "gfx942": Architecture(
        GPUTarget("hip", "gfx942", 64), DeviceFacts(304, 65536, None, warp_size=64), 2048, 32, reserved=0
    ),
    "gfx1100": Architecture(
        GPUTarget("hip", "gfx1100", 32),
        DeviceFacts(48, 65536, None),
        threads=2048,
        blocks=32,
        reserved=0,
        registers=6144,
        granule=24,
        shared=131072,
    ),
}


@dataclass(frozen=True)
class Shape:
    """A case, and the dtypes and memory format in which gather and attention are launched at it."""

    case: Case
    dtype: torch.dtype
    memory_format: torch.memory_format = torch.contiguous_format
    logits_dtype: torch.dtype | None = None  # where it is another

    def __str__(self) -> str:
        logits = f" ({TYPES[self.logits_dtype]} logits)" if self.logits_dtype else ""
        case = f"{self.case.name}, K={self.case.regions}, {self.case.height}x{self.case.width}"
        return f"{case}, {TYPES[self.dtype]}{logits}, {FORMATS[self.memory_format]}"

    def launch(self) -> None:
        for run in self.passes().values():
            run()

    def passes(self) -> dict[tuple[str, Pass], Callable[[], None]]:
        """Gather and attention, forward and backward, on meta tensors."""
        gather, attention = ocr_kernels.gather.triton, ocr_kernels.attention.triton
        case = self.case

        def pixels(channels: int, dtype: torch.dtype) -> Tensor:
            shape = (case.batch, channels, case.height, case.width)
            return torch.empty(shape, dtype=dtype, device="meta", memory_format=self.memory_format)

        feats, query = pixels(case.channels, self.dtype), pixels(case.key_channels, self.dtype)
        logits = pixels(case.regions, self.logits_dtype or self.dtype)
        key = query.new_empty((case.batch, case.key_channels, case.regions))
        out = feats.new_empty((case.batch, case.channels, case.regions))
        statistics = statistics_dtype(feats, logits)
        stats = feats.new_empty((case.batch, case.channels + 2, case.regions), dtype=statistics)
        like = torch.empty_like  # a tensor of its own for each argument, so that bytes are counted
        gradients = like(query), like(key), like(key)
        return {
            ("gather", "forward"): lambda: gather.forward(out, stats, feats, logits, 1.0),
            ("gather", "backward"): lambda: gather.backward(like(feats), like(logits), out, feats, logits, stats, 1.0),
            ("attention", "forward"): lambda: attention.forward(like(query), query, key, like(key), 1.0),
            ("attention", "backward"): lambda: attention.backward(*gradients, like(query), query, key, like(key), 1.0),
        }


class BlockShape(Shape):
    """A case of inference by the block, from feats to class logits, with as many classes as regions."""

    def passes(self) -> dict[tuple[str, Pass], Callable[[], None]]:
        case = self.case
        batch, channels, key_channels, classes = case.batch, case.channels, case.key_channels, case.regions
        spatial = case.height, case.width

        def empty(
            *shape: int, dtype: torch.dtype = self.dtype, memory_format: torch.memory_format = torch.contiguous_format
        ) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)

        def convolution(outputs: int, inputs: int) -> list[Tensor]:
            return [empty(outputs, inputs), empty(outputs, dtype=torch.float32)]

        up_bias = empty(channels, dtype=torch.float32)
        weights = [
            *convolution(key_channels, channels),
            *convolution(key_channels, key_channels),
            up_bias,
            empty(channels, channels),
            *convolution(channels, channels),
            *convolution(classes, channels),
        ]
        feats = empty(batch, channels, *spatial, memory_format=self.memory_format)
        logits = empty(batch, classes, *spatial, memory_format=self.memory_format)
        key, contexts = empty(batch, key_channels, classes), empty(batch, channels, classes)
        infer = ocr_kernels.block.triton.infer
        slopes = (0.0,) * 4
        return {
            ("inference", "forward"): lambda: infer(logits, feats, key, contexts, weights, 1.0, slopes, "logits"),
        }


class TrainingShape(Shape):
    """A case of training by the block, with BatchNorm's statistics and Dropout2d's mask."""

    def passes(self) -> dict[tuple[str, Pass], Callable[[], None]]:
        case = self.case
        batch, channels, depth, regions = case.batch, case.channels, case.key_channels, case.regions
        exact = torch.promote_types(self.dtype, torch.float32)

        def empty(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        def pixels(channels: int) -> Tensor:
            maps = empty(batch, channels, case.height, case.width)
            return maps.contiguous(memory_format=self.memory_format)

        feats, grad = pixels(channels), pixels(channels)
        matrices = [empty(depth, channels), empty(depth, depth), empty(channels, 2 * channels)]
        contexts = empty(batch, channels, regions, dtype=exact)
        vectors = [empty(n, dtype=exact) for n in (depth, depth, channels, channels) for _ in range(2)]
        tensors = feats, empty(batch, depth, regions), *matrices, contexts, vectors, empty(batch, channels, dtype=exact)
        settings = Settings(1.0, (0.0,) * 4, (1e-5,) * 4, ("",) * 4, True)
        kernels: Any = ocr_kernels.block.triton
        saved = *map(pixels, (depth, depth, regions, channels)), empty(10 * (depth + channels) + 4, dtype=exact)
        return {
            ("training", "forward"): lambda: kernels.forward(*tensors, settings),
            ("training", "backward"): lambda: kernels.backward(grad, *tensors, saved, settings, (True,) * 14),
        }


def shapes(quick: bool) -> list[Shape]:
    """Every case in every dtype and format; or a case for each row of the tile tables, and what else matters."""
    cityscapes, coco = CASES["cityscapes-inference"], CASES["coco-stuff"]
    even = replace(coco, height=128, width=256)  # pixels that divide by 16, so that loads take several at once
    narrow = [replace(cityscapes, key_channels=32), replace(CASES["regions-64"], key_channels=128)]
    rows = [cityscapes, CASES["regions-64"], CASES["regions-128"], even, CASES["long-tail"]]
    rarer = [
        *(Shape(case, torch.float64) for case in (even, CASES["long-tail"])),
        *(Shape(case, torch.bfloat16, logits_dtype=torch.float32) for case in (cityscapes, coco)),  # under autocast
    ]
    if not quick:
        dtypes = torch.bfloat16, torch.float16, torch.float32
        every = list(itertools.product([*CASES.values(), even, *narrow], dtypes, FORMATS))
        blocks = [kind(*shape) for kind in (BlockShape, TrainingShape) for shape in every]
        return [*(Shape(*shape) for shape in every), *rarer, *blocks]
    return [
        *(Shape(case, dtype) for dtype in (torch.bfloat16, torch.float32) for case in (*rows, *narrow)),
        Shape(even, torch.float16),
        *(Shape(case, torch.bfloat16, torch.channels_last) for case in (cityscapes, coco)),
        *(Shape(case, torch.bfloat16) for case in (CASES["lip"], CASES["pascal-context"], coco)),
        *rarer,
        *(BlockShape(case, torch.bfloat16) for case in [*rows, CASES["regions-256"], CASES["lip"]]),
        *(BlockShape(case, torch.bfloat16, torch.channels_last) for case in (cityscapes, even)),
        *(BlockShape(case, dtype) for case, dtype in ((even, torch.float16), (coco, torch.bfloat16))),
        *(BlockShape(case, torch.float32) for case in (cityscapes, even)),
        *(TrainingShape(case, torch.bfloat16) for case in rows),
        *(TrainingShape(case, dtype) for case in (cityscapes, even) for dtype in (torch.float16, torch.float32)),
        *(TrainingShape(case, torch.bfloat16, torch.channels_last) for case in (cityscapes, coco)),
        TrainingShape(even, torch.float64),
    ]


def random_shapes(count: int = 200) -> list[Shape]:
    """Images of any size, in batches of any, as a network sees them that is run on photos."""
    draw = random.Random(0)
    case = CASES["cityscapes-inference"]
    cases = [
        replace(case, batch=draw.randint(1, 8), height=draw.randint(16, 256), width=draw.randint(16, 256))
        for _ in range(count)
    ]
    return [kind(case, torch.bfloat16) for kind in (Shape, BlockShape, TrainingShape) for case in cases]


Position = tuple[int, ...]  # an argument's position, and an element's in it where it is a tuple


@dataclass(frozen=True)
class Launch:
    """One kernel launch: what Triton's just-in-time compiler would make of its arguments."""

    kernel: str  # module:name
    signature: tuple[tuple[str, Any], ...]  # a name and a type, or a tuple of types
    constants: tuple[tuple[Position, Any], ...]
    divisible_by_16: tuple[Position, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        name = self.kernel.split(":")[1].removesuffix("_kernel")
        return name.removeprefix("spatial_").removeprefix("pixel_region_").removeprefix("ocr_")

    def __str__(self) -> str:
        named = [(name, self.constant(name)) for name, _ in self.signature]
        tiles = [f"{name[6:]}{value}" for name, value in named if name.startswith("BLOCK_")]
        runs = [f"{name[4]}{value}" for name, value in self.options if name.startswith("num_")]
        return f"{self.name:26} {' '.join(tiles + runs):25}"

    def constant(self, name: str) -> Any:
        """The value of a parameter that is a constant; None where there is no such."""
        positions = {name: (index,) for index, (name, _) in enumerate(self.signature)}
        return dict(self.constants).get(positions.get(name, ()))

    def compile(self, target: GPUTarget) -> Any:
        divisible = {position: [["tt.divisibility", 16]] for position in self.divisible_by_16}
        source = ASTSource(pkgutil.resolve_name(self.kernel), dict(self.signature), dict(self.constants), divisible)
        return triton.compile(source, target=target, options=dict(self.options))


@dataclass(frozen=True)
class Resources:
    """What the machine code of one launch needs, and which instructions it has how often."""

    registers: int  # per thread
    spilled: int  # per thread: bytes of local memory (NVIDIA), registers (AMD)
    shared: int  # bytes per block
    blocks: int  # that a multiprocessor holds at a time
    matrix: dict[str, int]
    copies: dict[str, int]

    def __str__(self) -> str:
        instructions = (" ".join(f"{name} {n}" for name, n in found.items()) for found in (self.matrix, self.copies))
        matrix, copies = instructions
        return f"{self.registers:5}{self.spilled:6}{self.shared:8}{self.blocks:7}  {matrix:20}{copies}".rstrip()


HEADER = f"{'tiles':25} regs spill  shared blocks  {'matrix':20}copies"


@dataclass(frozen=True)
class Call:
    """A launch as it is made: of so many programs, with these numbers, on so many bytes."""

    launch: Launch | str  # or the name of an operation of PyTorch's
    programs: int
    numbers: dict[str, int]
    bytes: int  # of its different tensors
    multiply_adds: int = 0  # of a product of PyTorch's
    itemsize: int = 0  # of what it multiplies


class Operations(TorchDispatchMode):
    """Adds to the calls what PyTorch itself launches."""

    def __init__(self, recorded: list[Call]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorded = recorded

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not any(kind in func.__name__ for kind in ("empty", "view", "promote_types")):
            product: tuple[int, int] = 0, 0
            if count := flop_registry.get(func.overloadpacket):
                operands = [each for each in args if not isinstance(each, torch.dtype)]
                product = count(*operands, out_val=result) // 2, operands[0].itemsize
            self.recorded.append(Call(func.__name__, 1, {}, _bytes((args, kwargs, result)), *product))
        return result


def launches(architecture: str, run: Callable[[], None]) -> list[Launch]:
    """The different kernel launches that `run` makes on an architecture; its tensors must be meta tensors."""
    made = (call.launch for call in calls(architecture, run))
    return list(dict.fromkeys(launch for launch in made if isinstance(launch, Launch)))


def calls(architecture: str, run: Callable[[], None]) -> list[Call]:
    """All that `run` launches, in its order, with what PyTorch itself does in between."""
    recorded: list[Call] = []
    facts = ARCHITECTURES[architecture].facts

    def record(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        numbers = {name: value for name, value in zip(kernel.arg_names, args, strict=False) if type(value) is int}
        numbers |= {name: value for name, value in options.items() if type(value) is int}
        recorded.append(Call(_launch(kernel, args, options), prod(grid), numbers, _bytes(args)))

    with ExitStack() as stack:
        stack.enter_context(Operations(recorded))
        stack.enter_context(mock.patch.object(JITFunction, "run", record))
        stack.enter_context(mock.patch.dict(ocr_kernels.core.triton_launch._prepared, clear=True))
        for module in (*OPS, ocr_kernels.core.triton_host):
            stack.enter_context(mock.patch.object(module, "device_facts", return_value=facts))
        run()
    return recorded


def _bytes(arguments: Any) -> int:
    tensors = {id(leaf): leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)}
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())


def _launch(kernel: JITFunction[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    constants: list[tuple[Position, Any]] = []
    divisible: list[Position] = []

    def type_of(value: Any, position: Position, parameter: Any) -> Any:
        if parameter.is_constexpr or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
            constants.append((position, value))
            return "constexpr"
        if isinstance(value, tuple):  # whose elements Triton always specialises
            return tuple(type_of(element, (*position, i), parameter) for i, element in enumerate(value))
        if isinstance(value, float):
            return parameter.annotation_type
        if isinstance(value, Tensor):
            divisible.append(position)
            return "*" + TYPES[value.dtype]
        if value % 16 == 0 and not parameter.do_not_specialize:
            divisible.append(position)
        return "i32" if value < 2**31 else "i64"

    signature = tuple(
        (parameter.name, type_of(arguments.pop(parameter.name), (index,), parameter))
        for index, parameter in enumerate(kernel.params)
    )
    path = f"{kernel.fn.__module__}:{kernel.fn.__name__}"
    return Launch(path, signature, tuple(constants), tuple(divisible), tuple(arguments.items()))


def chosen(architecture: str, shapes: Iterable[Shape]) -> dict[Launch, list[Shape]]:
    """The different launches, and the shapes at which they are made."""
    found: dict[Launch, list[Shape]] = {}
    for shape in shapes:
        for launch in launches(architecture, shape.launch):
            found.setdefault(launch, []).append(shape)
    return found


def measure(architecture: str, launch: Launch) -> Resources:
    """Compile a launch."""
    return measured(architecture, launch.compile(ARCHITECTURES[architecture].target))


def measured(architecture: str, compiled: Any) -> Resources:
    on = ARCHITECTURES[architecture]
    metadata = compiled.metadata
    assembly = compiled.asm["ptx" if "ptx" in compiled.asm else "amdgcn"]
    registers, spilled = _registers(compiled)
    blocks = on.resident_blocks(registers, metadata.shared, metadata.num_warps, getattr(metadata, "tmem_size", 0) or 0)
    return Resources(
        registers, spilled, metadata.shared, blocks, _instructions(assembly, MATRIX), _instructions(assembly, COPIES)
    )


def _instructions(assembly: str, patterns: dict[str, str]) -> dict[str, int]:
    counts = {name: len(re.findall(pattern, assembly)) for name, pattern in patterns.items()}
    return {name: count for name, count in counts.items() if count}


def _registers(compiled: Any) -> tuple[int, int]:
    """(registers, spilled) of a compiled kernel."""
    if "cubin" not in compiled.asm:
        counts = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", compiled.asm["amdgcn"]))
        return int(counts["vgpr_count"]), int(counts["vgpr_spill_count"])
    dump = _read_cubin(compiled, "cuobjdump", "--dump-resource-usage")
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", dump)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def instructions(compiled: Any) -> str:
    """The machine code as text: SASS, or AMD's assembly."""
    return str(compiled.asm["amdgcn"]) if "amdgcn" in compiled.asm else _read_cubin(compiled, "nvdisasm", "-c")


def _read_cubin(compiled: Any, tool: str, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([NVIDIA / tool, option, file.name], check=True, capture_output=True, text=True).stdout


def allowed_spills(architecture: str, launch: Launch, found: Resources) -> int:
    """No kernel runs out of registers, but on NVIDIA's by little where pixels share little alignment: many addresses.

    Below that, ptxas itself parks a few values in local memory where one more block then fits on a multiprocessor.
    """
    if ARCHITECTURES[architecture].target.backend != "cuda":
        return 0
    if found.registers < min(254, REGISTERS // dict(launch.options).get("num_warps", 4)):
        return 64
    return {1: 32, 2: 48, 4: 48}.get(launch.constant("ALIGNMENT"), 0)


def faults(architecture: str, launch: Launch, found: Resources) -> list[str]:
    """What a launch should not be."""
    on = ARCHITECTURES[architecture]
    allowed = allowed_spills(architecture, launch, found)
    numbers = launch.constant("NUMBERS")
    operand = str(numbers.dot) if numbers else "none"  # what enters products, if there are any
    problems = {
        f"spills more than {allowed}": found.spilled > allowed,
        f"exceeds {on.facts.shared_memory} bytes of shared memory": found.shared > on.facts.shared_memory,
        f"multiplies {operand} without matrix instructions": operand in ("bf16", "fp16") and not found.matrix,
        "rounds fp32 to multiply it": operand == "fp32" and on.target.backend == "cuda" and bool(found.matrix),
        "may fuse products and sums": dict(launch.options).get("enable_fp_fusion", True),
    }
    return [problem for problem, present in problems.items() if present]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codegen", description=__doc__.splitlines()[0])
    parser.add_argument("architectures", nargs="*", choices=[*ARCHITECTURES, []], help="default: all")
    parser.add_argument("--quick", action="store_true", help="only a few cases that have all rows of the tile tables")
    parser.add_argument("--variants", action="store_true", help="only count: how many kernels do 200 sizes compile?")
    args = parser.parse_args(argv)
    failures = 0
    if args.variants:
        for name in args.architectures or ARCHITECTURES:
            counts = Counter(launch.name for launch in chosen(name, random_shapes()))
            print(f"{name}: {counts.total()} kernels", *(f"{n:5} {kernel}" for kernel, n in counts.items()), sep="\n")
        return 0
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for name in args.architectures or ARCHITECTURES:
            made = chosen(name, shapes(args.quick))
            heading = None
            print(f"{f'{name}: {len(made)} kernels':31}{HEADER}")
            for (launch, at), found in zip(made.items(), pool.map(measure, [name] * len(made), made), strict=True):
                if at[0] != heading:
                    heading = at[0]
                    print(f"  {heading}")
                print(f"    {launch}{found}", flush=True)
                for problem in faults(name, launch, found):
                    failures += 1
                    print(f"    ^ {problem}")
    print(f"{failures} faults")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
