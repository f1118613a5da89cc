"""The ops as PyTorch sees them: fakes, autocast, batching, torch.compile, backends and errors."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from ops import ATTENTION, DTYPES, GATHER, Op, all_dtypes, both_ops
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import ocr_kernels
from ocr_kernels import available_backends, pixel_region_attention, reference, spatial_gather, use_backend
from ocr_kernels.block import Layer, Norm, ocr_block
from ocr_kernels.block.registration import implemented
from ocr_kernels.core.backends import resolve_backend
from ocr_kernels.modules import SpatialOCR
from ocr_kernels.testing import LAYOUTS, Layout


def backward_call(op: Op, inputs: tuple, backend: str) -> tuple:
    """The backward op and arguments for it."""
    forward = op.overload(*inputs, 0.5, backend)
    needs = (True,) * len(inputs)
    overload = getattr(torch.ops.ocr_kernels, op.name + "_backward").default
    if op is GATHER:
        return overload, (torch.ones_like(forward[0]), *inputs, forward[1], 0.5, *needs, backend)
    return overload, (torch.ones_like(forward), *inputs, 0.5, *needs, backend)


@pytest.mark.thinned
@both_ops
@all_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "grad"])
def test_opcheck(op: Op, target: tuple[str, str], dtype: torch.dtype, layout: Layout, requires_grad: bool) -> None:
    backend, device = target
    inputs = op.inputs(
        channels=4, regions=3, spatial=(2, 5), dtype=dtype, layout=layout, device=device, requires_grad=requires_grad
    )
    torch.library.opcheck(op.overload, (*inputs, 1.5, backend))


@both_ops
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_backward(op: Op, target: tuple[str, str], layout: Layout) -> None:
    backend, device = target
    inputs = op.inputs(channels=4, regions=3, spatial=(2, 5), layout=layout, device=device)
    overload, arguments = backward_call(op, inputs, backend)
    torch.library.opcheck(overload, arguments)


@both_ops
def test_opcheck_double_backward(op: Op, target: tuple[str, str]) -> None:
    backend, device = target
    overload, arguments = backward_call(op, op.inputs(channels=4, regions=3, spatial=(2, 5), device=device), backend)
    torch.library.opcheck(overload, [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments])


@both_ops
def test_opcheck_empty(op: Op, target: tuple[str, str]) -> None:
    backend, device = target
    inputs = op.inputs(batch=0, device=device, requires_grad=True)
    torch.library.opcheck(op.overload, (*inputs, 1.0, backend))


@pytest.mark.thinned
@both_ops
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spatial", [(6,), (3, 4), (2, 3, 4), (1, 1), (1, 4)])
def test_memory_formats(op: Op, target: tuple[str, str], layout: Layout, spatial: tuple[int, ...]) -> None:
    """Results follow the query's memory format, gradients their inputs', and fakes say the same."""
    backend, device = target
    inputs = op.inputs(channels=4, spatial=spatial, layout=layout, device=device, requires_grad=True)
    out = op.on(backend)(*inputs)
    channels_last = layout == "channels_last" or (layout == "transposed" and len(spatial) == 1)
    if op is GATHER or not channels_last:
        assert out.is_contiguous()
    else:
        assert out.movedim(1, -1).is_contiguous()
    gradient = torch.autograd.grad(out.sum(), inputs)[0]
    if channels_last:
        assert gradient.movedim(1, -1).is_contiguous()
    else:
        assert gradient.is_contiguous()
    plain = [t.detach() for t in inputs]
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in plain]
        assert op.on(backend)(*fakes).stride() == out.stride()


@both_ops
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compile_without_recompiling(op: Op, target: tuple[str, str], layout: Layout) -> None:
    """One graph, dynamic in every size, forward and backward."""
    backend, device = target
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(op.on(backend), fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for batch, channels, regions, spatial in ((2, 6, 5, (7, 9)), (3, 10, 4, (8, 6)), (4, 5, 8, (5, 11))):
        inputs = op.inputs(
            batch=batch,
            channels=channels,
            regions=regions,
            spatial=spatial,
            layout=layout,
            device=device,
            requires_grad=True,
        )
        out, expected = compiled(*inputs), op.on(backend)(*inputs)
        torch.testing.assert_close(out, expected)
        assert out.stride() == expected.stride()
        gradients = torch.autograd.grad(out.sum(), inputs)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), inputs))
        compilations.append(counter.frame_count)
    assert compilations == compilations[:1] * 3


@both_ops
def test_compile_with_inductor(op: Op, target: tuple[str, str]) -> None:
    backend, device = target
    torch._dynamo.reset()
    inputs = op.inputs(device=device, requires_grad=True)

    def block(*tensors):
        return torch.relu(op.on(backend)(*(t * 2 for t in tensors)) + 1)

    compiled = torch.compile(block, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), block(*inputs))
    gradients = torch.autograd.grad(compiled(*inputs).sum(), inputs)
    torch.testing.assert_close(gradients, torch.autograd.grad(block(*inputs).sum(), inputs))


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
def test_autocast(target: tuple[str, str], autocast_dtype: torch.dtype) -> None:
    """feats, query, key and value are cast; logits, and what is float64, are not."""
    backend, device = target
    feats, logits = GATHER.inputs(device=device, requires_grad=True)
    query, key, value = ATTENTION.inputs(device=device, requires_grad=True)
    with torch.autocast(device, autocast_dtype):
        gathered = spatial_gather(feats, logits, backend=backend)
        attended = pixel_region_attention(query.to(autocast_dtype), key, value, backend=backend)
        assert spatial_gather(feats.double(), logits.double(), backend=backend).dtype == torch.float64
        with pytest.raises(TypeError, match=r"key must have the dtype of query, torch\.float64"):
            pixel_region_attention(query.double(), key, value, backend=backend)
    assert gathered.dtype == attended.dtype == autocast_dtype
    assert torch.equal(gathered, spatial_gather(feats.to(autocast_dtype), logits, backend=backend))
    lower = [t.to(autocast_dtype) for t in (query, key, value)]
    assert torch.equal(attended, pixel_region_attention(*lower, backend=backend))
    gradients = torch.autograd.grad(gathered.sum() + attended.sum(), (feats, logits, query, key, value))
    assert all(g.dtype == torch.float32 for g in gradients)


@both_ops
def test_autocast_of_a_backward_pass(op: Op, target: tuple[str, str]) -> None:
    """Within the region or after it, its sums and products have the digits of the statistics' dtype."""
    backend, device = target
    inputs = [t.requires_grad_() for t in op.inputs(device=device)]
    with torch.autocast(device, torch.bfloat16):
        loss = op.on(backend)(*inputs).float().square().sum()
        within = torch.autograd.grad(loss, inputs, retain_graph=True)
    assert all(map(torch.equal, within, torch.autograd.grad(loss, inputs)))


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_any_dtypes(target: tuple[str, str], autocast_dtype: torch.dtype) -> None:
    """The result has the autocast dtype, and every gradient that of its input, whatever the others are."""
    backend, device = target
    mixtures = {GATHER: itertools.product(DTYPES[1:], repeat=2), ATTENTION: itertools.permutations(DTYPES[1:])}
    for op, mixture in mixtures.items():
        inputs = op.inputs(batch=1, channels=4, regions=3, spatial=(5,), device=device)
        for dtypes in mixture:
            mixed = [t.to(dtype).requires_grad_() for t, dtype in zip(inputs, dtypes, strict=True)]
            with torch.autocast(device, autocast_dtype):
                out = op.on(backend)(*mixed)
            assert out.dtype == autocast_dtype
            cast = [t.to(autocast_dtype) for t in mixed]
            assert torch.equal(out, op.on(backend)(*(cast if op is ATTENTION else (cast[0], mixed[1]))))
            assert tuple(gradient.dtype for gradient in torch.autograd.grad(out.sum(), mixed)) == dtypes


