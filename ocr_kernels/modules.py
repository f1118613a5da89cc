"""Drop-in OCR modules on the fused ops: HRNet's constructors, forward argument order and `state_dict` keys.

The layers are defined once, in `ocr_kernels.reference`; what differs here is how the gather, the attention and all of
step 4 are computed. HRNet's own class names are aliases, so changing an import is enough.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ocr_kernels import reference
from ocr_kernels.attention import pixel_region_attention
from ocr_kernels.block import ocr_block
from ocr_kernels.block.layers import is_norm, is_pointwise, layer_of, mask_of, slope_of
from ocr_kernels.block.registration import is_used_on
from ocr_kernels.core.backends import left_to_compiler
from ocr_kernels.core.calls import is_plain_call, is_recorded, is_taken_apart
from ocr_kernels.gather import spatial_gather

__all__ = [
    "OCRHead",
    "ObjectAttentionBlock",
    "ObjectAttentionBlock2D",
    "SpatialGather",
    "SpatialGather_Module",
    "SpatialOCR",
    "SpatialOCR_Module",
]


class _NoScript:
    def __prepare_scriptable__(self) -> Any:
        name = type(self).__qualname__
        raise RuntimeError(
            f"torch.jit.script cannot compile ocr_kernels.modules.{name}: use torch.jit.trace, or script "
            f"ocr_kernels.reference.{name}, which takes the same state_dict"
        )


class SpatialGather(_NoScript, reference.SpatialGather):
    __doc__ = reference.SpatialGather.__doc__

    def gather(self, feats: Tensor, probs: Tensor) -> Tensor:
        if left_to_compiler(feats):
            return super().gather(feats, probs)
        return spatial_gather(feats, probs, self.scale)


class ObjectAttentionBlock(_NoScript, reference.ObjectAttentionBlock):
    __doc__ = reference.ObjectAttentionBlock.__doc__

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if left_to_compiler(query):
            return super().attend(query, key, value)
        return pixel_region_attention(query, key, value)


class SpatialOCR(_NoScript, reference.SpatialOCR):
    __doc__ = reference.SpatialOCR.__doc__

    attention: ClassVar[type[reference.ObjectAttentionBlock]] = ObjectAttentionBlock

    def forward(self, feats: Tensor, proxy_feats: Tensor) -> Tensor:
        """Pixels x `[B, C, H, W]` and regions f `[B, C, K, 1]` to z `[B, out_channels, H, W]`.

        All that pixels go through is one op. In inference it folds norms at each call; `replace_ocr_modules` keeps them
        folded from call to call.
        """
        slopes = None if is_taken_apart() or not is_used_on(feats.device) else self._slopes()
        if slopes is None or feats.dim() != 4 or not feats.is_floating_point() or is_recorded():
            return super().forward(feats, proxy_feats)
        attention = self.object_context_block
        key, value = (part(proxy_feats).flatten(2) for part in (attention.f_object, attention.f_down))
        convolutions, pairs = self._layers(nn.Conv2d), self._layers(nn.Sequential)
        norms = [None if type(pair[0]) is nn.Identity else pair[0] for pair in pairs]
        *pixel, up, fusing = map(layer_of, convolutions, norms, slopes)
        (dropout,) = self._layers(nn.Dropout2d)
        mask = mask_of(dropout, feats, convolutions[-1].out_channels)
        return ocr_block(feats, key, value, pixel, up, fusing, mask=mask)

    def _layers(self, kind: type[nn.Module]) -> list[Any]:
        """What pixels go through, of one kind."""
        attention = self.object_context_block
        layers = (*attention.f_pixel, *attention.f_up, *self.conv_bn_dropout)
        return [layer for layer in layers if isinstance(layer, kind)]

    def _slopes(self) -> list[float] | None:
        """Those of the activations that pixels go through; None where a layer is none that the op has, or has hooks."""
        attention = self.object_context_block
        layers, pairs = self._layers(nn.Module), self._layers(nn.Sequential)
        modules = [attention, attention.f_pixel, attention.f_up, self.conv_bn_dropout, *layers]
        modules += [layer for pair in pairs for layer in pair]
        slopes = [slope_of(activation) for _, activation in pairs]
        fits = (
            type(attention) is ObjectAttentionBlock
            and attention.scale == 1
            and all(type(norm) is nn.Identity or is_norm(norm) for norm, _ in pairs)
            and all(type(layer) in (nn.Sequential, nn.Dropout2d) or is_pointwise(layer) for layer in layers)
            and all(map(is_plain_call, modules))
        )
        return [slope for slope in slopes if slope is not None] if fits and None not in slopes else None


class OCRHead(_NoScript, reference.OCRHead):
    __doc__ = reference.OCRHead.__doc__

    gathering: ClassVar[type[reference.SpatialGather]] = SpatialGather
    distribution: ClassVar[type[reference.SpatialOCR]] = SpatialOCR


SpatialGather_Module = SpatialGather
ObjectAttentionBlock2D = ObjectAttentionBlock
SpatialOCR_Module = SpatialOCR
