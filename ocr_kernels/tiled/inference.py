"""The call: one pass over the tiles for each gather of the model, and one for the result."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ocr_kernels.gather.state import GatherState
from ocr_kernels.tiled.features import Features
from ocr_kernels.tiled.gathers import Gathers, Reached
from ocr_kernels.tiled.output import File, Journal, Output, checksum
from ocr_kernels.tiled.resize import places, resize
from ocr_kernels.tiled.seam import Seam, SeamMeter, seen
from ocr_kernels.tiled.sources import Source
from ocr_kernels.tiled.tiles import Grid, Tile

FLIPS: dict[str, tuple[int, ...]] = {"horizontal": (-1,), "vertical": (-2,), "both": (-2, -1)}


@dataclass(frozen=True)
class TiledResult:
    """What `segment_tiled` made of an image, and how.

    Examples:
        >>> head = modules.OCRHead(in_channels=3, num_classes=5, mid_channels=8, key_channels=4).eval()
        >>> result = segment_tiled(head, torch.rand(3, 40, 64), tile=32, margin=4, stride=1)
        >>> result.tiles, result.gathers, result.seam.pixels
        (6, 1, 288)
    """

    out: Any
    """The tensor or the array that was written, or the path of the file."""
    tiles: int
    gathers: int
    """How many the model has; the tiles, at all scales with all flips, were run once for each, and once more."""
    seconds: float
    peak_bytes: int | None
    """The most memory that the process has had: on a GPU that of PyTorch's tensors, else resident; None if unknown."""
    seam: Seam | None
    """None where no two tiles saw the same pixels in this run."""


