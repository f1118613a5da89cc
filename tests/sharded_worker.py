"""What each process does for test_sharded.py: `python sharded_worker.py RANK SIZE FILE [HOW]`, a case a line."""

from __future__ import annotations

import copy
import datetime
import functools
import itertools
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from ocr_kernels import GatherState, Layer, Norm, ocr_block, pixel_region_attention, spatial_gather

sys.path.append(str(Path(__file__).parent.parent / "examples"))

B, C, K, H, W, D, V = 3, 5, 4, 7, 3, 6, 2
RANK, SIZE = map(int, sys.argv[1:3]) if __name__ == "__main__" else (0, 2)
ROWS = {2: {"uneven": [3, 4], "none in one": [7, 0]}, 4: {"uneven": [1, 3, 2, 1], "none in one": [4, 0, 2, 1]}}


class Traffic(TorchDispatchMode):
    """The collectives of this process: their names, and the elements and bytes that go in."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().lower()
        if name.startswith(("c10d::", "_c10d_functional::", "ocr_kernels::all_reduce")) and (
            "reduce" in name or "gather" in name
        ):
            tensors = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            elements = sum(tensor.numel() for tensor in tensors)
            self.calls.append((name.split("::")[1].split(".")[0].replace("_", ""), elements, tensors[0].itemsize))
        return func(*args, **(kwargs or {}))

    def elements(self) -> list[int]:
        return [elements for _, elements, _ in self.calls]


def draw(*shapes: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shapes))
    return [torch.randn(tuple(shape), dtype=torch.float64, generator=generator) for shape in shapes]


@functools.cache
def mesh_of(shape: tuple[int, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", shape)


def same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


# The way of groups: each process has its rows, and the loss of its own.


def gather(feats: Tensor, logits: Tensor, group: distributed.ProcessGroup | None = None) -> Tensor:
    state = GatherState()
    state.update(feats, logits)
    return state.all_reduce(group).result()


def gathered(rows: str, run: Callable[..., Tensor] = gather, shift: float = 0.0) -> None:
    """f, and the gradients of a loss that is the sum of one in each process."""
    feats, logits = draw((B, C, H, W), (B, K, H, W))
    logits[:, 0, H - 1] += shift  # far from the others', of which some are nowhere
    logits[:, 1, : H - 1] = -torch.inf
    cotangents = draw(*[(B, C, K)] * SIZE)
    whole = [tensor.clone().requires_grad_() for tensor in (feats, logits)]
    f = spatial_gather(*whole)
    expected = torch.autograd.grad(f, whole, sum(cotangents))
    mine = [tensor.split(ROWS[SIZE][rows], 2)[RANK].clone().requires_grad_() for tensor in (feats, logits)]
    found = run(*mine)
    same(found, f)
    gradients = torch.autograd.grad(found, mine, cotangents[RANK])
    same(gradients, tuple(tensor.split(ROWS[SIZE][rows], 2)[RANK] for tensor in expected))


def differentiated_twice() -> None:
    feats, logits, cotangent = draw((1, 2, 4, 2), (1, 2, 4, 2), (1, 2, 2))

    def penalty(run: Callable[..., Tensor], parts: list[Tensor], share: float) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(run(*parts), parts, share * cotangent, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), parts)

    whole = [tensor.clone().requires_grad_() for tensor in (feats, logits)]
    mine = [tensor.tensor_split(SIZE, 2)[RANK].clone().requires_grad_() for tensor in (feats, logits)]
    expected = penalty(spatial_gather, whole, 1.0)
    same(penalty(gather, mine, 1 / SIZE), tuple(tensor.tensor_split(SIZE, 2)[RANK] for tensor in expected))


def two_parts_each() -> None:
    """Of a process, and what is reduced leaves the state as it was."""
    feats, logits = draw((B, C, 8, W), (B, K, 8, W))
    state = GatherState()
    for part in range(2):
        state.update(*(t.tensor_split(2 * SIZE, 2)[2 * RANK + part] for t in (feats, logits)))
    before = state.result()
    same(state.all_reduce().result(), spatial_gather(feats, logits))
    assert torch.equal(state.result(), before)


def counted_elements() -> None:
    """What docs/sharding.md says."""
    parts = [tensor.tensor_split(SIZE, 2)[RANK].requires_grad_() for tensor in draw((B, C, H, W), (B, K, H, W))]
    with Traffic() as forward:
        f = gather(*parts)
    with Traffic() as backward:
        f.sum().backward()
    assert forward.elements() == [B * K, B * (C + 1) * K], forward.calls
    assert backward.elements() == [B * (C + 1) * K], backward.calls
    assert {size for *_, size in forward.calls + backward.calls} == {8}


def head_trained(data: int) -> None:
    """The losses of 5 steps of the example's head are those of one process with all images and rows."""
    import sharded_head

    x, logits = draw((2, 8, H, W), (2, K, H, W))
    labels = torch.randint(K, (2, H, W), generator=torch.Generator().manual_seed(0))
    mesh = init_device_mesh("cpu", (data, SIZE // data), mesh_dim_names=("data", "space"))
    torch.manual_seed(0)
    head = sharded_head.Head(8, 4, K, mesh).double()
    if data > 1:  # PyTorch's SyncBatchNorm does not run on CPUs
        for part in (head.ocr.object_context_block.f_object, head.ocr.object_context_block.f_down):
            for layer in part:
                if isinstance(layer, nn.Sequential):
                    layer[0] = nn.Identity()
    one = Alone(copy.deepcopy(dict(head.named_children())))
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9)
    expected = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(one(x, logits), labels)
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    fully_shard(head, mesh=mesh)
    place = mesh.get_local_rank("data"), mesh.get_local_rank("space")
    rows = {1: [H], 2: ROWS[2]["uneven"], 4: ROWS[4]["uneven"]}[SIZE // data]  # no rows: no convolution
    mine = [tensor.tensor_split(data)[place[0]].split(rows, -2)[place[1]] for tensor in (x, logits, labels)]
    losses = sharded_head.train(head, *mine, labels.numel())
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-9)
    states = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in head.state_dict().items()
    }
    for name, value in one.state_dict().items():
        if "num_batches" not in name:
            torch.testing.assert_close(states[name], value, rtol=1e-8, atol=1e-9)


