"""What only a GPU can show: streams, graphs, a second device, large tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from ops import GATHER, Op, both_ops

from ocr_kernels import use_backend
from ocr_kernels.core.libraries import problem
from ocr_kernels.modules import SpatialOCR
from ocr_kernels.testing import Layout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to PyTorch"),
]
NATIVE = pytest.param("native", marks=pytest.mark.skipif(problem("cuda") is not None, reason=str(problem("cuda"))))
backends = pytest.mark.parametrize("backend", ["triton", NATIVE, "reference"])
kernels = pytest.mark.parametrize("backend", ["triton", NATIVE])


def forward_and_backward(op: Op, backend: str, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    out = op.on(backend)(*inputs)
    return out, *torch.autograd.grad(out, inputs, torch.ones_like(out))


@both_ops
@backends
def test_on_another_stream(op: Op, backend: str) -> None:
    inputs = op.inputs(channels=64, spatial=(64, 64), device="cuda", requires_grad=True)
    expected = forward_and_backward(op, backend, inputs)
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results.append(forward_and_backward(op, backend, inputs))
    torch.cuda.synchronize()
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def check_capture(step: Callable[[], tuple[torch.Tensor, ...]], inputs: Sequence[torch.Tensor]) -> None:
    """Captured once, replayed on other numbers."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for tensor in inputs:
            tensor.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    for actual, expected in zip(captured, step(), strict=True):
        torch.testing.assert_close(actual, expected)


@both_ops
@backends
@pytest.mark.parametrize("regions", [5, 70])
def test_cuda_graph(op: Op, backend: str, regions: int) -> None:
    inputs = op.inputs(regions=regions, channels=32, spatial=(16, 24), device="cuda", requires_grad=True)
    check_capture(lambda: forward_and_backward(op, backend, inputs), inputs)


@backends
def test_cuda_graph_of_a_module(backend: str) -> None:
    """In float64, so that it does not matter which convolutions cuDNN takes."""
    module = SpatialOCR(32, 16, 32, dropout=0.0).to("cuda", torch.float64)
    feats = torch.randn(2, 32, 16, 24, device="cuda", dtype=torch.float64, requires_grad=True)
    regions = torch.randn(2, 32, 5, 1, device="cuda", dtype=torch.float64, requires_grad=True)
    wanted = (feats, regions, *module.parameters())

    def step() -> tuple[torch.Tensor, ...]:
        with use_backend(backend):
            out = module(feats, regions)
        return out, *torch.autograd.grad(out, wanted, torch.ones_like(out).cumsum(3))

    check_capture(step, (feats, regions))


@both_ops
@backends
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
def test_second_device(op: Op, backend: str) -> None:
    """Tensors of a device that is not the current one."""
    inputs = op.inputs(device="cuda:1", requires_grad=True)
    with torch.cuda.device(0):
        results = forward_and_backward(op, backend, inputs)
    assert all(result.device == torch.device("cuda:1") for result in results)
    expected = forward_and_backward(op, backend, tuple(t.detach().to("cuda:0").requires_grad_() for t in inputs))
    for actual, plain in zip(results, expected, strict=True):
        torch.testing.assert_close(actual.cpu(), plain.cpu())


@both_ops
@kernels
def test_peak_memory(op: Op, backend: str) -> None:
    """A forward needs its output and little more: no map of pixels by regions."""
    inputs = op.inputs(batch=1, channels=128, regions=150, spatial=(256, 256), dtype=torch.bfloat16, device="cuda")
    op.on(backend)(*inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = op.on(backend)(*inputs)
    peak = torch.cuda.max_memory_allocated() - before
    probabilities = 150 * 256 * 256 * 4
    assert peak - out.nbytes < probabilities


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("batch", "channels", "regions", "spatial"),
    [(1, 512, 19, (128, 256)), (2, 512, 150, (130, 130)), (1, 512, 1203, (64, 64)), (8, 64, 2, (96, 96))],
    ids=["cityscapes", "ade20k", "long-tail", "interactive"],
)
@both_ops
@kernels
def test_parity_at_a_networks_size(
    op: Op,
    backend: str,
    batch: int,
    channels: int,
    regions: int,
    spatial: tuple[int, int],
    layout: Layout,
    dtype: torch.dtype,
) -> None:
    inputs = op.inputs(
        batch=batch,
        channels=channels if op is GATHER else channels // 2,
        regions=regions,
        spatial=spatial,
        dtype=dtype,
        layout=layout,
        device="cuda",
        requires_grad=True,
    )
    op.assert_parity(backend, inputs)


@both_ops
@kernels
def test_more_images_than_a_grid_is_high(op: Op, backend: str) -> None:
    """The second and the third axis of a grid end at 65,535."""
    inputs = op.inputs(batch=66_000, channels=2, regions=2, spatial=(1, 2), device="cuda", requires_grad=True)
    op.assert_parity(backend, inputs)


@kernels
def test_more_elements_than_32_bits_count(backend: str) -> None:
    """The last channels lie 2**31 elements and more from the first; float64 has room for these alone."""
    channels, pixels = 520, 2**22
    feats = torch.randn(1, channels, pixels, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    logits = torch.randn(1, 3, pixels, device="cuda")
    out = GATHER.on(backend)(feats, logits)
    last = feats[:, -8:].detach().double().requires_grad_()
    exact = GATHER.definition(last, logits.double())
    torch.testing.assert_close(out[:, -8:].double(), exact, rtol=0.02, atol=1e-4)
    grad = torch.randn_like(out)
    (dfeats,) = torch.autograd.grad(out, feats, grad)
    (expected,) = torch.autograd.grad(exact, last, grad[:, -8:].double())
    torch.testing.assert_close(dfeats[:, -8:].double(), expected, rtol=0.02, atol=5e-7)


def test_float32_precision_follows_pytorch() -> None:
    feats, logits = GATHER.inputs(channels=64, regions=19, spatial=(64, 64), device="cuda")
    exact = GATHER.definition(feats.double(), logits.double())
    errors = {}
    previous = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            errors[precision] = (GATHER.on("triton")(feats, logits) - exact).abs().max().item()
    finally:
        torch.backends.cuda.matmul.fp32_precision = previous
    assert errors["ieee"] < 1e-5
    if torch.cuda.get_device_capability() >= (8, 0):
        assert errors["tf32"] > errors["ieee"]
