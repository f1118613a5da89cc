"""The regions' colours, as colour-blind people see them."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from ocr_kernels.plotting import COLOURS

# Machado, Oliveira and Fernandes (2009), of linear RGB, where one kind of cone is missing
SEEN = {
    "protanopia": [0.152286, 1.052583, -0.204868, 0.114503, 0.786281, 0.099216, -0.003882, -0.048116, 1.051998],
    "deuteranopia": [0.367322, 0.860646, -0.227968, 0.280085, 0.672501, 0.047413, -0.011820, 0.042940, 0.968881],
    "tritanopia": [1.255528, -0.076749, -0.178779, -0.078411, 0.930809, 0.147602, 0.004733, 0.691367, 0.303900],
    "all cones": torch.eye(3).flatten().tolist(),
}
TO_XYZ = [0.4124564, 0.3575761, 0.1804375, 0.2126729, 0.7151522, 0.0721750, 0.0193339, 0.1191920, 0.9503041]
WHITE = torch.tensor([0.95047, 1.0, 1.08883])


def matrix(values: list[float]) -> Tensor:
    return torch.tensor(values).view(3, 3)


def lab(linear: Tensor) -> Tensor:
    """CIELAB, in which 2.3 is a difference that is just noticed."""
    x, y, z = ((matrix(TO_XYZ) @ linear) / WHITE).pow(1 / 3)  # of no colour as dark as needs the other formula
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eyes", SEEN)
def test_colours_are_told_apart(eyes: str) -> None:
    pytest.importorskip("matplotlib", reason="knows the colours' numbers")
    from ocr_kernels.plotting import colours

    rgb = colours(len(COLOURS))
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = [lab((matrix(SEEN[eyes]) @ colour).clamp(1e-3, 1)) for colour in linear]
    assert min(float((a - b).norm()) for a, b in combinations(seen, 2)) > 15
