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
from ocr_kernels.block import Layer, Norm, functional, ocr_block
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
@pytest.mark.parametrize("wrong", [Tensor.to_sparse, Tensor.to_mkldnn, lambda t: torch.nested.nested_tensor([*t])])
def test_tensors_are_dense(op: Op, wrong: Any) -> None:
    inputs = op.inputs(batch=BATCH, channels=CHANNELS, regions=REGIONS, spatial=PIXELS)
    for i, name in enumerate(("query", "key", "value") if op is ATTENTION else ("feats", "logits")):
        given = [wrong(each.detach()) if i == j else each for j, each in enumerate(inputs)]
        with pytest.raises(TypeError, match=f"^{name} must be dense, but is "):
            op.call(*given)


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


# The block's ops, which a program that was exported calls too


def block_arguments() -> tuple[dict[str, Tensor], list[Any]]:
    regions, depth, up, outputs = 3, 6, 7, 9
    shapes: dict[str, tuple[int, ...]] = {
        "feats": (BATCH, CHANNELS, *PIXELS), "key": (BATCH, depth, regions), "pixel_in": (depth, CHANNELS),
        "pixel_out": (depth, depth), "fusing": (outputs, up + CHANNELS), "contexts": (BATCH, up, regions),
    }  # fmt: skip
    for layer, channels in {"in": depth, "out": depth, "up": up, "z": outputs}.items():
        shapes |= {f"gain_{layer}": (channels,), f"shift_{layer}": (channels,)}
    shapes["mask"] = (BATCH, outputs)
    settings = [0.5, [0.0] * 4, [1e-5] * 4, [""] * 4, True]
    return {name: torch.randn(shape) for name, shape in shapes.items()}, settings


def inference_arguments() -> tuple[dict[str, Tensor], list[Any]]:
    tensors, (scale, slopes, *_) = block_arguments()
    on_context, on_pixels = tensors["fusing"].split((7, CHANNELS), 1)
    weights = [tensors[name] for name in ("pixel_in", "shift_in", "pixel_out", "shift_out", "shift_up")]
    weights += [on_context, on_pixels, tensors["shift_z"], torch.randn(5, 9), torch.randn(5)]
    named = {name: tensors[name] for name in ("feats", "key", "contexts")}
    return named | {f"weights[{i}]": weight for i, weight in enumerate(weights)}, [scale, slopes, "logits"]


WRONG_BLOCK = {
    "longer": lambda t: torch.cat((t, t), -1),
    "another batch": lambda t: torch.cat((t, t)),
    "a dimension more": lambda t: t[None],
    "no dimension": lambda t: t.sum(),
    "another dtype": lambda t: t.double(),
    "no floating dtype": lambda t: t.to(torch.int64),
    "another device": lambda t: t.to("meta"),
}


def check_each(tensors: dict[str, Tensor], wrong: str, call: Any, skipped: Sequence[str] = ()) -> None:
    """`feats` sets what the others have to be, so what is wrong with it may be said of one of them."""
    call(*tensors.values())
    for name in set(tensors) - set(skipped):
        changed = tensors | {name: WRONG_BLOCK[wrong](tensors[name])}
        with pytest.raises((ValueError, TypeError), match=r"^\w+(\[\d\])? must"):
            call(*changed.values())


@pytest.mark.parametrize("wrong", WRONG_BLOCK)
def test_the_blocks_ops_name_what_is_wrong(block_target: tuple[str, str], wrong: str) -> None:
    ops, (backend, device) = torch.ops.ocr_kernels, block_target
    with torch.device(device):
        tensors, settings = block_arguments()
    skipped = ["feats"] if wrong == "longer" else []  # more pixels
    check_each(tensors, wrong, lambda *each: ops.ocr_block(*each, *settings, backend), skipped)
    z, *saved = ops.ocr_block(*tensors.values(), *settings, backend)
    names = ("hidden_in", "hidden_out", "weights", "fused", "statistics")
    tensors = {"grad": z, **tensors, **dict(zip(names, saved, strict=True))}
    check_each(tensors, wrong, lambda *each: ops.ocr_block_backward(*each, *settings, [True] * 14, backend))


def test_the_blocks_ops_take_any_strides(block_target: tuple[str, str]) -> None:
    """Of each tensor, whoever calls them: kernels that take no strides of a vector get it without gaps."""
    ops, (backend, device) = torch.ops.ocr_kernels, block_target
    with torch.device(device):
        tensors, settings = block_arguments()
    z, *saved = ops.ocr_block(*tensors.values(), *settings, backend)
    every = dict(enumerate((torch.randn_like(z), *tensors.values(), *saved)))
    expected = ops.ocr_block_backward(*every.values(), *settings, [True] * 14, backend)
    for i, tensor in every.items():
        spread = torch.stack((tensor, tensor + 1), -1)[..., 0]
        changed = (every | {i: spread}).values()
        found = ops.ocr_block_backward(*changed, *settings, [True] * 14, backend)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ops.ocr_block(*list(changed)[1:16], *settings, backend)[0], z)