def segment_tiled(
    model: Callable[..., Any],
    image: Any,
    *,
    tile: int | tuple[int, int] = 1024,
    margin: int = 128,
    stride: int = 32,
    backbone: Callable[[Tensor], Any] | None = None,
    features: str | os.PathLike[str] = "recompute",
    prepare: Callable[[Any], Tensor] | None = None,
    output: int | str | Callable[[Any], Tensor] = -1,
    align_corners: bool = False,
    scales: Sequence[float] = (1.0,),
    flips: Sequence[Literal["horizontal", "vertical", "both"]] = (),
    result: Literal["classes", "logits"] = "classes",
    out: Any = None,
    restart: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> TiledResult:
    """Segment an image tile by tile with the regions of the whole image.

    OCR's regions are averages over all pixels, so that a tile on its own has others than its image. Here the tiles are
    run twice: the first pass adds up the regions, each pixel once, the second uses them. What is left of the
    tiles is what the backbone does at their edges: nothing, where it sees no further than `margin`.

    Any model will do whose gather runs as our op: with `ocr_kernels.modules`, or after `replace_ocr_modules`. One
    with several gathers, each of which may depend on the one before, is run once for each and once more.

    Args:
        model: in eval mode; takes `[1, C, h, w]`, or what `backbone` returns, a tuple as several arguments. Its
            gather's pixels must lie as the image's do, `[1, C, h, w]` or row by row `[1, C, N]`.
        image: `[C, H, W]`: a tensor, or an array in memory or in a file that has a shape and slices; or a reader like
            rasterio's datasets. One tile at a time is read.
        tile: height and width of what the model sees at once; other `scales` see other sizes.
        margin: how far a tile reaches beyond its core, the pixels that are taken from it; not beyond the image.
        stride: sizes of tiles, cores and margins are multiples of it. The image is continued to such a multiple at its
            lower and right edges by repeating the last row and column, which count in the regions.
        backbone: what comes before `model`, if features are to be kept.
        features: `"recompute"` runs the backbone in each pass, `"keep"` holds its results in memory; a path is a folder
            for them, which they leave when they are used up.
        prepare: makes what was read, `[C, h, w]`, a floating tensor `[1, C', h, w]`; by default its values in float32.
            The result goes to the device of the model's first parameter, if it has one.
        output: which of the model's outputs are the logits, an index or a key, or a function that finds them;
            a tensor is taken as it is. `[1, K, h, w]` of a lower resolution are interpolated bilinearly.
        align_corners: of this interpolation.
        scales: test-time augmentation. The result is the mean of the logits of the image resized to `round(scale * H)`
            x `round(scale * W)` pixels, each brought to `H` x `W`; a resized image has regions of its own. What
            `prepare` returns is resized as by `F.interpolate` with `mode="bilinear"`, window by window: what of it is
            under a tile's core, and `margin` pixels around. Without 1.0 the image itself has no part in the mean.
        flips: the same with the image mirrored, at each scale: `"horizontal"` exchanges left and right, `"vertical"`
            top and bottom, `"both"` does both. For the mean of probabilities let `output` return them.
        result: `"classes"` `[H, W]`, uint8, or int16 for more than 255; or `"logits"` `[K, H, W]`, at least float32.
        out: where to: None for a new tensor, on the device of the logits; an array or a tensor of that shape; or
            a path that ends with .npy, where the file appears when it is complete.
        restart: go on with a file where an earlier call was stopped, and start where none was. Shapes, sizes and
            weights must be the same; the image's pixels, functions and PyTorch's settings are not compared.
        progress: called with the number of tiles that are done and of all, over all passes; by default a
            bar is written to stderr, if that is a terminal.

    The same call gives the same bits, in several parts with `restart` too.

    Raises:
        TypeError: `model`, `image`, a size, `scales`, `flips`, `features`, `out`, what `prepare` returned or what
            `output` chose is of another type.
        ValueError: the model is in training or calls no gather; shapes, sizes or names are not as above; a scale is
            not positive and finite, or makes an image smaller than `stride`; or `restart` finds a run with other
            settings or weights, or damaged files.
        RuntimeError: the model gathers more or less often in one tile than in another.
        ImportError: `out` is a path, which needs NumPy, and there is none.
        OSError: a file cannot be read or written. What is done is kept for `restart`.

    Examples:
        >>> head = modules.OCRHead(in_channels=3, num_classes=5, mid_channels=8, key_channels=4).eval()
        >>> image = torch.rand(3, 40, 64)
        >>> tiled = segment_tiled(head, image, tile=32, margin=4, stride=1, result="logits")
        >>> with torch.inference_mode():
        ...     aux, whole = head(image.unsqueeze(0))
        >>> torch.allclose(tiled.out, whole[0], atol=1e-5)
        True
    """
    started = time.perf_counter()
    _check_model("model", model)
    if backbone is not None:
        _check_model("backbone", backbone)
    if result not in ("classes", "logits"):
        raise ValueError(f"result must be 'classes' or 'logits', but is {result!r}")
    _check_scales(scales)
    _check_flips(flips)
    source = Source(image, prepare)
    size = source.shape[1:]
    sizes = tuple(tile) if isinstance(tile, (tuple, list)) else (tile, tile)
    grid = Grid(size, sizes, margin, stride)
    resized = [tuple(round(scale * length) for length in size) for scale in scales]
    for scale, lengths in zip(scales, resized, strict=True):
        if lengths != size and min(lengths) < stride:
            raise ValueError(f"scales must make images of at least the stride {stride}, but {scale} makes {lengths}")
    is_path = isinstance(out, (str, os.PathLike))
    writer = File(Path(out)) if is_path else Output(out)
    if restart and not is_path:
        raise ValueError(f"restart needs a path as out, but that is {type(out).__name__}")
    if out is not None and not is_path and result == "classes" and tuple(out.shape) != size:
        raise ValueError(f"out must have shape {size}, but has {tuple(out.shape)}")
    if not isinstance(features, (str, os.PathLike)):
        raise TypeError(f"features must be 'recompute', 'keep' or a folder, but is {type(features).__name__}")
    folder = None if features in ("recompute", "keep") else Path(features)
    if features != "recompute" and backbone is None:
        raise ValueError(f"features can be {str(features)!r} with a backbone alone, but there is none")
    if folder is not None and not folder.is_dir():
        raise ValueError(f"features must be 'recompute', 'keep' or a folder that exists, but is {str(features)!r}")
    settings = {
        "image": source.shape,
        "tile": sizes,
        "margin": margin,
        "stride": stride,
        "output": output if isinstance(output, (int, str)) else "a function",
        "align_corners": align_corners,
        "scales": tuple(map(float, scales)),
        "flips": tuple(flips),
        "result": result,
        "weights": checksum(model, backbone) if is_path else "",
    }
    journal = Journal(Path(out), settings) if is_path else None
    before = journal.load() if journal is not None and restart else None
    if journal is not None and before is None:
        journal.remove()
    name = hashlib.sha256(f"{settings} {Path(out).resolve()}".encode()).hexdigest() if is_path else uuid.uuid4().hex
    run = _Run(
        model=model,
        source=source,
        grid=grid,
        grids=[grid.resized(lengths, align_corners) for lengths in resized],
        features=Features(backbone, folder or str(features), name[:16]),
        select=output if callable(output) else functools.partial(_chosen, output=output),
        align_corners=align_corners,
        flips=[(), *(FLIPS[flip] for flip in flips)],
        classes=result == "classes",
        writer=writer,
        journal=journal,
        progress=progress or _bar,
    )
    if before is not None:
        run.regions, run.states, run.done = before
        if run.states[0] is None:  # it was in the last pass
            writer.check(is_complete=run.done == len(grid.tiles))
    every = range(len(grid.tiles) * len(run.states))
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):  # compiled code refuses dispatch modes
        try:
            while not run.one_pass():
                pass
        except BaseException:
            if journal is None:  # nothing can go on with them
                run.features.forget(every)
            raise
    found = writer.finish()
    run.features.forget(every)
    if journal is not None:
        journal.remove()  # last: until then restart finds a run that is done
    return TiledResult(
        found,
        len(grid.tiles),
        len(run.regions[0]),
        time.perf_counter() - started,
        _peak_bytes(run.device),
        run.meter.result(),
    )


