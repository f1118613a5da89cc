"""Let an existing model's OCR modules compute on the fused ops, report what happened, and undo it.

A swapped module keeps its own forward, parameters, buffers, hooks and `state_dict` keys: the instance's class becomes
a subclass of the same name whose forward runs under `recognition.Recognition`. Classes are never changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import dis
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from ocr_kernels import modules
from ocr_kernels.recognition import Deferred, Log, Recognition, place_of_current, running
from ocr_kernels.rewriting import FUNCTIONS, rewritten_methods

Filter = Callable[[nn.Module, str], bool]

_PRODUCTS = {"matmul", "bmm", "einsum", "@"}


@dataclasses.dataclass(frozen=True)
class Swapped:
    """A swapped module, with what a dry run found: what ran fused, its outputs' error, and why more did not fuse."""

    name: str
    module_class: str
    computations: tuple[str, ...] | None = None
    max_error: float | None = None
    relative_error: float | None = None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class LeftAlone:
    """A module that looks like OCR and was not changed."""

    name: str
    module_class: str
    reason: str


@dataclasses.dataclass(frozen=True)
class ReplacementReport:
    """What `replace_ocr_modules` did; `print` it."""

    swapped: tuple[Swapped, ...]
    left_alone: tuple[LeftAlone, ...]

    def __str__(self) -> str:
        swapped = [(row.name or "(model)", row.module_class, *_findings(row)) for row in self.swapped]
        left_alone = [(row.name or "(model)", row.module_class, row.reason) for row in self.left_alone]
        lines = [f"{len(swapped)} swapped, {len(left_alone)} left alone"]
        if swapped:
            lines.append(_table(("swapped", "class", "fused", "max error", "relative", "remarks"), *swapped))
        if left_alone:
            lines.append(_table(("left alone", "class", "because"), *left_alone))
        return "\n".join(lines)


def replace_ocr_modules(
    model: nn.Module, *, filter: Filter | None = None, example_inputs: Any = None
) -> ReplacementReport:
    """Let every module of `model`, itself included, that computes OCR's gather or attention do so with our ops.

    The computation is recognised while it runs, not by names: a softmax over pixels followed by a product with the
    pixels' features, and a product followed by a softmax over regions and a product with the regions' values, with
    fewer regions than pixels. Everything else in the module's forward runs as it always did.

    Args:
        model: changed in place; repeating the call changes nothing more. `restore_ocr_modules` undoes it.
        filter: `(module, name) -> bool`, whether a module may be swapped.
        example_inputs: what `model` is called with: a tensor, a tuple of arguments or a dict of keyword arguments. A
            dry run without gradients then finds out what really ran fused, and its error; modules in which nothing
            did are left as they were. Parameters, buffers, the training flags and PyTorch's random state stay.

    Returns:
        What was swapped, what looked like OCR and was left alone, and why.

    Raises:
        TypeError: an argument is of the wrong type; nothing is changed.
    """
    _check_arguments(model, filter, example_inputs)
    rows: dict[nn.Module, Swapped | LeftAlone] = {}
    for name, module in model.named_modules():
        reason = _why_not(module)
        if reason is None and filter is not None and not filter(module, name):
            reason = "the filter says so"
        if reason is None:
            rows[module] = Swapped(name, type(module).__qualname__)
        elif reason:
            rows[module] = LeftAlone(name, type(module).__qualname__, reason)
    chosen = [module for module, row in rows.items() if isinstance(row, Swapped)]
    try:
        for module in chosen:
            quiet = None if _is_direct(module) else _quiet_children(module)
            module.__class__ = _swapped_class(type(module), quiet)  # type: ignore[arg-type]
        if example_inputs is not None and chosen:
            _dry_run(model, rows, example_inputs)
            for module in chosen:
                if isinstance(rows[module], LeftAlone):
                    _restore(module)
    except BaseException:
        for module in chosen:
            _restore(module)
        raise
    return ReplacementReport(
        tuple(row for row in rows.values() if isinstance(row, Swapped)),
        tuple(row for row in rows.values() if isinstance(row, LeftAlone)),
    )


