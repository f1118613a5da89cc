"""Images larger than memory, with the regions of the whole image."""

from ocr_kernels.tiled.inference import TiledResult, segment_tiled
from ocr_kernels.tiled.seam import Seam

__all__ = ["Seam", "TiledResult", "segment_tiled"]
