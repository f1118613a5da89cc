"""Nothing is moved twice: what the kernels read and write, counted in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="interprets Triton kernels")

import triton
import triton.language as tl
from traffic import Launch, record_traffic

import ocr_kernels.attention.triton
import ocr_kernels.core.triton_host
import ocr_kernels.gather.triton
from ocr_kernels.attention import registration as attention
from ocr_kernels.block import registration as block
from ocr_kernels.block import tiles
from ocr_kernels.core.backends import interpreting
from ocr_kernels.core.tiles import Problem
from ocr_kernels.core.triton_host import device_facts
from ocr_kernels.gather import registration as gather

pytestmark = pytest.mark.skipif(not interpreting(), reason="counts in Triton's interpreter; set TRITON_INTERPRET=1")


@triton.jit
def shifted_sum_kernel(out, x, length, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = tl.load(x + i, mask=i < length, other=0.0)
    before = tl.load(x + i - 1, mask=(i >= 1) & (i < length), other=0.0)
    tl.store(out + i, here + before, mask=i < length)


def test_counts() -> None:
    x, out = torch.randn(2, 10)[1], torch.empty(10, dtype=torch.float64)
    with record_traffic() as launches:
        shifted_sum_kernel[(2,)](out, x, 10, BLOCK=8)
        total = out[:4].sum()
    kernel, op = launches
    assert (kernel.name, op.name) == ("shifted_sum_kernel", "aten::sum")
    assert kernel.loads.counts(x).tolist() == [2] * 9 + [1]
    assert kernel.stores.counts(out).tolist() == [1] * 10
    assert not kernel.loads.counts(out).any()
    assert (kernel.loads.bytes, kernel.stores.bytes) == (19 * 4, 10 * 8)
    assert op.loads.counts(out).tolist() == [1] * 4 + [0] * 6
    assert op.stores.counts(total) == 1
    assert op.bytes == 5 * 8
    with pytest.raises(AssertionError):
        assert_once(launches, read=[x])


def assert_once(launches: Iterable[Launch], read: Iterable[Tensor] = (), written: Iterable[Tensor] = ()) -> None:
    """Each launch that reads a tensor reads every element of it once; the elements written are written once in all."""
    for tensor in read:
        counts = [counts for launch in launches if (counts := launch.loads.counts(tensor)).any()]
        assert counts
        assert all(bool((times == 1).all()) for times in counts)
    for tensor in written:
        assert (sum(launch.stores.counts(tensor) for launch in launches) == 1).all()


def draw(*shape: int, dtype: torch.dtype, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    return torch.randn(shape, dtype=dtype).contiguous(memory_format=memory_format)


@pytest.mark.slow
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize(
    ("regions", "dtype"),
    [
        *((regions, torch.bfloat16) for regions in (19, 171, 256)),
        *(pytest.param(regions, torch.bfloat16, marks=pytest.mark.wide) for regions in (59, 150)),
        (171, torch.float32),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
class TestPixelsPassOnce:
    """Up to 256 regions, and with no size that fills its last tile."""

    sizes = (1, 140, 9, 11)

    def test_gather(self, regions: int, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
        batch, channels, *spatial = self.sizes
        feats = draw(batch, channels, *spatial, dtype=dtype, memory_format=memory_format)
        # with no peaks, whose gradients are written once more
        logits = draw(batch, regions, *spatial, dtype=dtype, memory_format=memory_format) / 4
        with record_traffic() as launches:
            out, stats = gather._forward(feats, logits, 1.0, "triton")
        assert_once(launches, read=[feats], written=[out, stats])
        with record_traffic() as launches:
            gradients = gather._backward(out, feats, logits, stats, 1.0, True, True, "triton")
        assert_once(launches, read=[feats, logits], written=gradients)

    def test_attention(self, regions: int, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
        batch, channels, *_ = self.sizes
        query, grad = (draw(*self.sizes, dtype=dtype, memory_format=memory_format) for _ in range(2))
        key, value = (draw(batch, channels, regions, dtype=dtype) for _ in range(2))
        with record_traffic() as launches:
            out = attention._forward(query, key, value, None, "triton")
        assert_once(launches, read=[query], written=[out])
        with record_traffic() as launches:
            gradients = attention._backward(grad, query, key, value, None, True, True, True, "triton")
        assert_once(launches, read=[query, grad], written=gradients)


def block_weights(channels: int, key_channels: int, outputs: int, dtype: torch.dtype) -> list[Tensor]:
    """As the op takes them for z."""
    matrices = [
        draw(*shape, dtype=dtype)
        for shape in ((key_channels, channels), (key_channels, key_channels), (outputs, channels), (outputs, channels))
    ]
    biases = [draw(length, dtype=torch.float32) for length in (key_channels, key_channels, channels, outputs)]
    pixel_in, pixel_out, context, pixels = matrices
    pixel_in_bias, pixel_out_bias, up_bias, bias = biases
    return [pixel_in, pixel_in_bias, pixel_out, pixel_out_bias, up_bias, context, pixels, bias]


@pytest.mark.slow
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("regions", [19, 171, 256, *(pytest.param(k, marks=pytest.mark.wide) for k in (59, 150))])
def test_pixels_of_block(regions: int, memory_format: torch.memory_format) -> None:
    """The first kernel reads feats once, the second once for each tile of output channels; nothing else does."""
    channels, key_channels, outputs = 140, 40, 300
    feats = draw(1, channels, 9, 29, dtype=torch.bfloat16, memory_format=memory_format)
    key, contexts = (draw(1, size, regions, dtype=torch.bfloat16) for size in (key_channels, channels))
    weights = block_weights(channels, key_channels, outputs, torch.bfloat16)
    with record_traffic() as launches:
        z = block._infer(feats, key, contexts, weights, 1.0, (0.0,) * 4, "features", "triton")
    assert_once(launches, written=[z])
    reads = {launch.name: launch.loads.counts(feats) for launch in launches if launch.loads.counts(feats).any()}
    scattered = memory_format == torch.contiguous_format  # of an odd number of pixels
    problem = Problem(2, device_facts(feats.device), channels, regions, outputs, scattered)
    output_tiles = triton.cdiv(outputs, tiles.FUSE.choose(problem).outputs)
    assert output_tiles > 1
    expected = {"ocr_block_weights_kernel": 1, "ocr_block_fuse_kernel": output_tiles}
    assert {name: counts.unique().tolist() for name, counts in reads.items()} == {n: [c] for n, c in expected.items()}


@pytest.mark.slow
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("regions", [19, 171])
def test_pixels_of_block_in_training(regions: int, memory_format: torch.memory_format) -> None:
    """How often the kernels between PyTorch's products read each map that is saved, and write what they make."""
    channels, depth, outputs = 70, 40, 50
    feats = draw(2, channels, 9, 31, dtype=torch.bfloat16, memory_format=memory_format)
    matrices = [draw(*shape, dtype=torch.bfloat16) for shape in ((depth, channels), (depth, depth), (outputs, 120))]
    contexts = draw(2, 50, regions, dtype=torch.float32)
    vectors = [draw(n, dtype=torch.float32) for n in (depth, depth, 50, outputs) for _ in range(2)]
    tensors = (
        feats,
        draw(2, depth, regions, dtype=torch.bfloat16),
        *matrices,
        contexts,
        *vectors,
        torch.rand(2, outputs),
    )
    settings = 1.0, (0.0,) * 4, (1e-5,) * 4, ("",) * 4, True

    def times_read(launches: Iterable[Launch], tensor: Tensor) -> list[int]:
        ours = [launch for launch in launches if launch.name.startswith("ocr_block_")]
        return sum(launch.loads.counts(tensor) for launch in ours).unique().tolist()

    with record_traffic() as launches:
        z, *saved = block._forward(*tensors, *settings, "triton")
    hidden_in, hidden_out, weights, fused, _ = saved
    (softmax,) = (launch for launch in launches if launch.name == "ocr_block_region_weights_kernel")
    assert_once([softmax], read=[hidden_out], written=[weights])
    for each in (hidden_in, hidden_out, fused):
        assert times_read(launches, each) == [2, 3]  # a split's first tile once more
    grad = draw(*z.shape, dtype=torch.bfloat16, memory_format=memory_format)
    with record_traffic() as launches:
        block._backward(grad, *tensors, *saved, *settings, [True] * 14, "triton")
    assert [times_read(launches, each) for each in (hidden_in, hidden_out, fused, grad)] == [[3], [3], [2], [2]]
    through_y = [launch for launch in launches if launch.name == "ocr_block_contexts_gradient_kernel"]
    assert len(through_y) == (regions <= tiles.FEW[2])
    if through_y:
        assert_once(through_y, read=[weights])


