"""The block of DTensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from ocr_kernels.block.layers import Layer
from ocr_kernels.block.registration import TENSORS, ocr_block_backward_op, ocr_block_inference_op, ocr_block_op
from ocr_kernels.core.sharding import Rule, check_dtensors, divides, needed, register, spatial

__all__ = ["check_dtensors", "with_groups"]  # for the public call, which by it registers the rules below


def _block_inputs(shard: Shard, mask: Any) -> Rule:
    regions = shard if shard.dim == 0 else Replicate()
    masks = regions if mask.ndim == 2 else Replicate()
    return [shard, regions, *[Replicate()] * 3, regions, *[Replicate()] * (TENSORS - 6), masks]


def _block_shards(feats: Any, eps: Sequence[float], groups: Sequence[str]) -> list[Shard]:
    """None where a norm takes the statistics of the pixels of one process."""
    shared = all(e < 0 or group for e, group in zip(eps, groups, strict=True))
    return [Shard(0), *spatial(feats)] if shared else []


def _block(*args: Any) -> Iterator[Rule]:
    _, _, eps, groups, *_ = args[TENSORS + 1 :]
    for shard in _block_shards(args[0], eps, groups):
        yield [*[shard] * 5, Replicate(), *_block_inputs(shard, args[TENSORS])]


def _block_backward(grad: Any, *args: Any) -> Iterator[Rule]:
    _, _, eps, groups, _, needs, _ = args[TENSORS + 6 :]
    for shard in _block_shards(args[0], eps, groups):
        regions = shard if shard.dim == 0 else Partial()
        gradients = [shard, regions, *[Partial()] * 3, regions, *[Partial()] * (TENSORS - 6)]
        inputs = _block_inputs(shard, args[TENSORS])
        yield [*needed(gradients, needs), shard, *inputs, *[shard] * 4, Replicate()]


def _block_inference(
    feats: Any, key: Any, contexts: Any, weights: Sequence[Any], scale: Any, slopes: Any, output: str, backend: str
) -> Iterator[Rule]:
    yield [*[Shard(0)] * 4, *[Replicate()] * len(weights)]
    for shard in spatial(feats):
        out = Shard(shard.dim - 1) if output == "classes" else shard
        yield [out, shard, *[Replicate()] * (2 + len(weights))]


register(ocr_block_op, _block)
register(ocr_block_backward_op, _block_backward)
register(ocr_block_inference_op, _block_inference)


def with_groups(layers: dict[str, Layer | None], feats: Tensor) -> dict[str, Layer | None]:
    """The layers of a block, whose norms take the statistics of the pixels of all processes."""
    assert isinstance(feats, DTensor)
    mesh, shape = feats.device_mesh, feats.shape
    divided = [i for i, p in enumerate(feats.placements) if divides(p) and shape[p.dim] >= mesh.size(i)]
    return {name: _with_group(name, layer, mesh, divided) for name, layer in layers.items()}


def _with_group(name: str, layer: Layer | None, mesh: DeviceMesh, divided: Sequence[int]) -> Layer | None:
    """`divided` are the dimensions of the mesh over which images or pixels are."""
    norm = None if layer is None else layer.norm
    if layer is None or norm is None or not norm.is_batch or norm.group is not None or not divided:
        return layer
    if len(divided) > 1:
        raise ValueError(
            f"{name}.norm must have the group of all processes among which the pixels of feats are divided, over "
            f"{len(divided)} dimensions of a mesh, but has none"
        )
    return layer._replace(norm=norm._replace(group=mesh.get_group(divided[0])))
