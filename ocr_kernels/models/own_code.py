"""What a module is beside its tensors: its classes, their code, and what that may read."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import sys
from collections import deque
from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

BASE = vars(nn.Module()).keys()
"""Attributes that every module has."""


def class_of(layer: nn.Module) -> type:
    """Its class, without what `torch.distributed.fsdp.fully_shard` puts before it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    wrapper = getattr(fsdp, "FSDPModule", None)
    if wrapper is None or not isinstance(layer, wrapper):
        return type(layer)
    return next(base for base in type(layer).__mro__[1:] if base is not wrapper)


def present(layer: nn.Module) -> tuple[str, ...]:
    """The names of a layer's parameters and buffers that are there."""
    entries = (*layer._parameters.items(), *layer._buffers.items())
    return tuple([name for name, tensor in entries if tensor is not None])


def own_classes(module: nn.Module) -> list[type]:
    """The classes of a module that are not PyTorch's."""
    return [base for base in type(module).__mro__ if _is_own(base)]


def _is_own(base: type) -> bool:
    return _package(base.__module__) not in ("torch", "builtins")


def functions_of(base: type) -> list[FunctionType]:
    return [value for value in map(_function, vars(base).values()) if isinstance(value, FunctionType)]


def _function(value: Any) -> Any:
    """What a method, a static one or a property runs."""
    if isinstance(value, (property, functools.cached_property)):
        value = value.fget if isinstance(value, property) else value.func
    return inspect.unwrap(value)


def mentioned(module: nn.Module) -> frozenset[str]:
    """All names and strings in the code of the classes of a module and its parts."""
    classes = {base for part in module.modules() for base in own_classes(part)}
    codes = [function.__code__ for base in classes for function in functions_of(base)]
    strings = {each for code in codes for each in code.co_consts if isinstance(each, str)}
    return frozenset(strings.union(*(code.co_names for code in codes)))


def globals_of(module: nn.Module) -> list[tuple[dict[str, Any], tuple[str, ...]]]:
    """The globals of its code that may be others later, which are neither modules nor classes.

    Of functions those of the same package, where its forward calls them. Of what they and modules have, plain values.
    """
    packages = {_package(base.__module__) for part in module.modules() for base in own_classes(part)}
    found: dict[int, tuple[dict[str, Any], set[str]]] = {}

    def add(owner: dict[str, Any], name: str) -> None:
        found.setdefault(id(owner), (owner, set()))[1].add(name)

    todo: list[tuple[FunctionType, bool]] = []  # whether forward calls it, as far as names tell
    for kind in set(map(type, module.modules())):
        read = read_by_forward(kind)
        own = [base for base in kind.__mro__ if _is_own(base)]
        todo += [(f, f.__name__ in read or f.__name__ == "forward") for base in own for f in functions_of(base)]
    methods, seen = {function for function, _ in todo}, set()
    while todo:
        function, is_called = todo.pop()
        names = function.__code__.co_names
        for name in function.__globals__.keys() & names if (function, is_called) not in seen else ():
            value = function.__globals__[name]
            if isinstance(value, FunctionType):
                if is_called and _package(value.__module__) in packages - {"ocr_kernels"}:
                    todo.append((value, True))
                    add(function.__globals__, name)
            elif isinstance(value, ModuleType):
                for other in vars(value).keys() & names if is_called and _package(value.__name__) != "torch" else ():
                    if is_plain(vars(value)[other]):
                        add(vars(value), other)
            elif not isinstance(value, (type, BuiltinFunctionType)) and (function in methods or is_plain(value)):
                add(function.__globals__, name)
        seen.add((function, is_called))
    return [(owner, tuple(sorted(names))) for owner, names in found.values()]


def is_own_object(value: Any) -> bool:
    """Whether its class is neither Python's nor PyTorch's nor ours, and it has attributes."""
    others = sys.stdlib_module_names | {"torch", "ocr_kernels"}
    return hasattr(value, "__dict__") and _package(type(value).__module__) not in others


def _package(name: str | None) -> str:
    return (name or "").partition(".")[0]


def is_plain(value: Any) -> bool:
    return isinstance(value, (int, float, str, type(None))) or (isinstance(value, tuple) and all(map(is_plain, value)))


def is_value(value: Any) -> bool:
    """Whether it is made of numbers and strings alone."""
    parts = value.values() if isinstance(value, dict) else value
    return all(map(is_value, parts)) if isinstance(value, (dict, list, set, tuple)) else is_plain(value)


def kept(value: Any) -> Any:
    """What equals it, with copies of all that may be changed in place."""
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(map(kept, value))
    if isinstance(value, dict):
        return {key: kept(each) for key, each in value.items()}
    return copy.copy(value) if isinstance(value, (set, deque)) else value


MOST_CONTAINERS = 1000
"""A global may lead to anything."""


def containers_of(module: nn.Module) -> list[Any]:
    """The lists, dicts, sets and attributes of objects that a run might change.

    Of modules, their classes, the globals of their code, and what those have.
    """
    parts = list(module.modules())
    owners = [*map(vars, parts), *(vars(base) for base in {base for part in parts for base in own_classes(part)})]
    todo = [value for owner in owners for name, value in owner.items() if name not in BASE]
    todo += [globals[name] for globals, names in globals_of(module) for name in names]
    found: dict[int, Any] = {}
    while todo and len(found) < MOST_CONTAINERS:
        value = todo.pop()
        value = value.__self__ if isinstance(value, MethodType) else value
        if is_own_object(value) and not isinstance(value, (nn.Module, Tensor, type)):
            value = vars(value)
        if isinstance(value, (list, dict, set, deque, tuple)) and id(value) not in found:
            found[id(value)] = value
            todo += items_of(value) if len(value) <= MOST_CONTAINERS else []
    return [value for value in found.values() if not isinstance(value, tuple)]


def items_of(container: Any) -> list[Any]:
    return list(container.values()) if isinstance(container, dict) else list(container)


@contextlib.contextmanager
def without_trace(module: nn.Module) -> Iterator[None]:
    """Afterwards what a module's code may change is as it was: objects, generators, classes, globals."""
    classes = {base: dict(vars(base)) for part in module.modules() for base in own_classes(part)}
    containers = [(container, copy.copy(container)) for container in containers_of(module)]
    attributes = [value for part in module.modules() for value in vars(part).values()]
    generators = [(value, value.get_state()) for value in attributes if isinstance(value, torch.Generator)]
    try:
        yield
    finally:
        for container, was in containers:
            now, before = items_of(container), items_of(was)
            if len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True)):
                container.clear()
                (container.update if isinstance(container, (dict, set)) else container.extend)(was)
        for base, members in classes.items():
            for name, value in dict(vars(base)).items():
                if name.startswith("__"):  # Python's own
                    continue
                if name not in members:
                    delattr(base, name)
                elif value is not members[name]:
                    setattr(base, name, members[name])
        for generator, state in generators:
            generator.set_state(state)


def read_by_forward(kind: type) -> frozenset[str]:
    """The names in the forward of a class and in the methods that it calls."""
    read: set[str] = set()
    todo = {"forward"}
    while todo:
        read |= todo
        functions = (_function(inspect.getattr_static(kind, name, None)) for name in todo)
        names = (function.__code__.co_names for function in functions if isinstance(function, FunctionType))
        todo = set().union(*names) - read
    return frozenset(read)
