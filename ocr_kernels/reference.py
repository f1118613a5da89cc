"""The OCR modules in plain PyTorch, operation for operation what HRNet-OCR users run today.

Constructor arguments, forward argument order and `state_dict` keys are HRNet's, so its checkpoints load. The
gather's softmax runs over pixels, the attention's over regions. Those two computations are methods of their own,
`SpatialGather.gather` and `ObjectAttentionBlock.attend`: `ocr_kernels.modules` overrides these, and the forward of
`SpatialOCR`, which is one op.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = Callable[..., nn.Module]
"""Makes a layer: a normalisation from its number of channels, an activation from nothing."""

relu: Callable[[], nn.Module] = functools.partial(nn.ReLU, inplace=True)


class SpatialGather(nn.Module):
    """Step 3: region representations f_k = sum_i softmax_i(scale * M_ki) x_i, the softmax over pixels (Eq. 4).

    `cls_num`, the number of classes, is kept for HRNet's signature; K comes with the input.

    Examples:
        >>> SpatialGather(19)(torch.randn(2, 64, 16, 32), torch.randn(2, 19, 16, 32)).shape
        torch.Size([2, 64, 19, 1])
    """

    def __init__(self, cls_num: int = 0, scale: float = 1) -> None:
        super().__init__()
        self.cls_num = cls_num
        self.scale = scale

    def forward(self, feats: Tensor, probs: Tensor) -> Tensor:
        """Pixels x `[B, C, H, W]` and logits M `[B, K, H, W]` to regions f `[B, C, K, 1]`."""
        return self.gather(feats, probs).unsqueeze(3)

    def gather(self, feats: Tensor, probs: Tensor) -> Tensor:
        """f `[B, C, K]`."""
        pixels = feats.flatten(2).permute(0, 2, 1)  # [B, N, C]
        weights = F.softmax(self.scale * probs.flatten(2), dim=2)  # [B, K, N]
        return torch.matmul(weights, pixels).permute(0, 2, 1)

    def extra_repr(self) -> str:
        return f"cls_num={self.cls_num}, scale={self.scale}"


class ObjectAttentionBlock(nn.Module):
    """Step 4a: contexts y_i = rho(sum_k w_ik delta(f_k)), w_ik = softmax_k(D^-1/2 phi(x_i) . psi(f_k)) (Eqs. 3, 5).

    phi is `f_pixel`, psi `f_object`, delta `f_down`, rho `f_up`; D is `key_channels`. With `scale` > 1 the pixels
    are max-pooled by it before, and the contexts brought back to size by bilinear interpolation after.

    Raises:
        ValueError: `bn_type` names a normalisation other than PyTorch's own; that is what `norm_layer` is for.

    Examples:
        >>> block = ObjectAttentionBlock(in_channels=64, key_channels=32)
        >>> block(torch.randn(2, 64, 16, 32), torch.randn(2, 64, 19, 1)).shape
        torch.Size([2, 64, 16, 32])
    """

    def __init__(
        self,
        in_channels: int,
        key_channels: int,
        scale: int = 1,
        bn_type: str | None = None,
        *,
        norm_layer: Layer = nn.BatchNorm2d,
        act_layer: Layer = relu,
        align_corners: bool = True,
    ) -> None:
        super().__init__()
        _check_bn_type(bn_type)
        block = functools.partial(_convolutions, norm_layer=norm_layer, act_layer=act_layer)
        self.scale = scale
        self.in_channels = in_channels
        self.key_channels = key_channels
        self.align_corners = align_corners
        self.pool: nn.MaxPool2d = nn.MaxPool2d(kernel_size=(scale, scale))
        self.f_pixel: nn.Sequential = block(in_channels, key_channels, key_channels)
        self.f_object: nn.Sequential = block(in_channels, key_channels, key_channels)
        self.f_down: nn.Sequential = block(in_channels, key_channels)
        self.f_up: nn.Sequential = block(key_channels, in_channels)

    def forward(self, feats: Tensor, proxy_feats: Tensor) -> Tensor:
        """Pixels x `[B, C, H, W]` and regions f `[B, C, K, 1]` to contexts y `[B, C, H, W]`."""
        size = feats.shape[2:]
        if self.scale > 1:
            feats = self.pool(feats)
        query = self.f_pixel(feats)
        key, value = self.f_object(proxy_feats).flatten(2), self.f_down(proxy_feats).flatten(2)
        context: Tensor = self.f_up(self.attend(query, key, value))
        if self.scale > 1:
            context = F.interpolate(context, size=size, mode="bilinear", align_corners=self.align_corners)
        return context

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Query `[B, D, H, W]`, key and value `[B, D, K]` to `[B, D, H, W]`."""
        sim_map = torch.matmul(query.flatten(2).permute(0, 2, 1), key)  # [B, N, K]
        sim_map = F.softmax(self.key_channels**-0.5 * sim_map, dim=-1)
        context = torch.matmul(sim_map, value.permute(0, 2, 1))  # [B, N, D]
        return context.permute(0, 2, 1).contiguous().view(query.shape)