class Alone(nn.Module):
    """The head of the example in one process."""

    def __init__(self, children: dict[str, nn.Module]) -> None:
        super().__init__()
        self.ocr, self.cls = children["ocr"], children["cls"]
        for module in self.modules():
            for name, child in module.named_children():
                if isinstance(child, nn.SyncBatchNorm):
                    norm = nn.BatchNorm2d(child.num_features).double()
                    norm.load_state_dict(child.state_dict())
                    setattr(module, name, norm)

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        out: Tensor = self.cls(self.ocr(x, spatial_gather(x, logits).unsqueeze(3)))
        return out


# The way of DTensors: each process has its shards of tensors that mean the whole.


def of_dtensors(
    run: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    shape: tuple[int, ...],
    layouts: Sequence[Sequence[Any]],
    expected_layouts: Sequence[Sequence[Any]],
) -> None:
    """Values and gradients are those of plain tensors; the output, and the first gradients, lie as expected."""
    from torch.distributed.tensor import distribute_tensor

    mesh = mesh_of(shape)
    plain = [tensor.clone().requires_grad_() for tensor in tensors]
    out = run(*plain)
    (cotangent,) = draw(out.shape)
    expected = out, *torch.autograd.grad(out, plain, cotangent)
    made = [distribute_tensor(t, mesh, p).requires_grad_() for t, p in zip(tensors, layouts, strict=True)]
    whole = run(*made)
    found = whole, *torch.autograd.grad(whole, made, distribute_tensor(cotangent, mesh, whole.placements))
    for a, b, layout in itertools.zip_longest(found, expected, expected_layouts):
        assert layout is None or tuple(layout) == a.placements, (layout, a.placements)
        same(a.full_tensor(), b)


def gather_of_dtensors(
    layout: Sequence[Any],
    regions: Sequence[Any],
    shape: tuple[int, ...],
    rows: int = H,
    run: Callable[..., Tensor] = spatial_gather,
) -> None:
    feats, logits = draw((4, C, rows, W + 1), (4, K, rows, W + 1))
    tensors = feats, logits - 2000
    of_dtensors(run, tensors, shape, [layout, layout], [regions, layout, layout])


def attention_of_dtensors(
    layout: Sequence[Any], regions: Sequence[Any], gradients: Sequence[Any], shape: tuple[int, ...]
) -> None:
    tensors = draw((4, D, H, W + 1), (4, D, K), (4, V, K))
    layouts = [layout, regions, regions]
    of_dtensors(pixel_region_attention, tensors, shape, layouts, [layout, layout, gradients, gradients])


