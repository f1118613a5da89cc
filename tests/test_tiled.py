"""Images in tiles: the same result as whole, whatever the tiles; files that can be gone on with; errors."""

from __future__ import annotations

import copy
import errno
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ocr_kernels import modules, reference, replace_ocr_modules, segment_tiled, use_backend
from ocr_kernels.tiled.tiles import Grid

SETTINGS: dict[str, Any] = {"tile": 8, "margin": 2, "stride": 1}


@pytest.fixture(autouse=True)
def seeded_on_one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


def head_of(kind: Any = modules.OCRHead, *, pointwise: bool = False, **options: Any) -> Any:
    """Peaked regions, so that a tile's own are far from its image's."""
    head = kind(in_channels=3, num_classes=4, mid_channels=6, key_channels=4, **options)
    if pointwise:
        head.conv3x3_ocr[0] = nn.Conv2d(3, 6, 1)
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    return head.eval()


class Net(nn.Module):
    """Features and logits at a quarter of the image's size; what `stride` 4 needs at least."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 3, 3, 2, 1), nn.ReLU(), nn.Conv2d(3, 3, 3, 2, 1))
        self.head = head_of()

    def forward(self, image: Tensor) -> Any:
        return self.head(self.stem(image))


def whole(
    model: nn.Module,
    image: Tensor,
    stride: int = 1,
    align_corners: bool = False,
    flips: Sequence[str] = (),
    scales: Sequence[float] = (1.0,),
) -> Tensor:
    """Logits `[K, H, W]` of an image that is not divided, the mean over its `scales`, each with its `flips`."""
    height, width = image.shape[1:]
    dims = {"horizontal": [3], "vertical": [2], "both": [2, 3]}
    found = []
    for scale in scales:
        size = round(scale * height), round(scale * width)
        resized = F.interpolate(image.unsqueeze(0), size, mode="bilinear")
        padded = F.pad(resized, (0, -size[1] % stride, 0, -size[0] % stride), mode="replicate")
        back = [divmod(padded.shape[i + 2] * image.shape[i + 1], size[i]) for i in range(2)]
        assert all(rest == 0 for _, rest in back)  # the size of what is continued, in pixels of the image
        for mirrored in [[], *(dims[flip] for flip in flips)]:
            with torch.inference_mode():
                out = model(padded.flip(mirrored))[-1].flip(mirrored)
            out = F.interpolate(out, [length for length, _ in back], mode="bilinear", align_corners=align_corners)
            found.append(out[0, :, :height, :width])
    return torch.stack(found).mean(0)


def double(pixels: Tensor) -> Tensor:
    return pixels.double().unsqueeze(0)


def close(found: Tensor, expected: Tensor) -> None:
    """To rounding: the sums over pixels, and all that follows."""
    bound = 200 * torch.finfo(expected.dtype).eps * float(expected.abs().max())
    assert float((found - expected).abs().max()) <= bound


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("tile", "margin", "tiles"), [(64, 0, 1), ((16, 32), 0, 4), (16, 3, 18), ((4, 8), 0, 64)])
def test_pointwise_network_is_exact(tile: Any, margin: int, tiles: int, dtype: torch.dtype) -> None:
    head, image = head_of(pointwise=True).to(dtype), torch.rand(3, 32, 64) * 3
    result = segment_tiled(
        head, image, tile=tile, margin=margin, stride=1, result="logits", prepare=lambda x: x.to(dtype).unsqueeze(0)
    )
    expected = whole(head, image.to(dtype))
    close(result.out, expected)
    assert (result.tiles, result.gathers) == (tiles, 1)
    if margin:
        assert result.seam.largest <= 200 * torch.finfo(dtype).eps * float(expected.abs().max())
        assert result.seam.changed == 0
    else:
        assert result.seam is None


def test_a_tile_of_its_own_is_something_else() -> None:
    """The other tests would notice if regions were not those of the whole image."""
    head, image = head_of(pointwise=True), torch.rand(3, 32, 32)
    with pytest.raises(AssertionError):
        close(whole(head, image[:, :8, :8]), whole(head, image)[:, :8, :8])


@pytest.mark.parametrize("size", [(8, 8), (9, 31), (40, 17), (1, 50)])
@pytest.mark.parametrize("kind", [modules.OCRHead, reference.OCRHead])
def test_convolutions_with_a_margin_are_exact(kind: Any, size: tuple[int, int]) -> None:
    head, image = head_of(kind).double(), torch.rand(3, *size)
    expected = whole(head, image.double())
    if kind is reference.OCRHead:
        assert "gather" in str(replace_ocr_modules(head, example_inputs=image.double().unsqueeze(0)))
    result = segment_tiled(head, image, **SETTINGS, prepare=double, result="logits")
    close(result.out, expected)
    classes = segment_tiled(head, image, **SETTINGS, prepare=double)
    assert classes.out.dtype == torch.uint8
    assert torch.equal(classes.out.long(), expected.argmax(0))


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(48, 64), (33, 61)])
def test_logits_of_lower_resolution(size: tuple[int, int], align_corners: bool) -> None:
    """Of sizes that are no multiples of the stride, too."""
    net, image = Net().double().eval(), torch.rand(3, *size)
    options = {"tile": (40, 48), "margin": 16, "stride": 8, "align_corners": align_corners, "prepare": double}
    result = segment_tiled(net, image, **options, result="logits")
    close(result.out, whole(net, image.double(), 8, align_corners))


IN_TILES = ["regions [B, K, C], Linear, @", "regions [B, K, C, 1]", "einsum", "unaligned up-sampling", "residual"]
IN_TILES += ["NVIDIA: two sizes in a step", "weights of four dimensions"]


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in IN_TILES], ids=lambda family: family.name)
def test_replaced_models(family: Any) -> None:
    model, image = family.make().double().eval(), torch.rand(family.inputs[0][1], 20, 32) * 3

    def last(out: Any) -> Tensor:
        out = out["out"] if isinstance(out, dict) else out
        return out if isinstance(out, Tensor) else out[-1]

    with torch.inference_mode():
        expected = last(model(image.double().unsqueeze(0)))[0]
    replace_ocr_modules(model)
    result = segment_tiled(model, image, tile=16, margin=4, stride=4, output=last, prepare=double, result="logits")
    close(result.out, expected)
    assert result.gathers == family.gathers


class Chain(nn.Module):
    """Two gathers, of which the second takes what the first made of the pixels."""

    def __init__(self, *, pointwise: bool = True) -> None:
        super().__init__()
        self.first, self.second = head_of(pointwise=pointwise), head_of(pointwise=pointwise)

    def forward(self, feats: Tensor) -> Any:
        return self.second(self.first(feats)[-1][:, :3])


def test_gathers_that_depend_on_each_other() -> None:
    net, image = Chain().double().eval(), torch.rand(3, 20, 20)
    result = segment_tiled(net, image, **SETTINGS, prepare=double, result="logits")
    close(result.out, whole(net, image.double()))
    assert result.gathers == 2


FLIPS = [["horizontal"], ["vertical"], ("both", "horizontal", "vertical")]


@pytest.mark.parametrize("flips", FLIPS, ids="-".join)
@pytest.mark.parametrize(
    ("make", "size", "settings"),
    [
        (head_of, (19, 30), SETTINGS),
        (lambda: Chain(pointwise=False), (19, 30), {"tile": 16, "margin": 6, "stride": 1}),
        (lambda: Net().eval(), (33, 61), {"tile": (40, 48), "margin": 16, "stride": 8}),
        (lambda: Net().eval(), (48, 64), {"tile": 40, "margin": 16, "stride": 8, "align_corners": True}),
    ],
    ids=["head", "chain", "net", "align_corners"],
)
def test_flips_are_exact(make: Any, size: tuple[int, int], settings: dict[str, Any], flips: Sequence[str]) -> None:
    """Kernels of 3x3 that are not symmetric make something else of a mirrored image, regions included."""
    net, image = make().double().eval(), torch.rand(3, *size)
    rest = settings["stride"], settings.get("align_corners", False)
    expected, plain = whole(net, image.double(), *rest, flips), whole(net, image.double(), *rest)
    assert float((expected - plain).abs().max()) > 1e-2 * float(plain.abs().max())
    result = segment_tiled(net, image, **settings, flips=flips, prepare=double, result="logits")
    close(result.out, expected)
    unflipped = segment_tiled(net, image, **settings, prepare=double, result="logits")
    assert (result.tiles, result.gathers) == (unflipped.tiles, unflipped.gathers)
    assert result.seam.pixels == unflipped.seam.pixels


@pytest.mark.parametrize("flips", [[], ["horizontal", "both"]], ids=["", "flips"])
@pytest.mark.parametrize(
    ("make", "size", "settings", "scales"),
    [
        (lambda: head_of(pointwise=True), (19, 30), {"tile": 7, "margin": 0, "stride": 1}, (0.5, 1.0, 3)),
        (lambda: head_of(pointwise=True), (16, 24), {"tile": 4, "margin": 0, "stride": 4}, (0.5, 1.5, 3)),
        (head_of, (19, 30), SETTINGS, (0.5, 1.0, 1.5)),
        (head_of, (20, 9), SETTINGS, (3, 0.35)),
        (lambda: Chain(pointwise=False), (19, 30), {"tile": 16, "margin": 6, "stride": 1}, (0.5, 1.5)),
        (Net, (48, 64), {"tile": 40, "margin": 16, "stride": 8}, (0.5, 1.0, 1.5)),
        (Net, (44, 60), {"tile": (40, 48), "margin": 16, "stride": 8}, (0.5, 1.0, 1.5)),
        (Net, (48, 64), {"tile": 40, "margin": 16, "stride": 8, "align_corners": True}, (1.5, 0.5)),
        (Net, (96, 64), {"tile": 40, "margin": 16, "stride": 8}, (0.25, 2.5)),
    ],
    ids=["no margin", "stride", "head", "far", "chain", "net", "continued", "align_corners", "cores of no pixel"],
)
def test_scales_are_exact(
    make: Any, size: tuple[int, int], settings: dict[str, Any], scales: Sequence[float], flips: Sequence[str]
) -> None:
    """Of sizes that are no multiples of the stride, too, and with what `prepare` makes of the pixels."""
    net, image = make().double().eval(), torch.rand(3, *size)
    rest = settings["stride"], settings.get("align_corners", False), flips
    expected, plain = (whole(net, image.double().square(), *rest, some) for some in (scales, (1.0,)))
    assert float((expected - plain).abs().max()) > 1e-2 * float(plain.abs().max())
    options = settings | {"flips": flips, "prepare": lambda pixels: double(pixels).square()}
    result = segment_tiled(net, image, **options, scales=scales, result="logits")
    close(result.out, expected)
    alone = segment_tiled(net, image, **options)
    assert (result.tiles, result.gathers) == (alone.tiles, alone.gathers)


def test_the_seam_with_scales() -> None:
    head, image = head_of().double(), torch.rand(3, 24, 24)
    options = {"tile": 12, "stride": 1, "scales": (0.5, 1.5), "prepare": double}
    short, enough = (segment_tiled(head, image, margin=margin, **options).seam for margin in (0, 4))
    assert short is None
    assert enough.pixels
    assert enough.largest < 1e-11
    blurred = nn.Sequential(nn.AvgPool2d(9, 1, 4), head).eval()
    assert segment_tiled(blurred, image, margin=4, **options).seam.largest > 1e-2


def test_the_seam_is_that_of_the_mean() -> None:
    """Where tiles and mirrored tiles are off by opposite amounts, their mean has no seam."""
    head, image = head_of(pointwise=True).double(), torch.rand(3, 24, 24)
    calls = itertools.count()

    def off_by_the_tile(pixels: Tensor) -> Any:
        """Adds the tile's mean, which every second call subtracts: with one flip, that of the mirrored tile."""
        off = pixels.mean() * (-1) ** next(calls)
        return head(pixels)[-1] + off * torch.arange(4).view(4, 1, 1)

    seam = segment_tiled(off_by_the_tile, image, **SETTINGS, prepare=double).seam
    assert seam.largest > 1e-2
    calls = itertools.count()
    seam = segment_tiled(off_by_the_tile, image, **SETTINGS, prepare=double, flips=["horizontal"]).seam
    assert seam.largest < 1e-12