@both_ops
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_transforms(op: Op, target: tuple[str, str], autocast_dtype: torch.dtype) -> None:
    backend, device = target
    inputs = op.inputs(device=device)
    call = op.on(backend)
    with torch.autocast(device, autocast_dtype):
        gradients = torch.func.grad(lambda *x: call(*x).float().square().sum(), tuple(range(len(inputs))))(*inputs)
        tracked = [t.clone().requires_grad_() for t in inputs]
        expected = torch.autograd.grad(call(*tracked).float().square().sum(), tracked)
        # A transform that goes through the definition casts the products of its backward pass, as plain PyTorch does.
        assert all((a - b).norm() <= b.norm() / 32 for a, b in zip(gradients, expected, strict=True))
        assert torch.func.jvp(call, inputs, inputs)[1].dtype == autocast_dtype
        assert torch.vmap(call, in_dims=1)(*(t.unsqueeze(1) for t in inputs)).dtype == autocast_dtype


@pytest.mark.parametrize("cast_before", [False, True])
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_a_module(target: tuple[str, str], autocast_dtype: torch.dtype, cast_before: bool) -> None:
    backend, device = target
    dtype = autocast_dtype if cast_before else torch.float32
    module = SpatialOCR(8, 4, 6, dropout=0.0).to(device)
    inputs = [torch.randn(2, 8, *size, dtype=dtype, device=device, requires_grad=True) for size in ((3, 4), (5, 1))]
    with use_backend(backend), torch.autocast(device, autocast_dtype):
        out = module(*inputs)
    out.float().square().sum().backward()
    assert out.dtype == autocast_dtype
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())
    assert all(t.grad.dtype == dtype for t in inputs)


