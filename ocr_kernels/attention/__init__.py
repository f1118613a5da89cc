"""Step 4a of OCR: every pixel attends to the regions, by a softmax over regions."""

from ocr_kernels.attention.functional import pixel_region_attention

__all__ = ["pixel_region_attention"]
