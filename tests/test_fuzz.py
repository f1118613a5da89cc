"""Any input at all: sizes, strides, dtypes, magnitudes, infinities and NaN, and arguments that are wrong.

`make sanitize` tries 10,000 cases (`--hypothesis-profile=thorough`) of each op, under AddressSanitizer too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops import DTYPES, GATHER, Op, both_ops, native_on
from torch import Tensor

from ocr_kernels.core.layout import statistics_dtype

backends = pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=native_on("cpu"))])

BATCHES = st.sampled_from((1, 1, 2, 3, 0))
CHANNELS = st.sampled_from((1, 1, 2, 3, 5, 9, 17, 33, 70))
SPATIAL = st.lists(st.sampled_from((1, 1, 2, 3, 5, 8, 0)), min_size=1, max_size=4)
MAGNITUDES = st.sampled_from((0, 0, 0, 0, -20, -6, -3, 3, 6, 20))  # powers of ten
SCALES = st.sampled_from((1.0, 1.0, 0.25, -1.5, 0.0, 1e-20, 1e20))
SPECIAL = st.sampled_from((math.inf, -math.inf, math.nan, 1e-40, -1e-7, 0.0))


def laid_out(draw: Any, values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` in any strides, with steps and an offset, in memory that is NaN where no element of it lies."""
    dimensions = range(values.dim())
    order = draw(st.one_of(st.just([*dimensions]), st.just([0, *dimensions[2:], 1]), st.permutations(dimensions)))
    steps = [draw(st.sampled_from((1, 1, 1, 2))) for _ in dimensions]
    offset = draw(st.sampled_from((0, 0, 1, 3)))
    sizes = [size * step for size, step in zip(values.shape, steps, strict=True)]
    memory = torch.full((offset + math.prod(sizes),), math.nan, dtype=dtype)[offset:]
    whole = memory.view([sizes[d] for d in order]).permute([order.index(d) for d in dimensions])
    return whole[tuple(slice(None, None, step) for step in steps)].copy_(values)


