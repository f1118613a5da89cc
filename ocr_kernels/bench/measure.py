"""The correctness gate, what is measured behind it, and the record of the machine."""

from __future__ import annotations

import datetime
import functools
import itertools
import math
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import ocr_kernels.attention.reference
import ocr_kernels.gather.reference
from ocr_kernels import info
from ocr_kernels.bench.cases import AUTOTUNED, CHECKPOINTED, EAGER, OPS, SUBJECTS, TINY, Function, Pass, Work, Workload
from ocr_kernels.bench.timing import Timing
from ocr_kernels.testing import judge, peak_bytes, saved_bytes

# Of the eager definition's own error, for every dtype, since other people's code is judged as well. A module is long
# enough for a compiler to add up in another order at many places.
FACTOR, MODULE_FACTOR = 2.0, 4.0
L2_MEASURES = ("misplaced NaN or inf", "relative L2 error")
MEASURES = (*L2_MEASURES, "max error", "mean error", "bias")
EMPTY = "no kernels"  # ours with kernels that do nothing: what is left is Python, dispatch and allocation

Inputs = tuple[list[Tensor], list[Tensor]]
Prepare = Callable[[Any], Callable[[], object]]


class DeviceLost(RuntimeError):
    """A kernel's fault after which nothing more can run on the device in this process."""


@dataclass(frozen=True)
class Limits:
    """What this machine reached in the same run: a large copy (bytes read plus written) and a matrix product."""

    bytes_per_second: float
    flops_per_second: float

    def floor(self, works: Sequence[Work], dtype: torch.dtype) -> float:
        """The least time for these passes over the data, one after another."""
        return sum(
            max(
                work.numbers * dtype.itemsize / self.bytes_per_second,
                2 * work.multiply_adds / self.flops_per_second,
            )
            for work in works
        )


def record(commit: str | None) -> dict[str, Any]:
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    machine = info.collect()
    # paths of this machine's are nobody else's business
    del machine["environment"]["OCR_KERNELS_LIBRARY"]
    machine["library"] = {
        kind: {name: fact for name, fact in found.items() if name != "file"}
        for kind, found in machine["library"].items()
        if isinstance(found, dict)
    }
    return {"commit": commit or _commit(), "date": date, "load": [load()], **machine}