def test_a_model_may_change_its_input() -> None:
    head, image = head_of(), torch.rand(3, 20, 20)
    before = image.clone()
    expected = segment_tiled(head, image * 2, **SETTINGS, flips=["both"], result="logits").out
    found = segment_tiled(lambda x: head(x.mul_(2)), image, **SETTINGS, flips=["both"], result="logits").out
    assert torch.equal(found, expected)
    assert torch.equal(image, before)


class InPlace(reference.OCRHead):
    """Changes what the gather returns."""

    def forward(self, feats: Tensor) -> Any:
        pixels, aux = self.conv3x3_ocr(feats), self.aux_head(feats)
        return self.cls_head(self.ocr_distri_head(pixels, self.ocr_gather_head(pixels, aux).mul_(0.9)))


def test_regions_may_be_changed() -> None:
    head, image = head_of(InPlace).double(), torch.rand(3, 20, 20)
    with torch.inference_mode():
        expected = head(image.double().unsqueeze(0))[0]
    replace_ocr_modules(head)
    close(segment_tiled(head, image, **SETTINGS, prepare=double, result="logits").out, expected)


def test_backends_and_autocast() -> None:
    head, image = head_of(), torch.rand(3, 20, 20)
    expected = segment_tiled(head, image, **SETTINGS, result="logits").out
    with use_backend("reference"):
        close(segment_tiled(head, image, **SETTINGS, result="logits").out, expected)
    with torch.autocast("cpu", torch.bfloat16):
        found = segment_tiled(head, image, **SETTINGS, result="logits").out
        with torch.inference_mode():
            alike = head(image.unsqueeze(0))[-1][0].float()
    assert found.dtype == torch.float32
    assert float((found - alike).abs().max()) < 0.05 * float(alike.abs().max())


