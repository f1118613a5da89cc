"""The correctness gate, the timing behind it, and the record of the machine."""

from __future__ import annotations

import datetime
import functools
import itertools
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Op, Pass
from ocr_kernels import available_backends, info
from ocr_kernels.testing import FACTORS, assert_parity

EAGER, COMPILED = "eager", "compile"

Inputs = tuple[list[Tensor], Tensor]


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median, and the interquartile range as a share of it."""

    median: float
    spread: float


@dataclass(frozen=True)
class Limits:
    """What this machine reached in the same run: a large copy (bytes read plus written) and a matrix product."""

    bytes_per_second: float
    flops_per_second: float

    def floor(self, bytes_moved: int, flops: int) -> float:
        """The least time for that many bytes and operations."""
        return max(bytes_moved / self.bytes_per_second, flops / self.flops_per_second)


def record(commit: str | None) -> dict[str, Any]:
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"commit": commit or _commit(), "date": date, **info.collect()}


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        root = Path(__file__).parent
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return "unknown"


def our_backends(device: torch.device) -> list[str]:
    """The backends to time: the kernels that run on `device`, or the reference where there are none."""
    usable = [name for name, state in available_backends().items() if state is True and name != "reference"]
    if device.type == "cpu":
        usable = [name for name in usable if name != "triton"]
    return usable or ["reference"]


def measure_limits(device: torch.device, dtype: torch.dtype, seconds: float) -> Limits:
    large, side = (2**31, 8192) if device.type == "cuda" else (2**28, 1024)
    source = torch.randn(large // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    matrix = torch.randn(side, side, dtype=dtype, device=device)
    times = time_interleaved(
        {"copy": lambda _: target.copy_(source), "product": lambda _: matrix @ matrix}, [0], device, seconds
    )
    return Limits(2 * large / times["copy"].median, 2 * side**3 / times["product"].median)


def measure(
    op: Op, case: Case, what: Pass, dtype: torch.dtype, device: torch.device, limits: Limits, seconds: float
) -> dict[str, Any]:
    """One line of the results. A variant that fails or is wrong is not timed, and its problem is told."""
    backends = our_backends(device)
    functions: dict[str, Callable[..., Tensor]] = {EAGER: op.definition}
    functions[COMPILED] = torch.compile(op.definition, dynamic=False)
    functions.update({backend: functools.partial(op.ours, backend=backend) for backend in backends})

    inputs = op.inputs(case, dtype, device)
    problems = _problems(op, what, functions, inputs)
    calls = {name: functools.partial(RUN[what], f) for name, f in functions.items() if name not in problems}
    times = time_interleaved(calls, _copies(inputs, device), device, seconds)
    torch.compiler.reset()  # the next shape is compiled for itself, not as one more variant of this one

    bytes_moved, flops = op.bytes(case, what, dtype), op.flops(case, what)
    return {
        "case": case.name,
        "op": op.name,
        "pass": what,
        "ours": backends[0],
        "bytes": bytes_moved,
        "flops": flops,
        "floor": limits.floor(bytes_moved, flops),
        "times": {name: asdict(timing) for name, timing in times.items()},
        "problems": problems,
    }


def _forward(function: Callable[..., Tensor], inputs: Inputs) -> None:
    with torch.no_grad():
        function(*inputs[0])


def _forward_backward(function: Callable[..., Tensor], inputs: Inputs) -> None:
    tensors, grad = inputs
    torch.autograd.grad(function(*tensors), tensors, grad)


RUN: dict[Pass, Callable[[Callable[..., Tensor], Inputs], None]] = {
    "forward": _forward,
    "forward+backward": _forward_backward,
}


def _problems(op: Op, what: Pass, functions: Mapping[str, Callable[..., Tensor]], inputs: Inputs) -> dict[str, str]:
    """What keeps a variant from being timed: an exception, or an error above the budget of `ocr_kernels.testing`.

    The budget is twice the eager definition's own error for every dtype, since other people's code is judged as well.
    """
    tensors, grad = inputs
    if what == "forward":
        tensors = [tensor.detach() for tensor in tensors]
    problems = {}
    for name, function in functions.items():
        try:
            RUN[what](function, inputs)
        except Exception as error:  # whatever a compiler or a kernel raises belongs into the table
            problems[name] = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            continue
        try:
            with torch.set_grad_enabled(what != "forward"):
                assert_parity(function, op.definition, tensors, grad_output=grad, factors=dict.fromkeys(FACTORS, 2.0))
        except AssertionError as error:
            problems[name] = f"wrong: {' '.join(str(error).split())}"
    return problems


def _copies(inputs: Inputs, device: torch.device) -> list[Inputs]:
    """Enough copies of the inputs that, taken in turn, none is still in a GPU's L2 cache when its turn comes."""
    tensors, grad = inputs
    if device.type != "cuda":
        return [inputs]
    size = sum(t.nbytes for t in (*tensors, grad))
    count = math.ceil(3 * torch.cuda.get_device_properties(device).L2_cache_size / size)
    copies = [([t.detach().clone().requires_grad_() for t in tensors], grad.clone()) for _ in range(count)]
    return [inputs, *copies]


def time_interleaved(
    calls: Mapping[str, Callable[[Any], object]], arguments: Sequence[Any], device: torch.device, seconds: float
) -> dict[str, Timing]:
    """Time the calls for about `seconds`, each once a round, so that a change of the machine's speed meets all.

    They have run before. Each call takes the next of `arguments`.
    """
    turn = itertools.cycle(arguments)
    one_round = functools.partial(_cuda_round, lead=_host_time(calls, turn)) if device.type == "cuda" else _cpu_round
    one_round(calls, turn)
    start = time.perf_counter()
    one_round(calls, turn)
    rounds = min(200, max(5, int(seconds / (time.perf_counter() - start))))
    samples = [one_round(calls, turn) for _ in range(rounds)]
    return {name: _timing([sample[name] for sample in samples]) for name in calls}


def _cpu_round(calls: Mapping[str, Callable[[Any], object]], turn: Iterator[Any]) -> dict[str, float]:
    times = {}
    for name, call in calls.items():
        argument = next(turn)
        start = time.perf_counter()
        call(argument)
        times[name] = time.perf_counter() - start
    return times


def _host_time(calls: Mapping[str, Callable[[Any], object]], turn: Iterator[Any]) -> float:
    """How long the host takes to launch one round."""
    elapsed = 0.0
    for _ in range(3):  # the last one counts
        torch.cuda.synchronize()
        start = time.perf_counter()
        for call in calls.values():
            call(next(turn))
        elapsed = time.perf_counter() - start
    return elapsed


def _cuda_round(calls: Mapping[str, Callable[[Any], object]], turn: Iterator[Any], lead: float) -> dict[str, float]:
    events = {}
    # The GPU waits until the host has launched everything, so that the events time the GPU and not the launches;
    # 5e9 cycles last at least `lead` seconds on every GPU of today, twice that on most.
    torch.cuda._sleep(int(5e9 * lead))
    for name, call in calls.items():
        events[name] = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        events[name][0].record()
        call(next(turn))
        events[name][1].record()
    torch.cuda.synchronize()
    return {name: before.elapsed_time(after) * 1e-3 for name, (before, after) in events.items()}


def _timing(samples: list[float]) -> Timing:
    low, median, high = statistics.quantiles(samples, n=4)
    return Timing(median, (high - low) / median)
