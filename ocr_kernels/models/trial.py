"""A run of a user's model that leaves no trace, in which each module's replacement is compared with its own forward."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from ocr_kernels.core.calls import StandIn
from ocr_kernels.models.errors import Errors, errors
from ocr_kernels.models.random_state import forked_rng, undisturbed
from ocr_kernels.models.recognition import Log
from ocr_kernels.models.replacement import Replacement

_running = threading.Lock()  # a random state is one for all threads


@dataclasses.dataclass
class Finding:
    """What the trial of one module found: what ran fused, and how well; or why it cannot be replaced."""

    log: Log = dataclasses.field(default_factory=Log)
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    errors: Errors | None = None
    saved_bytes: int | None = None
    own_bytes: int | None = None  # that the module's own forward keeps for a backward pass
    failure: str | None = None


def dry_run(
    model: nn.Module, replacements: Mapping[nn.Module, Replacement], example_inputs: Any
) -> tuple[dict[nn.Module, Finding], str | None]:
    """What was found in the modules that a run of `model` reaches first, and what the run failed of, if it did."""
    findings: dict[nn.Module, Finding] = {}
    if any(map(is_lazy, model.parameters())):
        return findings, "the model has parameters that its first call makes; call it once before"
    if any(tensor.is_nested for tensor in model.buffers()):
        return findings, "the model has a nested tensor, which could not be put back"
    if _is_sharded(model):
        return findings, "FSDP2 shards the model, and keeps in mind what a run did; replace before `fully_shard`"
    kwargs = example_inputs if isinstance(example_inputs, dict) else {}
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    args = () if isinstance(example_inputs, dict) else args
    args, kwargs = cloned((args, kwargs))
    with (
        _running,
        torch.no_grad(),
        forked_rng(_tensors(model)),
        preserved(model),
        torch.compiler.set_stance("force_eager"),
    ):
        for module, replacement in replacements.items():
            vars(module)["forward"] = _Observer(replacement, findings)
        try:
            model(*args, **kwargs)
        except Exception as error:
            return findings, f"{type(error).__name__}: {error}"
    return findings, None


def _is_sharded(model: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # whose import takes long
    return fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules())


class _Observer(StandIn):
    """In place of a module's forward: tries its replacement at the first call."""

    def __init__(self, replacement: Replacement, findings: dict[nn.Module, Finding]) -> None:
        self.replacement = replacement
        self.findings = findings

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.replacement.module
        if module not in self.findings:
            finding = self.findings[module] = Finding(args=cloned(args), kwargs=cloned(kwargs))
            try:
                _compare(self.replacement, finding)
            except Exception as error:
                finding.failure = f"it fails: {type(error).__name__}: {error}"
        return type(module).forward(module, *args, **kwargs)

    def __deepcopy__(self, memo: Any) -> None:
        return None


def _compare(replacement: Replacement, finding: Finding) -> None:
    module, args, kwargs = replacement.module, finding.args, finding.kwargs
    observers = [(part, vars(part).pop("forward")) for part in module.modules() if _is_observed(part)]
    try:
        tensors, grad = _tensors(module), module.training

        def ours() -> tuple[Any, int]:
            finding.log = Log()
            return _run(module, lambda a, k: replacement.follow(a, k, finding.log), args, kwargs, grad)

        def own() -> tuple[Any, int]:
            return _run(module, lambda a, k: type(module).forward(module, *a, **k), args, kwargs, grad)

        (found, saved), (expected, saved_before) = undisturbed(tensors, ours, own)
        finding.saved_bytes = saved_before - saved if grad else None
        finding.own_bytes = saved_before if grad else None
        finding.errors = errors(found, expected, lambda: _exact(module, args, kwargs))
    finally:
        for part, observer in observers:
            vars(part)["forward"] = observer


def saved_in_training(replacement: Replacement, finding: Finding) -> int | None:
    """How many bytes less than the module's own forward a replacement with a plan for training keeps."""
    if finding.own_bytes is None:
        return None
    module = replacement.module
    with forked_rng(_tensors(module)):
        saved = _run(module, lambda a, k: replacement(*a, **k), finding.args, finding.kwargs, True)[1]
    return finding.own_bytes - saved


def _is_observed(module: nn.Module) -> bool:
    return isinstance(vars(module).get("forward"), _Observer)


def _run(module: nn.Module, forward: Callable[[Any, Any], Any], args: Any, kwargs: Any, grad: bool) -> tuple[Any, int]:
    """What a forward gives, and how many bytes it saves for a backward pass beside its inputs and parameters."""
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: _given(t, grad), (args, kwargs))
    given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    own = {_address(t) for t in [*given, *module.parameters(), *module.buffers()]}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _address(tensor) not in own and tensor.layout is torch.strided:
            saved[_address(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with preserved(module), torch.set_grad_enabled(grad):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = forward(args, kwargs)
        return pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), out), sum(saved.values())


def _given(tensor: Tensor, grad: bool) -> Tensor:
    """A copy as a model would hand it on: of what wants gradients, and may be modified in place."""
    with torch.set_grad_enabled(grad):
        return tensor.detach().clone().requires_grad_(grad and tensor.is_floating_point()).clone()


def _address(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:  # of tensors that are not dense
        return id(tensor)


def _exact(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """What the module's own forward gives in float64."""
    twin = copy.deepcopy(module).double()
    args, kwargs = pytree.tree_map_only(Tensor, _double, (args, kwargs))
    with forked_rng(_tensors(module)), torch.autocast(device_of(module).type, enabled=False):
        return type(twin).forward(twin, *args, **kwargs)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor.clone()


# Without a trace


def cloned(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), tree)


def device_of(module: nn.Module) -> torch.device:
    tensors = _tensors(module)
    return tensors[0].device if tensors else torch.device("cpu")


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Put everything that modules hold back as it was: values, attributes, children, hooks, containers."""
    holders: list[Any] = [vars(module) for module in model.modules()]
    holders += [value for holder in holders for value in holder.values() if isinstance(value, _CONTAINERS)]
    before = [(holder, copy.copy(holder)) for holder in holders]
    values = [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
    try:
        yield
    finally:
        for holder, was in before:
            holder.clear()
            (holder.update if isinstance(holder, (dict, set)) else holder.extend)(was)
        with torch.no_grad():
            for tensor, value in values:
                if not _is_unchanged(tensor, value):
                    tensor.copy_(value)


def _is_unchanged(tensor: Tensor, value: Tensor) -> bool:
    if tensor.is_meta:  # which has no values
        return True
    a, b = (t if t.layout is torch.strided else t.to_dense() for t in (tensor, value))
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


_CONTAINERS = dict, list, set, deque
