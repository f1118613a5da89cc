"""The layers of a block, and how they are made of PyTorch's modules as they are at a call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd


class Norm(NamedTuple):
    """BatchNorm, with what `torch.nn.functional.batch_norm` takes; statistics that run are updated as it does.

    Examples:
        >>> norm = torch.nn.BatchNorm2d(8)
        >>> Norm(norm.weight, norm.bias, norm.running_mean, norm.running_var, training=False).eps
        1e-05
    """

    weight: Tensor | None = None  # [channels]
    bias: Tensor | None = None
    running_mean: Tensor | None = None  # with running_var, or neither
    running_var: Tensor | None = None
    training: bool = True  # whether statistics are the batch's
    momentum: float | None = 0.1  # None: a cumulative average, by num_batches_tracked
    eps: float = 1e-5
    group: distributed.ProcessGroup | None = None  # the processes whose batches are one, as SyncBatchNorm has it
    num_batches_tracked: Tensor | None = None  # counts batches

    @property
    def is_batch(self) -> bool:
        """Whether statistics are those of the batch."""
        return self.training or self.running_mean is None

    @classmethod
    def of(cls, norm: nn.Module) -> Norm:
        """A BatchNorm as it is at a call.

        Raises:
            TypeError: it is no BatchNorm and no SyncBatchNorm.
        """
        if not isinstance(norm, _BatchNorm):
            raise TypeError(f"norm must be a BatchNorm or a SyncBatchNorm, but is {norm}")
        tracked = norm.num_batches_tracked if norm.training and norm.track_running_stats else None
        momentum = 0.0 if norm.momentum is None and tracked is None else norm.momentum
        training = norm.training or (norm.running_mean is None and norm.running_var is None)
        runs = not norm.training or norm.track_running_stats
        mean, var = (norm.running_mean, norm.running_var) if runs else (None, None)
        group = _group_of(norm) if isinstance(norm, nn.SyncBatchNorm) and norm.training else None
        return cls(norm.weight, norm.bias, mean, var, training, momentum, norm.eps, group, tracked)


class Layer(NamedTuple):
    """A 1x1 convolution, a norm or none, and an activation: x where it is positive, slope * x elsewhere.

    Examples:
        >>> convolution = torch.nn.Conv2d(16, 8, 1)
        >>> Layer(convolution.weight.flatten(1), convolution.bias, Norm(), slope=0.01).weight.shape
        torch.Size([8, 16])
    """

    weight: Tensor | None  # [outputs, inputs]; None, in `up` alone, for what changes nothing
    bias: Tensor | None = None
    norm: Norm | None = None
    slope: float = 0.0  # 0 is ReLU, 1 no activation

    @classmethod
    def of(cls, convolution: nn.Module, norm: nn.Module | None = None, activation: nn.Module | None = None) -> Layer:
        """A layer of PyTorch's modules, as they are now: with their tensors, less their hooks.

        Args:
            convolution: a 1x1 convolution or a Linear, `[outputs, inputs]`.
            norm: a BatchNorm or SyncBatchNorm in its present mode; `None` or an Identity for none.
            activation: a ReLU, or a LeakyReLU; `None` or an Identity for none.

        Raises:
            TypeError: a module is of a kind that the block does not have.
            ValueError: it is, with settings that the block does not have: a stride, a padding, a negative slope.

        Examples:
            >>> Layer.of(torch.nn.Conv2d(16, 8, 1), torch.nn.BatchNorm2d(8), torch.nn.LeakyReLU(0.1)).slope
            0.1
        """
        if type(convolution) not in (nn.Linear, *CONVOLUTIONS):
            raise TypeError(f"convolution must be a 1x1 convolution or a Linear, but is {convolution}")
        if type(convolution) is not nn.Linear and not is_pointwise(convolution):
            raise ValueError(f"convolution must have kernel, stride and groups of 1, no padding, but is {convolution}")
        if norm is not None and type(norm) is not nn.Identity and not is_norm(norm):
            raise TypeError(f"norm must be a BatchNorm, a SyncBatchNorm or None, but is {norm}")
        slope = 1.0 if activation is None else slope_of(activation)
        if slope is None:
            error = ValueError if type(activation) is nn.LeakyReLU else TypeError
            raise error(f"activation must be ReLU, LeakyReLU with a slope >= 0 or None, but is {activation}")
        return layer_of(convolution, None if type(norm) is nn.Identity else norm, slope)


def layer_of(convolution: nn.Module, norm: nn.Module | None, slope: float) -> Layer:
    """`Layer.of` modules that are known to fit, before an activation of that slope."""
    weight: Any = convolution.weight
    bias: Any = convolution.bias
    return Layer(weight.flatten(1), bias, None if norm is None else Norm.of(norm), slope)


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
    return isinstance(norm, nn.Module) and type(norm).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)


CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d
CHANNEL_DROPOUTS = nn.Dropout1d, nn.Dropout2d, nn.Dropout3d


def mask_of(dropout: nn.Dropout1d | nn.Dropout2d | nn.Dropout3d, feats: Tensor, channels: int) -> Tensor | None:
    """What a dropout of whole channels multiplies `[B, channels]` by: as it draws it, from the same random numbers."""
    if not dropout.training or dropout.p == 0:
        return None
    kind = feats.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else feats.dtype
    ones = feats.new_ones((feats.shape[0], channels, 1, 1), dtype=dtype)
    exact = torch.promote_types(feats.dtype, torch.float32)
    return F.dropout2d(ones, dropout.p, True).flatten(1).to(exact)


def is_pointwise(layer: nn.Module) -> bool:
    """Whether a layer is a 1x1 convolution, which is a product with a matrix."""
    if type(layer) not in CONVOLUTIONS:
        return False
    assert isinstance(layer, _ConvNd)
    is_padded = not isinstance(layer.padding, str) and any(layer.padding)
    return not is_padded and {*layer.kernel_size, *layer.stride, layer.groups} == {1}
