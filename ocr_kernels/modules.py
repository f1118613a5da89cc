"""Drop-in OCR modules on the fused ops: HRNet's constructors, forward argument order and `state_dict` keys.

The layers are defined once, in `ocr_kernels.reference`; what differs here is how the gather and the attention are
computed. HRNet's own class names are aliases, so changing an import is enough.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ocr_kernels import reference
from ocr_kernels.attention import pixel_region_attention
from ocr_kernels.core.backends import left_to_compiler
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


class OCRHead(_NoScript, reference.OCRHead):
    __doc__ = reference.OCRHead.__doc__

    gathering: ClassVar[type[reference.SpatialGather]] = SpatialGather
    distribution: ClassVar[type[reference.SpatialOCR]] = SpatialOCR


SpatialGather_Module = SpatialGather
ObjectAttentionBlock2D = _ObjectAttentionBlock = ObjectAttentionBlock
SpatialOCR_Module = SpatialOCR
