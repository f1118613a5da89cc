"""The folded weights of a module's calls: made once, and anew as soon as anything that they were made of changed."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ocr_kernels.block.registration import is_used_on
from ocr_kernels.core.backends import is_offered
from ocr_kernels.core.calls import has_own_forward, is_recorded
from ocr_kernels.core.derivatives import in_forward_mode, is_in_transform
from ocr_kernels.core.layout import DTYPES
from ocr_kernels.models.block_plan import plan_block, verify
from ocr_kernels.models.block_program import tensor_at
from ocr_kernels.models.block_training import TrainingPlan, plan_training
from ocr_kernels.models.block_weights import BlockPlan, Folded, computed_in
from ocr_kernels.models.maps import Recorder
from ocr_kernels.models.own_code import (
    BASE,
    class_of,
    globals_of,
    kept,
    mentioned,
    own_classes,
    read_by_forward,
    without_trace,
)

MOST_PLANS = 8
"""A module whose settings change from step to step trains by its own forward then."""

_version_of = operator.attrgetter("_version")
_mode_of = operator.attrgetter("training")


class BlockCache:
    """A module's plans, and its folded weights of the last call; a copy starts without them."""

    def __init__(self, plan: BlockPlan | None, training: TrainingPlan | None = None) -> None:
        self.plan = plan
        self.training = training
        self.snapshot: Snapshot | None = None
        self.trained: Structure | None = None  # for which the plan for training was last found to hold
        self.design: Design | None = None  # that the plan was made of
        self.plans = 0  # that were made since the first

    def __reduce__(self) -> Any:
        is_current = self.design is None or self.design.is_unchanged()  # a copy has nothing to compare with
        return BlockCache, (self.plan, self.training) if is_current else (None, None)

    def plan_training(self, module: nn.Module) -> str:
        """Find out how the module computes step 4 in training; why it cannot be one op, if it cannot."""
        assert self.plan is not None
        found = plan_training(module, self.plan)
        self.training = None if isinstance(found, str) else found
        return found if isinstance(found, str) else ""

    def training_for(self, module: nn.Module, feats: Any, regions: Any) -> TrainingPlan | None:
        """The plan for a call that wants gradients, is in training, or has norms that take the statistics of the batch.

        None where the module's own forward is to run: in traces and exports, where a layer has a hook, and where a
        backend is selected that has no such op.
        """
        plan, training = self.plan, self.training
        if plan is None or training is None or is_recorded():
            return None
        if plan.folds and not (torch.is_grad_enabled() or module.training):
            return None
        if not isinstance(feats, Tensor) or not isinstance(regions, Tensor):
            return None
        if not is_used_on(feats.device) or not self._trains(module):
            return None
        plan, training = self.plan, self.training  # which may be others now
        if plan is None:
            return None
        return training if plan.takes(feats, regions, tensor_at(module, plan.first)) else None

    def _trains(self, module: nn.Module) -> bool:
        """Whether there is a plan for training for the layers as they are."""
        if torch.compiler.is_compiling():
            return self._fits(module)
        known = self.trained
        if known is None or not known.is_of(module) or not known.is_unchanged():
            if not self._is_planned(module):
                if self.plans >= MOST_PLANS:
                    return False
                self._plan_again(module)
            if not self._fits(module):
                return False
            known = Structure(module)
            if all(parameter.is_leaf for parameter in module.parameters()):  # others may be of one call, and large
                self.trained = known
        return not (any(known.forward_hooks) or any(known.backward_hooks))

    def _fits(self, module: nn.Module) -> bool:
        plan, training = self.plan, self.training
        return plan is not None and training is not None and plan.fits(module) and training.fits(module)

    def forget(self) -> None:
        """For what PyTorch does not count: changes through `parameter.data` and by fused optimizers."""
        if self.snapshot is not None:
            self.snapshot.dtype = None  # is that of no call; what it knows of the module's structure stays

    def notices(self, module: nn.Module, *inputs: Any) -> bool:
        """Whether a call is in training or wants gradients. An optimizer may step then, so weights are forgotten."""
        if not module.training and not _wants_grad(module, *inputs):
            return False
        if not torch.compiler.is_compiling():
            self.forget()
        return True

    def watch(self, module: nn.Module) -> None:
        """Remember what the plan was made of, before the first call."""
        self.design = Design(module)
        self.snapshot = Snapshot(module, self.plan, torch.float32)
        self.forget()

    def weights_for(self, module: nn.Module, feats: Any, regions: Any) -> Folded | None:
        """The folded weights for a call with these pixels and regions; None where the module's own forward is to run.

        That is in training, where grad mode is on and anything requires grad, in traces, exports and `torch.func`
        transforms, inside `record_maps`, and where a layer has a hook.
        """
        if self.notices(module, feats, regions):
            return None
        if type(feats) is not Tensor or type(regions) is not Tensor or not _may_fold(feats, regions):
            return None
        device = feats.device.type
        if self.plan is not None and not is_offered(self.plan.backends(device)):
            return None
        dtype = computed_in(feats)
        if dtype not in DTYPES:
            return None
        if torch.compiler.is_compiling() or (feats.is_cuda and torch.cuda.is_current_stream_capturing()):
            # what is not part of the program would be stale when it runs again
            if (
                self.plan is None
                or not self.plan.folds
                or _is_watched_or_training(module)
                or not self.plan.fits(module)
            ):
                return None
            sources = [tensor_at(module, path) for _, path in self.plan.program.sources]
            if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in sources):
                return None
            takes = self.plan.takes(feats, regions, tensor_at(module, self.plan.first))
            return self.plan.weights(module, dtype) if takes else None
        snapshot = self.snapshot
        if snapshot is None or not snapshot.is_current(module, dtype):
            snapshot = self._renewed(module, dtype)
        if snapshot is None or any(snapshot.forward_hooks) or snapshot.plan is None or snapshot.first is None:
            return None
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in snapshot.tensors):
            return None  # of a weight that is no parameter
        return snapshot.weights if snapshot.plan.takes(feats, regions, snapshot.first) else None

    def _renewed(self, module: nn.Module, dtype: torch.dtype) -> Snapshot | None:
        if _is_watched_or_training(module):
            return None
        if not self._is_planned(module):
            self._plan_again(module)
        snapshot = Snapshot(module, self.plan, dtype)
        if not torch._C._len_torch_dispatch_stack():  # a mode's tensors may be no ordinary ones; nothing public tells
            if snapshot.first is not None and snapshot.first.is_cuda:
                torch.cuda.current_stream().synchronize()  # once for each change: the next call may use another stream
            self.snapshot = snapshot
        return snapshot

    def _is_planned(self, module: nn.Module) -> bool:
        """Whether the plan is of the module as it is. A replica of DataParallel has the same cache."""
        if self.plan is None or not self.plan.fits(module):
            return False
        before = self.design
        if before is None:  # of a copy
            self.design = Design(module)
            return True
        if not before.is_of(module):
            return True
        if list(module.modules()) == before.layers:
            return before.is_unchanged()
        now = Design(module)  # other layers, which fit: as good in the same places, if they are of the same classes
        if (now.paths, now.classes) != (before.paths, before.classes) or not before.has_code():
            return False
        self.design = now
        return True

    def _plan_again(self, module: nn.Module) -> None:
        self.plans += 1
        self.design, self.trained = Design(module), None
        with without_trace(module):
            found = plan_block(module)
            if isinstance(found, BlockPlan) and found.folds:
                checked = verify(module, found)
                found = checked if isinstance(checked, str) else found
            self.plan, self.training = (found if isinstance(found, BlockPlan) else None), None
            if self.plan is not None:
                self.plan_training(module)