def needs_differ() -> None:
    """Of the same op on the same shapes: no gradient's shape is another call's."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = mesh_of((SIZE,))
    tensors = draw((2, D, H, W), (2, D, K), (2, V, K))
    for needs in ((True, False, False), (False, True, True), (True, True, True)):
        plain = [tensor.clone().requires_grad_(need) for tensor, need in zip(tensors, needs, strict=True)]
        layouts = [Shard(2)], [Replicate()], [Replicate()]
        made = [
            distribute_tensor(t, mesh, p).requires_grad_(n) for t, p, n in zip(tensors, layouts, needs, strict=True)
        ]
        for inputs in (plain, made):
            pixel_region_attention(*inputs).square().sum().backward()
        for a, b in zip(made, plain, strict=True):
            same(None if a.grad is None else a.grad.full_tensor(), b.grad)


def block(
    args: Sequence[Tensor], running: Sequence[Tensor], training: bool, group: Any = None, **options: Any
) -> Tensor:
    feats, key, value, pixel, up, fusing, *vectors = args

    def layer(weight: Tensor, i: int) -> Layer:
        norm = Norm(vectors[i], vectors[i + 1], running[i], running[i + 1], training, group=group)
        return Layer(weight, None, norm)

    return ocr_block(feats, key, value, [layer(pixel, 0)], layer(up, 2), layer(fusing, 4), **options)


def block_of_dtensors(layout: Sequence[Any], shape: tuple[int, ...], training: bool) -> None:
    """z, gradients and running statistics; where two dimensions of a mesh divide pixels, with a group."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    shapes = [(4, C, H, W + 1), (4, D, K), (4, V, K), (D, C), (5, V), (6, 5 + C), *[(n,) for n in (D, D, 5, 5, 6, 6)]]
    tensors = draw(*shapes)
    everywhere = [Replicate()] * len(shape)
    regions = [placement if placement == Shard(0) else Replicate() for placement in layout]
    layouts = [layout, regions, regions, *[everywhere] * 9]
    mesh = mesh_of(shape)
    running = [tensor.abs() for tensor in tensors[6:]]
    moved = [distribute_tensor(tensor.clone(), mesh, everywhere) for tensor in running]
    group = distributed.group.WORLD if len(shape) == 2 else None

    def run(*args: Tensor) -> Tensor:
        is_made = hasattr(args[0], "placements")
        return block(args, moved if is_made else running, training, group if is_made else None)

    of_dtensors(run, tensors, shape, layouts, [layout, layout])
    same([tensor.full_tensor() for tensor in moved], running)
    if len(shape) == 2 and training:
        made = [distribute_tensor(t, mesh, p) for t, p in zip(tensors, layouts, strict=True)]
        with pytest.raises(ValueError, match="norm must have the group of all processes"):
            block(made, moved, True)
    if not training:
        with torch.no_grad():
            made = [distribute_tensor(t, mesh, p) for t, p in zip(tensors, layouts, strict=True)]
            same(block(made, moved, False).full_tensor(), block(tensors, running, False))
            classifier = draw((3, 6))[0]
            options: Any = {"output": "classes"}
            found = block(
                made, moved, False, classifier=(distribute_tensor(classifier, mesh, everywhere), None), **options
            )
            same(found.full_tensor(), block(tensors, running, False, classifier=(classifier, None), **options))