@pytest.fixture
def spatial_size(monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Makes the device 4 of an H200's 132 multiprocessors; their share of the pixels of an image of 256x512.

    Programs do there what they do on the whole machine, and there are as many of them for each pixel. What is done once
    for an image weighs more than it does there, so what is counted is an upper bound.
    """
    facts = device_facts(torch.device("cpu"))._replace(multiprocessors=4)
    for module in (ocr_kernels.gather.triton, ocr_kernels.attention.triton, ocr_kernels.core.triton_host):
        monkeypatch.setattr(module, "device_facts", lambda device: facts)
    return 4 * 31, 32


def assert_total(launches: Iterable[Launch], limit: float, pixel_tensors: Iterable[Tensor]) -> None:
    """All launches together move at most `limit` times what moving these tensors once does."""
    floor = sum(tensor.nbytes for tensor in pixel_tensors)
    total = sum(launch.bytes for launch in launches) / floor
    shares = ", ".join(f"{launch.name} {launch.bytes / floor:.3f}" for launch in launches)
    assert total <= limit, f"{total:.3f} times the floor: {shares}"


@pytest.mark.slow
@pytest.mark.parametrize(("regions", "limit"), [(19, 1.25), (171, 2.2)])
def test_total_of_gather_forward(regions: int, limit: float, spatial_size: tuple[int, int]) -> None:
    feats, logits = (draw(1, channels, *spatial_size, dtype=torch.bfloat16) for channels in (512, regions))
    with record_traffic() as launches:
        gather._forward(feats, logits, 1.0, "triton")
    assert_total(launches, limit, [feats, logits])


@pytest.mark.slow
def test_total_of_attention_forward(spatial_size: tuple[int, int]) -> None:
    query = draw(1, 256, *spatial_size, dtype=torch.bfloat16)
    key, value = (draw(1, 256, 19, dtype=torch.bfloat16) for _ in range(2))
    with record_traffic() as launches:
        out = attention._forward(query, key, value, None, "triton")
    assert_total(launches, 1.15, [query, out])


@pytest.mark.slow
def test_total_of_attention_backward(spatial_size: tuple[int, int]) -> None:
    query, grad = (draw(1, 256, *spatial_size, dtype=torch.bfloat16) for _ in range(2))
    key, value = (draw(1, 256, 19, dtype=torch.bfloat16) for _ in range(2))
    with record_traffic() as launches:
        dquery, *_ = attention._backward(grad, query, key, value, None, True, True, True, "triton")
    assert_total(launches, 1.15, [query, grad, dquery])


@pytest.mark.slow
@pytest.mark.parametrize(("regions", "limit", "pixels_limit"), [(19, 8.1, 2.6), (171, 14.6, 7.6)])
def test_total_of_block(regions: int, limit: float, pixels_limit: float) -> None:
    """In all, where matrices are re-read for each tile of pixels, from the second-level cache; and without them."""
    feats = draw(1, 512, 16, 64, dtype=torch.bfloat16)
    key, contexts = (draw(1, size, regions, dtype=torch.bfloat16) for size in (256, 512))
    weights = block_weights(512, 256, 512, torch.bfloat16)
    with record_traffic() as launches:
        z = block._infer(feats, key, contexts, weights, 1.0, (0.0,) * 4, "features", "triton")
    assert_total(launches, limit, [feats, z])
    matrices = sum(
        int(launch.loads.counts(matrix).sum()) * matrix.itemsize for launch in launches for matrix in weights
    )
    total = sum(launch.bytes for launch in launches) - matrices
    assert total <= pixels_limit * (feats.nbytes + z.nbytes), f"{total / (feats.nbytes + z.nbytes):.3f} times the floor"
