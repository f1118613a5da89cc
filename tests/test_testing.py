"""The helpers of `ocr_kernels.testing`: right kernels pass, and each wrong one is caught by the measure that should."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

import ocr_kernels
from ocr_kernels.attention import reference as attention
from ocr_kernels.gather import reference as gather
from ocr_kernels.testing import (
    FACTORS,
    LAYOUTS,
    Layout,
    assert_parity,
    attention_inputs,
    gather_inputs,
    gradcheck,
    gradgradcheck,
    judge,
    lay_out,
    oracle,
    peak_bytes,
    poisoned_memory,
    saved_bytes,
)

DTYPES = tuple(FACTORS)
spatial_gather = functools.partial(ocr_kernels.spatial_gather, backend="reference")
pixel_region_attention = functools.partial(ocr_kernels.pixel_region_attention, backend="reference")


class _Gradient(torch.autograd.Function):
    """The identity, with a gradient that is changed on its way back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.change(grad), None


def _with_gradient(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda tensor: _Gradient.apply(tensor, change)  # type: ignore[no-any-return]


# Inputs


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spatial", [(12,), (5, 6), (2, 3, 4)])
def test_layouts_hold_the_same_values(layout: Layout, spatial: tuple[int, ...]) -> None:
    plain = gather_inputs(spatial=spatial, logits_dtype=torch.float64)
    laid_out = gather_inputs(spatial=spatial, logits_dtype=torch.float64, layout=layout)
    for tensor, expected in zip(laid_out, plain, strict=True):
        assert tensor.shape == expected.shape
        assert tensor.dtype == expected.dtype
        if layout == "expanded":
            assert tensor.flatten()[0] == expected.flatten()[0]
            assert not tensor.isnan().any()
        else:
            assert torch.equal(tensor, expected)


def test_layouts_are_what_they_are_called() -> None:
    strides = {layout: lay_out(torch.zeros(2, 3, 4, 5), layout).stride() for layout in LAYOUTS}
    assert strides == {
        "contiguous": (60, 20, 5, 1),
        "channels_last": (60, 1, 15, 3),
        "transposed": (60, 20, 1, 4),
        "sliced": (4 * 7 * 8, 7 * 8, 8, 1),
        "strided": (3 * 8 * 10, 8 * 10, 20, 2),
        "expanded": (12, 4, 1, 0),
    }
    assert lay_out(torch.zeros(2, 3, 4), "expanded").stride() == (0, 4, 1)
    with pytest.raises(ValueError, match=r"layout must be one of contiguous, .*, but is 'diagonal'"):
        lay_out(torch.zeros(2, 3, 4, 5), "diagonal")  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["sliced", "strided"])
