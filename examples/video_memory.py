"""Regions that remember the frames of a clip, class by class, beside those of each frame alone.

A small OCR network learns noisy pictures of moving discs, then sees a noisier clip in which the light changes and one
disc is hidden for a while. Its regions come from each frame, from a moving average of those, or from a `GatherState`
that fades: there a frame counts for a class as much as the class is to be seen in it.

python examples/video_memory.py 150   (steps of training; ten seconds on a CPU)
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ocr_kernels import GatherState, spatial_gather
from ocr_kernels.modules import OCRHead

HEIGHT, WIDTH, FRAMES = 36, 48, 60
COLOURS = torch.tensor(
    [[0.2, 0.2, 0.2], [0.8, 0.3, 0.2], [0.2, 0.7, 0.3], [0.3, 0.3, 0.9]]
)  # of the ground, three discs
CLASSES = len(COLOURS)
HIDDEN, WHEN = 2, range(25, 40)  # the class that is hidden, and its frames


def clip(frames: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures `[T, 3, H, W]` without noise, and the class of every pixel `[T, H, W]`."""
    size = torch.tensor([HEIGHT, WIDTH])
    place = torch.rand(CLASSES, 2, generator=generator)
    speed = 0.04 * (torch.rand(CLASSES, 2, generator=generator) - 0.5)
    y, x = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    masks = torch.zeros(frames, HEIGHT, WIDTH, dtype=torch.long)
    for t in range(frames):
        centres = (1 - (1 - (place + t * speed) % 2).abs()) * size  # discs rebound from the borders
        for k in range(1, CLASSES):
            if not (k == HIDDEN and t in WHEN):
                masks[t][(y - centres[k, 0]) ** 2 + (x - centres[k, 1]) ** 2 < 64] = k
    light = 1 + 0.3 * torch.linspace(0, 2 * torch.pi, frames).sin()
    return light[:, None, None, None] * COLOURS[masks].permute(0, 3, 1, 2), masks


class Network(nn.Module):
    def __init__(self, channels: int = 24) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()
        )
        self.head = OCRHead(channels, CLASSES, mid_channels=32, key_channels=16, dropout=0)

    def pixels(self, frame: Tensor) -> tuple[Tensor, Tensor]:
        """What regions are gathered from: feats `[B, C, H, W]` and logits `[B, K, H, W]`."""
        feats = self.backbone(frame)
        return self.head.conv3x3_ocr(feats), self.head.aux_head(feats)

    def classify(self, feats: Tensor, regions: Tensor) -> Tensor:
        return self.head.cls_head(self.head.ocr_distri_head(feats, regions.unsqueeze(3)))


def train(network: Network, steps: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(steps):
        frames, masks = clip(40, generator)
        chosen = torch.randint(40, (4,), generator=generator)
        frames, masks = noisy(frames[chosen], 0.3, generator), masks[chosen]
        feats, logits = network.pixels(frames)
        out = network.classify(feats, spatial_gather(feats, logits))
        loss = F.cross_entropy(out, masks) + 0.4 * F.cross_entropy(logits, masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def noisy(frames: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    return frames + noise * torch.randn(frames.shape, generator=generator)


Pixels = tuple[Tensor, Tensor]  # feats and logits of a frame
Memory = Callable[[Tensor, Tensor], Tensor]  # of these, frame by frame, to regions [1, C, K]


def averaging(momentum: float) -> Memory:
    """A moving average of the regions of each frame: whether a class is in it or not."""
    average: list[Tensor] = []

    def regions(feats: Tensor, logits: Tensor) -> Tensor:
        here = spatial_gather(feats, logits)
        average.append(momentum * average[-1] + (1 - momentum) * here if average else here)
        return average[-1]

    return regions


def fading(momentum: float) -> Memory:
    """The gather of all frames so far, in which those before weigh `momentum` times what they did."""
    state = GatherState()

    def regions(feats: Tensor, logits: Tensor) -> Tensor:
        state.update(feats, logits)
        result = state.result()
        state.fade(momentum)
        return result

    return regions


def measure(network: Network, memory: Memory, pixels: list[Pixels], truth: Tensor, masks: Tensor) -> list[float]:
    """In %: how far regions move from frame to frame, errors of those in view and of the hidden one, mean IoU."""
    found = torch.cat([memory(*each) for each in pixels])  # [T, C, K], as `truth`
    outputs = [network.classify(feats, f[None]) for (feats, _), f in zip(pixels, found, strict=True)]
    classes = torch.cat(outputs).argmax(1)
    shown = torch.stack([masks.flatten(1).eq(k).any(1) for k in range(CLASSES)], 1)  # [T, K]
    size = truth.norm(dim=1)  # [T, K]
    last = WHEN.start - 1  # the frame in which the hidden class was last seen
    jitter = ((found[1:] - found[:-1]).norm(dim=1) / size[1:])[shown[1:] & shown[:-1]]
    error = ((found - truth).norm(dim=1) / size)[shown]
    of_hidden = (found[list(WHEN), :, HIDDEN] - truth[last, :, HIDDEN]).norm(dim=1) / size[last, HIDDEN]
    hits = [((classes == k) & (masks == k)).sum() / ((classes == k) | (masks == k)).sum() for k in range(CLASSES)]
    return [100 * float(each.mean()) for each in (jitter, error, of_hidden, torch.stack(hits))]


@torch.no_grad()
def compare(network: Network, generator: torch.Generator) -> None:
    clips = []
    for _ in range(4):
        clean, masks = clip(FRAMES, generator)
        pixels = [network.pixels(frame) for frame in noisy(clean, 0.6, generator).split(1)]
        clips.append((pixels, spatial_gather(*network.pixels(clean)), masks))
    rows: dict[str, Callable[[], Memory]] = {"of each frame": lambda: spatial_gather}
    for momentum in (0.5, 0.8, 0.95):
        rows[f"moving average, {momentum}"] = functools.partial(averaging, momentum)
        rows[f"GatherState, {momentum}"] = functools.partial(fading, momentum)
    print(f"{'regions':<22}{'jitter %':>10}{'error %':>10}{'hidden %':>10}{'IoU %':>10}")
    for name, memory in rows.items():
        means = torch.tensor([measure(network, memory(), *each) for each in clips]).mean(0).tolist()
        print(f"{name:<22}" + "".join(f"{mean:>10.1f}" for mean in means))


def main(steps: int) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = Network()
    train(network, steps, generator)
    compare(network.eval(), generator)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 150)