def restore_ocr_modules(model: nn.Module) -> list[str]:
    """Give the swapped modules of `model` their own classes back; the names of those that were swapped.

    Raises:
        TypeError: `model` is no module.
    """
    _check_arguments(model, None, None)
    return [name for name, module in model.named_modules() if _restore(module)]


def _check_arguments(model: object, filter: object, example_inputs: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is {type(model).__name__}")
    if filter is not None and not callable(filter):
        raise TypeError(f"filter must be callable as filter(module, name), but is {type(filter).__name__}")
    if not isinstance(example_inputs, (Tensor, tuple, dict, type(None))):
        raise TypeError(
            "example_inputs must be a tensor, a tuple of arguments or a dict of keyword arguments, "
            f"but is {type(example_inputs).__name__}"
        )


# The swap


@functools.cache
def _swapped_class(original: type[nn.Module], quiet: frozenset[str] | None) -> type[nn.Module]:
    """A subclass with the same name and no new state, whose forward recognises the computations.

    `quiet` are the names of the children in which there is nothing to recognise; None if rewritten methods do without
    the mode.
    """

    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if _observer is not None and running() is None:
            return _observer(self, original.forward, args, kwargs)
        return _run(self, original.forward, args, kwargs)

    def __setattr__(self: nn.Module, name: str, value: Any) -> None:
        original.__setattr__(self, name, _plain(value))

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        reduced = original.__reduce_ex__(self, max(protocol, 2))
        if isinstance(reduced, tuple) and reduced[1][:1] == (type(self),):
            function, arguments, *state = reduced
            return _rebuild, (original, quiet, function, *arguments[1:]), *state
        return reduced

    methods = rewritten_methods(original) if quiet is None else None  # type: ignore[arg-type]
    return type(original)(  # type: ignore[misc, no-any-return]
        original.__name__,
        (original,),
        {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "__reduce_ex__": __reduce_ex__,
            "__setattr__": __setattr__,
            "_ocr_kernels_original": original,
            "_ocr_kernels_direct": methods["forward"] if methods else None,
            "_ocr_kernels_compiles": bool(methods) or "@" not in _names(original),  # type: ignore[arg-type]
            **(methods or {}),
            **FUNCTIONS,
            "forward": forward,
            **{name: _quiet_child(name) for name in quiet or ()},
        },
    )


def _is_direct(module: nn.Module) -> bool:
    """Whether rewritten methods see all that matters, in `module` and in its children without parameters."""
    methods = rewritten_methods(type(module))  # type: ignore[arg-type]
    children = (child for child in module.children() if next(child.parameters(), None) is None)
    return methods is not None and not any(
        isinstance(part, nn.Softmax) or getattr(part, "inplace", False) or _names(type(part)) & _PRODUCTS  # type: ignore[arg-type]
        for child in children
        for part in child.modules()
    )


class _Quiet:
    """A child with parameters, as the forward of its swapped parent sees it: called outside the parent's mode.

    Nothing in it is to be recognised, and the mode costs every operation in it a microsecond or more.
    """

    def __init__(self, module: nn.Module) -> None:
        object.__setattr__(self, "_module", module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not _mode_is_on_top():
            return self._module(*args, **kwargs)
        mode = torch._C._pop_torch_function_stack()  # no public function steps out of a mode for a while
        try:
            return self._module(*args, **kwargs)
        finally:
            torch._C._push_on_torch_function_stack(mode)

    __class__ = property(lambda self: self._module.__class__)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._module, name)

    def __getitem__(self, index: Any) -> Any:
        return self._module[index]

    def __len__(self) -> int:
        return len(self._module)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._module)

    def __contains__(self, item: object) -> bool:
        return item in self._module

    def __bool__(self) -> bool:
        return bool(self._module)

    def __eq__(self, other: object) -> bool:
        return self._module is _plain(other)

    def __hash__(self) -> int:
        return hash(self._module)

    def __repr__(self) -> str:
        return repr(self._module)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._module.__reduce_ex__(protocol)


def _quiet_children(module: nn.Module) -> frozenset[str]:
    return frozenset(
        name
        for name, child in module.named_children()
        if next(child.parameters(), None) is not None
        and not isinstance(child, (nn.ModuleList, nn.ModuleDict))
        and not any(isinstance(part, nn.Softmax) for part in child.modules())
        and not hasattr(type(module), name)
    )


