"""`ocr_block` in inference against the reference module in eval mode: values, layouts, what PyTorch sees, memory."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from ops import over, pairwise, product
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ocr_kernels import flop_formulas
from ocr_kernels.block import Layer, Norm, ocr_block
from ocr_kernels.core.activations import activate_
from ocr_kernels.reference import SpatialOCR
from ocr_kernels.testing import (
    LAYOUTS,
    Layout,
    attention_inputs,
    measure_parity,
    oracle,
    peak_bytes,
    poisoned_memory,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
all_outputs = pytest.mark.parametrize("output", ["features", "logits", "classes"])


@pytest.fixture(autouse=True)
def poison():
    with poisoned_memory():
        yield


@pytest.fixture
def target(block_target: tuple[str, str]) -> tuple[str, str]:
    return block_target


@pytest.fixture
def own_dtype(target: tuple[str, str]) -> torch.dtype:
    """One for which the backend has kernels of its own: float32 is left to PyTorch's products."""
    return torch.bfloat16 if target[0] == "triton" else torch.float32


class Slopes(NamedTuple):
    pixel_in: float = 0.0
    pixel_out: float = 0.0
    object_in: float = 0.0
    object_out: float = 0.0
    down: float = 0.0
    up: float = 0.0
    fusing: float = 0.0


class Weights(NamedTuple):
    """Of step 4 and the classifier, with norms folded in: those that pixels go through, and psi and delta."""

    pixel_in: Tensor
    pixel_in_bias: Tensor
    pixel_out: Tensor | None
    pixel_out_bias: Tensor | None
    object_in: Tensor
    object_in_bias: Tensor
    object_out: Tensor | None
    object_out_bias: Tensor | None
    down: Tensor
    down_bias: Tensor
    up: Tensor | None
    up_bias: Tensor
    context: Tensor
    pixels: Tensor
    bias: Tensor
    classes: Tensor
    classes_bias: Tensor
    slopes: Slopes = Slopes()
    scale: float | None = None


def block(feats: Tensor, regions: Tensor, weights: Weights, output: Any = "features", **options: Any) -> Tensor:
    """`ocr_block` of pixels, and of what psi and delta make of regions `[B, C, K]`."""

    def through(columns: Tensor, name: str) -> Tensor:
        weight, bias = getattr(weights, name), getattr(weights, f"{name}_bias")
        if weight is None:
            return columns
        product = torch.nn.functional.linear(columns.mT, weight) + bias
        return activate_(product, getattr(weights.slopes, name)).to(columns.dtype).mT

    key, value = through(through(regions, "object_in"), "object_out"), through(regions, "down")
    options = {"output": output, "scale": weights.scale, **options}
    return ocr_block(feats, key, value, *layers_of(weights), **options)


def layers_of(weights: Weights) -> tuple[list[Layer], Layer, Layer, tuple[Tensor, Tensor]]:
    """phi, rho and g, and the classifier."""

    def layer(name: str) -> Layer:
        return Layer(getattr(weights, name), getattr(weights, f"{name}_bias"), slope=getattr(weights.slopes, name))

    pixel = [layer("pixel_in")] if weights.pixel_out is None else [layer("pixel_in"), layer("pixel_out")]
    fusing = Layer(torch.cat((weights.context, weights.pixels), 1), weights.bias, slope=weights.slopes.fusing)
    return pixel, layer("up"), fusing, (weights.classes, weights.classes_bias)


class Head(nn.Module):
    """Steps 4 and 5 in plain PyTorch, in eval mode, with BatchNorms that do something."""

    def __init__(
        self, channels: int = 20, keys: int = 12, out_channels: int = 24, classes: int = 5, output: str = "features"
    ) -> None:
        super().__init__()
        self.output = output
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.block = SpatialOCR(channels, keys, out_channels)
            self.cls_head = nn.Conv2d(out_channels, classes, kernel_size=1)
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    nn.init.normal_(module.running_mean, std=0.3)
                    nn.init.uniform_(module.running_var, 0.1, 0.5)
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                    nn.init.normal_(module.bias, std=0.3)
        self.eval().requires_grad_(False)

    def forward(self, feats: Tensor, regions: Tensor) -> Tensor:
        out = self.block(feats, regions.unsqueeze(3))
        return out if self.output == "features" else self.cls_head(out)


