"""The command `ocr-kernels demo`: a small OCR network learns one photograph, before and after the replacement.

Three copies of it train in lockstep on the same crops: as it is, as it is on crops that differ by one unit in the last
place, and with its OCR modules replaced. The second copy shows how far rounding alone drives two runs apart.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ocr_kernels.core.backends import Backend, resolve_backend, use_backend
from ocr_kernels.models.maps import record_maps
from ocr_kernels.models.replace import replace_ocr_modules
from ocr_kernels.plotting import COLOURS, colours, new_figure, plot_attention, plot_region_maps, region_over, show
from ocr_kernels.reference import OCRHead
from ocr_kernels.testing import FACTORS, Measurement, measure_parity, saved_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

PACKAGES = {"matplotlib": "matplotlib", "numpy": "numpy", "PIL": "pillow", "rich": "rich", "sklearn": "scikit-learn"}
REGIONS = len(COLOURS)
SIZE, CROP, STRIDE, BATCH = (256, 384), 160, 4, 2
MARKS = 5
STEPS = 150


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", type=Path, metavar="FILE", help="a photograph (default: china.jpg of scikit-learn)")
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: cuda where there is one)")
    parser.add_argument("--backend", help="reference, triton or native (default: the fastest on the device)")
    parser.add_argument(
        "--out", type=Path, default=Path("demo-output"), metavar="DIR", help="for the pictures (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help="of training (default: %(default)s)")


def main(args: argparse.Namespace) -> int:
    return run_demo(args.image, args.device, args.backend, args.out, args.steps)


def run_demo(
    image: Path | str | None = None,
    device: str | None = None,
    backend: Backend | None = None,
    out: Path | str = "demo-output",
    steps: int = STEPS,
) -> int:
    """Compare one training step, train, print a table and write the pictures and `report.txt` into `out`.

    Returns:
        0; 1 if the replaced network's outputs, gradients or loss curve differ more than rounding explains; 2, with one
        line on stderr and nothing written, if the arguments or this installation do not allow a run.
    """
    try:
        missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
        if missing:
            raise ValueError(f"needs {', '.join(missing)}: pip install {' '.join(missing)}")
        if steps < 1:
            raise ValueError(f"--steps must be at least 1, but is {steps}")
        chosen = _device(device)
        resolve_backend(chosen, backend)
        photo = _photo(_default_image() if image is None else Path(image))
        directory = Path(out)
        if directory.exists() and not directory.is_dir():
            raise ValueError(f"--out {out}: not a directory")
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()  # pictures can be written
    except (OSError, RuntimeError, ValueError) as error:
        print(f"ocr-kernels demo: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    cudnn = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with use_backend(backend), cudnn, torch.random.fork_rng([chosen] if chosen.type == "cuda" else []):
        return _demo(photo.to(chosen), directory, steps)


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError) as error:  # the former where PyTorch was built without CUDA
        raise ValueError(f"--device {name} is not available: {error}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, but is {name}")
    return device


def _default_image() -> Path:
    specification = importlib.util.find_spec("sklearn")  # does not import it
    assert specification is not None
    assert specification.origin is not None
    return Path(specification.origin).with_name("datasets") / "images" / "china.jpg"


def _photo(path: Path) -> Tensor:
    """The picture as `[1, 3, H, W]` in 0..1, cropped and resized to `SIZE`, upright if it is upright."""
    import numpy as np
    from PIL import Image, ImageOps

    if not path.is_file():
        raise ValueError(f"--image {path}: no such file")
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # so do Pillow's decoders
        raise ValueError(f"--image {path}: not an image that Pillow can read ({error})") from error
    width, height = max(SIZE), min(SIZE)
    size = (width, height) if image.width >= image.height else (height, width)
    pixels = np.asarray(ImageOps.fit(image, size, Image.Resampling.LANCZOS), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0).contiguous()


def _labels(photo: Tensor) -> Tensor:
    """`[H / STRIDE, W / STRIDE]` labels: k-means over colour and position, then each pixel takes its vicinity's."""
    from sklearn.cluster import KMeans

    colours = F.avg_pool2d(photo.cpu(), STRIDE)
    height, width = colours.shape[2:]
    y, x = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    points = torch.cat((3 * colours[0], y[None], 0.3 * x[None])).flatten(1).T
    clusters = KMeans(REGIONS, n_init=4, random_state=0).fit_predict(points.numpy())
    one_hot = F.one_hot(torch.from_numpy(clusters).long(), REGIONS).T.reshape(1, REGIONS, height, width)
    smooth = F.avg_pool2d(one_hot.float(), 9, stride=1, padding=4, count_include_pad=False)
    return smooth.argmax(1)[0].to(photo.device)


