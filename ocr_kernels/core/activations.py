"""Activations that have a slope: ReLU, LeakyReLU, none."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def activate_(x: Tensor, slope: float) -> Tensor:
    """x where it is positive, slope * x elsewhere, in place. NaN stays."""
    if slope == 1:
        return x
    return F.leaky_relu_(x, slope) if slope else x.relu_()