class Design:
    """What a plan is made of: a module's layers, their attributes, and the code of their classes."""

    def __init__(self, module: nn.Module) -> None:
        self.layers: list[nn.Module] = list(module.modules())
        self.paths: list[str] = [path for path, _ in module.named_modules()]
        self.classes: list[type] = list(map(class_of, self.layers))
        self.attributes: list[dict[str, Any]] = list(map(vars, self.layers))
        self.settings: Reads = _reads((vars(layer), _settings_of(layer)) for layer in self.layers)
        self.settings += [(operator.itemgetter(*names), [globals]) for globals, names in globals_of(module)]
        self.settings_before: list[list[Any]] = [list(map(kept, map(get, owners))) for get, owners in self.settings]
        self.code: list[Any] = [vars(base) for base in {base for layer in self.layers for base in own_classes(layer)}]
        self.code_before: list[tuple[Any, ...]] = [tuple(map(kept, code.values())) for code in self.code]
        self.read = mentioned(module) - {"forward"}  # which is an attribute of what is replaced
        self.names_before: list[set[str]] = self._names()

    def is_of(self, module: nn.Module) -> bool:
        return self.attributes[0] is vars(module)

    def is_unchanged(self) -> bool:
        """Whether the layers have the classes and settings that they had, in any mode."""
        is_set_up = list(map(class_of, self.layers)) == self.classes and self._names() == self.names_before
        return is_set_up and self.has_settings() and self.has_code()

    def _names(self) -> list[set[str]]:
        """Of each layer's attributes that the code may read."""
        return [attributes.keys() & self.read for attributes in self.attributes]

    def has_settings(self) -> bool:
        """Whether the layers' attributes are what they were, but for their modes."""
        try:
            return [list(map(get, owners)) for get, owners in self.settings] == self.settings_before
        except Exception:  # one is gone, or another tensor, which has no truth value
            return False

    def has_code(self) -> bool:
        """Whether classes, and what their methods are, are what they were."""
        try:
            return [tuple(code.values()) for code in self.code] == self.code_before
        except Exception:  # of an array that has no truth value
            return False


