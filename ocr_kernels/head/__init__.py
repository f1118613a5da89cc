"""Steps 4 and 5 of OCR for inference: from pixels and regions to z, to class logits or to classes, in one call."""

from ocr_kernels.head.functional import HeadWeights, Slopes, ocr_head

__all__ = ["HeadWeights", "Slopes", "ocr_head"]