class FusedHead(Head):
    backend = "reference"

    def forward(self, feats: Tensor, regions: Tensor) -> Tensor:
        return block(feats, regions, fold(self), self.output, backend=self.backend)


def folded_layers(sequence: nn.Sequential) -> dict[tuple[nn.Conv2d, nn.BatchNorm2d], tuple[Tensor, Tensor]]:
    """Each convolution of a sequence and its norm, with the float64 weight and bias of both together."""
    convolutions = [layer for layer in sequence if isinstance(layer, nn.Conv2d)]
    norms = [layer[0] for layer in sequence if isinstance(layer, nn.Sequential)]
    folded = {}
    for convolution, norm in zip(convolutions, norms, strict=True):
        factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        weight = convolution.weight.double().flatten(1) * factor[:, None]
        folded[convolution, norm] = weight, norm.bias.double() - factor * norm.running_mean.double()
    return folded


def with_rounded_weights(head: Head) -> Head:
    """The head in float64, but with folded weights rounded to its dtype."""
    dtype, exact = head.cls_head.weight.dtype, copy.deepcopy(head).double()
    attention = exact.block.object_context_block
    parts = (attention.f_pixel, attention.f_object, attention.f_down, attention.f_up)
    for part in (*parts, exact.block.conv_bn_dropout):
        for (convolution, norm), (weight, bias) in folded_layers(part).items():
            convolution.weight.data.copy_(weight.to(dtype).view_as(convolution.weight))
            norm.running_mean.zero_()
            norm.running_var.fill_(1 - norm.eps)
            norm.weight.data.fill_(1)
            norm.bias.data.copy_(bias)
    return exact


def fold(head: Head) -> Weights:
    """The head's weights with its BatchNorms folded in, computed in float64."""
    attention, dtype = head.block.object_context_block, head.cls_head.weight.dtype
    ((fusing, bias),) = folded_layers(head.block.conv_bn_dropout).values()
    parts = (attention.f_pixel, attention.f_object, attention.f_down, attention.f_up)
    weights = [
        *(tensor for part in parts for layer in folded_layers(part).values() for tensor in layer),
        *(half.contiguous() for half in fusing.chunk(2, dim=1)),
        bias,
        head.cls_head.weight.flatten(1),
        head.cls_head.bias,
    ]
    return Weights(*(w.to(dtype if w.dim() == 2 else torch.float32) for w in weights))


def tensors_of(weights: Weights) -> list[tuple[str, Tensor]]:
    return [(name, weight) for name, weight in weights._asdict().items() if isinstance(weight, Tensor)]


def on_tensors(function: Callable[[Tensor], Tensor], weights: Weights) -> Weights:
    return weights._replace(**{name: function(weight) for name, weight in tensors_of(weights)})


def draw(
    device: str = "cpu", dtype: torch.dtype = torch.float32, channels: int = 20, **options: Any
) -> tuple[Tensor, Tensor]:
    """feats `[B, C, *S]` and regions `[B, C, K]`."""
    feats, regions, _ = attention_inputs(channels=channels, dtype=dtype, device=device, **options)
    return feats, regions


def check(backend: str, inputs: tuple[Tensor, Tensor], **sizes: int) -> None:
    """z, logits and classes of `inputs` on `backend`."""
    feats = inputs[0]
    for output in ("features", "logits"):
        plain, fused = (kind(feats.shape[1], **sizes, output=output).to(feats) for kind in (Head, FusedHead))
        fused.backend = backend
        measured = measure_parity(fused, plain, inputs)
        # Folding rounds 16-bit weights once more, alike for all pixels, so it does not average out of their mean error.
        doubles = [tensor.double() for tensor in inputs]
        rounding = float((with_rounded_weights(plain)(*doubles) - oracle(plain, *inputs)).mean().abs().nan_to_num())
        failures = [str(m) for m in measured if m.error > m.bound + (rounding if m.measure == "bias" else 0)]
        assert not failures, f"{output} on {backend}: {failures}"

    exact = oracle(plain, *inputs)
    fused.output = "classes"
    classes = fused(*inputs)
    assert classes.dtype == torch.int64
    assert classes.shape == (feats.shape[0], *feats.shape[2:])
    if classes.numel():
        budget = 2 * next(m.bound for m in measured if m.measure == "max error")  # two logits may move by one each
        behind = exact.amax(1) - exact.gather(1, classes.unsqueeze(1)).squeeze(1)
        assert behind.max() <= budget


