"""What your own CI may hold: everything was replaced, and nothing became less accurate.

pytest examples/test_parity.py
"""

from __future__ import annotations

import copy

import pytest
import torch

import ocr_kernels
from ocr_kernels.reference import OCRHead  # stands for your own head, in plain PyTorch
from ocr_kernels.testing import assert_parity


@pytest.fixture
def head() -> OCRHead:
    torch.manual_seed(0)
    return OCRHead(in_channels=16, num_classes=19, mid_channels=32, key_channels=16, dropout=0.0)


def test_everything_is_replaced(head: OCRHead) -> None:
    ocr_kernels.replace_ocr_modules(head, example_inputs=torch.randn(2, 16, 16, 24)).raise_if_incomplete()


@pytest.mark.parametrize("training", [True, False])
def test_values_and_gradients(head: OCRHead, training: bool) -> None:
    """Against float64, by the error that the plain head makes itself."""
    plain = copy.deepcopy(head.train(training))
    ocr_kernels.replace_ocr_modules(head)
    assert_parity(head, plain, [torch.randn(2, 16, 16, 24).requires_grad_()])