def elements_of_dtensors() -> None:
    """What docs/sharding.md says: no pixel is sent."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = mesh_of((SIZE,))
    feats, logits = (distribute_tensor(t, mesh, [Shard(2)]).requires_grad_() for t in draw((B, C, H, W), (B, K, H, W)))
    with Traffic() as forward:
        f = spatial_gather(feats, logits)
    with Traffic() as backward:
        f.sum().backward()
    assert forward.elements() == [B * K, B * (C + 1) * K], forward.calls
    assert backward.elements() == [], backward.calls
    tensors = draw((B, D, H, W), (B, D, K), (B, V, K))
    layouts = [Shard(2)], [Replicate()], [Replicate()]
    query, key, value = (distribute_tensor(t, mesh, p).requires_grad_() for t, p in zip(tensors, layouts, strict=True))
    with Traffic() as forward:
        y = pixel_region_attention(query, key, value)
    with Traffic() as backward:
        for gradient in torch.autograd.grad(y, (key, value), y.detach()):
            gradient.redistribute(placements=[Replicate()])
    assert forward.elements() == [], forward.calls
    assert backward.elements() == [B * D * K, B * V * K], backward.calls
    with Traffic() as both:
        regions = spatial_gather(feats, logits)
        pixel_region_attention(feats, regions, regions).square().sum().backward()
    assert both.elements()[:2] == [B * K, B * (C + 1) * K]
    assert sum(both.elements()[2:]) <= 2 * B * (C + 1) * K, both.calls


def wrong_dtensors() -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = mesh_of((SIZE,))
    feats, logits = draw((B, C, H, W), (B, K, H, W))
    made = distribute_tensor(feats, mesh, [Shard(2)])
    with pytest.raises(TypeError, match="logits must be a DTensor where another argument is, but is Tensor"):
        spatial_gather(made, logits)
    with pytest.raises(TypeError, match="key must be a DTensor"):
        pixel_region_attention(made, feats[0], feats[0])
    with pytest.raises(ValueError, match="logits must have shape"):
        spatial_gather(made, distribute_tensor(logits[:, :, 1:], mesh, [Shard(2)]))


def cases() -> dict[str, Callable[[], None]]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    line, everywhere = (SIZE,), Replicate()
    compiled, compiled_op = (
        torch.compile(function, fullgraph=True, backend="aot_eager") for function in (gather, spatial_gather)
    )
    found: dict[str, Callable[[], None]] = {
        "uneven": lambda: gathered("uneven"),
        "none in one": lambda: gathered("none in one"),
        "compiled": lambda: gathered("uneven", compiled),
        "far apart": lambda: gathered("none in one", shift=-2000.0),
        "twice": differentiated_twice,
        "two parts each": two_parts_each,
        "elements": counted_elements,
        "head, rows": lambda: head_trained(1),
        "DTensors, images": lambda: gather_of_dtensors([Shard(0)], [Shard(0)], line),
        "DTensors, rows": lambda: gather_of_dtensors([Shard(2)], [everywhere], line),
        "DTensors, compiled": lambda: gather_of_dtensors([Shard(2)], [everywhere], line, run=compiled_op),
        "DTensors, columns": lambda: gather_of_dtensors([Shard(3)], [everywhere], line),
        "DTensors, no rows in one": lambda: gather_of_dtensors([Shard(2)], [everywhere], line, rows=SIZE + 1),
        "DTensors, replicated": lambda: gather_of_dtensors([everywhere], [everywhere], line),
        "DTensors, attention, images": lambda: attention_of_dtensors([Shard(0)], [Shard(0)], [Shard(0)], line),
        "DTensors, attention, rows": lambda: attention_of_dtensors([Shard(2)], [everywhere], [Partial()], line),
        "DTensors, needs": needs_differ,
        "DTensors, elements": elements_of_dtensors,
        "DTensors, wrong": wrong_dtensors,
        "DTensors, block, images": lambda: block_of_dtensors([Shard(0)], line, True),
        "DTensors, block, rows": lambda: block_of_dtensors([Shard(2)], line, True),
        "DTensors, block, rows, known statistics": lambda: block_of_dtensors([Shard(2)], line, False),
    }
    if SIZE == 4:
        square, both = (2, 2), [Shard(0), Shard(2)]
        found |= {
            "head, images and rows": lambda: head_trained(2),
            "DTensors, images and rows": lambda: gather_of_dtensors(both, [Shard(0), everywhere], square),
            "DTensors, rows and columns": lambda: gather_of_dtensors(
                [Shard(2), Shard(3)], [everywhere, everywhere], square
            ),
            "DTensors, attention, images and rows": lambda: attention_of_dtensors(
                both, [Shard(0), everywhere], [Shard(0), Partial()], square
            ),
            "DTensors, block, images and rows": lambda: block_of_dtensors(both, square, True),
        }
    return found


def missing(how: str) -> None:
    """The last process ends, or sleeps, before it has called what the others wait in."""
    if RANK == SIZE - 1:
        if how == "sleeps":
            time.sleep(5)
        os._exit(0)
    try:
        gather(*draw((1, C, 2, 2), (1, K, 2, 2)))
        print("no error")
    except RuntimeError as error:
        print(f"{how}: {type(error).__name__}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    how = sys.argv[4] if len(sys.argv) > 4 else "cases"
    timeout = datetime.timedelta(seconds=3 if how in ("ends", "sleeps") else 60)
    options: dict[str, Any] = {"rank": RANK, "world_size": SIZE, "timeout": timeout}
    distributed.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", **options)
    if how in ("ends", "sleeps"):
        missing(how)
        os._exit(0)
    compiled = {"compiled": lambda: gathered("uneven", torch.compile(gather, fullgraph=True))}
    for name, case in (compiled if how == "compiled" else cases()).items():
        try:
            case()
            print(f"{name}: right", flush=True)
        except Exception:
            print(f"{name}: {traceback.format_exc()!r}", flush=True)
            break  # the others wait for what this process did not send
    distributed.destroy_process_group()