REGIONS = (1, 2, 19, 150, 1203)
# More images of few pixels: the mean of a few errors is luck.
FEW_PIXELS = ((8, (1, 1)), (4, (1, 7)), (1, (3, 43)), (1, (127, 1)))
PIXELS = ((16, (1, 1)), (4, (1, 7)), (1, (3, 43)), (2, (127, 1)), (1, (31, 33)))
SIZES = ((20, 12, 24, 5), (1, 1, 1, 1), (17, 33, 9, 2), (64, 32, 64, 19), (40, 16, 130, 150))  # C, D, O, L
THINNED = pairwise(dtype=DTYPES, layout=LAYOUTS, sizes=SIZES, regions=REGIONS[:-1], pixels=FEW_PIXELS)
WIDE = (
    {"dtype": DTYPES, "regions": REGIONS, "pixels": [(1, (5, 8))]},
    {"dtype": DTYPES, "pixels": PIXELS},
    {"dtype": DTYPES, "sizes": SIZES},
    {"dtype": DTYPES, "layout": LAYOUTS},
)


@over([THINNED, [{"dtype": torch.float32, "regions": 1203, "pixels": (1, (5, 8))}]], [product(**axes) for axes in WIDE])
def test_parity(target: tuple[str, str], case: dict[str, Any]) -> None:
    backend, device = target
    options = dict(case)
    batch, spatial = options.pop("pixels", (2, (9, 11)))
    channels, keys, out_channels, classes = options.pop("sizes", SIZES[0])
    inputs = draw(device, channels=channels, batch=batch, spatial=spatial, **options)
    check(backend, inputs, keys=keys, out_channels=out_channels, classes=classes)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_many_tiles(layout: Layout) -> None:
    check("reference", draw(spatial=(47, 53), layout=layout))


@all_outputs
@pytest.mark.parametrize("shape", [(2, 20, 0, 5), (0, 20, 3, 4)])
def test_empty(target: tuple[str, str], output: str, shape: tuple[int, ...]) -> None:
    backend, device = target
    weights = fold(Head().to(device))
    out = block(
        torch.zeros(shape, device=device), torch.zeros(shape[0], 20, 3, device=device), weights, output, backend=backend
    )
    channels = {"features": (24,), "logits": (5,), "classes": ()}[output]
    assert out.shape == (shape[0], *channels, *shape[2:])


@pytest.mark.thinned
@all_outputs
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spatial", [(6,), (3, 4), (2, 3, 4), (1, 1)])
def test_memory_formats(
    target: tuple[str, str], own_dtype: torch.dtype, output: str, layout: Layout, spatial: tuple[int, ...]
) -> None:
    """The result follows the format of feats, any number of spatial dimensions, and fakes say the same."""
    backend, device = target
    feats, regions = draw(device, own_dtype, layout=layout, spatial=spatial)
    weights = fold(Head().to(device, own_dtype))
    out = block(feats, regions, weights, output, backend=backend)
    flat = block(feats.flatten(2), regions, weights, output, backend=backend)
    torch.testing.assert_close(out.flatten(1 if output == "classes" else 2), flat)
    if output != "classes" and (layout == "channels_last" or (layout == "transposed" and len(spatial) == 1)):
        assert out.movedim(1, -1).is_contiguous()
    else:
        assert out.is_contiguous()
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (feats, regions)]
        fake = block(*fakes, on_tensors(mode.from_tensor, weights), output, backend=backend)
    assert (fake.stride(), fake.dtype) == (out.stride(), out.dtype)


def operands(device: str, output: str, **options: Any) -> tuple[Any, ...]:
    """Arguments of the registered op, but for the backend."""
    feats, key = draw(device, **options)
    w = fold(Head().to(device, feats.dtype))
    weights = [w.pixel_in, w.pixel_in_bias, w.pixel_out, w.pixel_out_bias, w.up_bias, w.context, w.pixels, w.bias]
    weights += [] if output == "features" else [w.classes, w.classes_bias]
    return feats, key[:, :12], key, weights, 0.3, [0.0] * 4, output


@pytest.mark.thinned
@all_outputs
@all_dtypes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_opcheck(target: tuple[str, str], dtype: torch.dtype, output: str, layout: Layout) -> None:
    backend, device = target
    arguments = operands(device, output, dtype=dtype, layout=layout, spatial=(2, 5), regions=3)
    torch.library.opcheck(torch.ops.ocr_kernels.ocr_block_inference.default, (*arguments, backend))