def test_compiled_models_run_eagerly() -> None:
    head, image = head_of(), torch.rand(3, 20, 20)
    compiled = torch.compile(head, backend="eager")
    for _ in range(2):  # before it is compiled, and after
        close(segment_tiled(compiled, image, **SETTINGS, result="logits").out, whole(head, image))
        with torch.inference_mode():
            compiled(image.unsqueeze(0))


@pytest.mark.parametrize("features", ["keep", "folder"])
def test_kept_features(features: str, tmp_path: Path) -> None:
    head, image = head_of(), torch.rand(3, 20, 20)
    calls = []

    def backbone(pixels: Tensor) -> tuple[Tensor]:
        calls.append(pixels)
        return (pixels * 2,)

    recomputed = segment_tiled(head, image, **SETTINGS, backbone=backbone)
    assert len(calls) == 2 * recomputed.tiles
    calls.clear()
    kept = segment_tiled(
        head, image, **SETTINGS, backbone=backbone, features="keep" if features == "keep" else tmp_path
    )
    assert len(calls) == recomputed.tiles
    assert torch.equal(kept.out, recomputed.out)
    assert not list(tmp_path.iterdir())
    with pytest.raises(MemoryError):
        segment_tiled(Failing(head, 3).eval(), image, **SETTINGS, backbone=backbone, features=tmp_path)
    assert not list(tmp_path.iterdir())


