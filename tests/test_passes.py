"""What the block does between its products: the compiled passes beside those in plain PyTorch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from ops import DTYPES, native_on, over, pairwise
from torch import Tensor

from ocr_kernels.block.passes import Passes
from ocr_kernels.testing import poisoned_memory

pytestmark = native_on("cpu")

CASES: dict[str, Any] = {
    "channels": (1, 2, 5, 16, 17, 64, 70, 257),
    "pixels": (1, 3, 16, 33, 64, 129, 1100, 2500),
    "dtype": DTYPES,
    "channels_last": (False, True),
    "slope": (0.0, 0.1, 1.0),
    "other": ("same", "exact"),  # the dtype of the other map
    "gap": (0, 3),  # in memory, between neighbours in the longer dimension
}
PLAIN = {"dtype": torch.float32, "channels_last": False, "slope": 0.1, "other": "same", "gap": 0}


class Case:
    """Tiles of random numbers, for both kinds of passes."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.channels, self.pixels, self.dtype = case["channels"], case["pixels"], case["dtype"]
        self.channels_last, self.slope, self.gap = case["channels_last"], case["slope"], case["gap"]
        self.exact = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.other = self.exact if case["other"] == "exact" else self.dtype
        self.generator = torch.Generator().manual_seed(self.channels * self.pixels)

    def tile(self, dtype: torch.dtype | None = None, *, empty: bool = False, scale: float = 1.0) -> Tensor:
        rows, columns = (self.pixels, self.channels) if self.channels_last else (self.channels, self.pixels)
        values = (scale * torch.randn(rows, columns + self.gap, generator=self.generator)).to(dtype or self.dtype)
        tile = (values.fill_(math.nan) if empty else values)[:, :columns]
        return tile.t() if self.channels_last else tile

    def vectors(self, count: int) -> Tensor:
        return torch.randn(count, self.channels, generator=self.generator).to(self.exact)

    def run(self, passes: Passes, name: str, inputs: Sequence[Any], out: torch.dtype | None) -> list[Tensor]:
        """What the pass filled, and what it returned beside that."""
        filled = [] if out is None else [self.tile(out, empty=True)]
        with poisoned_memory():
            returned = getattr(passes, name)(*inputs, *filled)
        return [*filled, *(each for each in [returned] if not any(each is other for other in filled))]

    def check(self, name: str, *inputs: Any, out: torch.dtype | None = None, unit: float = 0.0) -> None:
        """The results of a pass are as near to those of float64 as those of plain PyTorch are, or so many units."""
        raised = [value.double() if isinstance(value, Tensor) else value for value in inputs]
        results = [self.run(make(self), name, inputs, out) for make in (compiled, plain)]
        expected = self.run(plain(self, torch.float64), name, raised, out and torch.float64)
        for found, eager, oracle in zip(*results, expected, strict=True):
            assert (found.shape, found.dtype) == (eager.shape, eager.dtype)
            scale = oracle.abs().max() + 1e-30
            error, eager_error = (((each - oracle).abs() / scale).max().item() for each in (found, eager))
            unit = max(unit, torch.finfo(found.dtype).eps)
            allowed = 1e-13 if found.dtype == torch.float64 else max(2.5 * eager_error, 4 * unit)
            assert error <= allowed, f"{name}: {error:.2e}, plain PyTorch {eager_error:.2e}"


def plain(case: Case, dtype: torch.dtype | None = None, kind: type[Passes] = Passes) -> Passes:
    """Passes for tiles as large as the case's."""
    passes = kind(case.tile(dtype)[None])
    passes.pixels = case.pixels
    return passes


def compiled(case: Case) -> Passes:
    from ocr_kernels.block.native import Compiled

    return plain(case, kind=Compiled)