@all_outputs
def test_the_op_takes_operands_of_any_strides(target: tuple[str, str], own_dtype: torch.dtype, output: str) -> None:
    backend, device = target
    feats, key, contexts, weights, *settings = operands(device, output, dtype=own_dtype)

    def spread(tensor: Tensor) -> Tensor:
        return torch.stack((tensor, tensor + 1), -1)[..., 0]

    op = partial(torch.ops.ocr_kernels.ocr_block_inference, feats)
    found = op(spread(key), spread(contexts), [spread(weight) for weight in weights], *settings, backend)
    assert torch.equal(found, op(key, contexts, weights, *settings, backend))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(target: tuple[str, str], compiler: str) -> None:
    backend, device = target
    torch._dynamo.reset()
    weights = fold(Head().to(device))

    def call(feats: Tensor, regions: Tensor) -> Tensor:
        return block(feats * 2, regions, weights, "logits", backend=backend) + 1

    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    for layout in ("contiguous", "channels_last"):
        inputs = draw(device, layout=layout)
        torch.testing.assert_close(compiled(*inputs), call(*inputs))


@all_outputs
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("spatial", [(7,), (3, 5), (2, 3, 2)])
def test_compiled_for_a_cpu_it_may_be_plain_pytorch(output: str, layout: Layout, spatial: tuple[int, ...]) -> None:
    graphs: list[torch.fx.GraphModule] = []
    torch._dynamo.reset()
    weights = fold(Head())
    inputs = draw("cpu", layout=layout, spatial=spatial)

    def call(feats: Tensor, regions: Tensor) -> Tensor:
        return block(feats, regions, weights, output)

    compiled = torch.compile(call, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    out, expected = compiled(*inputs), call(*inputs)
    torch.testing.assert_close(out, expected)
    assert out.stride() == expected.stride()
    has_op = any("ocr_kernels" in str(node.target) for graph in graphs for node in graph.graph.nodes)
    # where the op's layout is the compiler's, or what comes out in another is small
    assert has_op == ((layout == "channels_last" and len(spatial) > 1) or (output != "features" and len(spatial) == 2))


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
def test_autocast(target: tuple[str, str], autocast_dtype: torch.dtype) -> None:
    backend, device = target
    feats, regions = draw(device)
    weights = fold(Head().to(device))
    lower = on_tensors(lambda w: w.to(autocast_dtype) if w.dim() == 2 else w, weights)
    key, value = regions[:, :12], regions[:, 4:16]
    with torch.autocast(device, autocast_dtype):
        out = ocr_block(feats, key, value, *layers_of(weights), output="features", backend=backend)
    inputs = (tensor.to(autocast_dtype) for tensor in (feats, key, value))
    expected = ocr_block(*inputs, *layers_of(lower), output="features", backend=backend)
    assert out.dtype == autocast_dtype
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)  # without the rounding of value and of up's matrix


def test_vmap(target: tuple[str, str], own_dtype: torch.dtype) -> None:
    backend, device = target
    feats, regions = draw(device, own_dtype)
    call = partial(block, weights=fold(Head().to(device, own_dtype)), backend=backend)
    stacked = torch.stack([feats, feats.flip(1)], dim=1)
    batched = torch.vmap(call, in_dims=(1, None))(stacked, regions)
    for i in range(2):
        torch.testing.assert_close(batched[i], call(stacked[:, i], regions))


def test_vmap_over_weights(target: tuple[str, str]) -> None:
    backend, device = target
    feats, regions = draw(device)
    heads = [fold(Head().to(device)) for _ in range(2)]
    stacked = heads[0]._replace(
        **{name: torch.stack([getattr(head, name) for head in heads]) for name, _ in tensors_of(heads[0])}
    )
    in_dims = (None, None, Weights(*(0 if isinstance(w, Tensor) else None for w in stacked)))
    batched = torch.vmap(partial(block, backend=backend), in_dims=in_dims)(feats, regions, stacked)
    for result, weights in zip(batched, heads, strict=True):
        torch.testing.assert_close(result, block(feats, regions, weights, backend=backend))


