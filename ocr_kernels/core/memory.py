"""Large maps of a training step on a CPU, in memory that the step before has left.

The C library hands tensors of more than 32 MiB back to the system when they are freed. The next one is new memory,
which the system clears page by page at its first write.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ocr_kernels.core.derivatives import is_in_transform

VARIABLE = "OCR_KERNELS_KEEP_MEMORY"

LEAST = 2**25
"""Bytes; memory of smaller tensors is kept by the C library."""

RECENT = 16
"""Maps that are asked for, about those of two steps, before memory that served none of them goes back."""


class _Kept(NamedTuple):
    storage: torch.UntypedStorage
    bytes: int
    served: int  # when it last did

    def holders(self) -> int:
        """Tensors and objects that have the storage, and a number that is the same for all storages."""
        return torch._C._storage_Use_Count(self.storage._cdata) + sys.getrefcount(self.storage)

    def is_as_it_was(self) -> bool:
        """Another process may read what is shared, after the last tensor of this one; resized memory is another."""
        return self.storage.nbytes() == self.bytes and not self.storage.is_shared()


_kept: list[_Kept] = []
_lock = threading.Lock()
_asked = 0
_is_on = os.environ.get(VARIABLE, "1") != "0"


def reused(tensor: Tensor) -> Tensor:
    """A new tensor that nobody has written to, or one like it in memory that an earlier one has left.

    Memory is in use for as long as any tensor, view, storage or array has a part of it, whoever holds that.
    """
    global _asked
    bytes = tensor.numel() * tensor.element_size()
    if bytes < LEAST or not _is_on or type(tensor) is not Tensor or not tensor.is_cpu:
        return tensor
    if is_in_transform() or torch.are_deterministic_algorithms_enabled():  # which fill new memory
        return tensor
    alone = _alone()
    if alone is None:
        return tensor
    storage = tensor.untyped_storage()
    if storage.nbytes() != bytes:
        return tensor
    with _lock:
        _asked += 1
        held: list[_Kept] = []
        idle: list[_Kept] = []
        for each in _kept:
            (held if each.holders() > alone else idle).append(each)
        idle = [each for each in idle if each.is_as_it_was()]
        found = next((each for each in idle if each.bytes == bytes), None)
        if found is not None:
            storage = found.storage
            tensor = tensor.new_empty(0).set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
        idle = [each for each in idle if each is not found and _asked - each.served <= RECENT]
        _kept[:] = [*held, *idle, _Kept(storage, bytes, _asked)]
    return tensor


@contextlib.contextmanager
def new_memory() -> Iterator[None]:
    """In here every map is new memory, and what was kept is given back: for who counts what is asked for."""
    global _is_on
    before, _is_on = _is_on, False
    with _lock:
        _kept.clear()
    try:
        yield
    finally:
        _is_on = before


@functools.cache
def _alone() -> int | None:
    """What `holders` gives where there are none; None where PyTorch does not tell, as no public function does."""
    try:
        with torch.inference_mode(False), torch.device("cpu"):
            kept = _Kept(torch.empty(2).untyped_storage(), 8, 0)
            alone = kept.holders()
            tensor = torch.empty(0).set_(kept.storage)
            beside_tensor = kept.holders()
            del tensor
            storage = kept.storage
            beside_storage = kept.holders()
            del storage
            return alone if min(beside_tensor, beside_storage) > alone == kept.holders() else None
    except Exception:  # a changed function raises anything
        return None
