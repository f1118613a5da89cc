"""The names that a profile shows."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import profile

from ocr_kernels import modules, pixel_region_attention


@pytest.mark.parametrize("training", [True, False])
def test_ops_have_their_names(training: bool) -> None:
    head = modules.OCRHead(in_channels=8, num_classes=3, mid_channels=8, key_channels=4).train(training)
    query, region = torch.randn(1, 4, 5, requires_grad=training), torch.randn(1, 4, 3)
    with profile(acc_events=True) as profiled, torch.set_grad_enabled(training):
        out = head(torch.randn(2, 8, 4, 4))[1].sum() + pixel_region_attention(query, region, region).sum()
        if training:
            out.backward()
    names = {event.key for event in profiled.key_averages()}
    ops = ["spatial_gather", "pixel_region_attention", "ocr_block" if training else "ocr_block_inference"]
    ops += [f"{op}_backward" for op in ops] if training else []
    assert {f"ocr_kernels::{op}" for op in ops} <= names
