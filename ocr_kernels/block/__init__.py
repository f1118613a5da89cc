"""Step 4 of OCR: from pixels and regions to augmented representations, class logits or classes, as one op."""

from ocr_kernels.block.functional import FoldedBlock, fold_block, ocr_block
from ocr_kernels.block.layers import Layer, Norm

__all__ = ["FoldedBlock", "Layer", "Norm", "fold_block", "ocr_block"]
