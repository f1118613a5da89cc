"""Fused kernels for Object-Contextual Representations (semantic segmentation, arXiv 1909.11065; not text recognition).

The gather's softmax runs over pixels, once per region; the attention's runs over regions, once per pixel.
"""

from ocr_kernels.attention import pixel_region_attention
from ocr_kernels.core.backends import available_backends, use_backend
from ocr_kernels.core.registration import decompositions, flop_formulas
from ocr_kernels.folding import FoldingReport, fold_ocr_modules, unfold_ocr_modules
from ocr_kernels.gather import spatial_gather
from ocr_kernels.head import HeadWeights, ocr_head
from ocr_kernels.maps import attention_maps, record_maps, region_maps
from ocr_kernels.replace import ReplacementReport, replace_ocr_modules, restore_ocr_modules

__version__ = "0.1.0"

__all__ = [
    "FoldingReport",
    "HeadWeights",
    "ReplacementReport",
    "attention_maps",
    "available_backends",
    "decompositions",
    "flop_formulas",
    "fold_ocr_modules",
    "ocr_head",
    "pixel_region_attention",
    "record_maps",
    "region_maps",
    "replace_ocr_modules",
    "restore_ocr_modules",
    "spatial_gather",
    "unfold_ocr_modules",
    "use_backend",
]
