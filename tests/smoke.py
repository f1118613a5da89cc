"""What a wheel is tried with, where there is PyTorch and nothing else: the compiled kernels against the definitions."""

from functools import partial

import torch

import ocr_kernels
from ocr_kernels.attention import reference as attention
from ocr_kernels.core.libraries import library
from ocr_kernels.gather import reference as gather
from ocr_kernels.testing import assert_parity, attention_inputs, gather_inputs

for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for op, definition, inputs in (
        (ocr_kernels.spatial_gather, gather.spatial_gather, gather_inputs),
        (ocr_kernels.pixel_region_attention, attention.pixel_region_attention, attention_inputs),
    ):
        assert_parity(partial(op, backend="native"), definition, inputs(dtype=dtype, requires_grad=True))
print(ocr_kernels.__file__)
print(library())