def load() -> float | None:
    """How many processes wanted to run in the last minute."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None  # not on Windows


def _commit() -> str:
    root = Path(__file__).parents[2]  # whose repository it is: no other one may be around an installed package
    place = f"--git-dir={root / '.git'}", f"--work-tree={root}"
    command = ["git", *place, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return "unknown"


def measure_limits(device: torch.device, dtype: torch.dtype, seconds: float) -> Limits:
    large, side = (2**31, 8192) if device.type == "cuda" else (2**28, 1024)
    source = torch.randn(large // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    matrix = torch.randn(side, side, dtype=dtype, device=device)
    calls: dict[str, Prepare] = {
        "copy": lambda _: lambda: target.copy_(source),
        "product": lambda _: lambda: matrix @ matrix,
    }
    times = time_interleaved(calls, [0], device, seconds)
    return Limits(2 * large / times["copy"].median, 2 * side**3 / times["product"].median)


def measure(workload: Workload, limits: Limits, seconds: float) -> Iterator[dict[str, Any]]:
    """A line of the results for every pass. A variant that fails or is wrong is not timed, and its problem is told."""
    subject, case, dtype, device = workload.subject, workload.case, workload.dtype, workload.device
    functions = workload.variants()
    inputs = workload.inputs()
    for passes in (("forward",), ("backward", "forward+backward")):
        whole: Pass = passes[-1]
        if whole not in subject.passes:
            continue
        called = {name: f for name, f in functions.items() if (name, whole) != (CHECKPOINTED, "forward")}
        problems, first = gate(workload, called, inputs, whole)
        right = {name: function for name, function in called.items() if name not in problems}
        peak = {name: _peak_bytes(f, inputs, whole) for name, f in right.items()}
        saved = {} if whole == "forward" else {name: _saved_bytes(f, inputs) for name, f in right.items()}
        right |= subject.parts(functions[EAGER]) if EAGER in right else {}
        what: Pass
        for what in passes:  # type: ignore[assignment]
            calls = {name: functools.partial(prepare, what, function) for name, function in right.items()}
            copies = _copies(inputs, device)
            # All forward passes come before the backward passes, so that those find a cold cache, too.
            times = time_interleaved(calls, copies, device, seconds, len(copies) if what == "backward" else 1)
            del copies
            yield {
                "case": case.name,
                "subject": subject.name,
                "pass": what,
                "dtype": str(dtype).removeprefix("torch."),
                "memory_format": workload.memory_format,
                "shape": asdict(case),
                "ours": workload.backends(),
                "bytes": subject.bytes(case, what, dtype),
                "flops": subject.flops(case, what),
                "floor": limits.floor(subject.work(case, what), dtype),
                "times": {name: asdict(timing) for name, timing in times.items()},
                "first_call": first if what == whole else {},
                "peak_bytes": peak if what == whole else {},
                "saved_bytes": saved if what == "forward+backward" else {},
                "problems": problems,
            }
    torch.compiler.reset()  # the next shape is compiled for itself, not as one more variant of this one


def run(what: Pass, function: Function, inputs: Inputs) -> tuple[Tensor, ...]:
    """The outputs, and unless it is a forward pass alone the gradients of inputs and weights."""
    if what == "forward":
        with torch.no_grad():
            return _as_tuple(function(*inputs[0]))
    outputs = _as_tuple(function(*inputs[0]))
    return *outputs, *_backward(outputs, function, inputs)


def prepare(what: Pass, function: Function, inputs: Inputs) -> Callable[[], object]:
    """The call to be timed; before a backward pass alone, its forward pass runs here."""
    if what != "backward":
        return functools.partial(run, what, function, inputs)
    return functools.partial(_backward, _as_tuple(function(*inputs[0])), function, inputs)


def _backward(outputs: tuple[Tensor, ...], function: Function, inputs: Inputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, [*inputs[0], *_weights(function)], inputs[1])


def _weights(function: Function) -> list[Tensor]:
    return list(function.parameters()) if isinstance(function, nn.Module) else []


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def gate(
    workload: Workload, functions: Mapping[str, Function], inputs: Inputs, what: Pass
) -> tuple[dict[str, str], dict[str, float]]:
    """What keeps a variant from being timed, an exception or an error above the budget; seconds of the first calls.

    The budget is that of `ocr_kernels.testing.judge`. Where the error is luck in the order of sums, in float32 and in
    modules, the definition's own is the largest of three runs, two of them on inputs moved by an eps or two. Weights'
    gradients cancel, down to an exact zero before a normalisation, so a module is judged by relative L2 errors.
    """
    problems: dict[str, str] = {}
    first: dict[str, float] = {}
    results: dict[str, tuple[Tensor, ...]] = {}
    for name, function in functions.items():
        if isinstance(function, nn.Module):
            function.train(what != "forward")  # inference, or training
        start = time.perf_counter()
        try:
            results[name] = run(what, function, inputs)
            synchronize(workload.device)
        except Exception as error:  # whatever a compiler or a kernel raises belongs into the table
            problems[name] = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            require_device(workload.device, f"{name} {problems[name]}")
            continue
        first[name] = time.perf_counter() - start

    if results:
        wrong = _errors(workload, results, inputs, what)
        problems |= {name: f"wrong: {error}" for name, error in wrong.items()}
    return problems, first


def _errors(
    workload: Workload, results: Mapping[str, tuple[Tensor, ...]], inputs: Inputs, what: Pass
) -> dict[str, str]:
    definition = workload.eager()
    if isinstance(definition, nn.Module):
        definition.train(what != "forward")
    wide = deepcopy(definition).double() if isinstance(definition, nn.Module) else definition
    exact = run(what, wide, _changed(inputs, Tensor.double))
    runs = [run(what, definition, inputs)]
    if workload.dtype == torch.float32 or isinstance(definition, nn.Module):
        generator = torch.Generator(workload.device).manual_seed(0)
        size = 4 if workload.dtype == torch.float32 else 1

        def move(tensor: Tensor) -> Tensor:
            noise = size * (torch.rand(tensor.shape, generator=generator, device=tensor.device) - 0.5)
            return (tensor.float() * (1 + torch.finfo(tensor.dtype).eps * noise)).to(tensor.dtype)

        runs += [run(what, definition, _changed(inputs, move)) for _ in range(2)]

    errors: dict[str, str] = {}
    is_module = isinstance(definition, nn.Module)
    measures, factor = (L2_MEASURES, MODULE_FACTOR) if is_module else (MEASURES, FACTOR)
    weights = [name for name, _ in definition.named_parameters()] if isinstance(definition, nn.Module) else []
    outputs = [f"output {i}" for i in range(len(inputs[1]))]
    leaves = [f"gradient of {name}" for name in (*(f"input {i}" for i in range(len(inputs[0]))), *weights)]
    for name, result in results.items():
        for i, label in enumerate(outputs if what == "forward" else outputs + leaves):
            failures = [
                str(measurement)
                for measurement in judge(label, result[i], [(r[i], exact[i], 1.0) for r in runs], factor=factor)
                if not measurement.passed and measurement.measure in measures
            ]
            if failures:
                errors.setdefault(name, failures[0])
    return errors


def _changed(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    tensors, grads = inputs
    return [change(t.detach()).requires_grad_() for t in tensors], [change(grad) for grad in grads]


def _copies(inputs: Inputs, device: torch.device) -> list[Inputs]:
    """Enough copies of the inputs that, taken in turn, none is still in a GPU's L2 cache when its turn comes."""
    if device.type != "cuda":
        return [inputs]
    size = sum(t.nbytes for t in (*inputs[0], *inputs[1]))
    count = math.ceil(3 * torch.cuda.get_device_properties(device).L2_cache_size / size)
    return [inputs, *(_changed(inputs, torch.clone) for _ in range(count))]