@both_ops
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacfwd, torch.func.hessian])
def test_compile_of_transforms(op: Op, transform: Callable[..., Any]) -> None:
    torch._dynamo.reset()
    inputs = op.inputs(batch=1, channels=2, regions=3, spatial=(2,))
    function = transform(lambda *x: op.on("reference")(*x).square().sum())
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), function(*inputs))


@both_ops
def test_vmap(op: Op, target: tuple[str, str]) -> None:
    """Over any argument and dimension, against a loop."""
    backend, device = target
    inputs = op.inputs(device=device)
    stacked = [torch.stack([t, t.flip(1), t * 2], dim=1) for t in inputs]
    everywhere = torch.vmap(op.on(backend), in_dims=1)(*stacked)
    for i in range(3):
        torch.testing.assert_close(everywhere[i], op.on(backend)(*(s[:, i] for s in stacked)))
    first_only = torch.vmap(op.on(backend), in_dims=(1, *(None for _ in inputs[1:])), out_dims=1)(
        stacked[0], *inputs[1:]
    )
    for i in range(3):
        torch.testing.assert_close(first_only[:, i], op.on(backend)(stacked[0][:, i], *inputs[1:]))


@both_ops
def test_vmap_of_the_backward(op: Op, target: tuple[str, str]) -> None:
    backend, device = target
    inputs = op.inputs(device=device, requires_grad=True)
    out = op.on(backend)(*inputs)
    directions = torch.stack([torch.ones_like(out), torch.cos(out.detach())])
    batched = torch.autograd.grad(out, inputs, directions, is_grads_batched=True, retain_graph=True)
    for i in range(2):
        single = torch.autograd.grad(out, inputs, directions[i], retain_graph=True)
        torch.testing.assert_close([b[i] for b in batched], list(single))


# The block


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_an_empty_batch(block_target: tuple[str, str], dropout: float) -> None:
    """With a mask, which has no elements then, and without."""
    backend, device = block_target
    feats, proxy = torch.randn(0, 8, 3, 4, device=device), torch.randn(0, 8, 5, 1, device=device)
    feats.requires_grad_()
    found = []
    for cls in (reference.SpatialOCR, SpatialOCR):
        module = cls(8, 4, 6, dropout=dropout).to(device).train()
        with use_backend(backend):
            z = module(feats, proxy)
            gradients = torch.autograd.grad(z.sum(), [feats, *module.parameters()])
        assert z.shape == (0, 6, 3, 4)
        assert not any(gradient.any() for gradient in gradients)
        found.append([z, *gradients])
    torch.testing.assert_close(found[1], found[0])


