"""Derivatives: against finite differences on every backend, twice, for any subset of inputs, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops import ATTENTION, GATHER, Op, all_dtypes, both_ops
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from ocr_kernels.testing import gradcheck, gradgradcheck, saved_bytes

Tensors = tuple[Tensor, ...]
SIZES = {"batch": 1, "channels": 3, "spatial": (5,), "dtype": torch.float64, "requires_grad": True}


@both_ops
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_gradcheck(op: Op, target: tuple[str, str], layout: str) -> None:
    backend, device = target
    gradcheck(op.on(backend), op.inputs(regions=3, layout=layout, device=device, **SIZES))


@both_ops
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_the_result_may_be_modified_in_place(op: Op, target: tuple[str, str], layout: str) -> None:
    """PyTorch refuses it for a view that an op returns."""
    backend, device = target
    inputs = op.inputs(regions=3, layout=layout, device=device, **(SIZES | {"spatial": (2, 3)}))
    out = op.on(backend)(*inputs)
    expected = torch.autograd.grad((2 * out + 1).square().sum(), inputs, retain_graph=True)
    found = torch.autograd.grad(out.mul_(2).add_(1).square().sum(), inputs)
    torch.testing.assert_close(found, expected)


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


@pytest.mark.thinned
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
    extra = forward[1:] if op is GATHER else ()
    out = forward[0] if op is GATHER else forward
    gradients = backward(out, *inputs, *extra, 1.0, True, *(False for _ in inputs[1:]), backend)
    assert [g.numel() for g in gradients] == [inputs[0].numel(), *(0 for _ in inputs[1:])]


@pytest.mark.thinned
@all_dtypes
@pytest.mark.parametrize("regions", [19, 300])
def test_saved_for_backward(target: tuple[str, str], dtype: torch.dtype, regions: int) -> None:
    """The gather keeps its inputs, its unrounded result and 16 bytes a region at most; the attention its inputs."""
    backend, device = target
    feats, logits = GATHER.inputs(regions=regions, dtype=dtype, device=device, requires_grad=True)
    result = 2 * feats.shape[1] * regions * max(4, dtype.itemsize)
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


@both_ops
def test_results_changed_in_place(op: Op, target: tuple[str, str]) -> None:
    """Neither op saves the result that it returns, so gradients stay right."""
    backend, device = target
    inputs = op.inputs(device=device, requires_grad=True)
    out = op.on(backend)(*inputs).add_(1)
    out[0].relu_()
    expected = op.on(backend)(*inputs).add(1)
    expected = torch.cat([expected[:1].relu(), expected[1:]])
    gradients = torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)
    torch.testing.assert_close(*gradients)


@both_ops
def test_inference_tensors_are_refused_where_they_would_be_saved(op: Op, target: tuple[str, str]) -> None:
    backend, device = target
    with torch.inference_mode():
        first = op.inputs(device=device)[0]
    others = op.inputs(device=device, requires_grad=True)[1:]
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        op.on(backend)(first, *others)
    with torch.no_grad():
        assert not op.on(backend)(first, *others).requires_grad


# torch.func


def scalar(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *x: f(*x).square().sum()


def stacked(x: Tensors) -> Tensors:
    return tuple(torch.stack([t, t.flip(1)], dim=1) for t in x)


def everywhere(x: Tensors) -> tuple[int, ...]:
    return tuple(range(len(x)))


def leaves(x: Tensors) -> Tensors:
    return tuple(t.detach().requires_grad_() for t in x)


def by_dual_numbers(f: Callable[..., Tensor], *x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(*(forward_ad.make_dual(t, t.cos()) for t in x))).tangent


def backward_of_dual_numbers(f: Callable[..., Tensor], *x: Tensor) -> list[Tensor]:
    x = leaves(x)
    out = f(*x)
    grad = out.detach()
    with forward_ad.dual_level():
        gradients = torch.autograd.grad(out, x, forward_ad.make_dual(grad, grad.cos()))
        return [forward_ad.unpack_dual(gradient).tangent for gradient in gradients]


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, *x: grad(scalar(f), everywhere(x))(*x),
    "vjp": lambda f, *x: vjp(f, *x)[1](f(*x)),
    "jacrev": lambda f, *x: jacrev(f, everywhere(x))(*x),
    "grad of grad": lambda f, *x: grad(scalar(grad(scalar(f))), everywhere(x))(*x),
    "grad of grad of grad": lambda f, *x: grad(scalar(grad(scalar(grad(scalar(f))))))(*x),
    "vmap of grad": lambda f, *x: vmap(grad(scalar(f), everywhere(x)), in_dims=1)(*stacked(x)),
    "per sample": lambda f, *x: vmap(grad(scalar(f), everywhere(x)), (1, *(None for _ in x[1:])))(
        stacked(x)[0], *x[1:]
    ),
    "vmap of vmap of grad": lambda f, *x: vmap(vmap(grad(scalar(f)), 1), 1)(*stacked(stacked(x))),
    "grad of vmap": lambda f, *x: grad(scalar(vmap(f, 1)), everywhere(x))(*stacked(x)),
    "backward of vmap": lambda f, *x: (lambda y: torch.autograd.grad(scalar(vmap(f, 1))(*y), y))(leaves(stacked(x))),
    "backward of grad": lambda f, *x: (lambda y: torch.autograd.grad(scalar(grad(scalar(f)))(*y), y))(leaves(x)),
    "jvp": lambda f, *x: jvp(f, x, tuple(t.cos() for t in x)),
    "jacfwd": lambda f, *x: jacfwd(f, everywhere(x))(*x),
    "hessian": lambda f, *x: hessian(scalar(f), everywhere(x))(*x),
    "jacrev of jacfwd": lambda f, *x: jacrev(jacfwd(scalar(f)), everywhere(x))(*x),
    "jacfwd of jacfwd": lambda f, *x: jacfwd(jacfwd(scalar(f)), everywhere(x))(*x),
    "vmap of jvp": lambda f, *x: vmap(lambda *y: jvp(f, y, tuple(t.cos() for t in y)), in_dims=1)(*stacked(x)),
    "functionalize of grad": lambda f, *x: functionalize(grad(scalar(f), everywhere(x)))(*x),
    "linearize": lambda f, *x: linearize(f, *x)[1](*x),
    "dual numbers": by_dual_numbers,
    "backward of dual numbers": backward_of_dual_numbers,
}


@both_ops
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=[name.replace(" ", "-") for name in TRANSFORMS])
def test_transforms(op: Op, target: tuple[str, str], transform: Callable[..., Any]) -> None:
    backend, device = target
    inputs = op.inputs(channels=2, regions=3, spatial=(4,), dtype=torch.float64, device=device)
    torch.testing.assert_close(transform(op.on(backend), *inputs), transform(op.definition, *inputs))


@both_ops
def test_a_single_image_is_batched(op: Op, target: tuple[str, str]) -> None:
    """What no transform has batched is then expanded along the images."""
    backend, device = target
    inputs = op.inputs(batch=1, channels=2, regions=3, spatial=(4,), dtype=torch.float64, device=device)
    found, expected = (jacrev(grad(scalar(f), 1), 1)(*inputs) for f in (op.on(backend), op.definition))
    torch.testing.assert_close(found, expected)


@both_ops
def test_forward_mode_keeps_dtypes_and_checks(op: Op, target: tuple[str, str]) -> None:
    """Forward mode goes through the definition, with its sums in float32, so that only the results are rounded."""
    backend, device = target
    inputs = op.inputs(dtype=torch.float16, device=device)
    wide = tuple(t.float() for t in inputs)
    eps = torch.finfo(torch.float16).eps
    for found, exact in zip(jvp(op.on(backend), inputs, inputs), jvp(op.definition, wide, wide), strict=True):
        assert found.dtype == torch.float16
        torch.testing.assert_close(found.float(), exact, rtol=eps, atol=eps)
    with pytest.raises(ValueError, match="must have shape"):
        jvp(op.on(backend), (*inputs[:-1], inputs[-1][:1]), (*inputs[:-1], inputs[-1][:1]))