def test_what_must_not_be_read_is_nan(layout: Layout) -> None:
    tensor = lay_out(torch.zeros(2, 3, 4, 5), layout)
    whole = torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // 4,), (1,), 0)
    assert int(whole.isnan().sum()) == whole.numel() - tensor.numel()


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_are_drawn_in_float64_and_rounded(dtype: torch.dtype) -> None:
    make: tuple[Callable[..., tuple[Tensor, ...]], ...] = (gather_inputs, attention_inputs)
    for inputs in make:
        wide = inputs(dtype=torch.float64, seed=3)
        assert all(torch.equal(a, b.to(dtype)) for a, b in zip(inputs(dtype=dtype, seed=3), wide, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(inputs(dtype=torch.float64, seed=4), wide, strict=True))


def test_inputs_have_the_sizes_asked_for() -> None:
    feats, logits = gather_inputs(batch=3, channels=4, regions=6, spatial=(7,), requires_grad=True)
    assert (feats.shape, logits.shape) == ((3, 4, 7), (3, 6, 7))
    assert feats.is_leaf
    assert feats.requires_grad
    shapes = [t.shape for t in attention_inputs(batch=3, channels=4, value_channels=5, regions=6, spatial=(2, 3, 4))]
    assert shapes == [(3, 4, 2, 3, 4), (3, 4, 6), (3, 5, 6)]
    assert not attention_inputs()[0].requires_grad


# Parity: what is right


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_right_kernels_pass(dtype: torch.dtype, layout: Layout) -> None:
    feats, logits = gather_inputs(regions=7, spatial=(20, 21), dtype=dtype, layout=layout, requires_grad=True)
    measurements = assert_parity(spatial_gather, gather.spatial_gather, (feats, logits, 0.7))
    assert {m.tensor for m in measurements} == {"output", "gradient of feats", "gradient of logits"}
    assert {m.dtype for m in measurements} == {dtype}
    query, key, value = attention_inputs(value_channels=9, dtype=dtype, layout=layout, requires_grad=True)
    key.requires_grad_(False)
    measurements = assert_parity(pixel_region_attention, attention.pixel_region_attention, (query, key, value))
    assert {m.tensor for m in measurements} == {"output", "gradient of query", "gradient of value"}
    assert all(m.passed and m.error <= m.bound for m in measurements)
    assert feats.grad is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_expanded_incoming_gradient_and_mixed_dtypes_pass(dtype: torch.dtype) -> None:
    inputs = gather_inputs(dtype=dtype, logits_dtype=torch.float32, requires_grad=True)
    grad = torch.ones((), dtype=dtype).expand(2, 16, 5)
    measurements = assert_parity(spatial_gather, gather.spatial_gather, inputs, grad_output=grad)
    assert {m.tensor: m.dtype for m in measurements}["gradient of logits"] == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_pixel_has_no_gradient_of_logits(dtype: torch.dtype) -> None:
    inputs = gather_inputs(channels=64, spatial=(1,), dtype=dtype, requires_grad=True)
    assert_parity(spatial_gather, gather.spatial_gather, inputs)

    def no_row_term(feats: Tensor, logits: Tensor) -> Tensor:
        weights = logits.flatten(2).softmax(2).detach()
        return gather.spatial_gather(feats, logits.detach()) + feats.detach() @ (
            weights * (logits - logits.detach())
        ).transpose(1, 2)

    with pytest.raises(AssertionError, match="gradient of logits: mean error"):
        assert_parity(no_row_term, gather.spatial_gather, inputs)


def test_oracle_is_float64() -> None:
    feats, logits = gather_inputs(dtype=torch.bfloat16)
    exact = oracle(gather.spatial_gather, feats, logits, 2.0)
    assert exact.dtype == torch.float64
    assert torch.equal(exact, gather.spatial_gather(feats.double(), logits.double(), 2.0))
    assert oracle(nn.Linear(11, 2), feats).dtype == torch.float64


# Parity: what is wrong


def _wrong_axis(feats: Tensor, logits: Tensor) -> Tensor:
    return feats.flatten(2) @ logits.flatten(2).softmax(1).transpose(1, 2)


def _dropped_pixel(feats: Tensor, logits: Tensor) -> Tensor:
    return gather.spatial_gather(feats.flatten(2)[..., :-1], logits.flatten(2)[..., :-1])


def _half_sum(feats: Tensor, logits: Tensor) -> Tensor:
    weights = logits.flatten(2).softmax(2)
    total = torch.zeros(feats.shape[0], feats.shape[1], logits.shape[1], dtype=feats.dtype)
    for x, w in zip(feats.flatten(2).unbind(2), weights.unbind(2), strict=True):
        total = total + x.unsqueeze(2) * w.unsqueeze(1)
    return total


def _unwritten(feats: Tensor, logits: Tensor) -> Tensor:
    out = gather.spatial_gather(feats, logits)
    out[1, 2, 3] = float("nan")
    return out


def _replaced_images(feats: Tensor, logits: Tensor) -> Tensor:
    return gather.spatial_gather(feats, logits).flip(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (_wrong_axis, "output: mean error"),
        (_unwritten, "output: misplaced NaN or inf 1 exceeds 0"),
        (_replaced_images, "output: max error"),
    ],
)
def test_wrong_values_are_caught(wrong: Callable[..., Tensor], complaint: str, dtype: torch.dtype) -> None:
    inputs = gather_inputs(regions=7, spatial=(15, 16), dtype=dtype)
    with pytest.raises(AssertionError, match=complaint):
        assert_parity(wrong, gather.spatial_gather, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])  # bfloat16's eps is two pixels of 240