def test_features_leave_their_folder_tile_by_tile(tmp_path: Path) -> None:
    head, image, files = head_of(), torch.rand(3, 20, 20), []
    options = SETTINGS | {"backbone": nn.Identity().eval(), "features": tmp_path, "flips": ["vertical"]}
    segment_tiled(head, image, **options, progress=lambda *_: files.append(len(list(tmp_path.iterdir()))))
    assert files == [*range(2, 33, 2), *range(30, -1, -2)]
    with pytest.raises(MemoryError):
        segment_tiled(Failing(head, 30).eval(), image, **options)
    assert not list(tmp_path.iterdir())


class Reader:
    """After rasterio's datasets."""

    def __init__(self, image: Tensor) -> None:
        self.image = image
        self.count, self.height, self.width = image.shape

    def read(self, window: Any) -> Any:
        rows, columns = (slice(*part) for part in window)
        return self.image[:, rows, columns].numpy()


def test_images_are_read_from() -> None:
    pytest.importorskip("numpy")
    head, image = head_of(), torch.randint(0, 256, (3, 19, 21), dtype=torch.uint8)
    frozen = image.numpy().copy()
    frozen.flags.writeable = False
    expected = segment_tiled(head, image, **SETTINGS).out
    for source in (frozen, Reader(image)):
        assert torch.equal(segment_tiled(head, source, **SETTINGS).out, expected)


@pytest.mark.parametrize("dtype", [">u2", ">f4", "<i2", "u1"])
@pytest.mark.parametrize("backwards", [False, True])
def test_arrays_of_any_order_are_read(dtype: str, backwards: bool) -> None:
    """Of bytes, and of channels, such as OpenCV's."""
    numpy = pytest.importorskip("numpy")
    head, image = head_of(), torch.randint(0, 256, (3, 19, 21)).float()
    array = image.numpy().astype(dtype)
    if backwards:
        bgr = array[::-1].transpose(1, 2, 0).copy()
        array = bgr[:, :, ::-1].transpose(2, 0, 1)
        assert min(array.strides) < 0
    before = array.copy()
    expected = segment_tiled(head, image, **SETTINGS, result="logits").out
    assert torch.equal(segment_tiled(head, array, **SETTINGS, result="logits").out, expected)
    assert numpy.array_equal(array, before)