@pytest.mark.parametrize("wrong", WRONG_BLOCK)
def test_the_blocks_op_for_inference_names_what_is_wrong(block_target: tuple[str, str], wrong: str) -> None:
    tensors, settings = inference_arguments()
    op, backend = (
        torch.ops.ocr_kernels.ocr_block_inference,
        "reference" if block_target[1] != "cpu" else block_target[0],
    )
    skipped = ["feats"] if wrong == "longer" else []
    check_each(tensors, wrong, lambda *each: op(*each[:3], each[3:], *settings, backend), skipped)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (1, [0.0] * 3, "slopes must have four values, .* but has 3"),
        (2, [1e-5] * 5, "eps must have four values, .* but has 5"),
        (3, [], "groups must have four values, .* but has 0"),
    ],
)
def test_the_blocks_settings_are_of_four_layers(position: int, value: list[Any], message: str) -> None:
    tensors, settings = block_arguments()
    settings[position] = value
    with pytest.raises(ValueError, match=message):
        torch.ops.ocr_kernels.ocr_block(*tensors.values(), *settings, "reference")


def test_the_blocks_needs_are_of_each_tensor() -> None:
    tensors, settings = block_arguments()
    z, *saved = torch.ops.ocr_kernels.ocr_block(*tensors.values(), *settings, "reference")
    with pytest.raises(ValueError, match=r"needs must have 14 values, .* but has 3"):
        torch.ops.ocr_kernels.ocr_block_backward(z, *tensors.values(), *saved, *settings, [True] * 3, "reference")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights, rest: (weights[:9], rest), "weights must be 8 or 10 tensors for logits, but are 9"),
        (lambda weights, rest: (weights[:-2], rest), "weights"),
        (lambda weights, rest: (weights[:2], [*rest[:2], "features"]), "6 or 8 tensors for features, but are 2"),
        (lambda weights, rest: (weights, [rest[0], [0.0], rest[2]]), "slopes must have four values, .* but has 1"),
        (lambda weights, rest: (weights, [*rest[:2], "maps"]), "output must be 'features', 'logits' or 'classes'"),
    ],
)
def test_what_the_op_for_inference_takes(change: Any, message: str) -> None:
    tensors, settings = inference_arguments()
    feats, key, contexts, *weights = tensors.values()
    weights, settings = change(weights, settings)
    with pytest.raises((ValueError, TypeError), match=message):
        torch.ops.ocr_kernels.ocr_block_inference(feats, key, contexts, weights, *settings, "reference")


# The block's public call

OUTPUTS, DEPTH, UP = 7, 4, 6


def block_call(**changes: Any) -> Tensor:
    good: dict[str, Any] = {
        "feats": torch.randn(BATCH, CHANNELS, *PIXELS),
        "key": torch.randn(BATCH, DEPTH, REGIONS),
        "value": torch.randn(BATCH, 3, REGIONS),
        "pixel": [layer_with()],
        "up": Layer(torch.randn(UP, 3)),
        "fusing": Layer(torch.randn(OUTPUTS, UP + CHANNELS)),
    }
    return ocr_block(**good | changes)


def layer_with(bias: Any = None, norm: Any = None, weight: Any = None) -> Layer:
    """A first layer of phi."""
    return Layer(torch.randn(DEPTH, CHANNELS) if weight is None else weight, bias, norm)