SLOPES = Slopes(0.1, 0.2, 1.0, 0.3, -0.5, 0.01, 1.0), Slopes(*[1.0] * 7), Slopes(fusing=0.2)
CHANGES: dict[str, Callable[[Weights], Weights]] = {
    "slopes": lambda w: w._replace(slopes=SLOPES[0], scale=0.7),
    "no activation": lambda w: w._replace(slopes=SLOPES[1]),
    "one layer": lambda w: w._replace(
        pixel_out=None, pixel_out_bias=None, object_out=None, object_out_bias=None, slopes=SLOPES[2]
    ),
    "few contexts": lambda w: w._replace(
        up=w.up[:7].contiguous(), up_bias=w.up_bias[:7].contiguous(), context=w.context[:, :7].contiguous()
    ),
    "no up": lambda w: w._replace(
        up=None, up_bias=w.up_bias[:12].contiguous(), context=w.context[:, 4:16].contiguous()
    ),
}


def step_four(feats: Tensor, regions: Tensor, weights: Weights) -> Tensor:
    """Logits, from the formula."""

    def layer(x: Tensor, name: str) -> Tensor:
        weight, bias = getattr(weights, name), getattr(weights, f"{name}_bias")
        if weight is None:
            return x
        x = torch.einsum("oc,bcn->bon", weight, x) + bias[:, None]
        return torch.where(x > 0, x, getattr(weights.slopes, name) * x)

    x = feats.flatten(2)
    query = layer(layer(x, "pixel_in"), "pixel_out")
    key, value = layer(layer(regions, "object_in"), "object_out"), layer(regions, "down")
    scale = query.shape[1] ** -0.5 if weights.scale is None else weights.scale
    attention = (scale * query.mT @ key).softmax(2)
    y = value @ attention.mT
    y = (y if weights.up is None else weights.up @ y) + weights.up_bias[:, None]
    y = torch.where(y > 0, y, weights.slopes.up * y)
    z = weights.context @ y + weights.pixels @ x + weights.bias[:, None]
    z = torch.where(z > 0, z, weights.slopes.fusing * z)
    return (weights.classes @ z + weights.classes_bias[:, None]).unflatten(2, feats.shape[2:])


@all_dtypes
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_other_heads(target: tuple[str, str], change: Callable[[Weights], Weights], dtype: torch.dtype) -> None:
    """Other activations, one layer in phi and psi, other channels of y, another scale."""
    backend, device = target
    inputs = draw(device, dtype)
    weights = change(fold(Head().to(device, dtype)))
    exact = step_four(*(t.double() for t in inputs), on_tensors(Tensor.double, weights))
    found = block(*inputs, weights, "logits", backend=backend)
    error = (found.double() - exact).abs().max() / exact.abs().max()
    assert error <= {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]


@pytest.mark.parametrize("slope", [0.0, 0.1, 1.0])
def test_nan_and_infinity(target: tuple[str, str], own_dtype: torch.dtype, slope: float) -> None:
    """NaN stays NaN, and -inf becomes 0 by ReLU."""
    backend, device = target
    feats, regions = draw(device, own_dtype, spatial=(4,))
    weights = on_tensors(torch.zeros_like, fold(Head().to(device, own_dtype)))
    weights.bias[:2] = torch.tensor([float("nan"), float("-inf")])
    z = block(feats, regions, weights._replace(slopes=Slopes(fusing=slope)), backend=backend)
    assert z[:, 0].isnan().all()
    assert (z[:, 1] == (0 if slope == 0 else float("-inf"))).all()
    assert (z[:, 2:] == 0).all()


def test_bitwise_reproducible(target: tuple[str, str], own_dtype: torch.dtype) -> None:
    backend, device = target
    inputs, weights = draw(device, own_dtype), fold(Head().to(device, own_dtype))
    runs = [block(*inputs, weights, backend=backend) for _ in range(2)]
    assert torch.equal(*runs)


@pytest.mark.parametrize("position", [0, 1])
def test_the_op_has_no_derivative(target: tuple[str, str], position: int) -> None:
    backend, device = target
    arguments = list(operands(device, "features"))
    message = r"no derivative.*ocr_kernels\.ocr_block"

    def call(x: Tensor) -> Tensor:
        return torch.ops.ocr_kernels.ocr_block_inference(*arguments[:position], x, *arguments[position + 1 :], backend)

    x = arguments[position]
    expected = call(x)
    with pytest.raises(RuntimeError, match=message):
        call(x.clone().requires_grad_())
    with pytest.raises(RuntimeError, match=message):
        torch.func.grad(lambda x: call(x).sum())(x)
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(call, (x,), (x,))
    for without_grad in (torch.no_grad(), torch.inference_mode()):
        with without_grad:
            assert torch.equal(call(x.clone().requires_grad_()), expected)


