"""The two ops as the tests see them: one description each, so that every test runs over both."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import ocr_kernels
from ocr_kernels.attention.reference import pixel_region_attention as attention_definition
from ocr_kernels.core.libraries import problem
from ocr_kernels.gather.reference import spatial_gather as gather_definition
from ocr_kernels.testing import Measurement, assert_parity, attention_inputs, gather_inputs


@dataclass(frozen=True)
class Op:
    """An op of the library: the public call, its definition, its registered op, and how to draw inputs."""

    name: str
    call: Callable[..., Tensor]
    definition: Callable[..., Tensor]
    inputs: Callable[..., tuple[Tensor, ...]]

    @property
    def overload(self) -> torch._ops.OpOverload:
        return getattr(torch.ops.ocr_kernels, self.name).default

    def on(self, backend: str) -> Callable[..., Tensor]:
        """The public call on one backend."""
        return partial(self.call, backend=backend)

    def assert_parity(self, backend: str, inputs: Sequence[Any], **options: Any) -> list[Measurement]:
        return assert_parity(self.on(backend), self.definition, inputs, name=f"{self.name} on {backend}", **options)


GATHER = Op("spatial_gather", ocr_kernels.spatial_gather, gather_definition, gather_inputs)
ATTENTION = Op("pixel_region_attention", ocr_kernels.pixel_region_attention, attention_definition, attention_inputs)


def native_on(device_type: str) -> pytest.MarkDecorator:
    """Skips what needs the compiled library for these devices, with the reason why it cannot run."""
    reason = problem(device_type)
    return pytest.mark.skipif(reason is not None, reason=str(reason))


both_ops = pytest.mark.parametrize("op", [GATHER, ATTENTION], ids=lambda op: op.name)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


# Grids: a case is a dict of options of `inputs`


def product(**axes: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Every combination of the axes' values."""
    return (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))


def pairwise(**axes: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Few combinations, the same each time, in which any two values of two axes occur together."""
    rng = random.Random(0)
    points = [(name, i) for name, values in axes.items() for i in range(len(values))]
    pairs = [frozenset(pair) for pair in itertools.combinations(points, 2) if pair[0][0] != pair[1][0]]
    rng.shuffle(pairs)
    left = set(pairs)
    for pair in pairs:
        if pair not in left:
            continue
        case = dict(pair)
        for name in sorted(axes.keys() - case, key=lambda name: (-len(axes[name]), name)):
            gains = [sum(frozenset(((name, i), p)) in left for p in case.items()) for i in range(len(axes[name]))]
            case[name] = rng.choice([i for i, gain in enumerate(gains) if gain == max(gains)])
        left -= {frozenset(pair) for pair in itertools.combinations(case.items(), 2)}
        yield {name: axes[name][case[name]] for name in axes}


Grids = Iterable[Iterable[dict[str, Any]]]


def over(thinned: Grids, wide: Grids) -> pytest.MarkDecorator:
    """Runs a test over all cases, of which `make test` takes the thinned grids' alone."""

    def name(value: Any) -> str:
        return "x".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")

    cases = [(case, mark) for grids, mark in ((thinned, ()), (wide, pytest.mark.wide)) for g in grids for case in g]
    ids = ["-".join(f"{axis}_{name(value)}" for axis, value in case.items()) for case, _ in cases]
    return pytest.mark.parametrize("case", [pytest.param(case, marks=marks) for case, marks in cases], ids=ids)