BATCH, CHANNELS, DEPTH, REGIONS, OUTPUTS = 2, 5, 4, 3, 6
TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda loss, x: torch.func.grad(loss)(x),
    "vjp": lambda loss, x: torch.func.vjp(loss, x)[1](x.new_ones(())),
    "jvp": lambda loss, x: torch.func.jvp(loss, (x,), (x,)),
    "jvp of grad": lambda loss, x: torch.func.jvp(torch.func.grad(loss), (x,), (x,)),
    "grad of grad": lambda loss, x: torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(x),
    "functionalize": lambda loss, x: torch.func.functionalize(loss)(x),
    "vmap of others": lambda loss, x: torch.func.vmap(lambda y: loss(x) + y)(x.new_ones(1)),
}


def block_of(feats: Tensor, tensors: list[Tensor], norm: Norm | None = None, **options: Any) -> Tensor:
    """Whose last layer has a norm."""
    key, value, first, second, fusing = tensors
    pixel = [Layer(first), Layer(second)]
    return ocr_block(feats, key, value, pixel, None, Layer(fusing, None, norm, 1.0), **options)


def block_tensors() -> tuple[Tensor, list[Tensor]]:
    shapes = [(BATCH, DEPTH, REGIONS)] * 2 + [(DEPTH, CHANNELS), (DEPTH, DEPTH), (OUTPUTS, DEPTH + CHANNELS)]
    return torch.randn(BATCH, CHANNELS, 3, 4), [torch.randn(shape) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # of statistics
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_statistics_run_in_transforms(transform: str, dtype: torch.dtype) -> None:
    """Captured ones, as those of `torch.nn.functional.batch_norm` do."""
    feats, tensors = block_tensors()
    mean, var = torch.zeros(OUTPUTS, dtype=dtype), torch.ones(OUTPUTS, dtype=dtype)
    plain = nn.BatchNorm2d(OUTPUTS, affine=False, momentum=0.3)
    plain.num_batches_tracked = None
    norm = Norm(None, None, mean, var, momentum=0.3)
    found = TRANSFORMS[transform](lambda x: block_of(x, tensors, norm, backend="reference").square().sum(), feats)
    expected = TRANSFORMS[transform](lambda x: plain(block_of(x, tensors, backend="reference")).square().sum(), feats)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close((mean.float(), var.float()), (plain.running_mean, plain.running_var))


def test_statistics_of_a_vmap_run_each() -> None:
    feats, tensors = block_tensors()
    each = [torch.zeros(2, OUTPUTS), torch.ones(2, OUTPUTS)]
    several = torch.stack((feats, feats + 1))
    torch.func.vmap(lambda x, mean, var: block_of(x, tensors, Norm(None, None, mean, var)))(several, *each)
    for i, x in enumerate(several):
        alone = [torch.zeros(OUTPUTS), torch.ones(OUTPUTS)]
        block_of(x, tensors, Norm(None, None, *alone))
        torch.testing.assert_close([statistics[i] for statistics in each], alone)


@pytest.mark.parametrize("training", [True, False])
def test_the_blocks_checks_are_traced(training: bool) -> None:
    """Of all that a call may have: tracers and transforms have tensors of their own kinds."""
    feats, tensors = block_tensors()
    statistics = [torch.zeros(OUTPUTS), torch.ones(OUTPUTS)]
    weight, bias = torch.randn(3, OUTPUTS), torch.randn(3)
    mask = torch.ones(BATCH, OUTPUTS) if training else None

    def call(feats: Tensor, mask: Tensor | None, statistics: list[Tensor], *tensors: Tensor) -> Tensor:
        norm = Norm(None, None, *statistics, training)
        return block_of(feats, list(tensors), norm, classifier=(weight, bias), mask=mask)

    args = feats, mask, [each.clone() for each in statistics], *tensors
    expected = call(feats, mask, statistics, *tensors)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), expected)
    torch.testing.assert_close(args[2], statistics)
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(*args).shape == expected.shape
    each = torch.func.vmap(call, (0, None, 0, *[None] * 5))(feats[None], mask, [s[None] for s in statistics], *tensors)
    torch.testing.assert_close(each[0], expected)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, args)
        assert call(*fakes).shape == expected.shape


