"""Special values, degenerate sizes and the properties that a softmax-weighted sum has."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ops import ATTENTION, GATHER, Op, all_dtypes, both_ops

from ocr_kernels.testing import poisoned_memory

inf, nan = float("inf"), float("nan")


ROWS = (
    {0: (slice(None), -inf), 1: (slice(0, 1), inf), 2: (slice(3, 4), nan)},
    {0: (slice(0, 70), -inf)},  # the first tiles hold nothing
    {0: (slice(None), -inf)},  # a region without pixels
    {1: (slice(5, 6), inf)},
    {2: (slice(80, 81), nan)},
    {0: (slice(None), 3e38)},
    {0: (slice(1, None), -3e38)},
)


@pytest.mark.parametrize(
    ("rows", "regions"),
    [
        *((rows, 3) for rows in ROWS),
        (ROWS[0], 300),
        *(pytest.param(rows, 300, marks=pytest.mark.wide) for rows in ROWS[1:]),
    ],
)
def test_gather_special_logits(target: tuple[str, str], rows: dict, regions: int) -> None:
    """What softmax gives, and no other region is touched."""
    backend, device = target
    feats, logits = GATHER.inputs(batch=1, channels=6, regions=regions, spatial=(100,), device=device)
    for row, (pixels, value) in rows.items():
        logits[:, row, pixels] = value
    feats.requires_grad_()
    logits.requires_grad_()
    GATHER.assert_parity(backend, (feats, logits))


@pytest.mark.parametrize("regions", [3, 300])
@pytest.mark.parametrize("value", [inf, -inf, nan])
def test_attention_special_values(target: tuple[str, str], value: float, regions: int) -> None:
    """One pixel's scores are not finite: that pixel is as softmax has it, the others are right."""
    backend, device = target
    query, key, v = ATTENTION.inputs(batch=1, channels=6, regions=regions, spatial=(100,), device=device)
    query[:, 0, 7] = value
    key[:, 0] = key[:, 0].abs() + 0.1  # all scores of the pixel are value
    out = ATTENTION.on(backend)(query, key, v)
    expected = ATTENTION.definition(query, key, v)
    assert torch.equal(out.isnan(), expected.isnan())
    assert out[:, :, 7].isnan().all()
    others = torch.arange(100, device=device) != 7
    torch.testing.assert_close(out[:, :, others], expected[:, :, others])


@both_ops
@all_dtypes
def test_empty_batch(op: Op, target: tuple[str, str], dtype: torch.dtype) -> None:
    backend, device = target
    inputs = op.inputs(batch=0, dtype=dtype, device=device, requires_grad=True)
    out = op.on(backend)(*inputs)
    assert out.shape == op.definition(*inputs).shape
    for tensor, gradient in zip(inputs, torch.autograd.grad(out.sum(), inputs), strict=True):
        assert gradient.shape == tensor.shape


@both_ops
def test_no_pixels(op: Op, target: tuple[str, str]) -> None:
    backend, device = target
    inputs = op.inputs(spatial=(0, 4), device=device, requires_grad=True)
    with poisoned_memory():
        out = op.on(backend)(*inputs)
        gradients = torch.autograd.grad(out.sum(), inputs)
    expected = op.definition(*inputs)
    assert torch.equal(out, expected)
    for actual, plain in zip(gradients, torch.autograd.grad(expected.sum(), inputs), strict=True):
        assert torch.equal(actual, plain)


@both_ops
def test_weights_sum_to_one(op: Op, kernels: tuple[str, str]) -> None:
    """A constant is averaged to itself, exactly: numerator and denominator hold the same rounded weights."""
    backend, device = kernels
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        first, *others = op.inputs(regions=9, spatial=(70,), dtype=dtype, device=device)
        if op is GATHER:
            out = op.on(backend)(torch.full_like(first, 3), *others)
        else:
            out = op.on(backend)(first, others[0], torch.full_like(others[1], 3))
        torch.testing.assert_close(out, torch.full_like(out, 3), rtol=torch.finfo(torch.float32).eps * 4, atol=0)


def test_gather_is_linear_in_feats_and_ignores_shifts(kernels: tuple[str, str]) -> None:
    backend, device = kernels
    gather = GATHER.on(backend)
    feats, logits = GATHER.inputs(dtype=torch.float64, device=device)
    other = torch.flip(feats, (2, 3)).square()
    torch.testing.assert_close(
        gather(2 * feats - other, logits), 2 * gather(feats, logits) - gather(other, logits), rtol=1e-12, atol=1e-12
    )
    shifts = torch.linspace(-50, 50, logits.shape[1], device=device, dtype=torch.float64).view(1, -1, 1, 1)
    torch.testing.assert_close(gather(feats, logits + shifts), gather(feats, logits), rtol=1e-12, atol=1e-12)


