"""What stands in for the forward of one module: an attribute of the instance, whose class stays what it is.

So `type(module)`, `isinstance`, registries, `state_dict` and what other libraries do to the class see nothing of it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ocr_kernels.core.calls import StandIn, is_recorded
from ocr_kernels.models.block_cache import BlockCache
from ocr_kernels.models.block_weights import Folded
from ocr_kernels.models.classifier import Join, joined, matrix_of
from ocr_kernels.models.recognition import Copies, Log, Recognition
from ocr_kernels.models.rewriting import Rewriter

RESTORE_FIRST = "call ocr_kernels.restore_ocr_modules(model) first, and replace_ocr_modules(model) again after it"


class Replacement(StandIn):
    """Calls a module's own forward, a rewritten copy of it, or the block that it computes."""

    def __init__(
        self,
        module: nn.Module,
        classes: tuple[type[nn.Module], ...],
        copies: Copies,
        block: BlockCache | None = None,
        joins: tuple[Join, ...] = (),
    ) -> None:
        self.module = module
        self.classes = classes  # whose forwards may be followed: the module's own, and its children's
        self.copies: Copies = copies
        self.block = block
        self.joins = joins  # of its children's calls
        self.is_active: bool = True
        self.beside_block = False
        self.was_run = False  # by example inputs, fused

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        folded = self._folded(args, kwargs)
        if folded is not None:
            return folded[0].compute(*folded[1])
        inputs = self._pixels_and_regions(args, kwargs) if self.block is not None and self.is_active else None
        training = None if self.block is None or inputs is None else self.block.training_for(self.module, *inputs)
        if training is not None and inputs is not None:
            return training.compute(self.module, *inputs)
        return self.follow(args, kwargs)

    def _folded(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Folded, tuple[Any, Any]] | None:
        """The block's weights for a call, and its pixels and regions."""
        if self.block is None or not self.is_active:
            return None
        inputs = self._pixels_and_regions(args, kwargs)
        if inputs is None:
            self.block.notices(self.module, *args, *kwargs.values())
        weights = None if inputs is None else self.block.weights_for(self.module, *inputs)
        return None if weights is None or inputs is None else (weights, inputs)

    def logits(self, classifier: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        layer = matrix_of(classifier)
        folded = None if layer is None else self._folded(args, kwargs)
        if layer is None or folded is None:
            return None
        weights, inputs = folded
        joined = weights.with_classifier(*layer)
        return None if joined is None else joined.compute(*inputs)

    def _pixels_and_regions(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """The only arguments of a call, if there are two."""
        if not kwargs:
            return args if len(args) == 2 else None
        names = tuple(inspect.signature(type(self.module).forward).parameters)[1:3]
        inputs = (*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs))
        return inputs if len(inputs) == 2 == len(args) + len(kwargs) else None

    def follow(self, args: tuple[Any, ...], kwargs: dict[str, Any], log: Log | None = None) -> Any:
        """The module's own forward, with its computations recognised."""
        module = self.module
        function = type(module).forward
        rewritten = self.copies.get(function) if self.is_active else None  # type: ignore[call-overload]
        if rewritten is None or is_recorded():
            return function(module, *args, **kwargs)
        recognition = Recognition(self.copies, log, beside_block=self.beside_block)
        try:
            return recognition.settle(rewritten(recognition, module, *args, **kwargs))
        finally:
            recognition.made.clear()  # they know each other, and would keep tensors until they are collected

    # The attributes of a module that is replaced

    def install(self) -> None:
        vars(self.module).update(
            forward=self, _replicate_for_data_parallel=self.replicate, __prepare_scriptable__=self.refuse_scripting
        )

    def remove(self) -> None:
        self.is_active = False  # where another library has wrapped and kept it, too
        if self.block is not None:
            self.block.snapshot = self.block.trained = self.block.design = None  # which know the module
        self.remove_from(self.module)

    def remove_from(self, module: nn.Module) -> None:
        """From its own module, or a shallow copy of that."""
        for name in ("forward", "_replicate_for_data_parallel", "__prepare_scriptable__"):
            value = vars(module).get(name)
            if value is self or getattr(value, "__self__", None) is self:
                del vars(module)[name]

    def replicate(self) -> nn.Module:
        """For `nn.DataParallel`, whose replicas have a copy of the module's attributes."""
        replica: nn.Module = type(self.module)._replicate_for_data_parallel(self.module)
        twin = Replacement(replica, self.classes, self.copies, copy.copy(self.block), self.joins)
        twin.beside_block = self.beside_block
        twin.install()
        return replica

    def refuse_scripting(self) -> nn.Module:
        raise RuntimeError(f"torch.jit.script cannot compile a module that was replaced: {RESTORE_FIRST}")

    def __getattr__(self, name: str) -> Any:
        """What is asked of a forward: its name, its signature, its code."""
        if name in _OF_A_METHOD and "module" in vars(self):
            return getattr(self.__wrapped__, name)
        raise AttributeError(name)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return type(self.module).forward.__get__(self.module)  # type: ignore[no-any-return]

    def __deepcopy__(self, memo: dict[int, Any]) -> Replacement:
        twin = memo[id(self)] = Replacement.__new__(Replacement)
        vars(twin).update(vars(self), module=copy.deepcopy(self.module, memo), block=copy.deepcopy(self.block, memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "copies"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.copies = joined(state["classes"][0], self.joins) if self.joins else Rewriter().copies(state["classes"])


_OF_A_METHOD = {"__name__", "__qualname__", "__doc__", "__func__", "__self__", "__code__", "__defaults__"}
_OF_A_METHOD |= {"__kwdefaults__", "__annotations__", "__signature__"}


def replacement_of(module: nn.Module) -> Replacement | None:
    """What stands in for a module's forward, also where another library has wrapped it since."""
    values = (getattr(value, "__self__", value) for value in vars(module).values())
    return next((v for v in values if isinstance(v, Replacement) and v.is_active), None)