def test_one_dropped_pixel_of_hundreds_is_caught(dtype: torch.dtype) -> None:
    inputs = gather_inputs(regions=7, spatial=(15, 16), dtype=dtype)
    with pytest.raises(AssertionError, match="output: mean error"):
        assert_parity(_dropped_pixel, gather.spatial_gather, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_missing_scale_is_caught(dtype: torch.dtype) -> None:
    unscaled = functools.partial(pixel_region_attention, scale=1.0)
    with pytest.raises(AssertionError, match="output: max error"):
        assert_parity(unscaled, attention.pixel_region_attention, attention_inputs(dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_are_caught(dtype: torch.dtype) -> None:
    inputs = gather_inputs(spatial=(40, 41), dtype=dtype)
    with pytest.raises(AssertionError, match="output: mean error"):
        assert_parity(_half_sum, gather.spatial_gather, inputs)


def test_float32_inside_float64_is_caught() -> None:
    def rounded(feats: Tensor, logits: Tensor) -> Tensor:
        return spatial_gather(feats.float(), logits.float()).double()

    with pytest.raises(AssertionError, match="output: mean error"):
        assert_parity(rounded, gather.spatial_gather, gather_inputs(dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda grad: 1.01 * grad, "gradient of {}: relative L2 error"),
        (torch.zeros_like, "gradient of {}: relative L2 error 1 exceeds"),
        (lambda grad: -grad, "gradient of {}: mean error"),
    ],
    ids=["one per cent", "zero", "sign"],
)
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_wrong_gradients_are_caught(
    name: str, change: Callable[[Tensor], Tensor], complaint: str, dtype: torch.dtype
) -> None:
    def wrong(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tensors = {"query": query, "key": key, "value": value}
        tensors[name] = _with_gradient(change)(tensors[name])
        return pixel_region_attention(*tensors.values())

    inputs = attention_inputs(dtype=dtype, requires_grad=True)
    with pytest.raises(AssertionError, match=complaint.format(name)) as caught:
        assert_parity(wrong, attention.pixel_region_attention, inputs, name="attention")
    message = str(caught.value)
    assert message.startswith("attention differs from the reference")
    assert "output" not in message
    assert f"({str(dtype).removeprefix('torch.')} reference's own: " in message


def test_missing_gradient_is_caught() -> None:
    inputs = gather_inputs(requires_grad=True)
    with pytest.raises(
        AssertionError, match=r"gradient of logits: the reference has torch\.float32, <lambda> has none"
    ):
        assert_parity(lambda x, m: spatial_gather(x, m.detach()), gather.spatial_gather, inputs)
    with pytest.raises(AssertionError, match="gradient of m: the reference has none"):
        assert_parity(spatial_gather, lambda x, m: gather.spatial_gather(x, m.detach()), inputs)


def test_wrong_shape_and_dtype_are_caught() -> None:
    inputs = gather_inputs()
    with pytest.raises(AssertionError, match=r"must return outputs of shapes \[\(2, 5, 16\)\]"):
        assert_parity(lambda *args: spatial_gather(*args).mT, gather.spatial_gather, inputs)
    with pytest.raises(AssertionError, match=r"output: the reference has torch\.float32, <lambda> has torch\.float16"):
        assert_parity(lambda *args: spatial_gather(*args).half(), gather.spatial_gather, inputs)


# The measures one by one


def test_bias_below_the_noise_is_caught() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.rand(100_000, generator=generator, dtype=torch.float64)
    noise, other = 0.05 * torch.randn(2, 100_000, generator=generator, dtype=torch.float64)
    reference = [((exact + noise).float(), exact, 1.0)]
    assert all(m.passed for m in judge("dx", (exact + other).float(), reference))
    biased = judge("dx", (exact + other + 0.005).float(), reference)
    assert [m.measure for m in biased if not m.passed] == ["bias"]


def test_noise_in_a_single_element_is_caught() -> None:
    exact = torch.linspace(1, 2, 1000, dtype=torch.float64)
    reference = [(exact.half(), exact, 1.0)]
    assert all(m.passed for m in judge("y", exact.half(), reference))
    outlier = exact.half()
    outlier[500] += 0.01
    assert [m.measure for m in judge("y", outlier, reference) if not m.passed] == ["max error"]


def test_non_finite_elements_must_be_where_the_oracle_has_them() -> None:
    exact = torch.tensor([1.0, 1e6, -torch.inf, torch.nan], dtype=torch.float64)
    reference = [(exact.half(), exact, 1.0)]
    assert all(m.passed for m in judge("y", torch.tensor([1.0, torch.inf, -torch.inf, torch.nan]).half(), reference))
    for position, value in ((0, torch.nan), (1, 65504.0), (2, torch.inf), (3, 0.0)):
        wrong = exact.half()
        wrong[position] = value
        assert judge("y", wrong, reference)[0].error == 1


def test_an_overflowing_reference_allows_nothing() -> None:
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    overflowed = [(torch.tensor([torch.inf, torch.nan]).half(), exact, 1.0)]
    assert all(m.passed for m in judge("y", exact.half(), overflowed))
    assert not all(m.passed for m in judge("y", 1.01 * exact.half(), overflowed))
    assert not judge("y", overflowed[0][0], overflowed)[0].passed


def test_subnormal_rounding_is_allowed() -> None:
    exact = torch.full((64,), 1.3e-7, dtype=torch.float64)  # 2.2 spacings of float16's subnormal numbers
    assert all(m.passed for m in judge("y", exact.half(), [(exact.float(), exact, 1.0)]))


# Modules


class _Scaled(nn.Module):
    """conv -> batch norm -> attention over a learnt set of regions, with one factor to get wrong."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.regions = nn.Parameter(torch.randn(8, 4))
        self.factor = factor

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        regions = (self.factor * self.regions).expand(image.shape[0], -1, -1)
        pixels = self.norm(self.conv(image))
        return pixels, attention.pixel_region_attention(pixels, regions, regions)


def test_modules_are_compared_with_their_parameters_and_buffers() -> None:
    image = torch.randn(2, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    module = _Scaled(1.0)
    measurements = assert_parity(module, _Scaled(1.0), (image,))
    assert [m.tensor for m in measurements if m.measure == "max error"] == [
        "output 0",
        "output 1",
        "gradient of regions",
        "gradient of conv.weight",
        "gradient of conv.bias",
        "gradient of norm.weight",
        "gradient of norm.bias",
        "buffer norm.running_mean",
        "buffer norm.running_var",
    ]
    assert module.conv.weight.grad is None
    assert torch.equal(module.norm.running_mean, torch.zeros(8))  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="gradient of regions: relative L2 error"):
        assert_parity(_Scaled(1.01), module, (image,))
    other_momentum = _Scaled(1.0)
    other_momentum.norm.momentum = 0.11
    with pytest.raises(AssertionError, match=r"buffer norm\.running_mean: max error"):
        assert_parity(other_momentum, module, (image,))
    frozen = _Scaled(1.0)
    frozen.regions.requires_grad_(False)
    with pytest.raises(
        AssertionError, match=r"gradient of regions: the reference has torch\.float32, _Scaled has none"
    ):
        assert_parity(frozen, module, (image,))


# Derivatives, memory


def test_gradcheck() -> None:
    inputs = attention_inputs(batch=1, channels=3, regions=2, spatial=(4,), requires_grad=True)
    gradcheck(pixel_region_attention, inputs)
    gradgradcheck(pixel_region_attention, inputs)
    biased = _with_gradient(lambda grad: 1.001 * grad)
    with pytest.raises(GradcheckError, match="Jacobian mismatch"):
        gradcheck(lambda *args: biased(pixel_region_attention(*args)), inputs)
    random = _with_gradient(lambda grad: grad + 1e-12 * torch.rand_like(grad))
    with pytest.raises(GradcheckError, match="not reentrant"):
        gradcheck(lambda *args: random(pixel_region_attention(*args)), inputs)
    once = _with_gradient(Tensor.detach)
    gradcheck(lambda x: once(x.exp()), inputs[:1])
    with pytest.raises(RuntimeError):
        gradgradcheck(lambda x: once(x.exp()), inputs[:1])


def test_saved_bytes_counts_each_storage_once() -> None:
    x = torch.randn(10, requires_grad=True)
    assert saved_bytes(torch.exp, x) == 40
    assert saved_bytes(lambda t: t[:3] * t[3:6] * t[6:9], x) == 40 + 12
    assert saved_bytes(lambda t: t[:3] * t[3:6] * t[6:9], x, exclude=(x,)) == 12
    assert saved_bytes(torch.exp, x.detach()) == 0


def test_peak_bytes_counts_what_is_held_at_a_time() -> None:
    x = torch.ones(1000)

    def function(x: Tensor) -> Tensor:
        y = x + 1  # 4000 bytes, and 4000 for the next line until y is gone
        y = y * 2
        return (y + 1)[:10].clone()  # y and its sum together

    assert 8000 <= peak_bytes(function, x) <= 8064  # scalars are there as well
    assert peak_bytes(lambda x: x, x) == 0
    assert peak_bytes(lambda x: (x.view(-1), x + 1), x) <= 64


def test_saved_bytes_of_the_ops() -> None:
    inputs = attention_inputs(requires_grad=True)
    assert saved_bytes(pixel_region_attention, *inputs) >= sum(t.nbytes for t in inputs)
    assert saved_bytes(pixel_region_attention, *inputs, exclude=inputs) <= 16 * 2 * 99
    assert saved_bytes(attention.pixel_region_attention, *inputs, exclude=inputs) >= 4 * 2 * 99 * 5  # the weights
    feats, logits = gather_inputs(requires_grad=True)
    beyond_inputs = saved_bytes(spatial_gather, feats, logits, exclude=(feats, logits))
    assert 4 * 2 * 16 * 5 < beyond_inputs <= 4 * 2 * 16 * 5 + 16 * 2 * 5  # its output and the statistics


def test_poisoned_memory_is_nan_and_ends() -> None:
    with poisoned_memory():
        assert torch.empty(5).isnan().all()
        assert torch.zeros(1).new_empty(5, dtype=torch.bfloat16).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