# Backends


def test_available_backends() -> None:
    backends = available_backends()
    assert list(backends) == ["reference", "triton", "native"]
    assert backends["reference"] is True
    assert all(reason is True or (isinstance(reason, str) and reason) for reason in backends.values())


def set_problems(monkeypatch: pytest.MonkeyPatch, **problems: str | None) -> None:
    for name, problem in problems.items():
        for device_type in (None, "cpu", "cuda"):
            monkeypatch.setitem(ocr_kernels.core.backends._problems, (name, device_type), problem)


def test_use_backend_is_nested_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(
        "ocr_kernels.gather.functional.spatial_gather_op", lambda *args: used.append(args[-1]) or (args[0],)
    )
    set_problems(monkeypatch, triton=None, native="not here")
    x = torch.randn(1, 2, 3)
    with use_backend("triton"):
        spatial_gather(x, x, backend="reference")
        with use_backend("reference"):
            spatial_gather(x, x)
        with pytest.raises(TypeError, match="feats must be a tensor"), use_backend(None):
            spatial_gather(None, x)
        assert ocr_kernels.core.backends._selected == "triton"
    spatial_gather(x, x)
    assert used == ["reference", "reference", "reference"]


def test_use_backend_reaches_other_threads() -> None:
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(ocr_kernels.core.backends._selected))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_backward_runs_on_the_forwards_backend(kernels: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    backend, device = kernels
    feats, logits = GATHER.inputs(device=device, requires_grad=True)
    with use_backend(backend):
        out = spatial_gather(feats, logits)
    expected = torch.autograd.grad(spatial_gather(feats, logits, backend=backend).sum(), (feats, logits))
    called = []
    module = __import__(f"ocr_kernels.gather.{backend}", fromlist=["backward"])
    original = module.backward
    monkeypatch.setattr(module, "backward", lambda *args: called.append(backend) or original(*args))
    actual = torch.autograd.grad(out.sum(), (feats, logits))
    assert called == [backend]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_unknown_and_impossible_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    set_problems(monkeypatch, native="there is no compiled library")
    x = torch.randn(1, 2, 3)
    with pytest.raises(ValueError, match="backend must be one of reference, triton, native, but is 'cuda'"):
        spatial_gather(x, x, backend="cuda")
    with pytest.raises(ValueError, match="but is 'fastest'"), use_backend("fastest"):
        raise AssertionError("the block must not run")
    with pytest.raises(RuntimeError, match=r"backend 'native' cannot run: .*no compiled library"):
        spatial_gather(x, x, backend="native")
    with pytest.raises(RuntimeError, match="backend 'native' cannot run"), use_backend("native"):
        raise AssertionError("the block must not run")


@pytest.mark.parametrize(("device", "triton", "native", "chosen"), [
    ("cpu", None, None, "native"),
    ("cpu", None, "not here", "reference"),
    ("cuda", None, None, "triton"),
    ("cuda", "not here", None, "native"),
    ("cuda", "not here", "not here", "reference"),
    ("meta", None, None, "reference"),
])  # fmt: skip
def test_automatic_choice(
    device: str, triton: str | None, native: str | None, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_problems(monkeypatch, triton=triton, native=native)
    assert resolve_backend(torch.device(device)) == chosen
    of_block = chosen if device == "cpu" else chosen.replace("native", "reference")
    assert resolve_backend(torch.device(device), None, implemented(device)) == of_block


def test_native_needs_its_devices_and_an_op_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    set_problems(monkeypatch, native=None)
    monkeypatch.setitem(ocr_kernels.core.backends._problems, ("native", "cuda"), "not here")
    with pytest.raises(RuntimeError, match="backend 'native' cannot run on a meta tensor: its kernels are for"):
        spatial_gather(x3.to("meta"), x3.to("meta"), backend="native")
    with pytest.raises(RuntimeError, match="backend 'native' cannot run on a cuda tensor: not here"):
        resolve_backend(torch.device("cuda"), "native")
    with pytest.raises(RuntimeError, match="backend 'native' has no kernels for this op; reference and triton have"):
        resolve_backend(x3.device, "native", implemented("cuda"))


# Errors

x3, x4 = torch.zeros(2, 3, 5), torch.zeros(2, 3, 4, 5)
region = torch.zeros(2, 3, 6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: spatial_gather([1.0], x3), TypeError, "feats must be a tensor, but is list"),
        (lambda: spatial_gather(x3, None), TypeError, "logits must be a tensor, but is NoneType"),
        (lambda: spatial_gather(x3.int(), x3), TypeError, "feats must be float64, .*but is torch.int32"),
        (lambda: spatial_gather(x3, x3.bool()), TypeError, "logits must be float64, .*but is torch.bool"),
        (lambda: spatial_gather(x3, x3, "1"), TypeError, "^scale must be a number"),
        (lambda: spatial_gather(x3[0], x3[0]), ValueError, r"feats must have shape \[B, C, \*S\].*but has \(3, 5\)"),
        (lambda: spatial_gather(x3[:, :0], x3), ValueError, "feats must have shape .*C >= 1"),
        (lambda: spatial_gather(x3, x3[:, :0]), ValueError, "logits must have shape .*K >= 1"),
        (lambda: spatial_gather(x3, x3[:1]), ValueError, r"logits .* beside feats \(2, 3, 5\), but has \(1, 3, 5\)"),
        (lambda: spatial_gather(x4, x3), ValueError, "logits must have shape"),
        (lambda: spatial_gather(x3, x3[:, :, :4]), ValueError, "logits must have shape"),
        (lambda: spatial_gather(x3, x3.to("meta")), ValueError, "logits must be on the device of feats, cpu, .*meta"),
        (lambda: pixel_region_attention(1, region, region), TypeError, "query must be a tensor, but is int"),
        (lambda: pixel_region_attention(x4, region, 2), TypeError, "value must be a tensor, but is int"),
        (lambda: pixel_region_attention(x4.long(), region, region), TypeError, "query must be float64"),
        (lambda: pixel_region_attention(x4, region.half(), region), TypeError, "key must have the dtype of query"),
        (lambda: pixel_region_attention(x4, region, region.double()), TypeError, "value must have the dtype of query"),
        (lambda: pixel_region_attention(x4[0, 0], region, region), ValueError, "query must have shape"),
        (lambda: pixel_region_attention(x4, region[:, :2], region), ValueError, r"key .* beside query \(2, 3, 4, 5\)"),
        (lambda: pixel_region_attention(x4, region[..., None], region), ValueError, "key must have shape"),
        (lambda: pixel_region_attention(x4, region[..., :0], region[..., :0]), ValueError, "key .*K >= 1"),
        (lambda: pixel_region_attention(x4, region, region[..., :5]), ValueError, r"value .* beside key \(2, 3, 6\)"),
        (lambda: pixel_region_attention(x4, region, region[:, :0]), ValueError, "value .*Dv >= 1"),
        (lambda: pixel_region_attention(x4, region, region.to("meta")), ValueError, "value must be on the device"),
    ],
)
def test_errors_name_the_argument(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_the_registered_ops_check_too() -> None:
    with pytest.raises(ValueError, match="logits must have shape"):
        torch.ops.ocr_kernels.spatial_gather(x3, x4, 1.0, "reference")
    with pytest.raises(ValueError, match="key must have shape"):
        torch.ops.ocr_kernels.pixel_region_attention(x4, region[:, :2], region, None, "reference")
