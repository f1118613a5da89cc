"""Arguments that are not what they should be, and scales that are trained."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from ops import ATTENTION, GATHER, Op, both_ops
from torch import Tensor, nn

import ocr_kernels.core.backends
from ocr_kernels import modules, use_backend
from ocr_kernels.reference import SpatialGather

BATCH, CHANNELS, REGIONS, PIXELS = 2, 4, 3, (2, 5)


def backward_arguments(op: Op) -> tuple[dict[str, Tensor], Sequence[Any]]:
    inputs = op.inputs(batch=BATCH, channels=CHANNELS, regions=REGIONS, spatial=PIXELS)
    if op is ATTENTION:
        names = ("grad", "query", "key", "value")
        return dict(zip(names, (inputs[0], *inputs), strict=True)), (None, True, True, True)
    out, stats = op.overload(*inputs, 1.0, "reference")
    return dict(zip(("grad", "feats", "logits", "stats"), (out, *inputs, stats), strict=True)), (1.0, True, True)


WRONG = {
    "another shape": lambda t: t.transpose(1, 2),
    "another batch": lambda t: t[:1],
    "broadcast": lambda t: t[:, :1],
    "a batch of one without its dimension": lambda t: t[0],
    "empty": lambda t: t[:0],
    "another dtype": lambda t: t.double(),
    "no floating dtype": lambda t: t.to(torch.int64),
    "another device": lambda t: t.to("meta"),
}


@both_ops
@pytest.mark.parametrize("wrong", WRONG)
def test_backward_ops_name_what_is_wrong(op: Op, kernels: tuple[str, str], wrong: str) -> None:
    """`grad` and `stats` come from anybody who calls the op: nothing is broadcast, and no kernel sees them."""
    tensors, options = backward_arguments(op)
    backward = getattr(torch.ops.ocr_kernels, op.name + "_backward").default
    for name in {"grad", "stats"} & set(tensors):
        arguments = tensors | {name: WRONG[wrong](tensors[name])}
        with pytest.raises((ValueError, TypeError), match=f"^{name} must"):
            backward(*arguments.values(), *options, kernels[0])


@both_ops
@pytest.mark.parametrize("backend", ["os", "", "registration"])
def test_backends_are_not_names_of_modules(op: Op, backend: str) -> None:
    tensors, options = backward_arguments(op)
    inputs = op.inputs()
    for call in (
        lambda: op.overload(*inputs, 1.0, backend),
        lambda: getattr(torch.ops.ocr_kernels, op.name + "_backward").default(*tensors.values(), *options, backend),
        lambda: op.on(backend or "none")(*inputs),
    ):
        with pytest.raises(ValueError, match="backend must be one of reference, triton, native"):
            call()


@both_ops
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_scale_is_trained(op: Op, target: tuple[str, str], shape: tuple[int, ...]) -> None:
    """Its gradient, and those of all other inputs, are the plain formula's."""
    backend, device = target
    inputs = op.inputs(dtype=torch.float64, device=device, requires_grad=True)
    scale = nn.Parameter(torch.full(shape, 0.7, dtype=torch.float64, device=device))
    leaves = (*inputs, scale)
    out, expected = op.on(backend)(*leaves), op.definition(*inputs, scale.reshape(()))
    torch.testing.assert_close(out, expected)
    grad = torch.randn(out.shape, dtype=torch.float64, device=device)
    actual = torch.autograd.grad(out, leaves, grad)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, leaves, grad))
    assert float(actual[-1]) != 0


def test_a_modules_scale_is_trained() -> None:
    scales = [nn.Parameter(torch.tensor(2.0)) for _ in range(2)]
    feats, logits = GATHER.inputs()
    for scale, module in zip(scales, (modules.SpatialGather, SpatialGather), strict=True):
        module(scale=scale)(feats, logits).square().sum().backward()
    torch.testing.assert_close(scales[0].grad, scales[1].grad)


@both_ops
def test_a_scale_keeps_the_dtype(op: Op) -> None:
    inputs = op.inputs(dtype=torch.bfloat16)
    assert op.call(*inputs, torch.tensor(0.5)).dtype == torch.bfloat16


@both_ops
@pytest.mark.parametrize("scale", [2, np.float32(0.5), np.float64(0.5), True])
def test_any_number_is_a_scale(op: Op, scale: Any) -> None:
    inputs = op.inputs()
    assert torch.equal(op.call(*inputs, scale), op.call(*inputs, float(scale)))


@both_ops
@pytest.mark.parametrize("scale", ["1", 1j, [1.0], torch.ones(2), torch.tensor(1), torch.tensor(1j)])
def test_anything_else_is_no_scale(op: Op, scale: Any) -> None:
    with pytest.raises(TypeError, match=r"^scale must be a number or a"):
        op.call(*op.inputs(), scale)


def test_interleaved_blocks_leave_no_backend_behind() -> None:
    """Two threads whose blocks overlap: the first one ends while the other is open."""
    entered, left = threading.Event(), threading.Event()

    def first() -> None:
        with use_backend("reference"):
            entered.set()
            left.wait(10)

    before = ocr_kernels.core.backends._selected
    thread = threading.Thread(target=first)
    thread.start()
    entered.wait(10)
    with use_backend(None):
        left.set()
        thread.join()
        assert ocr_kernels.core.backends._selected is None
    assert ocr_kernels.core.backends._selected == before