@over(thinned=[pairwise(**CASES)], wide=[])
class TestEachPass:
    def test_activate(self, case: dict[str, Any]) -> None:
        c = Case(case)
        c.check("activate", c.tile(), c.vectors(3), c.slope, out=c.other)

    def test_moments(self, case: dict[str, Any]) -> None:
        c = Case(case)
        c.check("moments", c.tile().add_(3))

    def test_gradient(self, case: dict[str, Any]) -> None:
        c = Case(case)
        h, vectors = c.tile(), c.vectors(4)
        c.check("gradient", c.tile(c.other), h, vectors, c.slope)
        for out in {c.dtype, c.other}:
            c.check("gradient", c.tile(c.other), h, vectors, c.slope, out=out)

    def test_through(self, case: dict[str, Any]) -> None:
        c = Case(case)
        h, grad, vectors = c.tile(), c.tile(c.other), c.vectors(7)
        for out in {c.dtype, c.other}:
            c.check("through", grad, h, vectors, c.slope, out=out)

    def test_softmax(self, case: dict[str, Any]) -> None:
        c = Case(case)
        c.check("softmax", c.tile(c.exact, scale=5.0), out=c.dtype, unit=2 * torch.finfo(c.exact).eps)

    def test_softmax_backward(self, case: dict[str, Any]) -> None:
        c = Case(case)
        weights = c.tile()
        weights.copy_(torch.softmax(c.tile(torch.float64, scale=3.0), 0))
        matrix = torch.randn(c.channels, c.channels + 1, generator=c.generator).to(c.exact) / c.channels
        unit = torch.finfo(c.dtype).eps  # rounded weights do not add up to 1
        c.check("softmax_backward", weights, c.tile(c.other), matrix, 0.3, out=c.other, unit=unit)


@pytest.mark.parametrize("small", [0, 2**40])
@pytest.mark.parametrize("pixels", [1, 33, 300])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_products(
    monkeypatch: pytest.MonkeyPatch, small: int, pixels: int, channels_last: bool, gap: int, dtype: torch.dtype
) -> None:
    """By oneDNN where that is faster, which it is not for few numbers."""
    from ocr_kernels.block import native

    monkeypatch.setattr(native, "SMALL", small)
    case = Case({**PLAIN, "channels": 17, "pixels": pixels, "channels_last": channels_last, "gap": gap, "dtype": dtype})
    matrix, bias = case.vectors(17).to(dtype), case.vectors(1)[0]
    case.check("product", "name", matrix, case.tile())
    case.check("multiply", matrix, case.tile(), out=dtype)
    case.check("outer", case.tile(), case.tile())
    for slope in (0.0, 0.1, 1.0):
        case.check("layer", "name", matrix, bias, case.tile(), slope)
        case.check("layer_into", case.tile(empty=True), matrix, bias, case.tile(), slope)


def test_gradients_about_a_mean_that_is_large() -> None:
    """What is taken from each pixel alike would add up over pixels if it were rounded."""
    c = Case(PLAIN | {"channels": 3, "pixels": 70})
    h, grad = c.tile().add_(1e4), c.tile()
    vectors = torch.tensor([1.0, 0.0, 1.0, 0.5, 1 / 3, 0.1, 1e4])[:, None].expand(7, 3).contiguous()
    expected = 0.5 * grad.double() + vectors[4, 0].double() * (h.double() - 1e4) + vectors[5, 0].double()
    for make in (compiled, plain):
        out = c.tile()
        make(c).through(grad, h, vectors, 1.0, out)
        torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)


def test_in_place() -> None:
    c = Case(PLAIN | {"channels": 17, "pixels": 70})
    h, grad, vectors = c.tile(), c.tile(), c.vectors(4)
    apart, together = torch.empty_like(grad), grad.clone()
    sums = compiled(c).gradient(grad, h, vectors, 0.1, apart)
    assert torch.equal(sums, compiled(c).gradient(together, h, vectors, 0.1, together))
    assert torch.equal(apart, together)


