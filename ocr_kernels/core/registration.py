"""How an op is registered with PyTorch: one function for what every op of this library needs.

Ops are functional (nothing is mutated, no output aliases an input) and exist on every machine: their kernel
runs on any device and hands over to the backend that its last string argument names.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ocr_kernels.core.derivatives import Op, refuse_derivative, register_derivative, underived

LIBRARY = torch.library.Library("ocr_kernels", "DEF")
_decompositions: dict[Op, Op] = {}
_flop_formulas: dict[Any, Callable[..., int]] = {}


def decompositions() -> dict[Op, Op]:
    """Our ops in plain PyTorch, a table for `torch.export.ExportedProgram.run_decompositions`.

    Examples:
        >>> head = modules.OCRHead(in_channels=8, num_classes=3, mid_channels=16, key_channels=8).eval()
        >>> program = torch.export.export(head, (torch.randn(1, 8, 4, 4),))
        >>> "ocr_kernels" in str(program.run_decompositions(decompositions()).graph)
        False
    """
    return dict(_decompositions)


def exportable(op: Op) -> Op:
    """`op`, or its definition while `torch.onnx.export` traces a model: ONNX has no custom ops."""
    recorded = torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return _decompositions[op] if recorded and torch.onnx.is_in_onnx_export() else op


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """Our ops' operations, for `torch.utils.flop_counter.FlopCounterMode(custom_mapping=...)`.

    It has them already where it was imported before this library, which does not import it: it imports Triton.

    Examples:
        >>> from torch.utils.flop_counter import FlopCounterMode
        >>> with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        ...     regions = spatial_gather(torch.randn(1, 8, 4, 4), torch.randn(1, 3, 4, 4))
        >>> counter.get_total_flops()  # 2 * C * K * N
        768
    """
    return dict(_flop_formulas)


def register_op(
    schema: str,
    *,
    kernel: Op,
    fake: Op,
    definition: Op,
    flops: Callable[..., int],
    setup_context: Callable[..., None],
    backward: Op,
    vmap: Op,
    autocast: int = 0,
) -> Op:
    """Define `ocr_kernels::<schema>` with its kernel, its fake, its derivative and its batching rule.

    `definition` is the op in plain PyTorch: forward mode goes through it, and programs that cannot hold the op compute
    it. `flops` counts the operations of its matrix products from the op's arguments, with shapes in place of tensors.
    Under autocast the first `autocast` arguments are cast to the autocast dtype, as those of a convolution are, and
    nothing within the kernel.

    The schema has no defaults: the dispatcher would leave out arguments that equal them.
    """
    op, run = _register(schema, kernel, fake, flops, vmap, definition)
    rules = {device_type: _autocast_rule(op, autocast, device_type) for device_type in ("cpu", "cuda")}
    for device_type, rule in rules.items():
        LIBRARY.impl(op, rule, f"Autocast{device_type.upper()}")
    tensors = schema.split("->")[0].count("Tensor ")
    register_derivative(LIBRARY, op, run, tensors, definition, setup_context, backward, vmap, rules)
    return op


def register_inference_op(
    schema: str, *, kernel: Op, fake: Op, flops: Callable[..., int], vmap: Op, instead: str
) -> Op:
    """Define `ocr_kernels::<schema>` as `register_op` does, without a derivative: where one is wanted it raises.

    `instead` names what has a derivative.
    """
    op, run = _register(schema, kernel, fake, flops, vmap)
    message = (
        f"{op} is for inference and has no derivative: call it under torch.no_grad() or torch.inference_mode(), or "
        f"train with {instead}"
    )
    refuse_derivative(LIBRARY, op, run, message)
    return op


def _register(
    schema: str, kernel: Op, fake: Op, flops: Callable[..., int], vmap: Op, definition: Op | None = None
) -> tuple[Op, Op]:
    """The op, and the op less its derivative."""
    name, arguments = schema.split("(", 1)

    def define(name: str) -> Op:
        LIBRARY.define(f"{name}({arguments}")
        packet = getattr(torch.ops.ocr_kernels, name)
        op: Op = packet.default
        LIBRARY.impl(op, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"ocr_kernels::{name}", fake, lib=LIBRARY)
        torch.library.register_vmap(f"ocr_kernels::{name}", vmap, lib=LIBRARY)
        _flop_formulas[packet] = flops
        if "torch.utils.flop_counter" in sys.modules:
            sys.modules["torch.utils.flop_counter"].register_flop_formula(packet)(flops)
        if definition is not None:
            _decompositions[op] = definition
        return op

    op = define(name)
    return op, underived(op, lambda: define(f"{name}_underived"))


def is_autocast_on(device_type: str) -> bool:
    """Of a type of device that has none, as "meta", it is off, where PyTorch raises."""
    # PyTorch 2.11 does not compile the question
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)
    return available and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    return torch.autocast(device_type, enabled=False) if is_autocast_on(device_type) else nullcontext()


def autocast(tensor: Tensor, device_type: str) -> Tensor:
    """In the autocast dtype of a type of device; float64 stays, as in PyTorch's own autocast."""
    eligible = tensor.device.type == device_type and tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype(device_type)) if eligible else tensor


def _autocast_rule(op: Op, leading: int, device_type: str) -> Op:
    def rule(*args: Any) -> Any:
        tensors = [autocast(tensor, device_type) for tensor in args[:leading]]
        torch.set_autocast_enabled(device_type, False)  # in a tenth of the time of `torch.autocast`
        try:
            return op(*tensors, *args[leading:])
        finally:
            torch.set_autocast_enabled(device_type, True)

    return rule


def differentiate(
    definition: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """The gradients of `inputs`, by autograd through the definition; those not needed have no elements."""
    gradients = torch.func.vjp(definition, *inputs)[1](grad)
    return tuple(g if need else g.new_empty(0) for g, need in zip(gradients, needs, strict=True))


def differentiate_twice(
    definition: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor, cotangents: Sequence[Tensor | None]
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
