"""Fused kernels for Object-Contextual Representations (semantic segmentation, arXiv 1909.11065; not text recognition).

The gather's softmax runs over pixels, once per region; the attention's runs over regions, once per pixel.
"""

from ocr_kernels.attention import pixel_region_attention
from ocr_kernels.block import Layer, Norm, ocr_block
from ocr_kernels.core.backends import available_backends, use_backend
from ocr_kernels.core.registration import decompositions, flop_formulas
from ocr_kernels.gather import GatherState, spatial_gather
from ocr_kernels.models.maps import attention_maps, record_maps, region_maps
from ocr_kernels.models.replace import replace_ocr_modules, restore_ocr_modules
from ocr_kernels.models.report import ReplacementReport
from ocr_kernels.tiled import TiledResult, segment_tiled

__version__ = "0.1.0"

__all__ = [
    "GatherState",
    "Layer",
    "Norm",
    "ReplacementReport",
    "TiledResult",
    "attention_maps",
    "available_backends",
    "decompositions",
    "flop_formulas",
    "ocr_block",
    "pixel_region_attention",
    "record_maps",
    "region_maps",
    "replace_ocr_modules",
    "restore_ocr_modules",
    "segment_tiled",
    "spatial_gather",
    "use_backend",
]