class Structure(Design):
    """What a module was: its modes, parameters, buffers and hooks, too."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.types: list[type[nn.Module]] = list(map(type, self.layers))
        self.sizes: list[int] = list(map(len, self.attributes))
        self.modes: list[bool] = list(map(_mode_of, self.layers))
        own = ("_modules", "_parameters", "_buffers")
        owned: list[dict[str, Any]] = [getattr(layer, name) for layer in self.layers for name in own]
        self.owned: list[dict[str, Any]] = [owner for owner in owned if owner]
        self.owned_before: list[dict[str, Any]] = list(map(dict, self.owned))
        self.empty: list[dict[str, Any]] = [owner for owner in owned if not owner]
        self.children: list[dict[str, Any]] = [layer._modules for layer in self.layers if layer._modules]
        self.order_before: list[str] = self._order()
        # no public function tells of hooks on all modules
        self.forward_hooks = self._hooks("_forward_hooks", "_forward_pre_hooks")
        self.backward_hooks = self._hooks("_backward_hooks", "_backward_pre_hooks")

    def _hooks(self, *kinds: str) -> list[Any]:
        hooks = [getattr(layer, kind) for layer in self.layers[1:] for kind in kinds]
        return hooks + [getattr(torch_module, f"_global{kind}") for kind in kinds]

    def is_unchanged(self) -> bool:
        """Whether nothing but values of tensors changed: a few passes in C, since every call asks."""
        return (
            self.has_settings()
            and list(map(_mode_of, self.layers)) == self.modes
            and self.has_tensors_and_layers()
            and not any(self.empty)
            and list(map(len, self.attributes)) == self.sizes
            and self.has_code()
            and list(map(type, self.layers)) == self.types
        )

    def has_tensors_and_layers(self) -> bool:
        """Whether parameters, buffers and children are the same objects, or tensors of one element and equal."""
        try:  # objects are compared by identity first
            return self.owned == self.owned_before and self._order() == self.order_before
        except Exception:  # another tensor, which has no truth value
            return False

    def _order(self) -> list[str]:
        """The children's names, in the order in which an `nn.Sequential` runs them."""
        return list(itertools.chain.from_iterable(self.children))