def tensor(draw: Any, dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0 ** draw(MAGNITUDES)
    if values.numel():
        for special in draw(st.lists(SPECIAL, max_size=2)):
            values.view(-1)[draw(st.integers(0, values.numel() - 1))] = special
    repeated = draw(st.sampled_from((None, None, None, *range(len(shape)))))
    if repeated is not None and shape[repeated]:
        values = values.narrow(repeated, 0, 1)
    return laid_out(draw, values, dtype).expand(shape)


@st.composite
def cases(draw: Any, op: Op) -> tuple[Tensor, tuple[Tensor, ...], float]:
    """The incoming gradient, the inputs, and the scale."""
    batch, channels, regions, spatial = draw(BATCHES), draw(CHANNELS), draw(CHANNELS), draw(SPATIAL)
    dtype = draw(st.sampled_from(DTYPES))
    if op is GATHER:
        feats = tensor(draw, dtype, batch, channels, *spatial)
        logits = tensor(draw, draw(st.sampled_from(DTYPES)), batch, regions, *spatial)
        return tensor(draw, dtype, batch, channels, regions), (feats, logits), draw(SCALES)
    value_channels = draw(CHANNELS)
    query = tensor(draw, dtype, batch, channels, *spatial)
    key, value = (tensor(draw, dtype, batch, c, regions) for c in (channels, value_channels))
    return tensor(draw, dtype, batch, value_channels, *spatial), (query, key, value), draw(SCALES)


def forward_and_backward(function: Callable[..., Tensor], grad: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def written(draw: Any, dtype: torch.dtype, *shape: int) -> Tensor:
    """For a result of the compiled library, whose pixels lie at one stride."""
    result = torch.full(shape, math.nan, dtype=dtype)
    return result.movedim(1, -1).contiguous().movedim(-1, 1) if draw(st.booleans()) else result


def private(draw: Any, op: Op, grad: Tensor, inputs: Sequence[Tensor], scale: float) -> list[Tensor | None]:
    """The same by the ops of the compiled library, which write results in both formats, and gradients if wanted."""
    ops, like = torch.ops.ocr_kernels_native, inputs[0]
    saved: list[Tensor] = []
    out = written(draw, like.dtype, *grad.shape)
    if op is GATHER:
        batch, channels, regions = grad.shape
        saved = [written(draw, statistics_dtype(*inputs), batch, channels + 2, regions)]
        ops.gather_forward(out, *saved, *inputs, scale)
        backward = ops.gather_backward
    else:
        ops.attention_forward(out, *inputs, scale)
        backward = ops.attention_backward
    wanted = [draw(st.booleans()) for _ in inputs]
    gradients = [written(draw, t.dtype, *t.shape) if want else None for t, want in zip(inputs, wanted, strict=True)]
    backward(*gradients, grad, *inputs, *saved, scale)
    return [out, *gradients]


def kind(x: Tensor) -> Tensor:
    """0 where finite, 1 and -1 where infinite, 2 where NaN."""
    return torch.where(x.isnan(), 2.0, torch.where(x.isinf(), x.sign(), 0.0).double())


def largest(x: Tensor) -> float:
    return max((float(x.double()[x.isfinite()].abs().max()) if x.isfinite().any() else 0.0), 0.0)


def assert_like_eager(op: Op, actual: Sequence[Tensor | None], grad: Tensor, inputs: Sequence[Tensor], scale: float):
    """Infinite and NaN where the formula is, in its dtype or in float64; elsewhere not much further from it."""
    eager = forward_and_backward(lambda *t: op.definition(*t, scale), grad, inputs)
    wide = [t.double() for t in inputs]
    exact = forward_and_backward(lambda *t: op.definition(*t, scale), grad.double(), wide)
    g, sizes, factor = largest(grad), [largest(t) for t in inputs], max(1.0, abs(scale))
    terms = max(grad.numel(), *(t.numel() for t in inputs), 1)
    everything = factor * terms * max(1.0, g) * math.prod(max(1.0, size) for size in sizes)
    accumulator = torch.finfo(statistics_dtype(*inputs))
    if everything > accumulator.max / 10:
        return  # a sum may overflow in one order of its terms and not in another
    # What rounding the scores, and terms that cancel, may cost where eager was lucky.
    scores = 1 + abs(scale) * (sizes[1] if op is GATHER else sizes[0] * sizes[1] * inputs[0].shape[1])
    floor = 8 * accumulator.eps * scores * everything
    for i, (a, e, x) in enumerate(zip(actual, eager, exact, strict=True)):
        if a is None:
            continue
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        rounded = x.to(a.dtype)
        finfo, of_kind = torch.finfo(a.dtype), torch.isfinite if i else kind
        edge = (x.abs() > 0.9 * finfo.max) & (x.abs() < 1.1 * finfo.max)
        # Of a gradient it is the order of a sum's terms that makes an infinity of it or NaN.
        same = (of_kind(a) == of_kind(e)) | (of_kind(a) == of_kind(rounded)) | edge
        same |= a.isfinite() & (x.abs() <= floor)  # in float64, too, all is rounding, of terms that cancel
        assert same.all(), f"result {i}: {a[~same][:4]}, eager {e[~same][:4]}, in float64 {x[~same][:4]}"
        finite = a.isfinite() & e.isfinite() & rounded.isfinite()
        if finite.any():
            error, own = (float((t.double() - x)[finite].abs().max()) for t in (a, e))
            bound = 4 * own + 4 * finfo.eps * float(x[finite].abs().max()) + floor + finfo.tiny
            assert error <= bound, f"result {i}: error {error:.3g}, eager's {own:.3g}, bound {bound:.3g}"


@both_ops
@backends
@given(data=st.data())
def test_anything_gives_what_eager_gives(op: Op, backend: str, data: st.DataObject) -> None:
    grad, inputs, scale = data.draw(cases(op))
    actual = forward_and_backward(lambda *t: op.on(backend)(*t, scale), grad, inputs)
    assert_like_eager(op, actual, grad, inputs, scale)


@both_ops
@native_on("cpu")
@given(data=st.data())
def test_anything_through_the_compiled_librarys_ops(op: Op, data: st.DataObject) -> None:
    grad, inputs, scale = data.draw(cases(op))
    assert_like_eager(op, private(data.draw, op, grad, inputs, scale), grad, inputs, scale)


def spoiled(draw: Any, t: Tensor) -> Tensor:
    """The tensor with another rank, size, dtype or device: none that an op could take it for."""
    how = draw(st.sampled_from(("rank", "more", "none", "integers", "complex", "device")))
    if how == "rank":
        return t[0] if draw(st.booleans()) and t.shape[0] else t.unsqueeze(0)
    if how in ("more", "none"):
        shape = list(t.shape)
        d = draw(st.integers(0, t.dim() - 1))
        shape[d] = 0 if how == "none" and shape[d] else shape[d] + 1
        return t.new_zeros(shape)
    return t.to("meta") if how == "device" else t.to(torch.int32 if how == "integers" else torch.complex64)


@both_ops
@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=native_on("cpu")), "private"])
@given(data=st.data())
def test_wrong_arguments_of_the_backward_are_named(op: Op, backend: str, data: st.DataObject) -> None:
    """Whatever is wrong with one of them; nothing is written."""
    grad, inputs, scale = data.draw(cases(op))
    grad, *inputs = (t.nan_to_num(0, 0, 0) for t in (grad, *inputs))
    names = ("feats", "logits") if op is GATHER else ("query", "key", "value")
    tensors = {"grad": grad} | dict(zip(names, inputs, strict=True))
    if op is GATHER:
        batch, channels, regions = grad.shape
        tensors["stats"] = torch.zeros(batch, channels + 2, regions, dtype=statistics_dtype(*inputs))
    name = data.draw(st.sampled_from(list(tensors)))
    wrong = tensors | {name: spoiled(data.draw, tensors[name])}
    needs = [True] * len(inputs)
    named = re.compile(rf"\b({'|'.join(tensors)})\b")
    if backend == "private":
        gradients = [torch.full(t.shape, 7.0, dtype=t.dtype) for t in inputs]
        backward = getattr(torch.ops.ocr_kernels_native, "gather_backward" if op is GATHER else "attention_backward")
        with pytest.raises(RuntimeError) as raised:
            backward(*gradients, *wrong.values(), scale)
        assert all((g == 7).all() for g in gradients)
    else:
        backward = getattr(torch.ops.ocr_kernels, op.name + "_backward")
        with pytest.raises((TypeError, ValueError)) as raised:
            backward(*wrong.values(), scale, *needs, backend)
    if not (backend == "private" and wrong[name].is_meta):  # that PyTorch refuses, which finds no kernel for the device
        assert named.search(str(raised.value)), raised.value
