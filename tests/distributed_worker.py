"""What each of two processes does for test_distributed.py: `python distributed_worker.py RANK FILE`, a case a line."""

from __future__ import annotations

import copy
import functools
import sys
import traceback
from collections.abc import Callable

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ocr_kernels import available_backends, modules, reference, replace_ocr_modules, use_backend
from ocr_kernels.block import Layer, Norm, ocr_block

B, C, D, V, Y, OUT, K = 3, 5, 4, 3, 6, 7, 3
RANK = int(sys.argv[1]) if __name__ == "__main__" else 0


def mine(tensor: Tensor, first: int) -> Tensor:
    """The images of this process, of which the first one has `first`."""
    return tensor[:first] if RANK == 0 else tensor[first:]


def summed(tensor: Tensor) -> Tensor:
    total = tensor.clone()
    distributed.all_reduce(total)
    return total


def shared_statistics(first: int) -> None:
    """z, gradients and running statistics are those of one process with the whole batch, however it is divided."""
    torch.manual_seed(0)
    shapes = [(B, C, 4, 3), (B, D, K), (B, V, K), (D, C), (D, D), (Y, V), (OUT, Y + C)]
    shapes += [(n,) for n in (D, D, D, D, Y, Y, OUT, OUT)]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    cotangent = torch.randn(B, OUT, 4, 3, dtype=torch.float64)

    def run(args: list[Tensor], cotangent: Tensor, group: distributed.ProcessGroup | None) -> tuple[list[Tensor], ...]:
        args = [arg.clone().requires_grad_() for arg in args]
        feats, key, value, pixel_in, pixel_out, up, fusing, *vectors = args
        running = [torch.zeros(n, dtype=torch.float64) for n in (D, D, D, D, Y, Y, OUT, OUT)]

        def layer(weight: Tensor, i: int) -> Layer:
            return Layer(weight, None, Norm(vectors[i], vectors[i + 1], running[i], running[i + 1], group=group))

        pixel = [layer(pixel_in, 0), layer(pixel_out, 2)]
        z = ocr_block(feats, key, value, pixel, layer(up, 4), layer(fusing, 6))
        return [z.detach(), *torch.autograd.grad(z, args, cotangent)], running

    (z, *gradients), running = run(tensors, cotangent, None)
    parts = [mine(tensor, first) if i < 3 else tensor for i, tensor in enumerate(tensors)]
    (found, *found_gradients), found_running = run(parts, mine(cotangent, first), distributed.group.WORLD)
    torch.testing.assert_close(found, mine(z, first))
    for i, (a, b) in enumerate(zip(found_gradients, gradients, strict=True)):
        torch.testing.assert_close(*((a, mine(b, first)) if i < 3 else (summed(a), b)), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found_running, running)


def spatial_ocr(kind: type[nn.Module]) -> nn.Module:
    """With norms on the pixels alone: PyTorch's SyncBatchNorm does not run on CPUs."""
    torch.manual_seed(0)
    module = kind(16, 8, 16, dropout=0.0)
    for part in (module.object_context_block.f_object, module.object_context_block.f_down):
        for layer in part:
            if isinstance(layer, nn.Sequential):
                layer[0] = nn.Identity()
    return module.double()


def draw() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(4, 16, *s, dtype=torch.float64, generator=generator) for s in ((5, 6), (3, 1)))


def train(module: nn.Module, inputs: tuple[Tensor, ...], steps: int = 3) -> list[Tensor]:
    """A few steps; the outputs of each."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    outputs = []
    for _ in range(steps):
        optimizer.zero_grad()
        out = module(*inputs)
        out.square().mean().backward()
        optimizer.step()
        outputs.append(out.detach())
    return outputs


def compare_training(build: Callable[[], nn.Module], parallel: Callable[[nn.Module], nn.Module]) -> None:
    """The training of two processes on half a batch each is that of one on the whole, of the plain module."""
    inputs = draw()
    plain = spatial_ocr(reference.SpatialOCR)
    expected = train(plain, inputs)
    module = parallel(nn.SyncBatchNorm.convert_sync_batchnorm(build()))
    found = train(module, tuple(mine(tensor, 2) for tensor in inputs))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, mine(b, 2), rtol=1e-9, atol=1e-10)
    states = module.state_dict()
    for name, b in plain.state_dict().items():
        a = states["module." + name] if "module." + name in states else states[name]
        torch.testing.assert_close(a.full_tensor() if isinstance(a, DTensor) else a, b, rtol=1e-8, atol=1e-10)


def ours() -> nn.Module:
    return spatial_ocr(modules.SpatialOCR)


def replaced() -> nn.Module:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(spatial_ocr(reference.SpatialOCR)).float()
    (row,) = (row for row in replace_ocr_modules(model).replaced if row.name == "")
    assert row.computations is not None
    assert "training" in row.computations, row
    return model.double()


def sharded(module: nn.Module) -> nn.Module:
    fully_shard(module, mesh=distributed.init_device_mesh("cpu", (2,)))
    return module


def replaced_once_sharded() -> None:
    """A trial would leave FSDP2 with gathered weights that are not there; the model stays as it is, and runs."""
    model, inputs = sharded(spatial_ocr(reference.SpatialOCR)), draw()
    report = replace_ocr_modules(model, example_inputs=inputs)
    assert not report
    assert "replace before `fully_shard`" in report.left_alone[0].reason, report
    expected = spatial_ocr(reference.SpatialOCR)(*inputs)
    torch.testing.assert_close(model(*inputs), expected, rtol=1e-9, atol=1e-10)


def group_of_one() -> None:
    """A process group of this process alone shares nothing."""
    groups = [distributed.new_group([rank]) for rank in range(2)]
    module = nn.SyncBatchNorm.convert_sync_batchnorm(ours(), groups[RANK])
    expected = copy.deepcopy(spatial_ocr(reference.SpatialOCR))
    torch.testing.assert_close(module(*draw()), expected(*draw()), rtol=1e-9, atol=1e-10)


def by_triton(first: int) -> None:
    with use_backend("triton"):
        shared_statistics(first)


CASES: dict[str, Callable[[], None]] = {
    "two images and one": lambda: shared_statistics(2),
    "all images and none": lambda: shared_statistics(3),
    "DDP": lambda: compare_training(ours, DistributedDataParallel),
    "DDP, replaced": lambda: compare_training(replaced, DistributedDataParallel),
    "FSDP2": lambda: compare_training(ours, sharded),
    "FSDP2, replaced": lambda: compare_training(replaced, sharded),
    "FSDP2, replaced too late": replaced_once_sharded,
    "a group of one": group_of_one,
}
if available_backends("cpu")["triton"] is True:  # in its interpreter
    CASES |= {f"{name}, by Triton": functools.partial(by_triton, n) for name, n in (("divided", 2), ("none in one", 3))}

if __name__ == "__main__":
    torch.set_num_threads(1)
    DistributedDataParallel._passing_sync_batchnorm_handle = lambda *_: None  # it refuses SyncBatchNorm on CPUs
    distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=RANK, world_size=2)
    for name, case in CASES.items():
        try:
            case()
            print(f"{name}: right")
        except Exception:
            print(f"{name}: {traceback.format_exc()!r}")
    distributed.destroy_process_group()