class Snapshot(Structure):
    """Folded weights, and all that they were made from."""

    def __init__(self, module: nn.Module, plan: BlockPlan | None, dtype: torch.dtype) -> None:
        super().__init__(module)
        self.dtype: torch.dtype | None = dtype
        self.plan = plan = plan if plan is not None and plan.folds else None
        self.weights: Folded | None = None if plan is None else plan.weights(module, dtype)
        self.first: Tensor | None = None if plan is None else tensor_at(module, plan.first)
        self.tensors: list[Tensor] = (
            [] if plan is None else [tensor_at(module, path) for _, path in plan.program.sources]
        )
        self.countable: bool = all(type(t) in (Tensor, nn.Parameter) and not t.is_inference() for t in self.tensors)
        if self.countable:  # PyTorch counts their changes
            self.versions: list[int] = list(map(_version_of, self.tensors))
            self.storages: list[Tensor] = [
                tensor.detach() for tensor in self.tensors
            ]  # kept, so that no other gets its address
            self.addresses: list[int] = list(map(Tensor.data_ptr, self.tensors))
            self.probes: list[Tensor] = [probe for t in self.tensors if t.is_cpu for probe in _probes(t)]
            self.probed: Tensor | None = torch.cat(self.probes) if self.probes else None

    def is_current(self, module: nn.Module, dtype: torch.dtype) -> bool:
        return (
            self.dtype is dtype
            and self.countable
            and self.is_of(module)
            and self.is_unchanged()
            and list(map(_version_of, self.tensors)) == self.versions
            and list(map(Tensor.data_ptr, self.tensors)) == self.addresses
            and (self.probed is None or torch.equal(torch.cat(self.probes), self.probed))
        )


Reads = list[tuple[Callable[[Any], Any], list[dict[str, Any]]]]


def _settings_of(layer: nn.Module) -> tuple[str, ...]:
    """The names of a layer's attributes that its code may read."""
    names = tuple(name for name in vars(layer) if name not in BASE)
    if own_classes(layer):
        return names
    read = _read_by_pytorch(type(layer))  # type: ignore[arg-type]  # classes can be hashed
    return tuple(name for name in names if name in read)


_read_by_pytorch = functools.cache(read_by_forward)  # whose classes stay


def _probes(tensor: Tensor) -> list[Tensor]:
    """Some of its numbers, which show what PyTorch does not count: changes through `.data` and by fused optimizers.

    On a CPU alone, since on a GPU somebody would have to wait for them.
    """
    values = tensor.detach()
    if not values.is_contiguous() or not values.numel():
        return []
    middle = values.numel() // 2
    return [values.view(-1)[middle : middle + 8]]  # side by side, which is read five times as fast


def _reads(owners: Iterable[tuple[dict[str, Any], tuple[str, ...]]]) -> Reads:
    """How to read entries of many dicts in few passes: by those that have the same names."""
    alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for owner, names in owners:
        if names:
            alike.setdefault(names, []).append(owner)
    return [(operator.itemgetter(*names), owners) for names, owners in alike.items()]


def _wants_grad(module: nn.Module, *inputs: Any) -> bool:
    tensors = (each for each in (*inputs, *module.parameters()) if isinstance(each, Tensor))
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _may_fold(*inputs: Tensor) -> bool:
    if is_in_transform() or is_recorded():
        return False
    if torch.compiler.is_compiling():
        return True
    return not (  # which no public function tells
        in_forward_mode(inputs)
        or (
            torch._C._len_torch_dispatch_stack()
            and any(isinstance(mode, Recorder) for mode in _get_current_dispatch_mode_stack())
        )
    )


def _is_watched_or_training(module: nn.Module) -> bool:
    """Whether a layer is in training, or would run more than its class's forward. Compiled programs guard on it."""
    for layer in list(module.modules())[1:]:
        if layer.training or layer._forward_hooks or layer._forward_pre_hooks or has_own_forward(layer):
            return True
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
