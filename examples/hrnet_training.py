"""A small HRNet-OCR learns to segment handwritten digits, as it is and with its OCR modules replaced.

python examples/hrnet_training.py 60   (steps; needs scikit-learn, which ships the digits)
"""

from __future__ import annotations

import copy
import sys
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import ocr_kernels
from ocr_kernels.reference import SpatialGather, SpatialOCR  # stand for the classes of your fork's seg_hrnet_ocr.py

CLASSES = 11  # the digits, and what is no ink
GRID, SIDE = 4, 16  # digits in a row of a picture, pixels of a digit
HELD_OUT = 400
DIGITS = load_digits()


def batch(size: int, seed: int, training: bool) -> tuple[Tensor, Tensor]:
    """Pictures `[B, 1, 64, 64]` of 16 digits each, and the class of every pixel `[B, 64, 64]`."""
    images, labels = torch.from_numpy(DIGITS.images).float() / 16, torch.from_numpy(DIGITS.target)
    images, labels = (x[HELD_OUT:] if training else x[:HELD_OUT] for x in (images, labels))
    chosen = torch.randint(len(images), (size, GRID, GRID), generator=torch.Generator().manual_seed(seed))
    tiles = F.interpolate(images[chosen].flatten(0, 2)[:, None], (SIDE, SIDE), mode="bilinear")
    tiles = tiles.view(size, GRID, GRID, SIDE, SIDE)
    classes = (labels[chosen] + 1)[..., None, None] * (tiles > 0.4)
    pictures, masks = (x.permute(0, 1, 3, 2, 4).reshape(size, GRID * SIDE, GRID * SIDE) for x in (tiles, classes))
    return pictures[:, None], masks


def conv(before: int, after: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())


class HighResolutionNet(nn.Module):
    """Two branches of HRNet, one at half the other's resolution, then OCR; the names are `seg_hrnet_ocr`'s."""

    def __init__(self, width: int = 24, channels: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(1, width), conv(width, width, stride=2))
        self.high, self.low = nn.ModuleList(), nn.ModuleList()
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.transition = conv(width, 2 * width, stride=2)
        for _ in range(2):
            self.high.append(conv(width, width))
            self.low.append(conv(2 * width, 2 * width))
            self.down.append(conv(width, 2 * width, stride=2))
            self.up.append(nn.Conv2d(2 * width, width, 1))
        last = 3 * width
        self.conv3x3_ocr = conv(last, channels)
        self.ocr_gather_head = SpatialGather(CLASSES)
        self.ocr_distri_head = SpatialOCR(channels, channels // 2, channels, dropout=0.05)
        self.cls_head = nn.Conv2d(channels, CLASSES, 1)
        self.aux_head = nn.Sequential(conv(last, last), nn.Conv2d(last, CLASSES, 1))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images `[B, 1, H, W]` to `[auxiliary logits, logits]`, each `[B, K, H / 2, W / 2]`."""
        high = self.stem(images)
        low = self.transition(high)
        for on_high, on_low, down, up in zip(self.high, self.low, self.down, self.up, strict=True):
            high, low = on_high(high), on_low(low)
            high, low = high + enlarged(up(low), high), low + down(high)
        feats = torch.cat([high, enlarged(low, high)], 1)
        aux_logits = self.aux_head(feats)
        feats = self.conv3x3_ocr(feats)
        context = self.ocr_gather_head(feats, aux_logits)
        return [aux_logits, self.cls_head(self.ocr_distri_head(feats, context))]


def enlarged(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=True)


def loss_of(model: nn.Module, images: Tensor, masks: Tensor) -> Tensor:
    aux_logits, logits = (F.interpolate(x, images.shape[2:], mode="bilinear") for x in model(images))
    return F.cross_entropy(logits, masks) + 0.4 * F.cross_entropy(aux_logits, masks)


def train(model: nn.Module, steps: int) -> tuple[float, float]:
    """The last step's loss, and the milliseconds of a step."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    torch.manual_seed(0)  # of dropout
    start = time.perf_counter()
    for step in range(steps):
        loss = loss_of(model, *batch(4, step, training=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach()), 1e3 * (time.perf_counter() - start) / steps


@torch.inference_mode()
def mean_iou(model: nn.Module) -> float:
    """On digits that were not trained on."""
    images, masks = batch(16, 0, training=False)
    found = F.interpolate(model.eval()(images)[1], masks.shape[1:], mode="bilinear").argmax(1)
    both = [((found == k) & (masks == k)).sum() / ((found == k) | (masks == k)).sum() for k in range(CLASSES)]
    return float(torch.stack(both).mean())


def main(steps: int) -> None:
    torch.manual_seed(0)
    before = HighResolutionNet()
    after = copy.deepcopy(before)
    report = ocr_kernels.replace_ocr_modules(after, example_inputs=batch(1, 0, training=True)[0])
    report.raise_if_incomplete()
    print(report)
    for name, model in (("before", before), ("after", after)):
        loss, milliseconds = train(model, steps)
        print(f"{name}: {steps} steps of {milliseconds:.0f} ms, loss {loss:.3f}, mean IoU {mean_iou(model):.3f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 60)
