"""How an op is registered with PyTorch: one function for what every op of this library needs.

Ops are functional (nothing is mutated, no output aliases an input) and exist on every machine: their kernel
runs on any device and hands over to the backend that its last string argument names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ocr_kernels.layout import DTYPES

LIBRARY = torch.library.Library("ocr_kernels", "DEF")


def register_op(
    schema: str,
    *,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    vmap: Callable[..., Any],
) -> torch._ops.OpOverload:
    """Define `ocr_kernels::<schema>` with its kernel, its fake, its derivative and its batching rule.

    The schema has no defaults: the dispatcher would leave out arguments that equal them.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema)
    op: torch._ops.OpOverload = getattr(torch.ops.ocr_kernels, name).default
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    LIBRARY.impl(name, _derivative(op, setup_context, backward), "Autograd")
    torch.library.register_fake(f"ocr_kernels::{name}", fake, lib=LIBRARY)
    torch.library.register_vmap(f"ocr_kernels::{name}", vmap, lib=LIBRARY)
    return op


def _derivative(
    op: torch._ops.OpOverload, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """What `torch.library.register_autograd` registers, at half its cost per call."""

    def run(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    def forward(ctx: Any, *args: Any) -> Any:
        output = run(*args)
        setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(f"{op._opname}_derivative", (torch.autograd.Function,), members)

    def differentiable(*args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(*args)  # type: ignore[attr-defined]
        return run(*args)

    return differentiable


def register_autocast(op: torch._ops.OpOverload, leading: int) -> None:
    """Under autocast, cast the first `leading` arguments to the autocast dtype, as a convolution does."""

    def make_rule(device_type: str, excluded: torch._C.DispatchKeySet) -> Callable[..., Any]:
        def rule(*args: Any, **kwargs: Any) -> Any:
            cast = [_autocast(tensor, device_type) for tensor in args[:leading]]
            with torch._C._ExcludeDispatchKeyGuard(excluded):
                return op(*cast, *args[leading:], **kwargs)

        return rule

    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
        LIBRARY.impl(op._opname, make_rule(device_type, excluded), key)


def _autocast(tensor: Tensor, device_type: str) -> Tensor:
    # float64 stays, as in PyTorch's own autocast
    eligible = tensor.device.type == device_type and tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype(device_type)) if eligible else tensor


def differentiate_twice(
    definition: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    grad: Tensor,
    cotangents: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """The derivative of a backward pass with respect to `(grad, *inputs)`, by autograd through the definition.

    `cotangents` belong to the gradients that the backward pass returned, one for each of `inputs`.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # aliases, so that one tensor passed as two arguments still has two gradients
        grad, *inputs = (t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in (grad, *inputs))
        gradients = torch.autograd.grad(definition(*inputs), inputs, grad, create_graph=True)
        pairs = [(g, c) for g, c in zip(gradients, cotangents, strict=True) if c is not None]
        return torch.autograd.grad(
            [g for g, _ in pairs],
            (grad, *inputs),
            [c for _, c in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )


def check_tensors(**arguments: object) -> None:
    for name, argument in arguments.items():
        if not isinstance(argument, Tensor):
            raise TypeError(f"{name} must be a tensor, but is {type(argument).__name__}")


def check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, but is {tensor.dtype}")


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, but is on {tensor.device}")


def check_shape(name: str, tensor: Tensor, layout: str, matches: bool) -> None:
    if not matches:
        raise ValueError(f"{name} must have shape {layout}, but has {tuple(tensor.shape)}")


def batch_first(tensors: Sequence[Tensor], in_dims: Sequence[int | None], size: int) -> list[Tensor]:
    """For a batching rule: the vmapped dimension of every tensor folded into its batch dimension."""
    folded = []
    for tensor, dim in zip(tensors, in_dims, strict=True):
        moved = tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        folded.append(moved.flatten(0, 1))
    return folded


def batch_back(outputs: Sequence[Tensor], size: int) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """For a batching rule: the inverse of `batch_first`, with the dimensions that came back."""
    return tuple(out.unflatten(0, (size, out.shape[0] // size)) for out in outputs), (0,) * len(outputs)
