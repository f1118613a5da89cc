"""Run a module and compare: outputs, gradients, and which of our ops ran."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class CountOps(TorchDispatchMode):
    """How often each of our forward ops ran."""

    def __init__(self) -> None:
        super().__init__()
        self.gather = self.attention = self.block = self.inference = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.gather += func is torch.ops.ocr_kernels.spatial_gather.default
        self.attention += func is torch.ops.ocr_kernels.pixel_region_attention.default
        self.block += func is torch.ops.ocr_kernels.ocr_block.default
        self.inference += func is torch.ops.ocr_kernels.ocr_block_inference.default
        return func(*args, **(kwargs or {}))


def results(module: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """Outputs, and the gradients of inputs and parameters for a fixed random cotangent."""
    inputs = tuple(t.clone().requires_grad_() for t in inputs)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        outputs = [leaf for leaf in pytree.tree_leaves(module(*inputs)) if isinstance(leaf, Tensor)]
        wanted = {f"input {i}": t for i, t in enumerate(inputs)} | dict(module.named_parameters())
        loss = sum((out.double() * torch.randn(out.shape, dtype=torch.float64)).sum() for out in outputs)
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
    return {f"output {i}": t for i, t in enumerate(outputs)} | dict(zip(wanted, gradients, strict=True))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Differences in proportion to each tensor's largest value."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        assert found[name].dtype == tensor.dtype, name
        error = (found[name].double() - tensor.double()).abs().max().item()
        assert error <= tolerance * max(1.0, tensor.abs().max().item()), name