class SpatialOCR(nn.Module):
    """Step 4: augmented representations z = g([y, x]), of contexts and pixels (Eq. 6).

    Raises:
        ValueError: `bn_type` names a normalisation other than PyTorch's own; that is what `norm_layer` is for.

    Examples:
        >>> block = SpatialOCR(in_channels=64, key_channels=32, out_channels=48)
        >>> block(torch.randn(2, 64, 16, 32), torch.randn(2, 64, 19, 1)).shape
        torch.Size([2, 48, 16, 32])
    """

    attention: ClassVar[type[ObjectAttentionBlock]] = ObjectAttentionBlock

    def __init__(
        self,
        in_channels: int,
        key_channels: int,
        out_channels: int,
        scale: int = 1,
        dropout: float = 0.1,
        bn_type: str | None = None,
        *,
        norm_layer: Layer = nn.BatchNorm2d,
        act_layer: Layer = relu,
        align_corners: bool = True,
    ) -> None:
        super().__init__()
        self.object_context_block: ObjectAttentionBlock = self.attention(
            in_channels,
            key_channels,
            scale,
            bn_type,
            norm_layer=norm_layer,
            act_layer=act_layer,
            align_corners=align_corners,
        )
        self.conv_bn_dropout: nn.Sequential = _convolutions(
            2 * in_channels, out_channels, norm_layer=norm_layer, act_layer=act_layer
        )
        self.conv_bn_dropout.append(nn.Dropout2d(dropout))

    def forward(self, feats: Tensor, proxy_feats: Tensor) -> Tensor:
        """Pixels x `[B, C, H, W]` and regions f `[B, C, K, 1]` to z `[B, out_channels, H, W]`."""
        context = self.object_context_block(feats, proxy_feats)
        out: Tensor = self.conv_bn_dropout(torch.cat([context, feats], 1))
        return out


class OCRHead(nn.Module):
    """The five steps, from a backbone's features to logits; the children have the names of HRNet's `seg_hrnet_ocr`.

    Examples:
        >>> head = OCRHead(in_channels=32, num_classes=19, mid_channels=64, key_channels=32)
        >>> aux, out = head(torch.randn(2, 32, 16, 32))
        >>> aux.shape, out.shape
        (torch.Size([2, 19, 16, 32]), torch.Size([2, 19, 16, 32]))
    """

    gathering: ClassVar[type[SpatialGather]] = SpatialGather
    distribution: ClassVar[type[SpatialOCR]] = SpatialOCR

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        mid_channels: int = 512,
        key_channels: int = 256,
        dropout: float = 0.05,
        scale: int = 1,
        *,
        norm_layer: Layer = nn.BatchNorm2d,
        act_layer: Layer = relu,
        align_corners: bool = True,
    ) -> None:
        super().__init__()
        self.conv3x3_ocr: nn.Sequential = nn.Sequential(
            nn.Conv2d(in_channels, mid_channels, kernel_size=3, padding=1), norm_layer(mid_channels), act_layer()
        )
        self.ocr_gather_head: SpatialGather = self.gathering(num_classes)
        self.ocr_distri_head: SpatialOCR = self.distribution(
            mid_channels,
            key_channels,
            mid_channels,
            scale,
            dropout,
            norm_layer=norm_layer,
            act_layer=act_layer,
            align_corners=align_corners,
        )
        self.cls_head: nn.Conv2d = nn.Conv2d(mid_channels, num_classes, kernel_size=1)
        self.aux_head: nn.Sequential = nn.Sequential(
            nn.Conv2d(in_channels, in_channels, kernel_size=1),
            norm_layer(in_channels),
            act_layer(),
            nn.Conv2d(in_channels, num_classes, kernel_size=1),
        )

    def forward(self, feats: Tensor) -> list[Tensor]:
        """Backbone features `[B, in_channels, H, W]` to `[auxiliary logits, logits]`, each `[B, K, H, W]`."""
        pixels = self.conv3x3_ocr(feats)
        aux_logits = self.aux_head(feats)
        regions = self.ocr_gather_head(pixels, aux_logits)
        return [aux_logits, self.cls_head(self.ocr_distri_head(pixels, regions))]


def _convolutions(*channels: int, norm_layer: Layer, act_layer: Layer) -> nn.Sequential:
    """For each step in `channels`: a 1x1 convolution, then a `Sequential` of normalisation and activation."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(channels):
        layers.append(nn.Conv2d(before, after, kernel_size=1, bias=False))
        layers.append(nn.Sequential(norm_layer(after), act_layer()))
    return nn.Sequential(*layers)


def _check_bn_type(bn_type: str | None) -> None:
    if bn_type not in (None, "torchbn"):
        raise ValueError(f"bn_type must be None or 'torchbn', but is {bn_type!r}; pass another norm as norm_layer=")
