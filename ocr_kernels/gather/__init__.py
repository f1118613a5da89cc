"""Step 3 of OCR: pixels gathered into region representations, by a softmax over pixels."""

from ocr_kernels.gather.functional import spatial_gather
from ocr_kernels.gather.state import GatherState

__all__ = ["GatherState", "spatial_gather"]
