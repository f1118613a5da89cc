"""What the softmaxes are: the maps that the ops compute on the fly and never store, on request.

Recording is a dispatch mode around the ops, not a hook in them: outside `record_maps` nothing is asked or paid.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ocr_kernels.attention.registration import check_query_and_key, pixel_region_attention_op
from ocr_kernels.block.reference import query_of
from ocr_kernels.block.registration import ocr_block_inference_op, ocr_block_op
from ocr_kernels.core.arguments import check_dtype, check_shape, check_tensors, split_scale
from ocr_kernels.core.layout import statistics_dtype
from ocr_kernels.gather.registration import spatial_gather_op


def region_maps(logits: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """The weights of the gather: for each region, a softmax **over pixels** of `scale * logits` (Eq. 4).

    Args:
        logits: soft object regions M, `[B, K, *S]`, as `spatial_gather` takes them.
        scale: factor on the logits, a number or a tensor of one element.

    Returns:
        `[B, K, *S]`, float32, or float64 for float64; sums to one over `*S`.

    Raises:
        TypeError: `logits` is no tensor, or of another dtype than the op takes, or `scale` is no number.
        ValueError: its shape is another.

    Examples:
        >>> maps = region_maps(torch.randn(1, 19, 32, 64))
        >>> maps.shape, round(float(maps[0, 0].sum()), 4)
        (torch.Size([1, 19, 32, 64]), 1.0)
    """
    check_tensors(logits=logits)
    check_dtype("logits", logits)
    check_shape("logits", logits, "[B, K, *S] with K >= 1", logits.dim() >= 3 and logits.shape[1] >= 1)
    scores, factor = split_scale(scale, logits.flatten(2).to(statistics_dtype(logits)))
    return (factor * scores).softmax(2).view(logits.shape)


def attention_maps(query: Tensor, key: Tensor, scale: float | Tensor | None = None) -> Tensor:
    """The weights of the attention: for each pixel, a softmax **over regions** of `scale * q_i . k_k` (Eq. 3).

    Args:
        query: transformed pixels phi(x), `[B, D, *S]`, as `pixel_region_attention` takes them.
        key: transformed regions psi(f), `[B, D, K]`.
        scale: factor on the scores, a number or a tensor of one element; `None` means `D ** -0.5`.

    Returns:
        `[B, K, *S]`, float32, or float64 for float64, under autocast too; sums to one over K.

    Raises:
        TypeError: an argument is no tensor, the dtypes differ or are others than the op takes, or `scale` is no number.
        ValueError: shapes or devices do not match.

    Examples:
        >>> maps = attention_maps(torch.randn(1, 256, 32, 64), torch.randn(1, 256, 19))
        >>> maps.shape, round(float(maps[0, :, 0, 0].sum()), 4)
        (torch.Size([1, 19, 32, 64]), 1.0)
    """
    check_tensors(query=query, key=key)
    check_query_and_key(query, key)
    dtype = statistics_dtype(query)
    scale = query.shape[1] ** -0.5 if scale is None else scale
    with torch.autocast(query.device.type, enabled=False):
        scores = torch.matmul(key.transpose(1, 2).to(dtype), query.flatten(2).to(dtype))  # [B, K, N]
        scores, factor = split_scale(scale, scores)
    return (factor * scores).softmax(1).view(key.shape[0], key.shape[2], *query.shape[2:])


@dataclasses.dataclass(frozen=True)
class Maps:
    """What `record_maps` recorded: one detached `[B, K, *S]` for each call, in the order of the calls."""

    regions: list[Tensor] = dataclasses.field(default_factory=list)
    attention: list[Tensor] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def record_maps() -> Iterator[Maps]:
    """Record the `region_maps` and `attention_maps` of every call of the ops that this thread makes inside the block.

    It sees the functions, `ocr_kernels.modules`, replaced modules and `torch.ops`; outputs and gradients stay what they
    were. The pixels of a replaced module may come flat, `[B, K, N]`: `flatten(2).unflatten(2, (h, w))`
    makes images of all. A forward
    pass that runs again, as in activation checkpointing, is recorded again; `vmap` is one call whose batch is both.

    A map is computed at once, beside its call, and stays on its device until the lists are cleared: 4 bytes times
    B K N (10 MB for 19 regions of a 1024 x 2048 image at stride 4), less than the query that a later computation
    would have to keep.

    Blocks nest, and each records all that runs inside it. What `torch.compile` compiled runs eagerly inside a block, in
    every thread, and is recorded; tracing and exporting record nothing.

    Raises:
        RuntimeError: the block is inside a compiled function.

    Examples:
        >>> head = modules.OCRHead(in_channels=8, num_classes=3, mid_channels=16, key_channels=8).eval()
        >>> with torch.no_grad(), record_maps() as maps:
        ...     aux, out = head(torch.randn(1, 8, 16, 16))
        >>> maps.regions[0].shape, maps.attention[0].shape
        (torch.Size([1, 3, 16, 16]), torch.Size([1, 3, 16, 16]))
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("record_maps cannot be compiled: put it around the call of the compiled model")
    maps = Maps()
    with torch.compiler.set_stance("force_eager"), Recorder(maps):  # compiled code refuses dispatch modes
        yield maps


class Recorder(TorchDispatchMode):
    def __init__(self, maps: Maps) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.maps = maps

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is spatial_gather_op and _is_real(args[1]):
            self.maps.regions.append(region_maps(args[1].detach(), args[2]))
        elif func is ocr_block_op and _is_real(args[0]):
            weights = out[3]
            self.maps.attention.append(weights.to(statistics_dtype(weights)))
        elif func is ocr_block_inference_op and _is_real(args[0]):
            feats, key, _, weights, scale, slopes, *_ = args
            self.maps.attention.append(attention_maps(query_of(feats, weights, slopes), key, scale))
        elif func is pixel_region_attention_op and _is_real(args[0]):
            self.maps.attention.append(attention_maps(args[0].detach(), args[1].detach(), args[3]))
        return out


def _is_real(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter)  # no stand-in of a trace