class _Network(nn.Module):
    """A few convolutions of output stride 4, then an OCR head."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in ((3, 32, 2), (32, 48, 2), (48, 48, 1), (48, 64, 1)):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        self.backbone = nn.Sequential(*layers)
        self.head = OCRHead(64, REGIONS, 256, key_channels=128)
        # A batch norm over the regions, which are few and begin nearly equal, would divide by almost nothing and
        # drive runs that differ by rounding apart within five steps.
        attention = self.head.ocr_distri_head.object_context_block
        for part in (attention.f_object, attention.f_down):
            for layer in part:
                if isinstance(layer, nn.Sequential):
                    layer[0] = nn.Identity()

    def forward(self, images: Tensor) -> list[Tensor]:
        """`[B, 3, H, W]` to `[auxiliary logits, logits]`, each `[B, K, H / 4, W / 4]`."""
        logits: list[Tensor] = self.head(self.backbone(images))
        return logits


class _Objective(nn.Module):
    """The loss of a network: cross-entropy of its logits, plus 0.4 times that of the auxiliary ones."""

    def __init__(self, network: _Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images `[B, 3, H, W]` and labels `[B, H / 4, W / 4]` to loss, logits, auxiliary logits."""
        auxiliary, logits = self.network(images)
        # one long row of pixels, since PyTorch's loss of images adds up in no fixed order on a GPU
        main, extra = (F.cross_entropy(m.movedim(1, -1).flatten(0, 2), labels.flatten()) for m in (logits, auxiliary))
        return main + 0.4 * extra, logits, auxiliary


class _Run:
    """One network in training: its optimiser, its losses, its seconds per step."""

    def __init__(self, objective: _Objective, steps: int) -> None:
        self.objective = objective.train()
        self.optimiser = torch.optim.AdamW(objective.parameters(), lr=1e-3, eps=1e-5)
        self.schedule = torch.optim.lr_scheduler.PolynomialLR(self.optimiser, total_iters=steps, power=0.9)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, images: Tensor, labels: Tensor) -> None:
        torch.manual_seed(len(self.losses))  # dropout draws the same in every run
        start = time.perf_counter()
        loss = self.objective(images, labels)[0]
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.losses.append(float(loss.detach()))  # waits for the device
        self.seconds.append(time.perf_counter() - start)
        self.schedule.step()

    def drift(self, other: _Run) -> list[float]:
        """How far the losses are from another run's, step by step."""
        return [abs(a - b) for a, b in zip(self.losses, other.losses, strict=True)]