ONES = torch.ones(DEPTH)
FLOAT8 = ONES.to(torch.float8_e4m3fn)
HALF_GIVEN = r"pixel\[0\].norm must have running_mean and running_var, or neither, but has "


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"pixel": [None]}, TypeError, r"pixel\[0\] must be a Layer, but is NoneType"),
        ({"pixel": [layer_with(), None]}, TypeError, r"pixel\[1\] must be a Layer, but is NoneType"),
        ({"pixel": [(torch.randn(DEPTH, CHANNELS),)]}, TypeError, r"pixel\[0\] must be a Layer, but is tuple"),
        ({"fusing": None}, TypeError, "fusing must be a Layer, but is NoneType"),
        ({"up": "x"}, TypeError, "up must be a Layer or None, but is str"),
        ({"pixel": [layer_with(norm=(1, 2))]}, TypeError, r"pixel\[0\].norm must be a Norm or None, but is tuple$"),
        (
            {"pixel": [layer_with(norm=nn.BatchNorm1d(DEPTH))]},
            TypeError,
            r"pixel\[0\].norm must be a Norm or None, but is BatchNorm1d; Norm.of\(norm\) makes one",
        ),
        ({"pixel": [layer_with(ONES.int())]}, TypeError, r"pixel\[0\].bias must be float64, .* but is torch.int32"),
        ({"pixel": [layer_with(FLOAT8)]}, TypeError, r"pixel\[0\].bias must be float64, .* but is torch.float8_e4m3fn"),
        ({"pixel": [layer_with(norm=Norm(ONES.cfloat()))]}, TypeError, r"pixel\[0\].norm.weight must be float64"),
        ({"pixel": [layer_with(norm=Norm(ONES, ONES.bool()))]}, TypeError, r"pixel\[0\].norm.bias must be float64"),
        (
            {"pixel": [layer_with(norm=Norm(None, None, ONES.long(), ONES))]},
            TypeError,
            r"pixel\[0\].norm.running_mean must be float64, .* but is torch.int64",
        ),
        (
            {"pixel": [layer_with(norm=Norm(None, None, ONES, FLOAT8))]},
            TypeError,
            r"pixel\[0\].norm.running_var must be float64",
        ),
        (
            {"pixel": [layer_with(weight=torch.randn(DEPTH, CHANNELS).to_sparse())]},
            TypeError,
            r"pixel\[0\].weight must be dense, but is torch.sparse_coo",
        ),
        ({"pixel": [layer_with(norm=Norm(eps=-1e-5))]}, ValueError, r"pixel\[0\].norm.eps must be >= 0, but is -1e-05"),
        ({"pixel": [layer_with(norm=Norm(eps=float("nan")))]}, ValueError, r"pixel\[0\].norm.eps must be >= 0"),
        (
            {"pixel": [layer_with(norm=Norm(eps=None))]},
            TypeError,
            r"pixel\[0\].norm.eps must be a number, but is NoneType",
        ),
        (
            {"pixel": [layer_with(norm=Norm(None, None, ONES, ONES, momentum=None))]},
            TypeError,
            r"pixel\[0\].norm.momentum must be a number, but is NoneType",
        ),
        (
            {"mask": torch.ones(BATCH, OUTPUTS, requires_grad=True)},
            ValueError,
            "mask must not require grad, .* multiply z by it instead",
        ),
    ],
)
def test_the_block_names_what_is_wrong(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    block_call()
    with pytest.raises(error, match="^" + message):
        block_call(**changes)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("given", ["running_mean", "running_var"])
def test_running_statistics_are_two(given: str, training: bool) -> None:
    """With one of them a norm would do nothing in eval mode, and forget its statistics in training."""
    norm = Norm(training=training, **{given: ONES})
    with pytest.raises(ValueError, match=HALF_GIVEN + given + " alone"):
        block_call(pixel=[layer_with(norm=norm)])


def test_momentum_is_read_where_statistics_run_alone() -> None:
    for norm in (Norm(momentum=None), Norm(None, None, ONES, ONES, training=False, momentum=None)):
        block_call(pixel=[layer_with(norm=norm)])
    block_call(pixel=[layer_with(norm=Norm(None, None, ONES.clone(), ONES.clone(), momentum=np.float32(0.1), eps=0))])


def test_without_gradients_a_mask_may_require_one() -> None:
    with torch.no_grad():
        block_call(mask=torch.ones(BATCH, OUTPUTS, requires_grad=True))


@pytest.mark.parametrize("training", [True, False])
def test_autocast_leaves_float64(training: bool) -> None:
    """So all is float64 or nothing is, as in PyTorch's own layers."""
    double: dict[str, Any] = {
        "feats": torch.randn(BATCH, CHANNELS, *PIXELS).double(),
        "key": torch.randn(BATCH, DEPTH, REGIONS).double(),
        "value": torch.randn(BATCH, 3, REGIONS).double(),
    }
    mean, var = torch.zeros(OUTPUTS), torch.ones(OUTPUTS)
    fusing = Layer(torch.randn(OUTPUTS, UP + CHANNELS), None, Norm(None, None, mean, var, training))
    layers = {
        "pixel": [layer_with(weight=torch.randn(DEPTH, CHANNELS).double())],
        "up": Layer(torch.randn(UP, 3).double()),
        "fusing": fusing._replace(weight=fusing.weight.double()),
    }
    classifier = torch.randn(5, OUTPUTS), None
    with torch.autocast("cpu", torch.bfloat16):
        assert block_call(**double, **layers).dtype == torch.float64
        before = mean.clone(), var.clone()
        for changes, message in (
            (double | layers | {"classifier": classifier}, "classifier.weight must have the dtype of feats"),
            (double | layers | {"fusing": fusing}, "fusing.weight must have the dtype of feats"),
            ({"key": double["key"]}, "key must have the dtype of feats"),
            ({"value": double["value"].int()}, "value must be float64, .* but is torch.int32"),
        ):
            with pytest.raises(TypeError, match=message):
                block_call(**changes)
        block_call(key=double["key"].half(), fusing=fusing._replace(norm=None))
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])


def test_an_error_leaves_statistics_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError

    mean, var = torch.zeros(OUTPUTS), torch.ones(OUTPUTS)
    fusing = Layer(torch.randn(OUTPUTS, UP + CHANNELS), None, Norm(None, None, mean, var))
    monkeypatch.setattr(functional.F, "linear", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        block_call(fusing=fusing, classifier=(torch.randn(5, OUTPUTS), None))
    assert not mean.any()
    assert torch.equal(var, torch.ones(OUTPUTS))
