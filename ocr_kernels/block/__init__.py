"""Step 4 of OCR in training: from pixels and regions to augmented representations, as one op with a derivative."""

from ocr_kernels.block.functional import Layer, Norm, ocr_block

__all__ = ["Layer", "Norm", "ocr_block"]