@dataclass
class _Run:
    model: Callable[..., Any]
    source: Source
    grid: Grid
    grids: list[Grid]
    """Of each scale, with the same number of tiles."""
    features: Features
    select: Callable[[Any], Any]
    align_corners: bool
    flips: list[tuple[int, ...]]
    """Dimensions that are turned round: none first, which is the image itself."""
    classes: bool
    writer: Output
    journal: Journal | None
    progress: Callable[[int, int], object]
    regions: list[list[Tensor]] = field(init=False)
    """Of each flip at each scale, those of the gathers that have seen all tiles."""
    states: list[GatherState | None] = field(init=False)
    """Of each flip at each scale, that of the next gather; None in the last pass."""
    done: int = 0
    """Tiles of this pass."""
    meter: SeamMeter = field(default_factory=SeamMeter)
    device: torch.device | None = None
    """Of the model's first parameter, or None."""

    def __post_init__(self) -> None:
        self.states = [None] * (len(self.grids) * len(self.flips))
        self.regions = [[] for _ in self.states]
        parts = [part for part in (self.model, self.features.backbone) if isinstance(part, nn.Module)]
        self.device = next((tensor.device for part in parts for tensor in part.parameters()), None)

    def one_pass(self) -> bool:
        """Add up one gather over all tiles; or, where the first tile shows that there is none left, write the result.

        Whether that was written.
        """
        tiles, gathers = self.grid.tiles, len(self.regions[0])
        before = gathers * len(tiles)
        for index in range(self.done, len(tiles)):
            try:
                logits = self.mean(tiles[index], index)
                if logits is not None:
                    self.write(tiles[index], logits, is_first=index == 0)
            except Exception as error:
                note = f"at tile {index + 1} of {len(tiles)} ({tiles[index]}) in pass {gathers + 1}"
                if self.journal is not None:
                    note += "; restart=True goes on from there"
                getattr(error, "add_note", str)(note)  # Python 3.11
                raise
            self.done = index + 1
            if self.journal is not None:
                self.journal.save(self.regions, self.states, self.done)
            if logits is not None:
                self.features.forget(range(index * len(self.states), (index + 1) * len(self.states)))
            self.progress(before + self.done, before + len(tiles) * (2 if self.states[0] else 1))
        for regions, state in zip(self.regions, self.states, strict=True):
            if state is None:
                return True
            regions.append(state.result())
        self.states, self.done = [None] * len(self.states), 0
        return False

    def mean(self, tile: Tile, index: int) -> Tensor | None:
        """The mean over all scales of the logits `[K, h, w]` of the pixels that are seen; None before the last pass."""
        total = None
        for scale, grid in enumerate(self.grids):
            logits = self.mean_of_flips(index, scale)
            if logits is None:
                continue
            axes = zip(tile, grid.tiles[index], self.grid.image, grid.image, (grid.height, grid.width), strict=True)
            for dim, (span, window, size, resized, continued) in enumerate(axes, start=1):
                stride = window.stride_of(logits.shape[dim])
                steps = (size, resized), (continued, continued // stride)
                at = places(seen(span, size), *steps, align_corners=self.align_corners)
                logits = resize(logits, dim, at - window.start // stride)
            total = logits if total is None else total.add_(logits)
        return None if total is None else total / len(self.grids)

    def mean_of_flips(self, index: int, scale: int) -> Tensor | None:
        """The mean over all flips of the logits `[K, h, w]` of a tile at a scale; None before the last pass."""
        grid = self.grids[scale]
        tile = grid.tiles[index]
        read = functools.cache(lambda: self.source.read(tile, grid.image, self.device))
        total = None
        for flip, dims in enumerate(self.flips):
            variant = scale * len(self.flips) + flip
            logits = self.forward(grid.mirrored(tile, dims), index, variant, read)
            if logits is not None:
                total = logits.flip(dims) if total is None else total.add_(logits.flip(dims))
        return None if total is None else total / len(self.flips)

    def forward(self, tile: Tile, index: int, variant: int, read: Callable[[], Tensor]) -> Tensor | None:
        """The logits that the model makes of a mirrored tile, whose pixels `read` reads as they were."""
        regions, dims = self.regions[variant], self.flips[variant % len(self.flips)]
        number = index * len(self.states) + variant
        inputs = self.features.of(tile, number, lambda: read().flip(dims), not regions)
        known = len(regions)
        found, again = None, False
        with Gathers(tile, regions, self.states[variant]) as mode:
            try:
                found = self.model(*inputs) if isinstance(inputs, tuple) else self.model(inputs)
            except Reached:
                again = True
        if mode.calls == 0:
            raise ValueError(
                "model must call ocr_kernels.spatial_gather, but does not: use ocr_kernels.modules, "
                "or call ocr_kernels.replace_ocr_modules(model) first"
            )
        is_first = index == variant == 0
        if mode.calls < known or (not is_first and again != (self.states[0] is not None)):
            raise RuntimeError(f"the model gathers {mode.calls} times here, and another number of times on other tiles")
        self.states[variant] = mode.state
        if again:
            return None
        logits = self.select(found)
        if not isinstance(logits, Tensor):
            raise TypeError(f"output must choose a tensor, but chooses {type(logits).__name__}")
        is_image = logits.dim() == 4 and logits.shape[0] == 1
        if not is_image or not all(span.stride_of(size) for span, size in zip(tile, logits.shape[2:], strict=True)):
            raise ValueError(
                f"output must choose logits [1, K, h, w] whose size divides that of a tile, {tile.rows.size} x "
                f"{tile.columns.size}, and of its core, but chooses {tuple(logits.shape)}"
            )
        return logits[0] if logits.element_size() > 2 else logits[0].float()

    def write(self, tile: Tile, logits: Tensor, is_first: bool) -> None:
        """The core's part of the logits of the pixels that are seen, or its classes."""
        height, width = self.grid.image
        rows = slice(tile.rows.core_start, min(tile.rows.core_stop, height))
        columns = slice(tile.columns.core_start, min(tile.columns.core_stop, width))
        inner_rows, inner_columns = _within(rows, seen(tile.rows, height)), _within(columns, seen(tile.columns, width))
        self.meter.add(tile, logits, inner_rows, inner_columns)
        values = logits[:, inner_rows, inner_columns]
        if self.classes:
            values = values.argmax(0).to(torch.uint8 if len(logits) <= 255 else torch.int16)
        if is_first:
            self.writer.open((*values.shape[:-2], height, width), values.dtype, values.device)
        self.writer.write(rows, columns, values)


def _chosen(found: Any, output: int | str) -> Any:
    if isinstance(found, Tensor):
        return found
    try:
        return found[output]
    except (LookupError, TypeError):
        raise ValueError(f"output must be an index or a key of what the model returns, but is {output!r}") from None


def _within(part: slice, whole: slice) -> slice:
    return slice(part.start - whole.start, part.stop - whole.start)


def _check_model(name: str, model: object) -> None:
    if not callable(model):
        raise TypeError(f"{name} must be a module or a function, but is {type(model).__name__}")
    if isinstance(model, nn.Module):
        training = next((path for path, module in model.named_modules() if module.training), None)
        if training is not None:
            raise ValueError(f"{name} must be in eval mode, but {training or 'it'} is in training: call {name}.eval()")


def _check_scales(scales: object) -> None:
    expected = "scales must be a sequence of positive, finite numbers"
    if isinstance(scales, str) or not isinstance(scales, Sequence) or not all(isinstance(s, Real) for s in scales):
        raise TypeError(f"{expected}, but is {scales!r}")
    if not scales or not all(0 < scale < math.inf for scale in scales):
        raise ValueError(f"{expected}, but is {scales!r}")


def _check_flips(flips: object) -> None:
    expected = "flips must be a sequence of 'horizontal', 'vertical' and 'both', each at most once"
    if isinstance(flips, str) or not isinstance(flips, Sequence):
        raise TypeError(f"{expected}, but is {flips!r}")
    if any(flips.count(flip) > 1 or flip not in tuple(FLIPS) for flip in flips):
        raise ValueError(f"{expected}, but is {flips!r}")


def _peak_bytes(device: torch.device | None) -> int | None:
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _bar(done: int, total: int) -> None:
    if sys.stderr.isatty():
        filled = 40 * done // total
        end = "\n" if done == total else ""
        print(f"\r[{'#' * filled}{'.' * (40 - filled)}] {done}/{total} tiles", end=end, file=sys.stderr, flush=True)
