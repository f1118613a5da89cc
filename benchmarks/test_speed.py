"""The benchmarks' cases under pytest-benchmark: `pytest benchmarks/test_speed.py`, with `-k` for a part of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch

from ocr_kernels.bench import measure
from ocr_kernels.bench.cases import (
    CASES,
    COMPILED,
    EAGER,
    NETWORKS,
    PASSES,
    QUICK_CASES,
    SDPA,
    SDPA_BACKENDS,
    SUBJECTS,
    Function,
    Pass,
    Workload,
    our_backends,
    sweep_of,
)
from ocr_kernels.core.backends import interpreting

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
NAMES = [name for name in CASES if not sweep_of(name)] if GPU else list(QUICK_CASES)
VARIANTS = [EAGER, COMPILED, *SDPA_BACKENDS, *our_backends(DEVICE)]  # max-autotune takes minutes

pytestmark = pytest.mark.skipif(interpreting(), reason="TRITON_INTERPRET is set: the interpreter's times say nothing")


@cache
def workload(subject: str, name: str) -> Workload:
    case = CASES[name] if GPU else CASES[name].quick()
    return Workload(
        SUBJECTS[subject], case, torch.bfloat16 if GPU else torch.float32, DEVICE, peers=(EAGER, COMPILED, SDPA)
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("subject", [name for name in SUBJECTS if name not in NETWORKS])
@pytest.mark.parametrize("what", PASSES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_speed(benchmark: Any, variant: str, what: Pass, subject: str, name: str) -> None:
    if what not in SUBJECTS[subject].passes:
        pytest.skip("for inference alone")
    if variant in SDPA_BACKENDS and subject != "attention":
        pytest.skip("it is an attention")
    work = workload(subject, name)
    torch.compiler.reset()
    function = work.variants().get(variant)
    if function is None:
        pytest.skip("PyTorch does not run this kernel here")
    benchmark.group = f"{subject} {name} {what}"
    inputs = work.inputs()
    problems = measure.gate(work, {variant: function}, inputs, "forward" if what == "forward" else "forward+backward")[
        0
    ]
    assert not problems
    benchmark.pedantic(_synchronised, setup=partial(_prepared, what, function, inputs), rounds=10)


def _prepared(what: Pass, function: Function, inputs: measure.Inputs) -> tuple[tuple[Any], dict[str, Any]]:
    thunk = measure.prepare(what, function, inputs)
    measure.synchronize(DEVICE)
    return (thunk,), {}


def _synchronised(thunk: Callable[[], object]) -> None:
    thunk()
    measure.synchronize(DEVICE)
