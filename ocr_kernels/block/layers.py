"""The layers of a block, made of PyTorch's modules as they are at a call."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ocr_kernels.block.functional import Layer, Norm


def layer_of(convolution: nn.Module, norm: nn.Module | None, slope: float) -> Layer:
    """A 1x1 convolution, or a Linear, and a BatchNorm or None, before an activation of that slope.

    Does what the norm does before it calls `torch.nn.functional.batch_norm`: in training it counts its batches.
    """
    weight: Any = convolution.weight
    bias: Any = convolution.bias
    return Layer(weight.flatten(1), bias, None if norm is None else _norm_of(norm), slope)


def _norm_of(norm: nn.Module) -> Norm:
    assert isinstance(norm, _BatchNorm)
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:  # a cumulative average
            momentum = 1.0 / float(norm.num_batches_tracked)
    training = norm.training or (norm.running_mean is None and norm.running_var is None)
    runs = not norm.training or norm.track_running_stats
    mean, var = (norm.running_mean, norm.running_var) if runs else (None, None)
    group = _group_of(norm) if isinstance(norm, nn.SyncBatchNorm) and norm.training else None
    return Norm(norm.weight, norm.bias, mean, var, training, momentum, norm.eps, group)


def _group_of(norm: nn.SyncBatchNorm) -> Any:
    """The processes that share a norm's statistics; None where there is one."""
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    group = norm.process_group or distributed.group.WORLD
    return group if distributed.get_world_size(group) > 1 else None


def slope_of(activation: nn.Module) -> float | None:
    """The slope of an activation; None for those that have none."""
    if type(activation) is nn.LeakyReLU:
        return activation.negative_slope if activation.negative_slope >= 0 else None
    return {nn.ReLU: 0.0, nn.Identity: 1.0}.get(type(activation))


def is_norm(norm: nn.Module) -> bool:
    """Whether a norm computes what `layer_of` takes it for, whatever library's it is."""
    return type(norm).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def mask_of(dropout: nn.Dropout2d, feats: Tensor, channels: int) -> Tensor | None:
    """What a Dropout2d multiplies `[B, channels]` by: as it draws it, from the same random numbers."""
    if not dropout.training or dropout.p == 0:
        return None
    kind = feats.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else feats.dtype
    ones = feats.new_ones((feats.shape[0], channels, 1, 1), dtype=dtype)
    exact = torch.promote_types(feats.dtype, torch.float32)
    return F.dropout2d(ones, dropout.p, True).flatten(1).to(exact)


def is_pointwise(layer: nn.Module) -> bool:
    """Whether a layer is a 1x1 convolution, which is a product with a matrix."""
    if type(layer) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return False
    assert isinstance(layer, _ConvNd)
    is_padded = not isinstance(layer.padding, str) and any(layer.padding)
    return not is_padded and {*layer.kernel_size, *layer.stride, layer.groups} == {1}