def test_results_are_written_to(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    head, image = head_of(), torch.rand(3, 19, 21)
    expected = segment_tiled(head, image, **SETTINGS, result="logits").out
    array, tensor = numpy.zeros((4, 19, 21), numpy.float32), torch.zeros(4, 19, 21)
    for out in (array, tensor):
        assert segment_tiled(head, image, **SETTINGS, result="logits", out=out).out is out
        assert torch.equal(torch.as_tensor(out), expected)
    path = segment_tiled(head, image, **SETTINGS, result="logits", out=tmp_path / "logits.npy").out
    assert torch.equal(torch.from_numpy(numpy.load(path)), expected)
    assert list(tmp_path.iterdir()) == [path]


def test_many_classes() -> None:
    head = modules.OCRHead(3, 300, mid_channels=4, key_channels=4).eval()
    assert segment_tiled(head, torch.rand(3, 9, 9), **SETTINGS).out.dtype == torch.int16


class Failing(nn.Module):
    """Raises at one of its calls."""

    def __init__(self, model: nn.Module, call: int) -> None:
        super().__init__()
        self.model = model
        self.left = call

    def forward(self, x: Tensor) -> Any:
        self.left -= 1
        if self.left == 0:
            raise MemoryError("no more")
        return self.model(x)


@pytest.mark.parametrize("features", ["recompute", "keep", "folder"])
@pytest.mark.parametrize("call", [1, 6, 17, 32])  # of 16 in each pass
def test_restart(call: int, features: str, tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    head, image = head_of(), torch.rand(3, 20, 20)
    (tmp_path / "features").mkdir()
    options = SETTINGS | {"backbone": nn.Identity().eval(), "out": tmp_path / "classes.npy"}
    options["features"] = tmp_path / "features" if features == "folder" else features
    expected = segment_tiled(head, image, **SETTINGS).out
    model = Failing(head, call).eval()
    with pytest.raises(MemoryError, match="no more"):
        segment_tiled(model, image, **options)
    assert not options["out"].exists()
    calls = itertools.count(1)
    done = segment_tiled(model, image, **options, restart=True, progress=lambda *_: next(calls))
    assert next(calls) - 1 == 32 - (call - 1)
    assert torch.equal(torch.from_numpy(numpy.load(done.out)), expected)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["classes.npy", "features"]


@pytest.mark.parametrize("features", ["recompute", "keep", "folder"])
@pytest.mark.parametrize(
    ("variants", "count", "call"),
    [({"flips": ["both", "horizontal"]}, 3, call) for call in (2, 26, 51, 96)]
    + [({"scales": (0.5, 1.5), "flips": ["both"]}, 4, call) for call in (3, 65, 128)],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_restart_with_variants(variants: dict[str, Any], count: int, call: int, features: str, tmp_path: Path) -> None:
    """Of 16 tiles in each of two passes, each with so many variants."""
    numpy = pytest.importorskip("numpy")
    head, image = head_of(), torch.rand(3, 20, 20)
    (tmp_path / "features").mkdir()
    options = SETTINGS | variants | {"result": "logits"}
    expected = segment_tiled(head, image, **options).out
    options |= {"backbone": nn.Identity().eval(), "out": tmp_path / "logits.npy"}
    options["features"] = tmp_path / "features" if features == "folder" else features
    model = Failing(head, call).eval()
    with pytest.raises(MemoryError, match="no more"):
        segment_tiled(model, image, **options)
    done = segment_tiled(model, image, **options, restart=True)
    assert model.left == -(32 * count - (call - 1) // count * count)
    assert torch.equal(torch.from_numpy(numpy.load(done.out)), expected)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["features", "logits.npy"]


def test_a_run_that_was_stopped_from_outside(tmp_path: Path) -> None:
    """Where an exception is no error."""
    head, image, out = head_of(), torch.rand(3, 20, 20), tmp_path / "classes.npy"

    def stop(done: int, total: int) -> None:
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        segment_tiled(head, image, **SETTINGS, out=out, progress=stop)
    seen = []
    segment_tiled(head, image, **SETTINGS, out=out, restart=True, progress=lambda *numbers: seen.append(numbers))
    assert seen[0] == (21, 32)
    assert seen[-1] == (32, 32)


@pytest.mark.parametrize("features", ["recompute", "folder"])
@pytest.mark.parametrize("has_name", [False, True])
def test_a_complete_run_is_not_run_again(
    has_name: bool, features: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it stopped just before or just after the result got its name."""
    numpy = pytest.importorskip("numpy")
    head, image, out = head_of(), torch.rand(3, 20, 20), tmp_path / "classes.npy"
    (tmp_path / "features").mkdir()
    options = SETTINGS | {"backbone": nn.Identity().eval(), "out": out}
    options["features"] = tmp_path / "features" if features == "folder" else features
    rename = os.replace

    def stop(source: Path, target: Path) -> None:
        is_result = source.suffix == ".partial"
        if has_name or not is_result:
            rename(source, target)
        if is_result:
            raise OSError(errno.EIO, "Input/output error")

    model = Failing(head, 0).eval()
    with monkeypatch.context() as patches:
        patches.setattr(os, "replace", stop)
        with pytest.raises(OSError, match="Input/output error"):
            segment_tiled(model, image, **options)
    calls = model.left
    assert out.exists() == has_name
    done = segment_tiled(model, image, **options, restart=True)
    assert model.left == calls
    assert torch.equal(torch.from_numpy(numpy.load(done.out)), segment_tiled(head, image, **SETTINGS).out)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["classes.npy", "features"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("classes.npy.journal", lambda file: file.write_bytes(b"")),
        ("classes.npy.journal", lambda file: file.write_bytes(b"junk")),
        ("classes.npy.journal", lambda file: torch.save({"settings": {}}, file)),
        ("classes.npy.journal", lambda file: os.truncate(file, file.stat().st_size // 2)),
        ("classes.npy.partial", lambda file: file.write_bytes(b"")),
        ("classes.npy.partial", lambda file: os.truncate(file, file.stat().st_size - 1)),
        ("classes.npy.partial", lambda file: file.unlink()),
    ],
)
def test_restart_refuses_files_that_are_damaged(name: str, damage: Callable[[Path], Any], tmp_path: Path) -> None:
    """Also where an older result has the name, since this run was not complete."""
    pytest.importorskip("numpy")
    head, image, out = head_of(), torch.rand(3, 20, 20), tmp_path / "classes.npy"
    segment_tiled(head, image, **SETTINGS, out=out)
    with pytest.raises(MemoryError):
        segment_tiled(Failing(head, 20).eval(), image, **SETTINGS, out=out)
    damage(tmp_path / name)
    model = Failing(head, 0).eval()
    with pytest.raises(ValueError, match=f"restart cannot go on with .*{name}, .*: call without restart"):
        segment_tiled(model, image, **SETTINGS, out=out, restart=True)
    assert model.left == 0
    segment_tiled(head, image, **SETTINGS, out=out)
    assert list(tmp_path.iterdir()) == [out]


def test_a_file_needs_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(ImportError, match="out can be a path with NumPy alone: pip install numpy"):
        segment_tiled(head_of(), torch.rand(3, 9, 9), **SETTINGS, out=tmp_path / "classes.npy")


def test_restart_compares_settings_and_weights(tmp_path: Path) -> None:
    head, image, out = head_of(), torch.rand(3, 20, 20), tmp_path / "classes.npy"
    with pytest.raises(MemoryError):
        segment_tiled(Failing(head, 20).eval(), image, **SETTINGS, out=out)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = copy.deepcopy(head)
    other.cls_head.bias.data += 1
    changed: list[tuple[nn.Module, Tensor, dict[str, Any], str]] = [
        (other, image, SETTINGS, "weights"),
        (head, torch.rand(3, 20, 21), SETTINGS, r"image \(3, 20, 20\), now \(3, 20, 21\)"),
        (head, image, SETTINGS | {"margin": 1}, "margin 2, now 1"),
        (head, image, SETTINGS | {"tile": 10}, r"tile \(8, 8\), now \(10, 10\)"),
        (head, image, SETTINGS | {"result": "logits"}, "result classes, now logits"),
        (head, image, SETTINGS | {"scales": (1, 2)}, r"scales \(1.0,\), now \(1.0, 2.0\)"),
        (head, image, SETTINGS | {"flips": ["vertical"]}, r"flips \(\), now \('vertical',\)"),
    ]
    for model, picture, settings, message in changed:
        with pytest.raises(ValueError, match=message):
            segment_tiled(Failing(model, 0).eval(), picture, **settings, out=out, restart=True)
    assert files == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    segment_tiled(Failing(head, 0).eval(), image, **SETTINGS, out=out, restart=True)
    assert out.exists()


def test_same_bits_again() -> None:
    head, image = head_of(), torch.rand(3, 20, 20)
    first, second = (segment_tiled(head, image, **SETTINGS, result="logits") for _ in range(2))
    assert torch.equal(first.out, second.out)
    assert first.seam == second.seam
    assert not first.out.is_inference()  # so that it can be changed


def test_the_seam_shows_what_a_margin_is_short_of() -> None:
    """An edge detector that sees two pixels far."""
    head, image = head_of(pointwise=True), torch.rand(3, 24, 24)
    blur = nn.Conv2d(3, 3, 5, padding=2)
    seams = [
        segment_tiled(nn.Sequential(blur, head).eval(), image, tile=12, margin=margin, stride=1).seam
        for margin in (1, 2, 3)
    ]
    assert [seam.pixels for seam in seams] == [192, 192, 192]  # two lines along two borders of 24 pixels, both ways
    assert seams[0].largest > 1e-2
    assert seams[0].largest >= seams[0].mean > 0
    assert seams[0].changed > 0
    assert seams[1].largest > 1e-2  # of the neighbour's pixel, one farther out
    assert seams[2].largest < 1e-5
    assert seams[2].changed == 0


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operator made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes())
        return out


class Drawn:
    """An image that is nowhere."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def __getitem__(self, index: tuple[slice, slice, slice]) -> Tensor:
        rows, columns = (torch.arange(part.start, part.stop, dtype=torch.float32) for part in index[1:])
        return (rows[:, None] * columns).sin().expand(3, -1, -1)


@pytest.mark.parametrize("augmentation", [{}, {"flips": ["horizontal", "both"]}, {"scales": [0.5, 1, 1.5]}])
def test_memory_does_not_grow_with_the_image(augmentation: dict[str, Any], tmp_path: Path) -> None:
    head, options = head_of(), {"tile": 16, "margin": 2, "stride": 1, **augmentation}
    largest = []
    for size in ((16, 16), (32, 96)):
        with Largest() as mode:
            segment_tiled(head, Drawn(3, *size), **options, out=tmp_path / "classes.npy")
        largest.append(mode.elements)
    assert largest[0] >= largest[1]


@pytest.mark.parametrize(("height", "width", "tile", "margin", "stride"), [(100, 37, 24, 4, 4), (5, 90, 32, 8, 8)])
def test_cores_cover_the_image_once(height: int, width: int, tile: int, margin: int, stride: int) -> None:
    grid = Grid((height, width), (tile, tile), margin, stride)
    count = torch.zeros(grid.height, grid.width)
    for rows, columns in grid.tiles:
        count[rows.core_start : rows.core_stop, columns.core_start : columns.core_stop] += 1
        for span, size in ((rows, grid.height), (columns, grid.width)):
            assert span.size == min(tile, size)
            assert not any(edge % stride for edge in span)
            assert span.start == 0 or span.core_start - span.start >= margin
            assert span.stop == size or span.stop - span.core_stop >= margin
    assert (count == 1).all()


@pytest.mark.parametrize("size", [(41, 16), (250, 93), (9, 110)])
@pytest.mark.parametrize("align_corners", [False, True])
def test_cores_cover_a_resized_image_once(size: tuple[int, int], align_corners: bool) -> None:
    image = Grid((100, 37), (24, 24), 4, 4)
    grid = image.resized(size, align_corners)
    assert (grid.height, grid.width) == tuple(-(-length // 4) * 4 for length in size)
    assert len(grid.tiles) == len(image.tiles)
    count = torch.zeros(grid.height, grid.width)
    for rows, columns in grid.tiles:
        count[rows.core_start : rows.core_stop, columns.core_start : columns.core_stop] += 1
        for span, length in ((rows, grid.height), (columns, grid.width)):
            assert not any(edge % 4 for edge in span)
            assert span.start == 0 or span.core_start - span.start >= 4
            assert span.stop == length or span.stop - span.core_stop >= 4
    assert (count == 1).all()


def test_model_stays_what_it_is() -> None:
    head = head_of()
    before = copy.deepcopy(head.state_dict())
    segment_tiled(head, torch.rand(3, 20, 20), **SETTINGS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in head.state_dict().items())
    assert head(torch.rand(1, 3, 8, 8))[-1].requires_grad


def argument_errors() -> list[Any]:
    cases: list[tuple[str, dict[str, Any], type[Exception], str]] = [
        ("model", {"model": 3}, TypeError, "model must be a module or a function, but is int"),
        ("training", {"model": head_of().train()}, ValueError, "model must be in eval mode, but it is in training"),
        ("no gather", {"model": nn.Conv2d(3, 4, 1).eval()}, ValueError, "model must call ocr_kernels.spatial_gather"),
        ("image", {"image": "a.tif"}, TypeError, "image must have a shape and slices"),
        ("image's shape", {"image": torch.rand(20, 20)}, ValueError, r"image must have shape \[C, H, W\]"),
        ("tile", {"tile": 4}, ValueError, "tile must be .* larger than two margins of 2, but is 4"),
        ("tiles", {"tile": (8, 8, 8)}, ValueError, "tile must be one size, or height and width"),
        ("no size", {"tile": "16"}, TypeError, "tile, margin and stride must be whole numbers"),
        ("features", {"features": 3}, TypeError, "features must be 'recompute', 'keep' or a folder, but is int"),
        ("no margin", {"margin": 1.5}, TypeError, "tile, margin and stride must be whole numbers"),
        (
            "no output",
            {"output": 7},
            ValueError,
            "output must be an index or a key of what the model returns, but",
        ),
        ("stride", {"stride": 3}, ValueError, "margin must be a multiple of the stride 3, or 0, but is 2"),
        ("no stride", {"stride": 0}, ValueError, "stride must be at least 1, but is 0"),
        ("wrong stride", {"model": Net().eval(), "margin": 3}, ValueError, "give the model's stride as stride="),
        ("result", {"result": "labels"}, ValueError, "result must be 'classes' or 'logits', but is 'labels'"),
        ("a scale", {"scales": 0.5}, TypeError, "scales must be a sequence of positive, finite numbers, but is 0.5"),
        ("no number", {"scales": ["1"]}, TypeError, r"scales must be a sequence of .* numbers, but is \['1'\]"),
        ("no scales", {"scales": ()}, ValueError, r"scales must be a sequence of .* numbers, but is \(\)"),
        ("scale 0", {"scales": (1, 0)}, ValueError, r"scales must be .* positive, finite numbers, but is \(1, 0\)"),
        ("infinite", {"scales": [math.inf]}, ValueError, r"scales must be .* finite numbers, but is \[inf\]"),
        ("not a number", {"scales": [math.nan]}, ValueError, r"scales must be .* finite numbers, but is \[nan\]"),
        ("small scale", {"scales": [0.02]}, ValueError, r"at least the stride 1, but 0.02 makes \(0, 0\)"),
        ("a flip", {"flips": "both"}, TypeError, "flips must be a sequence of .*, but is 'both'"),
        ("flips", {"flips": ["left"]}, ValueError, r"flips must be a sequence of .*, but is \['left'\]"),
        ("flips twice", {"flips": ("both", "both")}, ValueError, "flips must be a sequence of .*, each at most once"),
        ("features", {"features": "keep"}, ValueError, "with a backbone alone"),
        ("folder", {"features": "nowhere", "backbone": nn.ReLU().eval()}, ValueError, "a folder that exists"),
        ("gather", {"backbone": head_of()}, ValueError, "backbone must have no gather"),
        ("prepare", {"prepare": lambda x: x}, ValueError, r"prepare must return a tensor \[1, C, 8, 8\]"),
        ("integers", {"prepare": lambda x: x.long()}, TypeError, "prepare must return a floating tensor"),
        ("no tensor", {"prepare": lambda x: None}, TypeError, "prepare must return a tensor"),
        ("output", {"output": lambda out: None}, TypeError, "output must choose a tensor, but chooses NoneType"),
        ("logits", {"output": lambda out: out[0][0]}, ValueError, r"output must choose logits \[1, K, h, w\]"),
        ("out", {"out": torch.zeros(3, 3)}, ValueError, r"out must have shape \(20, 20\), but has \(3, 3\)"),
        ("out's type", {"out": 3}, TypeError, "out must be None, an array, a tensor or a path, but is int"),
        ("file", {"out": "classes.tif"}, ValueError, "out must end with .npy"),
        ("a folder", {"out": "folder.npy"}, ValueError, "out must be a file, but folder.npy is a folder"),
        ("no folder", {"out": "nowhere/classes.npy"}, ValueError, "out must be in a folder that exists"),
        ("restart", {"restart": True}, ValueError, "restart needs a path as out"),
    ]
    return [pytest.param(*case[1:], id=case[0]) for case in cases]


@pytest.mark.parametrize(("changes", "kind", "message"), argument_errors())
def test_errors(
    changes: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder.npy").mkdir()
    monkeypatch.chdir(tmp_path)
    arguments = {"model": head_of(), "image": torch.rand(3, 20, 20), **SETTINGS, **changes}
    with pytest.raises(kind, match=message):
        segment_tiled(arguments.pop("model"), arguments.pop("image"), **arguments)


def test_models_that_cannot_be_divided() -> None:
    """More images than one, and gathers that come and go."""
    head = head_of(pointwise=True)
    calls = itertools.count()
    models: list[tuple[Callable[[Tensor], Any], type[Exception], str]] = [
        (lambda x: head(torch.cat([x, x.flip(3)])), ValueError, "the model must gather one image"),
        (lambda x: head(x) if next(calls) < 3 else head.aux_head(x), ValueError, "model must call"),
        (lambda x: head(head(x)[-1][:, :3]) if x.mean() > 0.5 else head(x), RuntimeError, "another number of times"),
    ]
    image = torch.zeros(3, 20, 20)
    image[:, 10:] = 1
    for model, kind, message in models:
        with pytest.raises(kind, match=message):
            segment_tiled(model, image, **SETTINGS)


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not hasattr(os, "posix_fallocate"):
        pytest.skip("this system reserves no space")

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    head, image, out = head_of(), torch.rand(3, 20, 20), tmp_path / "classes.npy"
    with pytest.raises(OSError, match="out cannot be written"):
        segment_tiled(head, image, **SETTINGS, out=out)
    assert [path.name for path in tmp_path.iterdir()] == ["classes.npy.journal"]
    monkeypatch.undo()
    seen = []
    segment_tiled(head, image, **SETTINGS, out=out, restart=True, progress=lambda *numbers: seen.append(numbers))
    assert seen[0] == (17, 32)  # the first pass is not run again
    assert list(tmp_path.iterdir()) == [out]


def test_progress_is_quiet_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    segment_tiled(head_of(), torch.rand(3, 9, 9), **SETTINGS)
    assert capsys.readouterr() == ("", "")