def _quiet_child(name: str) -> property:
    def child(self: nn.Module) -> Any:
        if name not in self._modules:
            raise AttributeError(name)
        module = self._modules[name]
        return _Quiet(module) if module is not None and _mode_is_on_top() else module

    return property(child)


def _mode_is_on_top() -> bool:
    # no public function tells the modes that are on
    depth = 0 if torch.compiler.is_compiling() else torch._C._len_torch_function_stack()
    return depth > 0 and type(torch._C._get_function_stack_at(depth - 1)) is Recognition


def _plain(value: Any) -> Any:
    """What a swapped module may keep of `value`."""
    if type(value) is Deferred:
        return value._compute()
    return value._module if type(value) is _Quiet else value


def _original(module: nn.Module) -> type[nn.Module] | None:
    """The class that a swapped module had."""
    return vars(type(module)).get("_ocr_kernels_original")


def _restore(module: nn.Module) -> bool:
    original = _original(module)
    if original is not None:
        module.__class__ = original
    return original is not None


def _rebuild(
    original: type[nn.Module], quiet: frozenset[str] | None, function: Callable[..., nn.Module], *arguments: Any
) -> nn.Module:
    """For copying and unpickling: what `function(original, *arguments)` makes, swapped."""
    return function(_swapped_class(original, quiet), *arguments)  # type: ignore[arg-type]


def _run(
    module: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    log: Log | None = None,
) -> Any:
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    exporting = torch.compiler._is_exporting_flag  # is_exporting() is true under any torch.compile of PyTorch 2.11
    # under a mode, torch.compile exchanges the operands of `deferred @ tensor`
    exchanged = torch.compiler.is_compiling() and not type(module)._ocr_kernels_compiles  # type: ignore[attr-defined]
    if tracing or exporting or exchanged or forward_ad._current_level >= 0:
        return forward(module, *args, **kwargs)
    mode = running()
    if mode is not None:  # of a module around this one: once is enough
        outer, mode.log = mode.log, log
        try:
            return mode.settle(forward(module, *args, **kwargs))
        finally:
            mode.log = outer
    mode = Recognition(log)
    direct = type(module)._ocr_kernels_direct  # type: ignore[attr-defined]
    if direct is None:
        with mode:
            output = mode.settle(forward(module, *args, **kwargs))
    else:
        place = place_of_current()
        before, place.recognition = place.recognition, mode
        try:
            output = mode.settle(direct(module, *args, **kwargs))
        finally:
            place.recognition = before
    mode.finish(module)
    return output


# Which modules may contain the computations


def _why_not(module: nn.Module) -> str | None:
    """Why `module` is not to be swapped: empty where nothing in it looks like OCR, None where it is."""
    if isinstance(module, (modules.SpatialGather, modules.ObjectAttentionBlock)):
        return "it calls ocr_kernels itself"
    if _original(module) is not None:
        return "it was swapped before"
    names = _names(type(module))  # type: ignore[arg-type]
    if not names & _PRODUCTS:
        return ""
    if not any("softmax" in name.lower() for name in names) and not any(
        isinstance(part, nn.Softmax)
        for name in names & module._modules.keys()
        for part in module.get_submodule(name).modules()
    ):
        return "it takes a sigmoid, not a softmax" if "sigmoid" in names else ""
    if "forward" in vars(module) or isinstance(module, torch.fx.GraphModule):
        return "its forward is the instance's own, not its class's"
    if "apply" in names:
        return "it may call a custom autograd function"
    if "checkpoint" in names:
        return "it checkpoints parts of itself, which would be recomputed without being swapped"
    return None


@functools.cache
def _names(module_class: type[nn.Module]) -> frozenset[str]:
    """The names in the code of forward and of the methods and same-file functions it calls; "@" for that operator."""
    names: set[str] = set()
    seen: set[FunctionType] = set()
    reached: list[Any] = [module_class.forward]
    while reached:
        function = inspect.unwrap(reached.pop())
        if (
            not isinstance(function, FunctionType)
            or function in seen
            or (function.__module__ or "").startswith("torch.")
        ):
            continue
        seen.add(function)
        found = set(_code_names(function.__code__))
        names |= found
        for name in found:
            methods = [vars(owner)[name] for owner in module_class.__mro__ if name in vars(owner)]
            reached += [getattr(m, "__func__", m) for m in (methods if "super" in found else methods[:1])]
            neighbour = function.__globals__.get(name)
            if isinstance(neighbour, FunctionType) and neighbour.__code__.co_filename == function.__code__.co_filename:
                reached.append(neighbour)
    return frozenset(names)


