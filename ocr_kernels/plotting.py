"""Pictures of the maps, by matplotlib, which only drawing needs. Nothing here touches pyplot or a style."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ocr_kernels.core.arguments import check_shape, check_tensors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")  # Okabe and Ito's
BARS = 24  # that still have legible names


def plot_region_maps(image: Tensor, maps: Tensor, names: Sequence[str] | None = None) -> Figure:
    """The region maps over the greyed image, one panel for each region.

    A region's colour is at full strength from the 99th percentile of its weights on.

    Args:
        image: `[3, H, W]`, in 0..1.
        maps: `[K, h, w]`, such as `record_maps` and `region_maps` give for one image; some rows of it to draw those.
        names: of the K regions; their numbers from 1 on by default.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: `image` or `maps` is no tensor.
        ValueError: a shape is another, or `names` are not K.

    Examples:
        >>> figure = plot_region_maps(torch.rand(3, 64, 128), region_maps(torch.randn(1, 4, 16, 32))[0])
        >>> len(figure.axes)
        4
    """
    photo, maps, names = _checked(image, maps, names)
    columns = min(len(maps), 4)
    rows = -(-len(maps) // columns)
    height, width = photo.shape[:2]
    size = max(3.25, 6.5 / columns)  # of a panel, in inches: the title is 6 inches long
    title = "Soft object regions: for each region, a softmax over pixels"
    caption = "Over the greyed image; a colour is at full strength from the 99th percentile of its region's weights on."
    figure = new_figure(size * columns, rows * (size * height / width + 0.35) + 0.75, title, caption)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for k, weights in enumerate(maps):
        show(panels[k], region_over(photo, weights, colours(len(maps))[k]), names[k])
    for rest in panels[len(maps) :]:
        rest.set_axis_off()
    return figure


def region_over(photo: Tensor, weights: Tensor, colour: Tensor) -> Tensor:
    """A region's map `[h, w]` in a colour over the greyed photo `[H, W, 3]`."""
    full = weights.flatten().kthvalue(-(-99 * weights.numel() // 100)).values
    strength = (weights / full.clamp_min(torch.finfo(torch.float32).tiny)).clamp(0, 1)[None, None]
    large = F.interpolate(strength, photo.shape[:2], mode="bilinear", align_corners=False)[0, 0].unsqueeze(2)
    return (1 - large) * 0.6 * photo.mean(2, keepdim=True) + large * colour


def plot_attention(
    image: Tensor,
    maps: Tensor,
    pixels: Sequence[tuple[int, int]],
    names: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
) -> Figure:
    """Numbered pixels of the image, each with a bar chart of its weights over the regions.

    Of more than 24 regions, those with the most weight in any of these pixels.

    Args:
        image: `[3, H, W]`, in 0..1.
        maps: `[K, h, w]`, such as `record_maps` and `attention_maps` give for one image.
        pixels: `(y, x)`, in the image.
        names: of the K regions; their numbers from 1 on by default.
        labels: the region, 0..K-1, that each pixel is ringed in the colour of; that of most weight by default.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: `image` or `maps` is no tensor.
        ValueError: a shape is another, `names` are not K, `labels` not a region for each pixel, or there is no such
            pixel.

    Examples:
        >>> maps = attention_maps(torch.randn(1, 8, 16, 32), torch.randn(1, 8, 4))[0]
        >>> figure = plot_attention(torch.rand(3, 64, 128), maps, pixels=[(10, 20), (40, 100)])
        >>> len(figure.axes)
        3
    """
    photo, maps, names = _checked(image, maps, names)
    height, width = photo.shape[:2]
    if not pixels or not all(0 <= y < height and 0 <= x < width for y, x in pixels):
        raise ValueError(f"pixels must be (y, x) inside the image of {height} x {width}, but are {list(pixels)}")
    if labels is not None and len(labels) != len(pixels):
        raise ValueError(f"labels must be one for each of {len(pixels)} pixels, but are {len(labels)}")
    if labels is not None and not all(0 <= label < len(maps) for label in labels):
        raise ValueError(f"labels must be regions, 0 to {len(maps) - 1}, but are {list(labels)}")
    weights = torch.stack([maps[:, y * maps.shape[1] // height, x * maps.shape[2] // width] for y, x in pixels])
    rings = weights.argmax(1).tolist() if labels is None else labels
    shown = weights.amax(0).topk(min(len(maps), BARS)).indices.sort().values.tolist()
    every = colours(len(maps))
    top = min((limit for limit in (0.1, 0.25, 0.5) if weights.max() <= limit), default=1)

    title = "Pixel-region attention: for each pixel, a softmax over regions"
    caption = "Bars are a pixel's weights on the regions, whose colours they have; they sum to 1."
    figure = new_figure(12, max(6, 1.2 * len(pixels)), title, caption)
    grid = figure.add_gridspec(len(pixels), 2, width_ratios=(2.2, 1))
    picture = figure.add_subplot(grid[:, 0])
    owner = "that has the most weight" if labels is None else "they belong to"
    show(picture, photo, f"pixels, ringed in the colour of the region {owner}")
    for number, (y, x) in enumerate(pixels, 1):
        style = {"boxstyle": "circle", "facecolor": "white", "edgecolor": every[rings[number - 1]].tolist(), "lw": 2.5}
        picture.text(x, y, str(number), ha="center", va="center", fontsize=11, weight="bold", bbox=style)
        bars = figure.add_subplot(grid[number - 1, 1])
        bars.bar(range(len(shown)), weights[number - 1, shown].numpy(), color=every[shown].numpy())
        bars.set(ylim=(0, top), yticks=(0, top / 2, top), xticks=range(len(shown)), ylabel=f"pixel {number}")
        bars.spines[["top", "right"]].set_visible(False)
        bars.tick_params(labelbottom=number == len(pixels))
    bars.set_xticklabels([names[k] for k in shown], rotation=90 if max(map(len, names)) > 2 else 0)
    bars.set_xlabel("region" if len(shown) == len(maps) else f"the {BARS} regions of most weight, of {len(maps)}")
    return figure


def _checked(image: Tensor, maps: Tensor, names: Sequence[str] | None) -> tuple[Tensor, Tensor, Sequence[str]]:
    """The image as `[H, W, 3]`, the maps in float32, both on the CPU, and the names."""
    check_tensors(image=image, maps=maps)
    check_shape("image", image, "[3, H, W]", image.dim() == 3 and image.shape[0] == 3 and image.numel() > 0)
    expected = "[K, h, w] (one image's; where a replaced module made them flat, unflattened)"
    check_shape("maps", maps, expected, maps.dim() == 3 and maps.numel() > 0)
    if names is not None and len(names) != len(maps):
        raise ValueError(f"names must be one for each of {len(maps)} regions, but are {len(names)}")
    names = [str(k) for k in range(1, len(maps) + 1)] if names is None else names
    photo = image.detach().float().cpu().permute(1, 2, 0)
    return photo.clamp(0, 1), maps.detach().float().cpu(), names


def new_figure(width: float, height: float, title: str, caption: str) -> Figure:
    """In inches, with what it shows above it, and how to read it below."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=13)
    figure.supxlabel(caption, fontsize=9, color="0.3")
    return figure


def show(axes: Axes, picture: Tensor, title: str = "") -> None:
    """`picture` is `[H, W, 3]` in 0..1."""
    axes.imshow(picture.numpy())
    axes.set_title(title, fontsize=11)
    axes.set_axis_off()


def colours(regions: int) -> Tensor:
    """`[K, 3]` in 0..1, colour-blind safe; they begin again after seven."""
    from matplotlib.colors import to_rgb

    return torch.tensor([to_rgb(COLOURS[k % len(COLOURS)]) for k in range(regions)])
