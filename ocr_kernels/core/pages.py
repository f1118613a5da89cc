"""Large results in large pages of memory."""

from __future__ import annotations

import ctypes
import functools
import mmap
from typing import Any

from torch import Tensor

LARGE = 2**22
"""Bytes from which on the system is asked; below, an allocator has most of its memory from earlier calls."""


def in_large_pages(tensor: Tensor) -> Tensor:
    """`tensor` itself, just allocated and not yet written: Linux is asked to back it by pages of 2 MiB.

    A large tensor's memory is new at each call. Pages of 4 KiB, made one by one at the first write, take four times as
    long as what is written. Where the system has no large pages or the memory is not new, nothing changes.
    """
    if type(tensor) is Tensor and tensor.is_cpu and tensor.nbytes >= LARGE and (advise := _madvise()):
        page = mmap.PAGESIZE
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        start, end = -(-start // page) * page, end // page * page
        advise(start, end - start, mmap.MADV_HUGEPAGE)
    return tensor


@functools.cache
def _madvise() -> Any:
    """The system's call, or None where there is none."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # another system than Linux
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return advise
