"""The gather of pixels in parts is the gather of all of them: values, derivatives, and what a state refuses."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from ops import DTYPES, GATHER, native_on, over, pairwise
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ocr_kernels import GatherState, spatial_gather
from ocr_kernels.testing import FACTORS, assert_parity, gradcheck, gradgradcheck, judge, poisoned_memory, saved_bytes

Part = tuple[Tensor, Tensor]
TARGET = tuple[str, str]

# Where many parts are quick: the fixture `target` has Triton's interpreter, too, which is not.
on_cpu = pytest.mark.parametrize(
    "target", [("reference", "cpu"), pytest.param(("native", "cpu"), marks=native_on("cpu"))], ids="-".join
)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(), poisoned_memory():
        torch.manual_seed(0)
        yield


def cut(feats: Tensor, logits: Tensor, count: int, dim: int = 2) -> Iterator[Part]:
    """`count` parts of uneven size; of more than two the second is empty."""
    size = feats.shape[dim]
    ends = [round(size * (i / count) ** 1.3) for i in range(count + 1)]
    if count > 2:
        ends[2] = ends[1]
    for start, end in itertools.pairwise(ends):
        yield feats.narrow(dim, start, end - start), logits.narrow(dim, start, end - start)


def state_of(parts: Any, scale: float | Tensor = 1.0, backend: str | None = None) -> GatherState:
    state = GatherState(scale, backend=backend)
    for feats, logits in parts:
        state.update(feats, logits)
    return state


def in_parts(count: int, dim: int = 2, backend: str | None = None) -> Callable[..., Tensor]:
    def gather(feats: Tensor, logits: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        return state_of(cut(feats, logits, count, dim), scale, backend).result()

    return gather


def inputs(**options: Any) -> Part:
    return GATHER.inputs(**({"batch": 2, "channels": 3, "regions": 4, "spatial": (9, 2)} | options))


def exact_inputs(**options: Any) -> Part:
    return inputs(dtype=torch.float64, requires_grad=True, **options)


def derivatives(function: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
    """The result and the gradients of a loss that is not linear in it."""
    tensors = tuple(tensor.detach().requires_grad_() for tensor in tensors)
    out = function(*tensors)
    return [out.detach(), *torch.autograd.grad(out.square().sum() + out.sum(), tensors)]


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12, equal_nan=True)


# Parity


@on_cpu
@over(
    [
        pairwise(
            parts=(1, 2, 7, 64),
            dtypes=[(dtype, dtype) for dtype in DTYPES] + [(torch.bfloat16, torch.float32)],
            layout=("contiguous", "channels_last", "strided", "transposed"),
            dim=(2, 3),
            regions=(1, 5, 171),
            scale_and_peak=((1.0, 0), (30.0, 0), (-0.7, 0), (1.0, 8)),
        )
    ],
    [],
)
def test_parity(target: TARGET, case: dict[str, Any]) -> None:
    backend, device = target
    (dtype, logits_dtype), (scale, peak) = case["dtypes"], case["scale_and_peak"]
    spatial = (70, 2) if case["dim"] == 2 else (2, 70)
    tensors = inputs(
        channels=6, regions=case["regions"], spatial=spatial, dtype=dtype, logits_dtype=logits_dtype, peak=peak,
        layout=case["layout"], device=device, requires_grad=True,
    )  # fmt: skip
    luck = 2.0 if peak or scale == 30 else 1.0  # few numbers make up the errors where regions are peaked
    factors = {dtype: factor * (luck if dtype.itemsize >= 4 else 1.0) for dtype, factor in FACTORS.items()}
    function = in_parts(case["parts"], case["dim"], backend)
    assert_parity(function, GATHER.definition, (*tensors, scale), factors=factors)


@pytest.mark.parametrize("dtypes", [(torch.float64,) * 2, (torch.float32,) * 2, (torch.bfloat16, torch.float32)])
def test_parity_of_two_parts(target: TARGET, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    backend, device = target
    tensors = inputs(dtype=dtypes[0], logits_dtype=dtypes[1], device=device, requires_grad=True)
    assert_parity(in_parts(2, 2, backend), GATHER.definition, tensors)


@on_cpu
@pytest.mark.parametrize("count", [2, 64])
def test_float64_to_rounding(target: TARGET, count: int) -> None:
    backend, device = target
    tensors = exact_inputs(spatial=(70, 2), device=device)
    for scale in (1.0, 30.0):
        assert_same(
            derivatives(lambda *x, scale=scale: in_parts(count, 2, backend)(*x, scale), *tensors),
            derivatives(lambda *x, scale=scale: GATHER.definition(*x, scale), *tensors),
        )


@on_cpu
@pytest.mark.parametrize("shift", [1000.0, -1000.0])
def test_float32_logits_far_from_zero(target: TARGET, shift: float) -> None:
    """What a part weighs is no float32 logarithm, and what has no weight is no logarithm of 0."""
    backend, device = target
    feats, logits = inputs(spatial=(70, 2), device=device)
    logits = logits + shift
    logits[:, 1, :20] = -math.inf
    ours = derivatives(in_parts(7, 2, backend), feats, logits)
    plain = derivatives(GATHER.definition, feats, logits)
    exact = derivatives(GATHER.definition, feats.double(), logits.double())
    for name, *results in zip(("output", "gradient of feats", "gradient of logits"), ours, plain, exact, strict=True):
        failures = [str(each) for each in judge(name, results[0], [(*results[1:], 1.0)], factor=4.0) if not each.passed]
        assert not failures


@on_cpu
@pytest.mark.parametrize("value", [-1e20, 1e20, torch.finfo(torch.float32).min])
def test_a_region_that_a_finite_number_masks(target: TARGET, value: float) -> None:
    """All of its pixels count alike, also in parts of several sizes: a logarithm beside such a number tells nothing."""
    backend, _ = target
    feats, logits = exact_inputs(spatial=(9, 4))
    logits = logits.detach().index_fill(1, torch.tensor([1]), value).requires_grad_()

    def uneven(feats: Tensor, logits: Tensor) -> Tensor:
        parts = [(feats[:, :, rows], logits[:, :, rows]) for rows in (slice(0, 1), slice(1, 9))]
        return state_of(parts, backend=backend).result()

    assert_same(derivatives(uneven, feats, logits), derivatives(GATHER.definition, feats, logits))
    with torch.no_grad():
        state = state_of([(feats[:, :, :1], logits[:, :, :1])], backend=backend)
        state.fade(0.25)
        state.update(feats[:, :, 1:3], logits[:, :, 1:3])
    expected = (0.25 * feats[:, :, :1].mean((2, 3)) + 2 * feats[:, :, 1:3].mean((2, 3))) / 2.25
    assert_same(state.result()[..., 1], expected)


@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan], ids=str)
def test_a_part_in_which_a_region_is_not_finite(target: TARGET, value: float) -> None:
    backend, device = target
    feats, logits = exact_inputs(batch=1, spatial=(4, 1), device=device)
    logits = logits.detach().clone()
    logits[0, 1, :2] = value
    expected = derivatives(GATHER.definition, feats, logits)
    parts = [slice(0, 2), slice(2, 4)]
    assert_same(
        derivatives(
            lambda x, m: state_of(((x[:, :, rows], m[:, :, rows]) for rows in parts), backend=backend).result(),
            feats,
            logits,
        ),
        expected,
    )


@on_cpu
@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan], ids=str)
@pytest.mark.parametrize("where", ["pixel", "part", "parts", "everywhere"])
def test_values_that_are_not_finite(target: TARGET, value: float, where: str) -> None:
    """Those of one region give what the softmax gives, and leave the values of the others alone."""
    backend, device = target
    feats, logits = exact_inputs(device=device)
    pixels = {"pixel": slice(4, 5), "part": slice(0, 3), "parts": slice(3, 9), "everywhere": slice(None)}[where]
    logits = logits.detach().clone()
    logits[0, 1, pixels] = value
    parts = [slice(0, 3), slice(3, 4), slice(4, 9)]

    def gather(feats: Tensor, logits: Tensor) -> Tensor:
        return state_of(((feats[:, :, rows], logits[:, :, rows]) for rows in parts), backend=backend).result()

    expected = derivatives(GATHER.definition, feats, logits)
    assert_same(derivatives(gather, feats, logits), expected)
    assert expected[0][0, :, 1].isnan().all() == (value != -math.inf or where == "everywhere")


def test_logits_around_a_region_that_is_absent() -> None:
    """Its weight, 0, has no logarithm: none stands in for it that outweighs logits of -2000."""
    feats, logits = exact_inputs()
    logits = logits.detach() - 2000
    logits[:, 0, :4] = -math.inf
    parts = [(feats[:, :, rows], logits[:, :, rows]) for rows in (slice(0, 2), slice(0, 0), slice(2, 4), slice(4, 9))]
    assert_same(state_of(parts).result(), GATHER.definition(feats, logits))


def test_no_pixels() -> None:
    feats, logits = exact_inputs()
    for empty in ((feats[:, :, :0], logits[:, :, :0]), (feats[:0], logits[:0])):
        state = state_of([empty, empty])
        assert torch.equal(state.result(), spatial_gather(*empty))
        assert torch.equal(state.share(*empty), spatial_gather(*empty))
        state.result().detach().add_(1)  # is nobody else's
        assert torch.equal(state.result(), spatial_gather(*empty))


def test_many_spatial_dimensions() -> None:
    feats, logits = exact_inputs(spatial=(4, 3, 2))
    assert_same(in_parts(3, 4)(feats, logits), GATHER.definition(feats, logits))
    feats, logits = (tensor.flatten(2) for tensor in (feats, logits))
    assert_same(in_parts(7)(feats, logits), GATHER.definition(feats, logits))


def test_parts_may_differ_in_their_spatial_sizes() -> None:
    feats, logits = exact_inputs()
    state = GatherState()
    state.update(feats[:, :, :4], logits[:, :, :4])
    state.update(feats[:, :, 4:].flatten(2), logits[:, :, 4:].flatten(2))
    assert_same(state.result(), GATHER.definition(feats, logits))


def test_same_parts_same_bits(target: TARGET) -> None:
    backend, device = target
    tensors = inputs(device=device)
    first, second = (derivatives(in_parts(3, 2, backend), *tensors) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_the_result_has_the_dtype_of_the_feats_and_is_contiguous(target: TARGET) -> None:
    backend, device = target
    for dtype in DTYPES:
        result = in_parts(2, 2, backend)(*inputs(dtype=dtype, logits_dtype=torch.float32, device=device))
        assert result.dtype == dtype
        assert result.is_contiguous()


# Derivatives


def with_absent(logits: Tensor) -> Tensor:
    """A region that is absent of the first parts, a pixel that has no weight in another."""
    mask = torch.zeros_like(logits, dtype=torch.bool)
    mask[:, 0, :3], mask[:, 1, 4] = True, True
    return logits.masked_fill(mask, -math.inf)


@on_cpu
@pytest.mark.parametrize("absent", [False, True])
def test_gradcheck(target: TARGET, absent: bool) -> None:
    backend, device = target
    tensors = exact_inputs(batch=1, channels=2, regions=2, spatial=(5, 1), device=device)

    def gather(feats: Tensor, logits: Tensor) -> Tensor:
        return in_parts(3, 2, backend)(feats, with_absent(logits) if absent else logits)

    gradcheck(gather, tensors)
    gradgradcheck(gather, tensors, fast=True)


def test_third_derivative() -> None:
    feats, logits = exact_inputs()

    def third(function: Callable[..., Tensor]) -> Tensor:
        result = function(feats, logits).square().sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(result, logits, create_graph=True)
            result = gradient.square().sum()
        return result

    assert_same(third(in_parts(3)), third(GATHER.definition))


@pytest.mark.parametrize("wanted", [0, 1])
def test_one_gradient(target: TARGET, wanted: int) -> None:
    backend, device = target
    tensors = inputs(device=device)
    expected = derivatives(in_parts(3, 2, backend), *tensors)[1 + wanted]
    tensors[wanted].requires_grad_()
    out = in_parts(3, 2, backend)(*tensors)
    (out.square().sum() + out.sum()).backward()
    assert torch.equal(tensors[wanted].grad, expected)
    assert tensors[1 - wanted].grad is None


def test_a_scale_is_trained() -> None:
    scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
    tensors = exact_inputs()
    assert_same(derivatives(in_parts(3), *tensors, scale), derivatives(GATHER.definition, *tensors, scale))


def test_a_scale_that_changes_between_parts_is_noticed() -> None:
    """By autograd, as a weight that changes before its backward pass is."""
    scale = nn.Parameter(torch.tensor(2.0))
    feats, logits = inputs(requires_grad=True)
    state = state_of([(feats, logits)], scale)
    with torch.no_grad():
        scale.mul_(2)
    state.update(feats, logits)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        state.result().sum().backward()


def test_parts_without_gradients_are_constants() -> None:
    feats, logits = exact_inputs()
    with torch.no_grad():
        state = state_of([(feats[:, :, :4], logits[:, :, :4])])
    state.update(feats[:, :, 4:], logits[:, :, 4:])
    gradient = torch.autograd.grad(state.result().square().sum(), feats)[0]
    expected = torch.autograd.grad(GATHER.definition(feats, logits).square().sum(), feats)[0]
    assert not gradient[:, :, :4].any()
    assert_same(gradient[:, :, 4:], expected[:, :, 4:])


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_saved_for_backward(target: TARGET, dtype: torch.dtype) -> None:
    """Of a part its own feats and logits, and beside them numbers for its regions alone, however many its pixels."""
    backend, device = target

    def kept(pixels: int, count: int) -> int:
        tensors = inputs(spatial=(pixels, 2), dtype=dtype, device=device, requires_grad=True)
        return saved_bytes(in_parts(count, 2, backend), *tensors, exclude=tensors)

    assert kept(64, 1) == kept(8, 1)
    assert kept(64, 6) == kept(8, 6)
    of_regions = 2 * 3 * 4 * 8  # [B, C, K], float64
    assert kept(8, 6) - kept(8, 5) <= 4 * of_regions
    with torch.no_grad():
        assert kept(8, 6) == 0


# Merge, share, fade


def test_a_group_of_something_else_is_named() -> None:
    state = GatherState()
    state.update(torch.randn(1, 3, 4, 5), torch.randn(1, 2, 4, 5))
    with pytest.raises(TypeError, match="group must be a process group or None, but is str"):
        state.all_reduce("all")


def sums_of(state: GatherState) -> Part:
    """What a state will answer: its result, and what one more part does to that."""
    after = copy.deepcopy(state)
    after.update(*(tensor[:, :, :1].detach() for tensor in inputs(dtype=state.result().dtype)))
    return state.result(), after.result()


def test_merge_in_any_grouping() -> None:
    feats, logits = exact_inputs(spatial=(30, 2))
    feats, logits = feats.detach(), with_absent(logits).detach()
    a, b, c, d = (state_of([part]) for part in cut(feats, logits, 4))
    merge = GatherState.merge
    expected = sums_of(state_of([(feats, logits)]))
    for merged in (
        merge(a, b, c, d),
        merge(merge(a, b), merge(c, d)),
        merge(a, merge(b, merge(c, d))),
        merge(d, b, c, a),
    ):
        assert_same(sums_of(merged), expected)
    assert_same(merge(a).result(), a.result())


def test_merged_states_stay_as_they_are_and_are_differentiated() -> None:
    feats, logits = exact_inputs()

    def merged(feats: Tensor, logits: Tensor) -> Tensor:
        states = [state_of([part]) for part in cut(feats, logits, 3)]
        before = [state.result() for state in states]
        result = GatherState.merge(*states)
        result.update(feats[:, :, :2], logits[:, :, :2])
        assert all(torch.equal(a, b.result()) or a.isnan().any() for a, b in zip(before, states, strict=True))
        return result.result()

    def expected(feats: Tensor, logits: Tensor) -> Tensor:
        return GATHER.definition(*(torch.cat((x, x[:, :, :2]), 2) for x in (feats, logits)))

    assert_same(derivatives(merged, feats, logits), derivatives(expected, feats, logits))


def test_merge_keeps_scale_and_backend() -> None:
    states = [GatherState(2.0, backend="reference") for _ in range(2)]
    for state in states:
        state.update(*inputs())
    merged = GatherState.merge(*states)
    assert (merged.scale, merged.backend) == (2.0, "reference")


@pytest.mark.parametrize(
    ("scales", "differ"),
    [
        ((2.0, torch.tensor(1.0)), True),
        ((torch.tensor(1.0), torch.tensor(2.0)), True),
        ((torch.tensor(1.0), nn.Parameter(torch.tensor([2.0]))), True),
        ((1.0, torch.tensor(1.0), 2), True),
        ((0.7, torch.tensor(0.7), nn.Parameter(torch.tensor([0.7], dtype=torch.float64))), False),
        ((nn.Parameter(torch.tensor(2.0)), 2), False),
    ],
)
def test_merged_states_have_one_scale(scales: tuple[float | Tensor, ...], differ: bool) -> None:
    """Numbers and tensors alike, by their values."""
    states = [state_of([inputs()], scale) for scale in scales]
    if not differ:
        assert GatherState.merge(*states).scale is scales[0]
        return
    with pytest.raises(ValueError, match=r"one scale, but have \[1.0, 2.0\]"):
        GatherState.merge(*states)


def test_scales_whose_values_nobody_knows_yet_are_merged() -> None:
    feats, logits = (tensor.detach() for tensor in exact_inputs())
    scale = torch.tensor(0.7, dtype=torch.float64)

    def merged(feats: Tensor, scale: Tensor) -> Tensor:
        return GatherState.merge(*(state_of([(feats, logits)], each) for each in (scale, scale.clone()))).result()

    expected = GATHER.definition(feats, logits, scale)
    assert_same(torch.vmap(merged)(feats[None], scale[None])[0], expected)
    assert_same(torch.func.vjp(merged, feats, scale)[0], expected)
    assert_same(torch.compile(merged, fullgraph=True, backend="aot_eager")(feats, scale), expected)
    with FakeTensorMode() as mode:
        feats, logits, scale = (mode.from_tensor(tensor) for tensor in (feats, logits, scale))
        assert merged(feats, scale).shape == expected.shape


def test_shares_add_up(target: TARGET) -> None:
    backend, device = target
    feats, logits = exact_inputs(device=device)
    logits = with_absent(logits).detach()
    parts = list(cut(feats.detach(), logits, 4))
    state = state_of(parts, 0.7, backend)
    shares = [state.share(*part) for part in parts]
    assert_same(sum(shares), GATHER.definition(feats, logits, 0.7))


@pytest.mark.parametrize(("absent", "inference"), [(False, False), (True, True)])
def test_training_one_part_at_a_time(target: TARGET, absent: bool, inference: bool) -> None:
    """A convolution whose pixels the regions are gathered from, and a loss of each tile that depends on f."""
    backend, device = target
    torch.manual_seed(0)
    network = nn.Conv2d(2, 3 + 4, 1).double().to(device)
    scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64, device=device))
    images = [torch.randn(2, 2, 3, width, dtype=torch.float64, device=device) for width in (4, 1, 6)]

    def pixels(image: Tensor) -> Part:
        feats, logits = network(image).split((3, 4), 1)
        if absent and image is images[0]:
            logits = logits.index_fill(1, torch.tensor([1], device=device), -math.inf)
        return feats, logits

    def loss(image: Tensor, f: Tensor) -> Tensor:
        return (torch.einsum("bchw,bck->bkhw", network(image)[:, :3], f.tanh()) - 1).square().sum()

    leaves = (*network.parameters(), scale)
    feats, logits = (torch.cat(each, -1) for each in zip(*map(pixels, images), strict=True))
    f = GATHER.definition(feats, logits, scale)
    expected = torch.autograd.grad(sum(loss(image, f) for image in images), leaves)

    with torch.inference_mode() if inference else torch.no_grad():
        state = state_of(map(pixels, images), scale, backend)
    f = state.result().requires_grad_()
    for image in images:
        loss(image, f).backward()
    for image in images:
        state.share(*pixels(image)).backward(f.grad)
    assert_same([leaf.grad for leaf in leaves], list(expected))


@on_cpu
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.float16,) * 2])
def test_parity_of_shares(target: TARGET, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """The gradient of a share is that of f, however the state came to be."""
    backend, device = target
    tensors = inputs(spatial=(30, 2), dtype=dtypes[0], logits_dtype=dtypes[1], device=device, requires_grad=True)
    state = state_of(cut(*(tensor.detach() for tensor in tensors), 7), backend=backend)

    def shares(feats: Tensor, logits: Tensor) -> Tensor:
        return sum(state.share(*part).double() for part in cut(feats, logits, 7)).to(feats.dtype)

    assert_parity(shares, GATHER.definition, tensors, grad_output=torch.randn(2, 3, 4, device=device).to(dtypes[0]))


def test_fade_weighs() -> None:
    feats, logits = exact_inputs()
    weights = torch.tensor([0.125, 0.125, 0.25, 0.25, 0.25, 1, 1, 1, 1], dtype=torch.float64)

    def fading(feats: Tensor, logits: Tensor) -> Tensor:
        state = GatherState()
        for rows, factor in ((slice(0, 2), 0.5), (slice(2, 5), 0.25), (slice(5, 9), 1)):
            state.update(feats[:, :, rows], logits[:, :, rows])
            state.fade(factor)
        return state.result()

    def weighted(feats: Tensor, logits: Tensor) -> Tensor:
        return GATHER.definition(feats, logits + weights.log()[:, None])

    assert_same(derivatives(fading, feats, logits), derivatives(weighted, feats, logits))


def test_fading_is_exact() -> None:
    """By one factor nothing changes, however small it is; and a part that comes after it counts as much more."""
    first, second = (inputs(dtype=torch.float64) for _ in range(2))
    for factor in (0.9, 1e-46, 1e39, Fraction(1, 3)):
        state = state_of([first])
        before = state.result()
        state.fade(factor)
        torch.testing.assert_close(state.result(), before, rtol=1e-15, atol=0)
    state = state_of([first])
    for _ in range(1000):
        state.fade(0.999)
    state.update(*second)
    feats, logits = (torch.cat([a.flatten(2), b.flatten(2)], 2) for a, b in zip(first, second, strict=True))
    logits = logits + torch.tensor([1000 * math.log(0.999), 0.0]).double().repeat_interleave(first[0][0, 0].numel())
    torch.testing.assert_close(state.result(), GATHER.definition(feats, logits), rtol=1e-11, atol=1e-12)


def test_a_long_stream_fades_without_end() -> None:
    """Weights of 1e-30 ** 20 are no numbers of float64; a region that was seen last then is remembered."""
    feats, logits = (tensor.detach() for tensor in exact_inputs())
    state = state_of([(feats, logits)])
    absent = logits.index_fill(1, torch.tensor([2]), -math.inf)
    for _ in range(20):
        state.fade(1e-30)
        state.update(feats + 1, absent)
    old, new = GATHER.definition(feats, logits), GATHER.definition(feats + 1, logits)
    assert_same(state.result(), torch.cat((new[:, :, :2], old[:, :, 2:3], new[:, :, 3:]), 2))


# Errors

FEATS, LOGITS = torch.randn(2, 3, 5), torch.randn(2, 4, 5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: s.update(None, LOGITS), TypeError, "feats must be a tensor, but is NoneType"),
        (lambda s: s.update(FEATS, [1]), TypeError, "logits must be a tensor, but is list"),
        (lambda s: s.update(FEATS, LOGITS.long()), TypeError, "logits must be float64, .* but is torch.int64"),
        (
            lambda s: s.update(FEATS.int(), LOGITS),
            TypeError,
            "feats must be float64, float32, bfloat16 or float16, but is torch.int32",
        ),
        (lambda s: s.update(FEATS.double(), LOGITS), TypeError, "parts before, torch.float32, but has torch.float64"),
        (lambda s: s.update(FEATS[0], LOGITS), ValueError, r"feats must have shape \[B, C, \*S\] with C >= 1, but has"),
        (lambda s: s.update(FEATS, LOGITS[0]), ValueError, r"logits must have shape .* beside feats"),
        (lambda s: s.update(FEATS, LOGITS[..., 1:]), ValueError, r"logits must have shape .* but has \(2, 4, 4\)"),
        (lambda s: s.update(FEATS, LOGITS[:1]), ValueError, r"logits must have shape .* but has \(1, 4, 5\)"),
        (lambda s: s.update(FEATS[:, 1:], LOGITS), ValueError, r"B, C, K \(2, 3, 4\) as the .* but have \(2, 2, 4\)"),
        (lambda s: s.update(FEATS, LOGITS[:, 1:]), ValueError, r"B, C, K \(2, 3, 4\) as the .* but have \(2, 3, 3\)"),
        (lambda s: s.update(FEATS[:1], LOGITS[:1]), ValueError, r"B, C, K \(2, 3, 4\) as .* but have \(1, 3, 4\)"),
        (
            lambda s: s.update(FEATS.to("meta"), LOGITS.to("meta")),
            ValueError,
            "device of the parts before, cpu, but is",
        ),
        (
            lambda s: s.update(FEATS, LOGITS.to("meta")),
            ValueError,
            "logits must be on the device of feats, cpu, but is",
        ),
        (lambda s: s.share(FEATS[:1], LOGITS[:1]), ValueError, r"B, C, K \(2, 3, 4\) as the .* but have \(1, 3, 4\)"),
        (lambda s: s.share(FEATS.half(), LOGITS), TypeError, "parts before, torch.float32, but has torch.float16"),
        (lambda s: s.fade(0), ValueError, "factor must be positive and finite, but is 0"),
        (lambda s: s.fade(math.inf), ValueError, "factor must be positive and finite, but is inf"),
        (lambda s: s.fade(10**400), ValueError, "factor must be positive and finite, but is 1000"),
        (lambda s: s.fade(math.nan), ValueError, "factor must be positive and finite, but is nan"),
        (lambda s: s.fade("1"), TypeError, "factor must be a number, but is str"),
        (lambda s: s.fade(torch.ones(())), TypeError, "factor must be a number, but is Tensor"),
        (lambda s: GatherState.merge(s, None), TypeError, "states must be GatherStates, but one is NoneType"),
        (lambda s: GatherState.merge([s]), TypeError, "states must be GatherStates, but one is list"),
        (lambda s: GatherState.merge(s, GatherState()), RuntimeError, "no result before its first part"),
        (
            lambda s: GatherState.merge(s, state_of([(FEATS[:1], LOGITS[:1])])),
            ValueError,
            r"\(2, 3, 4\) .* \(1, 3, 4\)",
        ),
        (lambda s: GatherState.merge(s, state_of([(FEATS.double(), LOGITS)])), TypeError, "states must have the dtype"),
        (
            lambda s: GatherState.merge(s, state_of([(FEATS, LOGITS)], 2)),
            ValueError,
            r"one scale, but have \[1.0, 2.0\]",
        ),
    ],
)
def test_what_is_wrong_is_named_and_changes_nothing(
    call: Callable[[GatherState], object], error: type[Exception], message: str
) -> None:
    state = state_of([(FEATS, LOGITS)])
    before = sums_of(state)
    with pytest.raises(error, match=message):
        call(state)
    assert all(map(torch.equal, sums_of(state), before))


@pytest.mark.parametrize(
    ("options", "part", "error", "message"),
    [
        ({}, (FEATS.int(), LOGITS), TypeError, "feats must be float64, .* but is torch.int32"),
        ({}, (FEATS[:, :0], LOGITS), ValueError, "feats must have shape .* with C >= 1"),
        ({}, (FEATS, LOGITS[:, :0]), ValueError, "logits must have shape .* with K >= 1"),
        (
            {"scale": torch.tensor(2.0)},
            (FEATS, LOGITS.long()),
            TypeError,
            "logits must be float64, .* but is torch.int64",
        ),
        ({"scale": "1"}, (FEATS, LOGITS), TypeError, "scale must be a number or a tensor"),
        ({"scale": torch.ones(2)}, (FEATS, LOGITS), TypeError, "scale must be a number or a floating tensor"),
        ({"backend": "fast"}, (FEATS, LOGITS), ValueError, "backend must be one of reference, triton, native"),
    ],
)
def test_what_is_wrong_with_a_first_part(
    options: dict[str, Any], part: Part, error: type[Exception], message: str
) -> None:
    state = GatherState(**options)
    with pytest.raises(error, match=message):
        state.update(*part)
    with pytest.raises(RuntimeError, match="no result before its first part"):
        state.result()


def test_before_the_first_part() -> None:
    for call in (lambda s: s.result(), lambda s: s.share(FEATS, LOGITS), lambda s: s.fade(0.5)):
        with pytest.raises(RuntimeError, match="no result before its first part: call update"):
            call(GatherState())
    with pytest.raises(ValueError, match="states must be one or more, but there is none"):
        GatherState.merge()


def test_meta_tensors() -> None:
    result = in_parts(2)(*(tensor.to("meta") for tensor in inputs()))
    assert result.is_meta
    assert result.shape == (2, 3, 4)


# PyTorch's modes and transforms


def test_autocast(target: TARGET) -> None:
    backend, device = target
    feats, logits = inputs(device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = in_parts(3, 2, backend)(feats, logits)
        assert_parity(
            lambda feats, logits: in_parts(3, 2, backend)(feats, logits),
            lambda feats, logits: GATHER.definition(feats.bfloat16(), logits),
            (feats, logits),
            oracle=GATHER.definition,
            factors=dict.fromkeys(FACTORS, 1.25),
        )
    assert out.dtype == torch.bfloat16
    gradients = torch.autograd.grad(out.sum(), (feats, logits))
    assert [gradient.dtype for gradient in gradients] == [torch.float32, torch.float32]


def test_autocast_for_some_parts_alone() -> None:
    state = state_of([(FEATS, LOGITS)])
    before = state.result()
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(TypeError, match=r"parts before, torch\.float32"),
    ):
        state.update(FEATS, LOGITS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(state.result(), before)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(compiler: str) -> None:
    def function(feats: Tensor, logits: Tensor) -> Tensor:
        states = [GatherState(), GatherState()]
        for (x, m), state in zip(cut(feats, with_absent(logits), 3), (*states, states[0]), strict=True):
            state.update(x, m)
            state.fade(0.5)
        merged = GatherState.merge(*states)
        return merged.result() + merged.share(feats[:, :, :2], logits[:, :, :2])

    tensors = exact_inputs()
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    assert_same(derivatives(compiled, *tensors), derivatives(function, *tensors))


def test_a_state_outlives_a_compiled_function() -> None:
    feats, logits = (tensor.detach() for tensor in exact_inputs())

    @torch.compile(fullgraph=True, backend="aot_eager")
    def add(state: GatherState, feats: Tensor, logits: Tensor) -> None:
        state.update(feats, logits)

    state = GatherState()
    for part in cut(feats, logits, 3):
        add(state, *part)
    assert_same(state.result(), GATHER.definition(feats, logits))


def test_vmap(target: TARGET) -> None:
    backend, device = target
    feats, logits = (tensor.detach() for tensor in exact_inputs(batch=3, device=device))
    stacked = feats.unflatten(0, (3, 1)), logits.unflatten(0, (3, 1))
    result = torch.vmap(in_parts(3, 2, backend))(*stacked)
    assert_same(result.flatten(0, 1), GATHER.definition(feats, logits))
    result = torch.vmap(in_parts(3, 2, backend), (None, 0))(feats[:1], stacked[1])
    assert_same(result.flatten(0, 1), GATHER.definition(feats[:1].expand_as(feats), logits))


@on_cpu
def test_transforms(target: TARGET) -> None:
    backend, device = target
    tensors = tuple(tensor.detach() for tensor in exact_inputs(batch=1, channels=2, spatial=(6, 1), device=device))

    def loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda feats, logits: function(feats, with_absent(logits)).square().sum()

    ours, expected = loss(in_parts(3, 2, backend)), loss(GATHER.definition)
    assert_same(torch.func.grad(ours, (0, 1))(*tensors), torch.func.grad(expected, (0, 1))(*tensors))
    per_sample = [
        torch.vmap(torch.func.grad(f, (0, 1)))(*(x.expand(2, *x.shape) for x in tensors)) for f in (ours, expected)
    ]
    assert_same(*per_sample)
    hessians = [torch.func.jacrev(torch.func.grad(f, 1), 1)(*tensors) for f in (ours, expected)]
    assert_same(*hessians)


@on_cpu
def test_copies_are_independent(target: TARGET) -> None:
    backend, device = target
    feats, logits = inputs(device=device)
    state = state_of(cut(feats, logits, 3), 0.7, backend)
    before = state.result()
    for duplicate in (copy.deepcopy(state), pickle.loads(pickle.dumps(state)), copy.copy(state)):
        assert torch.equal(duplicate.result(), before)
        duplicate.update(feats + 1, logits)
        duplicate.fade(0.5)
        assert torch.equal(state.result(), before)
        assert not torch.equal(duplicate.result(), before)


@on_cpu
def test_inference_mode(target: TARGET) -> None:
    backend, device = target
    tensors = exact_inputs(device=device)
    parts = list(cut(*tensors, 3))
    with torch.inference_mode():
        state = state_of(parts[:2], backend=backend)
        assert state.result().is_inference()
    state.update(*parts[2])
    result = state.result()
    assert_same(result, GATHER.definition(*tensors))
    assert torch.autograd.grad(result.sum(), tensors[0])[0].any()
