"""A first look at every kernel: each launched once or twice at sizes that are odd, and held against float64.

The bounds are coarse, for faults and not for accuracy, which the tests judge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import ocr_kernels
from benchmarks.gpu.journal import Skipped, work
from ocr_kernels import testing
from ocr_kernels.attention.reference import pixel_region_attention
from ocr_kernels.block import Layer, Norm, ocr_block
from ocr_kernels.block.functional import Output
from ocr_kernels.core.backends import Backend
from ocr_kernels.gather.reference import spatial_gather

BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5, torch.float64: 1e-12}  # of relative L2 errors
CHANNELS = 72  # one tile, and a part of one
OPS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., tuple[Tensor, ...]]]] = {
    "gather": (ocr_kernels.spatial_gather, spatial_gather, testing.gather_inputs),
    "attention": (ocr_kernels.pixel_region_attention, pixel_region_attention, testing.attention_inputs),
}


@dataclass(frozen=True)
class Size:
    dtype: torch.dtype
    regions: int
    batch: int
    spatial: tuple[int, int]
    layout: testing.Layout

    def __str__(self) -> str:
        height, width = self.spatial
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype} K={self.regions} {self.batch}x{height}x{width} {self.layout}"


SIZES = (
    Size(torch.bfloat16, 19, 1, (130, 130), "contiguous"),
    Size(torch.bfloat16, 150, 3, (130, 130), "channels_last"),
    Size(torch.bfloat16, 300, 1, (33, 31), "contiguous"),
    Size(torch.bfloat16, 1, 3, (1, 1), "channels_last"),
    Size(torch.float16, 150, 1, (130, 130), "contiguous"),
    Size(torch.float16, 19, 3, (33, 31), "channels_last"),
    Size(torch.float32, 19, 3, (130, 130), "channels_last"),
    Size(torch.float32, 300, 1, (33, 31), "contiguous"),
    Size(torch.float32, 1, 1, (33, 31), "contiguous"),
    Size(torch.float64, 150, 3, (33, 31), "contiguous"),
    Size(torch.float64, 19, 1, (1, 1), "channels_last"),
)
BLOCK_SIZES = [size for size in SIZES if size.dtype != torch.float64]


# Results, how to compute them in float64, and a bound of their errors.
Launched = tuple[Sequence[Tensor], Callable[[], Sequence[Tensor]], float]


def launches(device: torch.device, backends: Sequence[Backend]) -> dict[str, Callable[[], Launched]]:
    """Both ops on each backend, forward and backward, and the block for inference and in training."""
    found: dict[str, Callable[[], Launched]] = {
        f"{backend} {op} {size}": partial(launch_op, op, backend, size, device)
        for size in SIZES
        for op in OPS
        for backend in backends
    }
    found |= {f"block {size}": partial(launch_block, size, device) for size in BLOCK_SIZES}
    return found | {
        f"training {size}": partial(launch_training, size, device) for size in SIZES if size.spatial != (1, 1)
    }


def launch_op(op: str, backend: Backend, size: Size, device: torch.device) -> Launched:
    reason = ocr_kernels.available_backends(device.type)[backend]
    if reason is not True:
        raise Skipped(str(reason))
    call, definition, draw = OPS[op]
    # as under autocast
    options: dict[str, Any] = {"logits_dtype": torch.float32} if op == "gather" and size.dtype.itemsize == 2 else {}
    inputs = draw(
        batch=size.batch,
        channels=CHANNELS,
        regions=size.regions,
        spatial=size.spatial,
        dtype=size.dtype,
        layout=size.layout,
        device=device,
        requires_grad=True,
        **options,
    )
    with testing.poisoned_memory():
        out = call(*inputs, backend=backend)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        results = out, *torch.autograd.grad(out, inputs, grad)

    def exact() -> Sequence[Tensor]:
        wide = [tensor.detach().cpu().double().requires_grad_() for tensor in inputs]
        out = definition(*wide)
        return out, *torch.autograd.grad(out, wide, grad.cpu().double())

    return results, exact, BOUNDS[size.dtype]


def launch_block(size: Size, device: torch.device, channels: int = CHANNELS, keys: int = 40) -> Launched:
    """z or, for several images, the class logits, in inference."""
    c, d, k = channels, keys, size.regions
    shapes = [(d, c), (d,), (d, d), (d,), (c, d), (c,), (c, 2 * c), (c,), (k, c), (k,)]
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = size.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    weights = [draw(*s, dtype=size.dtype if len(s) == 2 else torch.float32) * s[-1] ** -0.5 for s in shapes]
    feats = testing.lay_out(draw(size.batch, c, *size.spatial), size.layout)
    key, value = (draw(size.batch, d, k) for _ in range(2))
    output: Output = "features" if size.batch == 1 else "logits"

    def run(feats: Tensor, key: Tensor, value: Tensor, *weights: Tensor, backend: Backend | None = None) -> Tensor:
        pairs = [weights[i : i + 2] for i in range(0, len(weights), 2)]
        first, second, up, fusing = (Layer(weight, bias) for weight, bias in pairs[:-1])
        classifier = pairs[-1][0], pairs[-1][1]
        return ocr_block(feats, key, value, [first, second], up, fusing, classifier, output=output, backend=backend)

    with torch.no_grad(), testing.poisoned_memory():
        result = run(feats, key, value, *weights)

    def exact() -> Sequence[Tensor]:
        inputs = [tensor.cpu().double() for tensor in (feats, key, value, *weights)]
        return [run(*inputs, backend="reference")]

    return [result], exact, BOUNDS[size.dtype]


def launch_training(size: Size, device: torch.device, channels: int = CHANNELS, keys: int = 40) -> Launched:
    """z and all gradients, with the statistics of the batch; no activation, whose kinks would magnify rounding."""
    c, d, k = channels, keys, size.regions
    exact = torch.promote_types(size.dtype, torch.float32)
    shapes = [(size.batch, d, k), (size.batch, d, k), (d, c), (d, d), (c, d), (c, 2 * c)]
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = size.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    inputs = [testing.lay_out(draw(size.batch, c, *size.spatial), size.layout)]
    inputs += [draw(*shape) * (1.0 if len(shape) == 3 else shape[-1] ** -0.5) for shape in shapes]
    inputs += [1 + draw(n, dtype=exact) / 4 for n in (d, d, c, c)]
    grad = draw(size.batch, c, *size.spatial)

    def run(inputs: Sequence[Tensor], grad: Tensor, backend: Backend | None = None) -> Sequence[Tensor]:
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        feats, key, value, *matrices, g1, g2, g3, g4 = inputs
        first, second, up, fusing = (
            Layer(matrix, None, Norm(gain), 1.0) for matrix, gain in zip(matrices, (g1, g2, g3, g4), strict=True)
        )
        z = ocr_block(feats, key, value, [first, second], up, fusing, backend=backend)
        return z, *torch.autograd.grad(z, inputs, grad)

    with testing.poisoned_memory():
        results = run(inputs, grad)

    def expected() -> Sequence[Tensor]:
        return run([tensor.cpu().double() for tensor in inputs], grad.cpu().double(), "reference")

    return results, expected, BOUNDS[size.dtype]


def check(results: Sequence[Tensor], exact: Callable[[], Sequence[Tensor]], bound: float) -> dict[str, float]:
    """Relative L2 errors; absolute ones where the result is 0, as the derivative of a softmax over one element."""
    errors = {}
    for i, (result, expected) in enumerate(zip(results, exact(), strict=True)):
        expected = expected.detach()
        size = float(expected.norm())
        difference = float((result.detach().cpu().double() - expected).norm())
        error = difference / (size if size > 1e-9 else expected.numel() ** 0.5)
        errors["output" if i == 0 else f"gradient {i}"] = error
    wrong = [f"{name} is {error:.1e} off" for name, error in errors.items() if not error <= bound]  # NaN is
    assert not wrong, f"{', '.join(wrong)}, more than {bound:.0e}"
    return errors


def subjects(device: torch.device, backends: Sequence[Backend]) -> dict[str, Callable[[], dict[str, float]]]:
    return {name: partial(_checked, launch) for name, launch in launches(device, backends).items()}


def _checked(launch: Callable[[], Launched]) -> dict[str, float]:
    return check(*launch())


if __name__ == "__main__":
    torch.set_num_threads(2)  # several processes work on this
    work(subjects(torch.device("cuda"), ("triton", "native")))