@all_outputs
def test_where_a_derivative_is_wanted_the_other_op_runs(output: str) -> None:
    feats, regions = draw()
    weights = fold(Head())
    expected = block(feats, regions, weights, output)
    for name in ("pixels", "bias", "classes"):
        trained = weights._replace(**{name: getattr(weights, name).clone().requires_grad_()})
        out = block(feats, regions, trained, output)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        assert out.requires_grad == (output != "classes" and (name != "classes" or output == "logits"))


def test_float64(target: tuple[str, str]) -> None:
    backend, device = target
    inputs = draw(device, torch.float64)
    weights = on_tensors(Tensor.double, fold(Head().to(device)))
    found = block(*inputs, weights, "logits", backend=backend)
    torch.testing.assert_close(found, step_four(*inputs, weights), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
def test_norms_are_folded(target: tuple[str, str], own_dtype: torch.dtype, training: bool) -> None:
    """Where statistics are known; where they are the batch's, they are taken."""
    backend, device = target
    feats, regions = draw(device, own_dtype)
    weights = fold(Head().to(device, own_dtype))
    mean, var, gain = (torch.rand(24, device=device) + 0.5 for _ in range(3))
    norm = Norm(gain, None, mean, var, training=training)
    matrix = torch.cat((weights.context, weights.pixels), 1)
    layers = [Layer(weights.pixel_in)], Layer(weights.up), Layer(matrix, weights.bias, norm)
    key, value = regions[:, :12].contiguous(), regions[:, :12].contiguous()
    before = mean.clone()
    found = ocr_block(feats, key, value, *layers, backend="reference" if training else backend)
    product = ocr_block(feats, key, value, *layers[:2], Layer(matrix, weights.bias, slope=1.0), backend=backend)
    expected = nn.functional.batch_norm(product.float(), before, var.clone(), gain, None, training).relu()
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02 if own_dtype != torch.float32 else 1e-5)
    assert torch.equal(mean, before) != training


def test_flops() -> None:
    """2 (DC + D^2 + 2 OC + LO + DK + CK) operations per pixel."""
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        torch.ops.ocr_kernels.ocr_block_inference(
            *operands("cpu", "logits", batch=2, regions=7, spatial=(3, 5)), "reference"
        )
    expected = 2 * 30 * (12 * 20 + 12 * 12 + 2 * 24 * 20 + 5 * 24 + 12 * 7 + 20 * 7)
    assert counter.get_total_flops() == expected


def test_memory() -> None:
    """The reference itself needs a quarter of what the module does, and less."""
    feats, regions = draw(channels=64, batch=1, spatial=(256, 256), layout="channels_last")
    module = Head(64, 32, 64)
    weights = fold(module)
    fused, eager = partial(block, weights=weights, backend="reference"), module
    for call in (fused, eager):
        call(feats, regions)
    assert peak_bytes(fused, feats, regions) <= peak_bytes(eager, feats, regions) / 4


def test_memory_of_the_kernels(
    monkeypatch: pytest.MonkeyPatch, target: tuple[str, str], own_dtype: torch.dtype
) -> None:
    """For logits and classes z exists for some pixels at a time; what comes out is the same."""
    backend, device = target
    inputs, weights = draw(device, own_dtype, batch=1, spatial=(1030,)), fold(Head().to(device, own_dtype))
    whole = [block(*inputs, weights, output, backend=backend) for output in ("features", "logits", "classes")]
    if backend == "triton":
        head = importlib.import_module("ocr_kernels.block.triton_inference")
        made = []
        right = head._empty_pixels
        monkeypatch.setattr(head, "_empty_pixels", lambda *a: made.append(right(*a)) or made[-1])
        monkeypatch.setattr(head, "PIXELS_AT_ONCE", 1024)
        parts = [block(*inputs, weights, output, backend=backend) for output in ("features", "logits", "classes")]
        assert all(torch.equal(a, b) for a, b in zip(parts, whole, strict=True))
        assert max(t.shape[0] * t.shape[2] for t in made) <= 1024
    _, logits, classes = whole
    assert torch.equal(logits.gather(1, classes.unsqueeze(1)).squeeze(1), logits.amax(1))  # of those alike, any
