"""PyTorch's random state, which is one for all threads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

_Result = TypeVar("_Result")


def forked_rng(tensors: Iterable[Tensor]) -> contextlib.AbstractContextManager[None]:
    """In here, numbers are drawn that are drawn again after it, on the CPU and on the devices of `tensors`."""
    return torch.random.fork_rng({t.device.index for t in tensors if t.device.type == "cuda"})


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
                states.append(torch.get_rng_state())
        if all(torch.equal(state, states[0]) for state in states):
            break
    return results
