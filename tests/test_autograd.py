"""Derivatives: against finite differences on every backend, twice, for any subset of inputs, and what they cost."""

from __future__ import annotations

import pytest
import torch
from ops import ATTENTION, GATHER, Op, all_dtypes, both_ops

from ocr_kernels.testing import gradcheck, gradgradcheck, saved_bytes

SIZES = {"batch": 1, "channels": 3, "spatial": (5,), "dtype": torch.float64, "requires_grad": True}


@both_ops
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_gradcheck(op: Op, target: tuple[str, str], layout: str) -> None:
    backend, device = target
    gradcheck(op.on(backend), op.inputs(regions=3, layout=layout, device=device, **SIZES))


@both_ops
def test_gradcheck_many_regions(op: Op, kernels: tuple[str, str]) -> None:
    """More regions than one tile holds."""
    backend, device = kernels
    gradcheck(op.on(backend), op.inputs(regions=260, device=device, **(SIZES | {"channels": 2})), fast=True)


@both_ops
def test_gradgradcheck(op: Op, target: tuple[str, str]) -> None:
    backend, device = target
    gradgradcheck(op.on(backend), op.inputs(regions=3, device=device, **SIZES))


@both_ops
def test_third_derivative(op: Op, target: tuple[str, str]) -> None:
    backend, device = target
    inputs = op.inputs(regions=3, device=device, **SIZES)

    def third(function):
        result = function(*inputs).square().sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(result, inputs[0], create_graph=True)
            result = gradient.square().sum()
        return result

    torch.testing.assert_close(third(op.on(backend)), third(op.definition), rtol=1e-9, atol=0)


@both_ops
def test_one_tensor_as_two_arguments(op: Op, target: tuple[str, str]) -> None:
    backend, device = target
    x = GATHER.inputs(batch=1, channels=3, spatial=(4,), dtype=torch.float64, device=device, requires_grad=True)[0]
    arguments = (x, x) if op is GATHER else (x, x, x)
    gradcheck(lambda x: op.on(backend)(*(x for _ in arguments)), (x,))
    gradgradcheck(lambda x: op.on(backend)(*(x for _ in arguments)), (x,))


@both_ops
@pytest.mark.parametrize("regions", [5, 70])
@pytest.mark.parametrize("wanted", range(1, 8), ids=lambda wanted: f"{wanted:03b}")
def test_any_subset_of_gradients(op: Op, kernels: tuple[str, str], wanted: int, regions: int) -> None:
    """Those that are needed are the same whatever else is; the others are not computed."""
    backend, device = kernels
    inputs = op.inputs(regions=regions, device=device)
    if wanted >= 1 << len(inputs):
        wanted >>= 1
    everything = [t.detach().requires_grad_() for t in inputs]
    some = [t.detach().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(inputs)]
    for tensors in (everything, some):
        op.on(backend)(*tensors).square().sum().backward()
    for full, part in zip(everything, some, strict=True):
        assert part.grad is None if not part.requires_grad else torch.equal(part.grad, full.grad)


@both_ops
def test_unneeded_gradients_have_no_elements(op: Op, target: tuple[str, str]) -> None:
    backend, device = target
    inputs = op.inputs(device=device)
    backward = getattr(torch.ops.ocr_kernels, op.name + "_backward")
    forward = op.overload(*inputs, 1.0, backend)
    extra = forward if op is GATHER else ()
    out = forward[0] if op is GATHER else forward
    gradients = backward(out, *inputs, *extra, 1.0, True, *(False for _ in inputs[1:]), backend)
    assert [g.numel() for g in gradients] == [inputs[0].numel(), *(0 for _ in inputs[1:])]


@all_dtypes
@pytest.mark.parametrize("regions", [19, 300])
def test_saved_for_backward(target: tuple[str, str], dtype: torch.dtype, regions: int) -> None:
    """The gather keeps its inputs, its result and 16 bytes a region at most; the attention its inputs alone."""
    backend, device = target
    feats, logits = GATHER.inputs(regions=regions, dtype=dtype, device=device, requires_grad=True)
    result = 2 * feats.shape[1] * regions * dtype.itemsize
    kept = saved_bytes(GATHER.on(backend), feats, logits, exclude=(feats, logits))
    assert kept <= result + 16 * 2 * regions
    inputs = ATTENTION.inputs(regions=regions, dtype=dtype, device=device, requires_grad=True)
    assert saved_bytes(ATTENTION.on(backend), *inputs, exclude=inputs) == 0


@both_ops
def test_nothing_is_saved_without_gradients(op: Op, target: tuple[str, str]) -> None:
    backend, device = target
    inputs = op.inputs(device=device, requires_grad=True)
    with torch.no_grad():
        assert saved_bytes(op.on(backend), *inputs) == 0
    with torch.inference_mode():
        out = op.on(backend)(*op.inputs(device=device))
    assert out.is_inference()


@both_ops
def test_backward_twice_and_through_views(op: Op, target: tuple[str, str]) -> None:
    backend, device = target
    inputs = op.inputs(device=device, requires_grad=True)
    out = op.on(backend)(*inputs)
    first = torch.autograd.grad(out.flatten()[::2].sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(out.flatten()[::2].sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@both_ops
def test_inputs_changed_in_place_are_noticed(op: Op, target: tuple[str, str]) -> None:
    backend, device = target
    inputs = op.inputs(device=device, requires_grad=True)
    out = op.on(backend)(*inputs)
    with torch.no_grad():
        inputs[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
