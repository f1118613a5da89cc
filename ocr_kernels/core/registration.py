"""How an op is registered with PyTorch: one function for what every op of this library needs.

Ops are functional (nothing is mutated, no output aliases an input) and exist on every machine: their kernel
runs on any device and hands over to the backend that its last string argument names.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("ocr_kernels", "DEF")


def register_op(
    schema: str,
    *,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    definition: Callable[..., Any],
    flops: Callable[..., int],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    vmap: Callable[..., Any],
) -> torch._ops.OpOverload:
    """Define `ocr_kernels::<schema>` with its kernel, its fake, its derivative and its batching rule.

    `definition` is the op in plain PyTorch, through which forward-mode derivatives go. `flops` counts the operations
    of the definition's matrix products from the op's arguments, with shapes in place of tensors.

    The schema has no defaults: the dispatcher would leave out arguments that equal them.
    """
    op = _register(schema, kernel, fake, flops, vmap)
    LIBRARY.impl(op._opname, _derivative(op, definition, setup_context, backward), "Autograd")
    return op


def register_inference_op(
    schema: str,
    *,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int],
    vmap: Callable[..., Any],
    instead: str,
) -> torch._ops.OpOverload:
    """Define `ocr_kernels::<schema>` as `register_op` does, without a derivative: where one is wanted it raises.

    `instead` names what has a derivative.
    """
    op = _register(schema, kernel, fake, flops, vmap)

    def refuse_derivatives(*args: Any) -> Any:
        forward_mode = forward_ad._current_level >= 0 or (torch._C._are_functorch_transforms_active() and _in_jvp())
        if forward_mode or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            raise RuntimeError(
                f"ocr_kernels::{op._opname} is for inference and has no derivative: call it under torch.no_grad() or "
                f"torch.inference_mode(), or train with {instead}"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    LIBRARY.impl(op._opname, refuse_derivatives, "Autograd")
    return op


def _register(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int],
    vmap: Callable[..., Any],
) -> torch._ops.OpOverload:
    name = schema[: schema.index("(")]
    LIBRARY.define(schema)
    op: torch._ops.OpOverload = getattr(torch.ops.ocr_kernels, name).default
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ocr_kernels::{name}", fake, lib=LIBRARY)
    torch.library.register_vmap(f"ocr_kernels::{name}", vmap, lib=LIBRARY)
    _Imports.then("torch.utils.flop_counter", lambda module: module.register_flop_formula(op.overloadpacket)(flops))
    return op


def _derivative(
    op: torch._ops.OpOverload,
    definition: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """What `torch.library.register_autograd` registers, at half its cost per call."""

    def run(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    def forward(ctx: Any, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            # for the transforms around this one, which `run` reaches
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                output = run(*args)
        else:
            output = run(*args)
        setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(f"{op._opname}_derivative", (torch.autograd.Function,), members)
    # what Function.apply calls after checks for callers above the dispatcher, which hands us one transform at a time
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def differentiable(*args: Any) -> Any:
        transformed = torch._C._are_functorch_transforms_active()
        if forward_ad._current_level >= 0 or (transformed and _in_jvp()):
            return definition(*args)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return run(*args)
        if transformed:
            with enable_single_level_autograd_function():
                return apply(*args)
        return apply(*args)

    return differentiable


def _in_jvp() -> bool:
    """Whether `torch.func.jvp` is active, also in a graph of `torch.compile`, where `forward_ad` does not know."""
    return any(transform.key() == TransformType.Jvp for transform in get_interpreter_stack() or ())


class _Imports:
    """Modules of PyTorch that are told about our ops once something imports them: some take seconds to import.

    This is a finder on `sys.meta_path`, where every import of a new module looks.
    """

    waiting: ClassVar[dict[str, list[Callable[[ModuleType], object]]]] = {}

    @classmethod
    def then(cls, name: str, action: Callable[[ModuleType], object]) -> None:
        """Call `action` with the module `name`: now if it is imported, else once it is."""
        if name in sys.modules:
            action(sys.modules[name])
        else:
            cls.waiting.setdefault(name, []).append(action)

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        if name not in cls.waiting:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_act(module: ModuleType) -> None:
                execute(module)
                for action in cls.waiting.pop(name, ()):
                    action(module)

            spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Imports)


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


def register_decomposition(op: torch._ops.OpOverload, decomposition: Callable[..., Any]) -> None:
    """Let programs that cannot hold `op`, as those of ONNX, compute `decomposition`, in the same memory format."""
    torch._decomp.decomposition_table[op] = decomposition
    torch._decomp.meta_table[op] = decomposition  # only looked up: symbolic sizes go to the op's fake, as all others do
    _Imports.then("torch._inductor.lowering", lambda module: _keep_in_inductor(op, module))


def _keep_in_inductor(op: torch._ops.OpOverload, lowering: ModuleType) -> None:
    """What Inductor does when it meets an op that it does not know, which it refuses where `CI` is set in the
    environment and the op has a decomposition."""
    constraint = lowering.tag_to_layout_constraint(torch._library.utils.get_layout_constraint_tag(op))
    lowering.make_fallback(op, layout_constraint=constraint, warn=False)


def _autocast(tensor: Tensor, device_type: str) -> Tensor:
    # float64 stays, as in PyTorch's own autocast
    eligible = tensor.device.type == device_type and tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype(device_type)) if eligible else tensor


def differentiate(
    definition: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """The gradients of `inputs`, by autograd through the definition; those not needed have no elements."""
    gradients = torch.func.vjp(definition, *inputs)[1](grad)
    return tuple(g if need else g.new_empty(0) for g, need in zip(gradients, needs, strict=True))


def differentiate_twice(
    definition: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    grad: Tensor,
    cotangents: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """The derivative of a backward pass with respect to `(grad, *inputs)`, by autograd through the definition.

    `cotangents` belong to the gradients that the backward pass returned, one for each of `inputs`.
    """
    wanted = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]
    if not wanted:
        return (None,) * (1 + len(inputs))

    def gradients(grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        every = torch.func.vjp(definition, *inputs)[1](grad)
        return tuple(every[i] for i in wanted)

    derivatives: tuple[Tensor, ...] = torch.func.vjp(gradients, grad, *inputs)[1](tuple(cotangents[i] for i in wanted))
    return derivatives


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
