"""How an op is differentiated: in 0.6 of the host time of `torch.library.register_autograd`, and also by `torch.func`
and in forward mode, where that one raises or returns zeros.

What the ops use of autograd's private functions stands in this file alone. Each is tried when the file is imported;
where it is missing or does something else, the public form beside it takes over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

Op = Callable[..., Any]


def _private(get: Callable[[], Any], works: Callable[[Any], bool]) -> Any:
    """What `get` finds in PyTorch; None where it is missing or fails its trial."""
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
            found = get()
            return found if works(found) else None
    except Exception:  # a changed function raises anything
        return None


def _hides_autograd(guard: Any) -> bool:
    x = torch.ones((), requires_grad=True)
    with guard():
        return torch.is_grad_enabled() and not (x + x).requires_grad


def _function(name: str, **members: Op) -> Any:
    return type(name, (torch.autograd.Function,), {key: staticmethod(member) for key, member in members.items()})


def _applies(apply: Callable[[Any], Op]) -> bool:
    function = _function("trial", forward=lambda _, x: x + x, backward=lambda _, grad: 3 * grad)
    x = torch.ones((), requires_grad=True)
    return torch.autograd.grad(apply(function)(x), x)[0].item() == 3


def _has_tangent(tensors: Sequence[Tensor], level: int | None = None) -> bool:
    """Whether one takes part in forward mode, at the level that was entered last."""
    return any(forward_ad.unpack_dual(tensor, level=level).tangent is not None for tensor in tensors)


def _sees_levels(in_forward_mode: Callable[[Sequence[Tensor]], bool]) -> bool:
    with forward_ad.dual_level():
        inside = in_forward_mode(())
    return inside and not in_forward_mode(())


def _sees_transforms(is_in_transform: Callable[[], bool]) -> bool:
    inside = torch.func.vmap(lambda x: x + is_in_transform())(torch.zeros(1))
    return inside.item() == 1 and not is_in_transform()


# Runs an op below its derivative. Public: an op of another name that has none.
_below_autograd = _private(lambda: torch._C._AutoDispatchBelowAutograd, _hides_autograd)
in_forward_mode = _private(lambda: lambda _: forward_ad._current_level >= 0, _sees_levels) or _has_tangent
# Whether a transform of torch.func is under way. Public: nothing; that one may be costs time.
is_in_transform = _private(lambda: torch._C._are_functorch_transforms_active, _sees_transforms) or (lambda: True)
# Function.apply, less its checks for callers above the dispatcher.
_apply = _private(lambda: lambda function: super(torch.autograd.Function, function).apply, _applies) or (
    lambda function: function.apply
)


def underived(op: Op, define_twin: Callable[[], Op]) -> Op:
    """`op` less its derivative; the twin has none."""
    if _below_autograd is None:
        return define_twin()

    def run(*args: Any) -> Any:
        with _below_autograd():
            return op(*args)

    return run


def is_differentiated(tensors: Sequence[Tensor]) -> bool:
    """Whether what is made of them has a derivative to anybody, outside of a `torch.func.vmap` too."""
    return (torch.is_grad_enabled() and any(map(_requires_grad, tensors))) or in_forward_mode(tensors)


def _requires_grad(tensor: Tensor) -> bool:
    if tensor.requires_grad or not is_in_transform():
        return tensor.requires_grad
    if torch.compiler.is_compiling():
        return True  # compilers trace no wrappers: it may
    inner = torch.func.debug_unwrap(tensor, recurse=False)
    return inner is not tensor and _requires_grad(inner)


class _ForwardMode(Exception):
    """Forward mode reached a function."""


def register_derivative(
    library: torch.library.Library,
    op: Op,
    run: Op,
    tensors: int,
    definition: Op,
    setup_context: Callable[..., None],
    backward: Op,
    vmap: Op,
    autocast: Mapping[str, Op],
) -> None:
    """Differentiate `op`, whose first `tensors` arguments are tensors; `run` is the op less its derivative.

    Forward mode goes through the definition. `autocast` has the rules by type of device.
    """

    def jvp(*_: Any) -> Any:
        raise _ForwardMode

    def forward(ctx: Any, *args: Any) -> Any:
        output = run(*args)
        setup_context(ctx, args, output)
        return output

    apply = _apply(_function(str(op), forward=forward, backward=backward))
    function = _function(str(op), forward=run, setup_context=setup_context, backward=backward, jvp=jvp, vmap=vmap)

    def differentiate(*args: Any) -> Any:
        leading = args[:tensors]
        if _is_transformed(leading[0]) or in_forward_mode(leading):
            return definition(*args)
        if torch.is_grad_enabled():
            for tensor in leading:
                if tensor.requires_grad:
                    return apply(*args)
        return run(*args)

    def transform(*args: Any) -> Any:
        kind = args[0].device.type
        if kind in autocast and torch.is_autocast_enabled(kind):
            return autocast[kind](*args)
        try:
            return function.apply(*args)
        except _ForwardMode:
            pass
        except RuntimeError as error:  # torch.func.functionalize has no rule for functions
            if "custom_function_call" not in str(error):
                raise
        return definition(*args)

    library.impl(op, differentiate, "Autograd")
    with contextlib.suppress(RuntimeError):  # where torch.func takes no whole calls, it gets the definition
        library.impl(op, transform, "FuncTorchDynamicLayerFrontMode")


def refuse_derivative(library: torch.library.Library, op: Op, run: Op, message: str) -> None:
    """Raise where a derivative of `op` is wanted; `run` is the op less that."""

    def refuse(*args: Any) -> Any:
        tensors = []
        for arg in args:
            if isinstance(arg, Tensor):
                tensors.append(arg)
            elif isinstance(arg, (list, tuple)):
                tensors += [each for each in arg if isinstance(each, Tensor)]
        wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        # a transform wraps every tensor; when compiled, its level is known to them alone
        compiled = _is_transformed(tensors[0]) and _has_tangent(tensors, level=0)
        if wanted or compiled or in_forward_mode(tensors):
            raise RuntimeError(message)
        return run(*args)

    library.impl(op, refuse, "Autograd")


def _is_transformed(tensor: Tensor) -> bool:
    """Whether a transform of `torch.func` wraps it."""
    return torch.func.debug_unwrap(tensor, recurse=False) is not tensor