def _code_names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    if any(
        i.opname == "BINARY_MATRIX_MULTIPLY" or (i.opname == "BINARY_OP" and "@" in i.argrepr)
        for i in dis.get_instructions(code)
    ):
        yield "@"
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code_names(constant)


# The dry run


_observer: Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any] | None = None
"""Called in place of a swapped forward while a dry run is going on."""


def _dry_run(model: nn.Module, rows: dict[nn.Module, Swapped | LeftAlone], example_inputs: Any) -> None:
    """Run `model` once as it was, and every swapped module beside it, and complete the rows of those."""
    global _observer
    unseen = {module: row for module, row in rows.items() if isinstance(row, Swapped)}

    def observe(module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if module not in unseen:
            return forward(module, *args, **kwargs)
        row, log = unseen.pop(module), Log()
        copied_args, copied_kwargs = _cloned((args, kwargs))
        failure = None
        with _forked_rng(model):
            try:
                output = _run(module, forward, copied_args, copied_kwargs, log)
            except Exception as error:
                failure = error
        expected = forward(module, *args, **kwargs)
        if failure is None:
            rows[module] = _completed(row, log, output, expected)
        else:
            rows[module] = LeftAlone(row.name, row.module_class, f"it fails where scores are deferred: {failure}")
        return expected

    kwargs = example_inputs if isinstance(example_inputs, dict) else {}
    args = example_inputs if isinstance(example_inputs, tuple) else () if kwargs else (example_inputs,)
    args, kwargs = _cloned((args, kwargs))
    _observer = observe
    try:
        with torch.no_grad(), _forked_rng(model), _preserved(model):
            model(*args, **kwargs)
    finally:
        _observer = None
    for module, row in unseen.items():
        rows[module] = dataclasses.replace(row, computations=())


def _completed(row: Swapped, log: Log, output: Any, expected: Any) -> Swapped | LeftAlone:
    notes = tuple(dict.fromkeys(log.notes))
    if not log.fused:
        return LeftAlone(row.name, row.module_class, "; ".join(notes) or "neither computation ran")
    return Swapped(row.name, row.module_class, tuple(dict.fromkeys(log.fused)), *_error(output, expected), notes)


def _cloned(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.clone, tree)


def _forked_rng(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    tensors = (*model.parameters(), *model.buffers())
    return torch.random.fork_rng({t.device.index for t in tensors if t.device.type == "cuda"})


@contextlib.contextmanager
def _preserved(model: nn.Module) -> Iterator[None]:
    """Put buffers and the modules' attributes back as they were."""
    attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
    buffers = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    values = [(buffer.data, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for now, before in attributes + buffers:
            now.clear()
            now.update(before)
        for buffer, value in values:
            buffer.copy_(value)


def _error(output: Any, expected: Any) -> tuple[float, float]:
    """The largest difference over all tensors, and the largest one relative to its tensor's largest value."""
    absolute = relative = 0.0
    for a, b in zip(pytree.tree_leaves(output), pytree.tree_leaves(expected), strict=True):
        if isinstance(b, Tensor) and b.is_floating_point() and b.numel():
            same = (a == b) | (a.isnan() & b.isnan())
            error = (a.double() - b.double()).abs().masked_fill(same, 0).max().item()
            absolute = max(absolute, error)
            relative = max(relative, error / (b.abs().max().item() or 1.0))
    return absolute, relative


def _findings(row: Swapped) -> tuple[str, ...]:
    if row.computations is None:
        return ("to be seen when it runs",)
    if not row.computations:
        return ("not run by example_inputs",)
    return ", ".join(row.computations), f"{row.max_error:.1e}", f"{row.relative_error:.1e}", "; ".join(row.notes)


def _table(*rows: tuple[str, ...]) -> str:
    columns = itertools.zip_longest(*rows, fillvalue="")
    widths = [max(map(len, column)) for column in columns]
    return "\n".join("  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
