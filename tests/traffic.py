"""What kernels move: every element that a launch reads or writes in Triton's interpreter, by its address.

PyTorch's own ops between the launches (sums of partial results, copies, matrix products) are recorded beside them, as
reading each tensor given and writing each tensor returned once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder


@dataclass
class Accesses:
    """The addresses of the elements that were read, or written, each as often as it was."""

    addresses: list[np.ndarray] = field(default_factory=list, repr=False)
    bytes: int = 0

    def add(self, addresses: np.ndarray, itemsize: int) -> None:
        self.addresses.append(addresses.ravel().astype(np.int64))
        self.bytes += addresses.size * itemsize

    def counts(self, tensor: Tensor) -> Tensor:
        """How often each element of the tensor was accessed; its memory must not have been another's then."""
        storage = tensor.untyped_storage()
        length = storage.nbytes() // tensor.itemsize
        offsets = (np.concatenate([*self.addresses, np.zeros(0, np.int64)]) - storage.data_ptr()) // tensor.itemsize
        counts = np.bincount(offsets[(offsets >= 0) & (offsets < length)], minlength=length)
        return torch.from_numpy(counts).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@dataclass
class Launch:
    """One kernel launch, or one of PyTorch's own ops."""

    name: str
    loads: Accesses = field(default_factory=Accesses)
    stores: Accesses = field(default_factory=Accesses)

    @property
    def bytes(self) -> int:
        return self.loads.bytes + self.stores.bytes


@contextmanager
def record_traffic() -> Iterator[list[Launch]]:
    """Record every launch inside. Lanes that are masked off touch nothing; lanes that share an address count each.

    Call the code that launches, not the registered op around it: what a registered op does inside is not seen.
    """
    launches: list[Launch] = []
    interpreting = False
    execute = GridExecutor.__call__
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def record_launch(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal interpreting
        launches.append(Launch(self.fn.__name__))
        interpreting = True  # the interpreter handles its arguments with PyTorch ops, which are not the kernel's
        try:
            execute(self, *args, **kwargs)
        finally:
            interpreting = False

    def record_load(self: Any, pointers: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        launches[-1].loads.add(*_active(pointers, mask))
        return load(self, pointers, mask, *args, **kwargs)

    def record_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        launches[-1].stores.add(*_active(pointers, mask))
        return store(self, pointers, value, mask, *args, **kwargs)

    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("kernels use no atomics, and none are recorded")

    class RecordOps(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            result = op(*args, **kwargs)
            if not (interpreting or op.is_view or "empty" in op.name()):
                launches.append(_launch_of(op.name(), args, kwargs, result))
            return result

    with (
        mock.patch.object(GridExecutor, "__call__", record_launch),
        mock.patch.multiple(InterpreterBuilder, create_masked_load=record_load, create_masked_store=record_store),
        mock.patch.multiple(InterpreterBuilder, create_atomic_rmw=refuse, create_atomic_cas=refuse),
        RecordOps(),
    ):
        yield launches


def _launch_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Launch:
    launch = Launch(name)
    # a tensor that the op overwrites, or that it takes zero times, is not read
    unread = 1 if name in ("aten::copy_", "aten::zero_", "aten::fill_") or kwargs.get("beta") == 0 else 0
    inputs = [args[unread:], {key: value for key, value in kwargs.items() if key != "out"}]
    for accesses, tree in ((launch.loads, inputs), (launch.stores, result)):
        for tensor in tree_leaves(tree):
            if isinstance(tensor, Tensor):
                accesses.add(_addresses(tensor), tensor.itemsize)
    return launch


def _active(pointers: Any, mask: Any) -> tuple[np.ndarray, int]:
    """The addresses of the lanes that are not masked off, and the bytes of an element."""
    inside = mask.data.astype(bool)  # a product of masks may have come as integers
    return pointers.data[inside], pointers.get_element_ty().primitive_bitwidth // 8


def _addresses(tensor: Tensor) -> np.ndarray:
    storage = tensor.untyped_storage()
    addresses = torch.arange(storage.data_ptr(), storage.data_ptr() + storage.nbytes(), tensor.itemsize)
    return addresses.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).numpy()
