"""Values and gradients of both ops, on every backend, within the error budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops import ATTENTION, DTYPES, GATHER, Op, all_dtypes, both_ops, native_on, over, pairwise, product

from ocr_kernels.testing import FACTORS, LAYOUTS, Layout, lay_out, measure_parity, poisoned_memory


@pytest.fixture(autouse=True)
def poison():
    with poisoned_memory():
        yield


# Just below, at and above the tiles of pixels (16 to 128), channels (16 to 128) and regions (16 to 256), primes, and 1.
CHANNELS = (1, 16, 17, 33, 65, 129)
PEAKS = (0, 8, 20, 1e4)
SIZES_AND_OPTIONS = {
    "dtype": DTYPES,
    "layout": LAYOUTS,
    "grad_layout": LAYOUTS,
    "peak": (0, 8, 20, 1e3),  # of the scores
    "scale": (1.0, 0.0, 0.3, 8.0, -1.5),
    "batch": (1, 2),
    "channels": CHANNELS,
    "regions": (1, 2, 7, 16, 19, 33, 65, 129, 171),
    "spatial": ((1,), (16,), (31,), (5, 13), (127,), (3, 43), (2, 3, 2, 3)),
}
MANY_REGIONS = {
    "dtype": DTYPES,
    "layout": ("contiguous", "channels_last", "strided"),
    "peak": (0, 20),
    "batch": (1, 2),
    "channels": (17, 33),
    "regions": (257, 400),
    "spatial": ((1,), (33,)),
}
MOST_REGIONS = {"batch": (1,), "channels": (17,), "regions": (1203,), "spatial": ((33,),)}
MOST_REGIONS |= {"dtype": (torch.float32, torch.bfloat16)}
ONE_CHANNEL = {"channels": (1, 2), "regions": (7, 70), "dtype": DTYPES}  # no score stands out there: all would be alike
WIDE: list[dict[str, Any]] = [
    {"batch": (1,), "channels": (20,), "spatial": ((5, 8),), "dtype": DTYPES}
    | {"regions": (1, 2, 3, 7, 16, 19, 59, 150, 171, 257, 1203)},
    {"channels": (17,), "regions": (6,), "dtype": (torch.float32, torch.float16)}
    | {"spatial": [(pixels,) for pixels in (1, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 193)]},
    {"spatial": ((3, 13),), "dtype": (torch.float32, torch.float16)}
    | {"channels": (1, 2, 15, 16, 17, 31, 33, 63, 65, 127, 129, 257)},
    {"channels": (10,), "dtype": DTYPES, "layout": LAYOUTS, "regions": (5, 70)},
    {"channels": (10,), "spatial": ((6, 7),), "grad_layout": LAYOUTS},
    {"channels": (9,), "spatial": ((40,), (5, 8), (2, 4, 5), (2, 2, 2, 5)), "layout": ("contiguous", "channels_last")},
    {"regions": (6,), "dtype": (torch.float32, torch.float16), "scale": (0.0, 0.3, 1.0, 8.0, -1.5)},
]
WIDE_VALUES = [
    {"channels": (channels,), "value_channels": (value_channels,), "regions": (7, 70)}
    for channels, value_channels in ((5, 40), (33, 8), (16, 130))
]


def check(op: Op, target: tuple[str, str], case: dict[str, Any]) -> None:
    backend, device = target
    options = {name: value for name, value in case.items() if name not in ("scale", "grad_layout")}
    scale = case.get("scale", 1.0)
    options["peak"] = case.get("peak", 0) / (scale or 1.0)
    if op is ATTENTION:
        scale *= case.get("channels", 16) ** -0.5
    inputs = (*op.inputs(**options, device=device, requires_grad=True), scale)
    grad = None
    if "grad_layout" in case:
        out = op.definition(*inputs)
        grad = lay_out(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out), case["grad_layout"])
    # Where regions are peaked, alike or repeated, few numbers make up the errors: more of them is luck.
    few = case.get("peak") or case.get("layout") == "expanded"
    luck = 8.0 if scale == 0 else 2.0 if few else 1.0
    factors = {dtype: factor * (luck if dtype.itemsize >= 4 else 1.0) for dtype, factor in FACTORS.items()}
    op.assert_parity(backend, inputs, grad_output=grad, factors=factors)


@over(
    [*(pairwise(**axes, logits_dtype=DTYPES) for axes in (SIZES_AND_OPTIONS, MANY_REGIONS)), product(**MOST_REGIONS)],
    [product(**axes) for axes in WIDE],
)
def test_gather(target: tuple[str, str], case: dict[str, Any]) -> None:
    check(GATHER, target, case)


@over(
    [
        pairwise(**SIZES_AND_OPTIONS | {"channels": CHANNELS[1:]}, value_channels=CHANNELS),
        pairwise(**MANY_REGIONS, value_channels=(3, 33)),
        product(**ONE_CHANNEL),
        product(**MOST_REGIONS),
    ],
    [product(**axes) for axes in WIDE + WIDE_VALUES],
)
def test_attention(target: tuple[str, str], case: dict[str, Any]) -> None:
    check(ATTENTION, target, case)


@pytest.mark.parametrize("peak", PEAKS)
@pytest.mark.parametrize("logits_dtype", DTYPES, ids=str)
@all_dtypes
def test_gradient_of_peaked_logits(
    target: tuple[str, str], dtype: torch.dtype, logits_dtype: torch.dtype, peak: float
) -> None:
    """At most 1.5 times the error of eager PyTorch and rounding; where one pixel has all the weight it is zero."""
    backend, device = target
    options = {"batch": 6, "channels": 64, "regions": 16, "spatial": (7, 9), "peak": peak, "device": device}
    inputs = GATHER.inputs(**options, dtype=dtype, logits_dtype=logits_dtype, requires_grad=True)
    measured = measure_parity(GATHER.on(backend), GATHER.definition, inputs)
    (m,) = (m for m in measured if (m.tensor, m.measure) == ("gradient of logits", "relative L2 error"))
    assert m.dtype == logits_dtype
    assert m.error <= (1.5 * m.reference + torch.finfo(logits_dtype).eps / 2 if peak < PEAKS[-1] else 0)


@both_ops
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_stride_zero_gradient(op: Op, target: tuple[str, str], layout: Layout) -> None:
    backend, device = target
    inputs = op.inputs(layout=layout, device=device, requires_grad=True)
    summed = torch.autograd.grad(op.on(backend)(*inputs).sum(), inputs)
    out = op.on(backend)(*inputs)
    for actual, expected in zip(summed, torch.autograd.grad(out, inputs, torch.ones_like(out)), strict=True):
        torch.testing.assert_close(actual, expected)


def test_many_splits_of_the_pixels(kernels: tuple[str, str]) -> None:
    """Long sums: half precision keeps its accuracy, more than the reference does."""
    backend, device = kernels
    feats, logits = GATHER.inputs(
        batch=1, channels=16, regions=3, spatial=(40, 101), dtype=torch.float16, device=device, requires_grad=True
    )
    measured = GATHER.assert_parity(backend, (feats, logits))
    worst = {m.measure: m for m in measured if m.tensor == "output"}
    assert worst["mean error"].error < worst["mean error"].reference


@native_on("cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_tiles_of_a_split(dtype: torch.dtype) -> None:
    """A later tile of pixels with a higher maximum rescales the sums of those before it."""
    inputs = GATHER.inputs(batch=1, channels=2, regions=2, spatial=(521, 257), dtype=dtype, requires_grad=True)
    GATHER.assert_parity("native", inputs)


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