@both_ops
def test_permutations(op: Op, kernels: tuple[str, str]) -> None:
    """Pixels and regions have no order."""
    backend, device = kernels
    inputs = op.inputs(regions=20, spatial=(90,), dtype=torch.float64, device=device)
    pixels, regions = torch.arange(90, device=device).roll(37), torch.arange(20, device=device).flip(0)
    out = op.on(backend)(*inputs)
    if op is GATHER:
        feats, logits = inputs
        shuffled = op.on(backend)(feats[:, :, pixels], logits[:, regions][:, :, pixels])
        expected = out[:, :, regions]
    else:
        query, key, value = inputs
        shuffled = op.on(backend)(query[:, :, pixels], key[:, :, regions], value[:, :, regions])
        expected = out[:, :, pixels]
    torch.testing.assert_close(shuffled, expected, rtol=1e-12, atol=1e-12)


def test_one_hot_logits_pick_pixels(kernels: tuple[str, str]) -> None:
    backend, device = kernels
    feats, _ = GATHER.inputs(batch=1, channels=5, spatial=(50,), device=device)
    logits = torch.where(torch.eye(50, dtype=torch.bool, device=device), 0.0, -inf).unsqueeze(0)
    assert torch.equal(GATHER.on(backend)(feats, logits), feats)


@both_ops
@all_dtypes
@pytest.mark.parametrize("regions", [5, 70])
def test_bitwise_reproducible(op: Op, target: tuple[str, str], dtype: torch.dtype, regions: int) -> None:
    backend, device = target
    inputs = op.inputs(batch=1, regions=regions, spatial=(13, 19), dtype=dtype, device=device, requires_grad=True)

    def run() -> tuple[torch.Tensor, ...]:
        out = op.on(backend)(*inputs)
        return out, *torch.autograd.grad(out, inputs, torch.cos(out))

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_offsets_past_two_to_the_31(kernels: tuple[str, str]) -> None:
    """Channels 2**31 - 64 elements apart: offsets inside one tile need 64 bits."""
    backend, device = kernels
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free GPU memory")
    stride = 2**31 - 64
    storage = torch.empty(2 * stride + 40, dtype=torch.float16, device=device)  # its pages are hardly touched
    wide = storage.as_strided((1, 3, 40), (0, stride, 1))
    feats, logits = GATHER.inputs(batch=1, channels=3, regions=3, spatial=(40,), dtype=torch.float16, device=device)
    query, key, value = ATTENTION.inputs(
        batch=1, channels=3, regions=3, spatial=(40,), dtype=torch.float16, device=device
    )
    for tensor, run in (
        (feats, lambda x: GATHER.on(backend)(x, logits)),
        (logits, lambda m: GATHER.on(backend)(feats, m)),
        (query, lambda q: ATTENTION.on(backend)(q, key, value)),
    ):
        expected = torch.autograd.functional.vjp(run, tensor, torch.ones_like(run(tensor)))
        wide.copy_(tensor)
        actual = torch.autograd.functional.vjp(run, wide, torch.ones_like(run(tensor)))
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])


def test_definitions_are_the_papers() -> None:
    """Eqs. 3 to 5, written with loops, in float64."""
    feats, logits = GATHER.inputs(batch=1, channels=3, regions=2, spatial=(7,), dtype=torch.float64)
    for k in range(2):
        weights = F.softmax(1.5 * logits[0, k], dim=0)
        expected = sum(weights[i] * feats[0, :, i] for i in range(7))
        torch.testing.assert_close(GATHER.definition(feats, logits, 1.5)[0, :, k], expected)
    query, key, value = ATTENTION.inputs(
        batch=1, channels=4, value_channels=3, regions=2, spatial=(7,), dtype=torch.float64
    )
    for i in range(7):
        scores = torch.stack([query[0, :, i] @ key[0, :, k] / 2 for k in range(2)])
        expected = sum(F.softmax(scores, dim=0)[k] * value[0, :, k] for k in range(2))
        torch.testing.assert_close(ATTENTION.definition(query, key, value)[0, :, i], expected)
