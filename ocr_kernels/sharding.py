"""Importing this registers the layouts of all ops on DTensors, for `torch.ops.ocr_kernels`.

The public functions do so themselves, at their first DTensor.
"""

from ocr_kernels.attention import sharding as attention
from ocr_kernels.block import sharding as block
from ocr_kernels.gather import sharding as gather

__all__ = ["attention", "block", "gather"]
