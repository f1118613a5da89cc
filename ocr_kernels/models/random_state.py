"""The random states of PyTorch, Python and NumPy, each of which is one for all threads."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

_Result = TypeVar("_Result")


@contextlib.contextmanager
def forked_rng(tensors: Iterable[Tensor]) -> Iterator[None]:
    """In here, numbers are drawn that are drawn again after it, on the CPU and on the devices of `tensors`."""
    python, numpy = random.getstate(), sys.modules.get("numpy.random")
    of_numpy = None if numpy is None else numpy.get_state()
    with torch.random.fork_rng({t.device.index for t in tensors if t.device.type == "cuda"}):
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.set_state(of_numpy)


def random_states() -> tuple[Any, ...]:
    """PyTorch's on the CPU, Python's and NumPy's, to be compared."""
    numpy = sys.modules.get("numpy.random")
    return torch.get_rng_state().tolist(), random.getstate(), None if numpy is None else _comparable(numpy.get_state())


def _comparable(state: Any) -> Any:
    """NumPy's, with bytes for its arrays."""
    if isinstance(state, dict):
        return {name: _comparable(each) for name, each in state.items()}
    return tuple(map(_comparable, state)) if isinstance(state, tuple) else getattr(state, "tobytes", lambda: state)()


def undisturbed(tensors: Iterable[Tensor], *runs: Callable[[], _Result]) -> list[_Result]:
    """What runs that draw the same numbers give; all run again if another thread drew some meanwhile, as far as seen.

    A `Dropout` cannot be given a generator of its own.
    """
    tensors = list(tensors)
    for _ in range(5):
        results, states = [], []
        for run in runs:
            with forked_rng(tensors):
                results.append(run())
                states.append(random_states())
        if all(state == states[0] for state in states):
            break
    return results
