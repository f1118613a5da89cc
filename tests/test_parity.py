"""Values and gradients of both ops, on every backend, within the error budget."""

from __future__ import annotations

import pytest
import torch
from ops import ATTENTION, GATHER, Op, all_dtypes, both_ops

from ocr_kernels.testing import LAYOUTS, Layout, poisoned_memory

REGIONS = (1, 2, 3, 7, 16, 19, 59, 150, 171, 257, 1203)


@pytest.fixture(autouse=True)
def poison():
    with poisoned_memory():
        yield


@both_ops
@all_dtypes
@pytest.mark.parametrize("regions", REGIONS)
def test_any_number_of_regions(op: Op, target: tuple[str, str], dtype: torch.dtype, regions: int) -> None:
    backend, device = target
    inputs = op.inputs(
        batch=1, channels=20, regions=regions, spatial=(5, 8), dtype=dtype, device=device, requires_grad=True
    )
    op.assert_parity(backend, inputs)


# Just below, at and above the tiles of pixels (16 to 64) and channels (16 to 128), primes, and 1.
@both_ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("pixels", [1, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 193])
def test_any_number_of_pixels(op: Op, kernels: tuple[str, str], dtype: torch.dtype, pixels: int) -> None:
    backend, device = kernels
    inputs = op.inputs(
        channels=17, regions=6, spatial=(pixels,), dtype=dtype, device=device, seed=pixels, requires_grad=True
    )
    op.assert_parity(backend, inputs)


@both_ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("channels", [1, 2, 15, 16, 17, 31, 33, 63, 65, 127, 129, 257])
def test_any_number_of_channels(op: Op, kernels: tuple[str, str], dtype: torch.dtype, channels: int) -> None:
    backend, device = kernels
    inputs = op.inputs(
        channels=channels, regions=5, spatial=(3, 13), dtype=dtype, device=device, seed=channels, requires_grad=True
    )
    op.assert_parity(backend, inputs)


@pytest.mark.parametrize("regions", [7, 70], ids=["one-pass", "maps"])
@pytest.mark.parametrize(("channels", "value_channels"), [(5, 40), (33, 8), (16, 130)])
def test_value_channels_differ(kernels: tuple[str, str], channels: int, value_channels: int, regions: int) -> None:
    backend, device = kernels
    inputs = ATTENTION.inputs(
        channels=channels, value_channels=value_channels, regions=regions, device=device, requires_grad=True
    )
    ATTENTION.assert_parity(backend, inputs)


@both_ops
@all_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("regions", [5, 70])
def test_any_layout(op: Op, target: tuple[str, str], dtype: torch.dtype, layout: Layout, regions: int) -> None:
    backend, device = target
    inputs = op.inputs(channels=10, regions=regions, dtype=dtype, layout=layout, device=device, requires_grad=True)
    op.assert_parity(backend, inputs)


@both_ops
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_the_incoming_gradient(op: Op, kernels: tuple[str, str], layout: Layout) -> None:
    backend, device = kernels
    inputs = op.inputs(batch=2, channels=10, spatial=(6, 7), device=device, requires_grad=True)
    out = op.on(backend)(*inputs)
    other = ATTENTION.inputs(channels=out.shape[1], spatial=out.shape[2:], layout=layout, device=device)[0]
    op.assert_parity(backend, inputs, grad_output=other)


@both_ops
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_stride_zero_gradient(op: Op, target: tuple[str, str], layout: Layout) -> None:
    backend, device = target
    inputs = op.inputs(layout=layout, device=device, requires_grad=True)
    summed = torch.autograd.grad(op.on(backend)(*inputs).sum(), inputs)
    out = op.on(backend)(*inputs)
    for actual, expected in zip(summed, torch.autograd.grad(out, inputs, torch.ones_like(out)), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("logits_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@all_dtypes
def test_logits_of_another_dtype(target: tuple[str, str], dtype: torch.dtype, logits_dtype: torch.dtype) -> None:
    backend, device = target
    feats, logits = GATHER.inputs(dtype=dtype, logits_dtype=logits_dtype, device=device, requires_grad=True)
    assert GATHER.on(backend)(feats, logits).dtype == dtype
    GATHER.assert_parity(backend, (feats, logits))


@pytest.mark.parametrize("spatial", [(40,), (5, 8), (2, 4, 5), (2, 2, 2, 5)], ids=lambda spatial: f"{len(spatial)}d")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@both_ops
def test_any_number_of_spatial_dimensions(
    op: Op, target: tuple[str, str], spatial: tuple[int, ...], layout: Layout
) -> None:
    backend, device = target
    inputs = op.inputs(channels=9, spatial=spatial, layout=layout, device=device, requires_grad=True)
    op.assert_parity(backend, inputs)


@both_ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 8.0, -1.5])
def test_any_scale(op: Op, target: tuple[str, str], dtype: torch.dtype, scale: float) -> None:
    backend, device = target
    inputs = op.inputs(regions=6, dtype=dtype, device=device, requires_grad=True)
    op.assert_parity(backend, (*inputs, scale))


def test_many_splits_of_the_pixels(kernels: tuple[str, str]) -> None:
    """Long sums: half precision keeps its accuracy, more than the reference does."""
    backend, device = kernels
    feats, logits = GATHER.inputs(
        batch=1, channels=16, regions=3, spatial=(40, 101), dtype=torch.float16, device=device, requires_grad=True
    )
    measured = GATHER.assert_parity(backend, (feats, logits))
    worst = {m.measure: m for m in measured if m.tensor == "output"}
    assert worst["mean error"].error < worst["mean error"].reference


def test_weights_too_small_for_float16(kernels: tuple[str, str]) -> None:
    """One pixel far above the others, which still add up: their weights are subnormal or zero in float16."""
    backend, device = kernels
    feats = torch.ones(1, 4, 2000, dtype=torch.float16, device=device)
    feats[:, :, 0] = 0
    logits = torch.full((1, 2, 2000), -17.0, dtype=torch.float16, device=device)  # exp(-17) = 4e-8
    logits[:, :, 0] = 0
    exact = GATHER.definition(feats.double(), logits.double())
    assert torch.allclose(GATHER.on(backend)(feats, logits).double(), exact, rtol=1e-3)
    assert not torch.allclose(GATHER.definition(feats, logits).double(), exact, rtol=1e-2)


@both_ops
def test_float32_logits_far_from_zero(op: Op, target: tuple[str, str]) -> None:
    """The softmax's shift is subtracted before it is exponentiated, in the backward pass too."""
    backend, device = target
    inputs = list(op.inputs(regions=6, device=device))
    if op is GATHER:
        inputs[1] = inputs[1] + 1000
    else:  # one more channel adds 1000 to every score
        query, key, value = inputs
        inputs = [
            torch.cat((query, torch.full_like(query[:, :1], 100)), 1),
            torch.cat((key, torch.full_like(key[:, :1], 10)), 1),
            value,
            0.25,
        ]
    inputs = [t.detach().requires_grad_() if isinstance(t, torch.Tensor) else t for t in inputs]
    op.assert_parity(backend, inputs)