@pytest.mark.parametrize("slope", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("channels_last", [False, True])
def test_what_is_not_finite(slope: float, channels_last: bool) -> None:
    c = Case(PLAIN | {"channels": 3, "pixels": 6, "channels_last": channels_last})
    h = c.tile()
    h.copy_(torch.tensor([math.inf, -math.inf, math.nan, -0.0, 2.0, -2.0]))
    vectors = torch.tensor([[1.0], [0.0], [1.0]]).expand(3, 3).contiguous()
    results = [make(c).activate(h, vectors, slope, c.tile()) for make in (compiled, plain)]
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)
    vectors = torch.cat((vectors, torch.zeros(1, 3)))
    grads = [c.tile() for _ in range(2)]
    for make, out in zip((compiled, plain), grads, strict=True):
        make(c).gradient(torch.full_like(h, 3.0), h, vectors, slope, out)
    torch.testing.assert_close(*grads, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_number_of_threads_changes_no_bit(dtype: torch.dtype, channels_last: bool) -> None:
    case = PLAIN | {"channels": 150, "pixels": 1300, "dtype": dtype, "channels_last": channels_last}
    results = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        c = Case(case)
        passes, h, grad = compiled(c), c.tile(), c.tile()
        outs = [c.tile(empty=True) for _ in range(3)]
        passes.through(grad, h, c.vectors(7), 0.0, outs[0])
        passes.softmax(h, outs[1])
        passes.softmax_backward(outs[1], grad, torch.zeros(150, 151, dtype=c.exact), 1.0, outs[2])
        results.append([*outs, passes.moments(h), passes.gradient(grad, h, c.vectors(4), 0.0)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def tiles(**change: Any) -> dict[str, Any]:
    h = torch.randn(4, 6)
    return {"out": torch.full_like(h, 7.0), "h": h, "vectors": torch.randn(3, 4), "slope": 0.0} | change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": torch.full((4, 5), 7.0)}, r"out must have shape \[4, 6\], but has \[4, 5\]"),
        ({"out": torch.full((4, 6), 7.0, dtype=torch.float16)}, "out must be float32"),
        ({"out": torch.full((6, 4), 7.0).t()}, "out must have its pixels or its channels side by side"),
        ({"out": torch.full((4, 12), 7.0)[:, ::2]}, "out must have its pixels or its channels side by side"),
        ({"h": torch.randn(2, 4, 6)}, r"h must be \[channels, pixels\]"),
        ({"h": torch.ones(4, 6, dtype=torch.int32)}, "h must be float64, float32"),
        ({"vectors": torch.randn(2, 4)}, r"vectors must have shape \[3, 4\]"),
        ({"vectors": torch.randn(3, 4).double()}, "vectors must be float32"),
        ({"vectors": torch.randn(4, 3).t()}, "vectors must be contiguous"),
    ],
)
def test_bad_arguments_change_nothing(change: dict[str, Any], message: str) -> None:
    arguments = tiles(**change)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ocr_kernels_native.block_activate(*arguments.values())
    assert (arguments["out"] == 7).all()


@pytest.mark.parametrize(("channels", "pixels"), list(itertools.product((1, 4), repeat=2)))
def test_one_channel_or_pixel_is_of_either_format(channels: int, pixels: int) -> None:
    rows = torch.randn(channels, pixels)
    columns = rows.t().contiguous().t()
    expected = rows.clamp(min=-1) + 1  # of ReLU(1 * h + 1)
    for h, like in itertools.product((rows, columns), repeat=2):
        out = torch.empty_strided(like.shape, like.stride())
        arguments = out, h, torch.ones(3, channels), 0.0
        if min(channels, pixels) > 1 and h is not like:
            with pytest.raises(RuntimeError, match="out must have its pixels or its channels side by side"):
                torch.ops.ocr_kernels_native.block_activate(*arguments)
        else:
            torch.ops.ocr_kernels_native.block_activate(*arguments)
            torch.testing.assert_close(out, expected)
