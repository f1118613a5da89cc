"""Pixel-region attention of DTensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.distributed.tensor import Partial, Replicate, Shard

from ocr_kernels.attention.registration import pixel_region_attention_backward_op, pixel_region_attention_op
from ocr_kernels.core.sharding import Rule, check_dtensors, needed, register, spatial

__all__ = ["check_dtensors"]  # for the public call, which by it registers the rules below


def _attention(query: Any, *_: Any) -> Iterator[Rule]:
    yield [Shard(0)] * 4
    for shard in spatial(query):
        yield [shard, shard, Replicate(), Replicate()]


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, scale: Any, *options: Any) -> Iterator[Rule]:
    yield [*needed([Shard(0)] * 3, options[:3]), *[Shard(0)] * 4]
    for shard in spatial(query):
        yield [*needed([shard, Partial(), Partial()], options[:3]), shard, shard, Replicate(), Replicate()]


register(pixel_region_attention_op, _attention)
register(pixel_region_attention_backward_op, _attention_backward)