def _crops(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of crops at random places, half of them mirrored, with their labels."""
    generator = torch.Generator().manual_seed(0)
    side = CROP // STRIDE
    choices = torch.tensor([labels.shape[0] - side + 1, labels.shape[1] - side + 1, 2])
    while True:
        crops = []
        for _ in range(BATCH):
            y, x, mirrored = (torch.rand(3, generator=generator) * choices).int().tolist()
            window = (..., slice(STRIDE * y, STRIDE * y + CROP), slice(STRIDE * x, STRIDE * x + CROP))
            crop = images[0][window], labels[y : y + side, x : x + side]
            crops.append([part.flip(-1) for part in crop] if mirrored else crop)
        image, label = (torch.stack(parts) for parts in zip(*crops, strict=True))
        yield image, label


def _demo(photo: Tensor, directory: Path, steps: int) -> int:
    from rich.console import Console
    from rich.progress import track

    console = Console(record=True, highlight=False)
    images, labels = (photo - 0.45) / 0.25, _labels(photo)
    batches = _crops(images, labels)
    batch = next(batches)

    torch.manual_seed(0)
    before = _Objective(_Network()).to(photo.device)
    moved, after = copy.deepcopy(before), copy.deepcopy(before)
    report = replace_ocr_modules(after.network, example_inputs=batch[0])
    console.print(f"{report}\n", markup=False, soft_wrap=True)
    not_fused = {"gather", "attention"} - {name for replaced in report.replaced for name in replaced.computations or ()}
    if not_fused:
        console.print(f"parity FAILED: not replaced: {', '.join(sorted(not_fused))}")
        return 1
    try:
        measurements = _compare(after, before, batch)
    except AssertionError as error:
        console.print(f"parity FAILED: {error}", markup=False)
        return 1
    saved = [_saved(objective, batch) for objective in (before, after)]

    runs = [_Run(objective, steps) for objective in (before, moved, after)]
    for _ in track(range(steps), "training 3 networks in lockstep", console=Console()):
        crops, targets = next(batches)
        for run in runs:
            run.step(crops.nextafter(crops + 1) if run.objective is moved else crops, targets)
    with record_maps() as maps:  # of the replaced network: the others never call our ops
        masks = [_mask(objective.network.eval(), images) for objective in (before, moved, after)]
    console.print(_training_table(runs, masks, labels.cpu(), saved))
    console.print(_parity_table(measurements))
    regions, attention = (recorded[0][0].unflatten(1, labels.shape) for recorded in (maps.regions, maps.attention))
    pictures = _draw(photo[0].cpu(), labels.cpu(), masks[-1], regions, attention, runs, saved)
    for name, figure in pictures.items():
        figure.savefig(directory / name, dpi=150)

    failures = [str(m) for m in measurements if not m.passed]
    _, moved_drift, drift = (max(run.drift(runs[0])) for run in runs)
    # Training multiplies rounding until the two networks are merely alike: over seeds, either drift ends anywhere from
    # 0.01% to 1% of the first loss. So this is a check of the whole; the comparison of one step is the sharp one.
    allowed = max(10 * moved_drift, 0.02 * max(runs[0].losses))
    if not drift <= allowed:
        failures.append(f"loss curves: difference {drift:.3g} exceeds {allowed:.3g}")
    verdict = "\n  ".join(("parity FAILED", *failures)) if failures else "parity holds"
    console.print(verdict, markup=False, soft_wrap=True)
    console.print(f"in {directory}: {', '.join((*pictures, 'report.txt'))}", markup=False, soft_wrap=True)
    lines = [console.export_text(), "every measurement, against the network in float64", *map(str, measurements)]
    (directory / "report.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if failures else 0


def _compare(after: _Objective, before: _Objective, batch: tuple[Tensor, Tensor]) -> list[Measurement]:
    """One training step measured: outputs, all gradients, all running statistics.

    Dropout is off, since float64, in which the oracle runs, may draw other numbers.
    """
    after, before = (copy.deepcopy(objective).train() for objective in (after, before))
    for module in (*after.modules(), *before.modules()):
        if isinstance(module, nn.Dropout2d):
            module.eval()
    no_grad = batch[0].new_zeros(BATCH, REGIONS, *batch[1].shape[1:])
    return measure_parity(
        after,
        before,
        batch,
        grad_output=(batch[0].new_ones(()), no_grad, no_grad),
        factors={torch.float32: 2 * FACTORS[torch.float32]},  # the errors of two ops meet in the gradients
    )


def _parity_table(measurements: Sequence[Measurement]) -> Table:
    """Max and relative L2 error of the outputs, and of the worst of the gradients and of the running statistics."""
    tensors: dict[str, dict[str, Measurement]] = {}
    for measurement in measurements:
        tensors.setdefault(measurement.tensor, {})[measurement.measure] = measurement

    def badness(tensor: str) -> float:
        return max(m.error / m.bound for m in tensors[tensor].values() if m.bound > 0)

    rows = {"output 0": "loss", "output 1": "logits", "output 2": "auxiliary logits"}
    notes = []
    for kind, label in (("gradient of ", "gradients"), ("buffer ", "statistics")):
        names = [tensor for tensor in tensors if tensor.startswith(kind)]
        worst = max(names, key=badness)
        rows[worst] = f"{label}: worst"
        notes.append(f"worst of {len(names)} {label}: {worst.removeprefix(kind).removeprefix('network.')}")
    table = _table("One training step in float32, against the same in float64", "\n".join(notes))
    for column in ("max error\nbefore", "\nafter", "\nallowed", "relative\nbefore", "\nafter", ""):
        table.add_column(column, justify="right")
    for tensor, label in rows.items():
        largest, relative = (tensors[tensor][measure] for measure in ("max error", "relative L2 error"))
        numbers = (largest.reference, largest.error, largest.bound, relative.reference, relative.error)
        passed = all(m.passed for m in tensors[tensor].values())
        table.add_row(label, *(f"{number:.1e}" for number in numbers), "ok" if passed else "FAILS")
    return table


def _table(title: str, caption: str | None = None) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, caption=caption, box=box.SIMPLE, title_justify="left", caption_justify="left")
    table.add_column("")
    return table


def _saved(objective: _Objective, batch: tuple[Tensor, Tensor]) -> tuple[int, int]:
    """Bytes saved for backward by the whole network, and by the head's steps 3 and 4 alone."""
    head = objective.network.head
    with torch.no_grad():
        feats = objective.network.backbone(batch[0])
        pixels, logits = head.conv3x3_ocr(feats), head.aux_head(feats)
    pixels.requires_grad_()
    logits.requires_grad_()

    def steps_3_and_4() -> Tensor:
        out: Tensor = head.ocr_distri_head(pixels, head.ocr_gather_head(pixels, logits))
        return out

    there = (*objective.parameters(), *objective.buffers(), *batch, pixels, logits)
    return saved_bytes(objective, *batch, exclude=there), saved_bytes(steps_3_and_4, exclude=there)


def _training_table(
    runs: Sequence[_Run], masks: Sequence[Tensor], labels: Tensor, saved: Sequence[tuple[int, int]]
) -> Table:
    table = _table(f"Training, {len(runs[0].losses)} steps", _gain(runs, saved))
    for column in ("before", "before, crops\none ulp off", "after"):
        table.add_column(column, justify="right")
    right = [mask[STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE] == labels for mask in masks]
    same = [mask == masks[0] for mask in masks]
    table.add_row("time per step (median)", *(f"{1e3 * statistics.median(run.seconds):.0f} ms" for run in runs))
    for row, numbers in zip(("network", "OCR block"), zip(*saved, strict=True), strict=True):
        first, last = (f"{n / 2**20:.1f} MiB" for n in numbers)
        table.add_row(f"saved for backward: {row}", first, first, last)
    table.add_row("loss at the end", *(f"{run.losses[-1]:.4f}" for run in runs))
    table.add_row("loss curve: largest difference", "", *(f"{max(run.drift(runs[0])):.1e}" for run in runs[1:]))
    table.add_row("mask: pixels equal", "", *(f"{100 * float(m.float().mean()):.2f} %" for m in same[1:]))
    table.add_row("mask: pixels as labelled", *(f"{100 * float(m.float().mean()):.1f} %" for m in right))
    return table


def _gain(runs: Sequence[_Run], saved: Sequence[tuple[int, int]]) -> str:
    """What the replacement brought, in a sentence."""
    before, *_, after = (statistics.median(run.seconds) for run in runs)
    (_, block), (_, small) = saved
    return f"Replaced: {after / before:.0%} of the time of a step, {small / block:.0%} of the bytes that it saves."


@torch.no_grad()
def _mask(network: _Network, images: Tensor) -> Tensor:
    """`[H, W]`, the region of every pixel, by a network in evaluation mode."""
    large = F.interpolate(network(images)[1], size=images.shape[2:], mode="bilinear", align_corners=False)
    return large.argmax(1)[0].cpu()


def _draw(
    photo: Tensor, labels: Tensor, mask: Tensor, regions: Tensor, attention: Tensor, runs: Sequence[_Run],
    saved: Sequence[tuple[int, int]],
) -> dict[str, Figure]:  # fmt: skip
    """The pictures by file name; `photo` is `[3, H, W]` in 0..1, the maps are `[K, h, w]`."""
    pixels = _typical_pixels(mask)
    return {
        "overview.png": _draw_overview(photo, mask, regions, runs, saved),
        "photo.png": _draw_photo(photo),
        "mask.png": _draw_mask(photo, labels, mask),
        "regions.png": plot_region_maps(photo, regions, [f"region {k}" for k in range(1, REGIONS + 1)]),
        "attention.png": plot_attention(photo, attention, pixels, labels=[int(mask[pixel]) for pixel in pixels]),
        "losses.png": _draw_losses(runs),
    }


def _typical_pixels(mask: Tensor) -> list[tuple[int, int]]:
    """`(y, x)` of the pixel deepest inside each region of the mask, of the `MARKS` regions where that is deepest."""
    one_hot = F.one_hot(mask, REGIONS).movedim(2, 0)[None].float()
    inside = F.avg_pool2d(one_hot, 41, stride=1, padding=20)[0].flatten(1)  # near 1 where the region is all around
    depth, deepest = inside.max(1)
    chosen = depth.argsort(descending=True)[:MARKS]
    pixels = deepest[chosen[depth[chosen] > 0]].sort().values
    return [divmod(pixel, mask.shape[1]) for pixel in pixels.tolist()]


def _draw_overview(
    photo: Tensor, mask: Tensor, regions: Tensor, runs: Sequence[_Run], saved: Sequence[tuple[int, int]]
) -> Figure:
    """What the regions are, and what the replacement brought."""
    title = "Object regions of a photo, and what training this small network on them costs on this machine"
    caption = (
        "Left, where the three largest regions have their weight; right, time and what is kept for the backward pass."
    )
    figure = new_figure(14, 2.6 * photo.shape[1] / photo.shape[2] + 1.65, title, caption)
    *pictures, time_axes, bytes_axes = figure.subplots(1, 5, width_ratios=(3, 3, 3, 1.6, 1.6))
    regions = regions.detach().float().cpu()
    largest = mask.flatten().bincount(minlength=REGIONS).argsort(descending=True)[: len(pictures)].sort().values
    for axes, k in zip(pictures, largest.tolist(), strict=True):
        show(axes, region_over(photo.permute(1, 2, 0), regions[k], colours(REGIONS)[k]), f"region {k + 1}")
    times = [1e3 * statistics.median(run.seconds) for run in (runs[0], runs[-1])]
    for axes, values, what in (
        (time_axes, times, "a step [ms]"),
        (bytes_axes, [block / 2**20 for _, block in saved], "saved by the\nOCR block [MiB]"),
    ):
        bars = axes.bar(["before", "after"], values, color=[COLOURS[0], COLOURS[4]])
        axes.bar_label(bars, fmt="%.3g")
        axes.set_title(what, fontsize=11)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set(yticks=(), ylim=(0, 1.15 * max(values)))
    return figure


def _draw_photo(photo: Tensor) -> Figure:
    caption = "The network is trained on crops of it."
    figure = new_figure(7, 7 * photo.shape[1] / photo.shape[2] + 0.65, "The photo", caption)
    show(figure.subplots(), photo.permute(1, 2, 0))
    return figure


def _draw_mask(photo: Tensor, labels: Tensor, mask: Tensor) -> Figure:
    from matplotlib.patches import Patch

    title = "Labels of k-means, and what the replaced network learnt of them"
    figure = new_figure(12, 6 * photo.shape[1] / photo.shape[2] + 1.25, title, caption="")
    grey = 0.25 + 0.75 * photo.mean(0).unsqueeze(2)
    large = labels.repeat_interleave(STRIDE, 0).repeat_interleave(STRIDE, 1)
    left, right = figure.subplots(1, 2)
    show(left, 0.4 * grey + 0.6 * colours(REGIONS)[large], "labels")
    show(right, 0.4 * grey + 0.6 * colours(REGIONS)[mask], "mask, over the photo")
    handles = [Patch(color=colour, label=f"region {k}") for k, colour in enumerate(COLOURS, 1)]
    caption = "A colour is a region, in both."
    figure.legend(
        handles=handles, loc="outside lower center", ncols=REGIONS, frameon=False, title=caption, title_fontsize=9
    )
    return figure


def _draw_losses(runs: Sequence[_Run]) -> Figure:
    before, moved, after = runs
    caption = "Left, the losses themselves. Right, what the replacement moves them by, beside what rounding alone does."
    figure = new_figure(12, 4.75, "Training before and after the replacement", caption)
    left, right = figure.subplots(1, 2)
    left.plot(before.losses, color=COLOURS[0], linewidth=4, label="before")
    left.plot(after.losses, color=COLOURS[4], linewidth=1.5, label="after")
    left.set(xlabel="step", ylabel="loss", title="loss")
    for run, colour, label in ((moved, COLOURS[0], "before, crops one ulp off"), (after, COLOURS[4], "after")):
        right.plot([max(drift, 1e-8) for drift in run.drift(before)], color=colour, label=label)
    right.set(xlabel="step", yscale="log", title="difference of the loss from that before")
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