def _peak_bytes(function: Function, inputs: Inputs, what: Pass) -> int:
    """What a call allocates at most at a time besides its results."""
    return peak_bytes(lambda *_: run(what, function, inputs), *inputs[0])


def _saved_bytes(function: Function, inputs: Inputs) -> int:
    """What is kept for the backward pass besides inputs and weights."""
    return saved_bytes(function, *inputs[0], exclude=[*inputs[0], *_weights(function)])


def time_interleaved(
    calls: Mapping[str, Prepare], arguments: Sequence[Any], device: torch.device, seconds: float, batch: int = 1
) -> dict[str, Timing]:
    """Time the calls for about `seconds`, in rounds of all of them, so that a change of the machine's speed meets all.

    They have run before. A round has `batch` calls of each, every one prepared with the next of `arguments` before
    the first is timed.
    """
    if not calls:
        return {}
    turn = itertools.cycle(arguments)
    names = list(calls) * batch
    lead = 0.0

    def one_round() -> list[float]:
        nonlocal lead
        thunks = [calls[name](next(turn)) for name in names]
        if device.type != "cuda":
            return _cpu_round(thunks)
        times, host = _cuda_round(thunks, lead)
        lead = lead or host
        return times

    one_round()
    lead = 0.0  # of the second round, since the first one warms up
    one_round()
    start = time.perf_counter()
    one_round()
    rounds = seconds / (time.perf_counter() - start)
    samples = [one_round() for _ in range(math.ceil(min(200, max(5, rounds * batch)) / batch))]
    return {
        name: Timing.of([times[i] for times in samples for i in range(index, len(names), len(calls))])
        for index, name in enumerate(calls)
    }


def _cpu_round(thunks: Sequence[Callable[[], object]]) -> list[float]:
    times = []
    for thunk in thunks:
        start = time.perf_counter()
        thunk()
        times.append(time.perf_counter() - start)
    return times


def _cuda_round(thunks: Sequence[Callable[[], object]], lead: float) -> tuple[list[float], float]:
    """Seconds on the GPU, and how long the host took to launch everything."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in thunks]
    torch.cuda.synchronize()
    # The GPU waits until the host has launched everything, so that the events time the GPU and not the launches;
    # 5e9 cycles last at least `lead` seconds on every GPU of today, twice that on most.
    torch.cuda._sleep(int(5e9 * lead))
    start = time.perf_counter()
    for thunk, (before, after) in zip(thunks, events, strict=True):
        before.record()
        thunk()
        after.record()
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    return [before.elapsed_time(after) * 1e-3 for before, after in events], host


def host_times(workload: Workload, repeats: int = 15, calls: int = 50) -> list[dict[str, Any]]:
    """Seconds that a call of an op on a tiny input costs the host, beside the same op with kernels that do nothing.

    On a CPU the tiny computation is included, in one thread, but not in the line without kernels.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # waiting for a second thread takes longer than the rest
    try:
        return list(_host_times(workload, repeats, calls))
    finally:
        torch.set_num_threads(threads)


def _host_times(workload: Workload, repeats: int, calls: int) -> Iterator[dict[str, Any]]:
    tiny = replace(workload, case=TINY, peers=tuple(p for p in workload.peers if p != AUTOTUNED))
    for name in OPS:
        subject = SUBJECTS[name]
        functions = replace(tiny, subject=subject).variants()
        functions[EMPTY] = subject.ours(TINY, "reference")
        inputs = replace(tiny, subject=subject).inputs()
        what: Pass
        for what in ("forward", "forward+backward"):
            samples: dict[str, list[float]] = {variant: [] for variant in functions}
            for _, (variant, function) in itertools.product(range(repeats), functions.items()):
                with _no_kernels() if variant == EMPTY else nullcontext():
                    run(what, function, inputs)
                    synchronize(workload.device)
                    start = time.perf_counter()
                    for _ in range(calls):
                        run(what, function, inputs)
                    samples[variant].append((time.perf_counter() - start) / calls)
                synchronize(workload.device)
            times = {variant: asdict(Timing.of(values)) for variant, values in samples.items()}
            yield {"subject": name, "pass": what, "times": times}
        torch.compiler.reset()


def _no_kernels() -> ExitStack:
    """Inside this context the reference backend computes nothing."""
    stack = ExitStack()
    for module in (ocr_kernels.gather.reference, ocr_kernels.attention.reference):
        for name in ("forward", "backward"):
            stack.enter_context(mock.patch.object(module, name, _nothing))
    return stack


def _nothing(*_: object) -> None:  # a Mock would take longer than what is measured
    pass


def require_device(device: torch.device, problem: str) -> None:
    """Raise `DeviceLost` if nothing can run on the device after a problem."""
    try:
        synchronize(device)
    except RuntimeError as error:
        raise DeviceLost(problem) from error


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
