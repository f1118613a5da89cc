"""`ocr-kernels demo`: a short run on a generated picture, its pictures, and every way in which it refuses or fails."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ocr_kernels import demo
from ocr_kernels.gather import reference as gather

PICTURES = ("overview.png", "photo.png", "mask.png", "regions.png", "attention.png", "losses.png")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A portrait of four coloured quarters with some noise."""
    generator = np.random.default_rng(0)
    quarters = generator.integers(0, 256, (2, 2, 3)).repeat(48, 0).repeat(32, 1)
    path = tmp_path_factory.mktemp("image") / "quarters.png"
    Image.fromarray((0.9 * quarters + 25 * generator.random(quarters.shape)).astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def finished(image: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, Path]:
    """Exit code, output and directory of a run of three steps."""
    out = tmp_path_factory.mktemp("out") / "new" / "directory"
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = demo.run_demo(image, "cpu", "reference", out, steps=3)
    return code, output.getvalue(), out


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures and small crops, where only the verdict matters."""
    monkeypatch.setattr(demo, "_draw", lambda *_: {})
    monkeypatch.setattr(demo, "CROP", 64)


def test_parity_holds_and_the_tables_say_so(finished: tuple[int, str, Path]) -> None:
    code, output, _ = finished
    assert code == 0
    assert "parity holds" in output
    for line in (
        "head.ocr_distri_head.object_context_block",
        "  logits ",
        "  auxiliary logits ",
        "  gradients: worst ",
        "loss curve: largest difference",
        "mask: pixels equal",
        "time per step",
        "saved for backward: network",
        "Training, 3 steps",
    ):
        assert line in output
    assert "FAIL" not in output


def test_pictures_are_written(finished: tuple[int, str, Path]) -> None:
    _, output, out = finished
    assert sorted(path.name for path in out.iterdir()) == sorted((*PICTURES, "report.txt"))
    for name in PICTURES:
        assert name in output
        with Image.open(out / name) as picture:
            assert picture.format == "PNG"
            pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
        assert min(pixels.shape[:2]) > 400
        assert pixels.std() > 20


def test_the_report_lists_every_gradient(finished: tuple[int, str, Path]) -> None:
    report = (finished[2] / "report.txt").read_text(encoding="utf-8")
    assert "One training step" in report
    for name, _ in demo._Objective(demo._Network()).named_parameters():
        assert f"gradient of {name}: relative L2 error" in report
    assert "exceeds" not in report


def test_typical_pixels_lie_deep_in_the_regions_that_are_there() -> None:
    mask = torch.zeros(100, 160, dtype=torch.int64)
    mask[:, 80:] = 3
    pixels = demo._typical_pixels(mask)
    assert {int(mask[pixel]) for pixel in pixels} == {0, 3}
    assert all(20 <= y < 80 and 20 <= x % 80 < 60 for y, x in pixels)


def test_crops_are_drawn_alike_and_keep_their_labels(image: Path) -> None:
    photo = demo._photo(image)
    labels = torch.arange(96 * 64).view(96, 64)
    batches = [next(demo._crops(photo, labels)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))
    images, targets = batches[0]
    assert images.shape == (demo.BATCH, 3, demo.CROP, demo.CROP)
    whole = torch.nn.functional.avg_pool2d(photo, demo.STRIDE)[0].flatten(1)
    pooled = torch.nn.functional.avg_pool2d(images, demo.STRIDE)
    for crop, target in zip(pooled, targets, strict=True):
        torch.testing.assert_close(crop.flatten(1), whole[:, target.flatten()])


def _one_per_cent_off(right: Callable[..., None]) -> Callable[..., None]:
    def backward(first: Tensor | None, *args: Any) -> None:
        right(first, *args)
        if first is not None:
            first.mul_(1.01)

    return backward


@pytest.mark.usefixtures("small")
def test_a_wrong_gradient_is_exit_code_1(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the gather: a block with a wrong one is found out before it is used."""
    monkeypatch.setattr(gather, "backward", _one_per_cent_off(gather.backward))
    assert demo.run_demo(image, "cpu", "reference", tmp_path, steps=1) == 1
    output = capsys.readouterr().out
    assert "FAILS" in output
    assert "parity FAILED\n  gradient of network." in output
    assert "relative L2 error" in output


@pytest.mark.usefixtures("small")
def test_a_diverging_loss_curve_is_exit_code_1(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo._Run, "drift", lambda run, other: [float("nan")])
    assert demo.run_demo(image, "cpu", "reference", tmp_path, steps=1) == 1
    assert "loss curves: difference nan exceeds" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_nothing_replaced_is_exit_code_1(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace = demo.replace_ocr_modules
    monkeypatch.setattr(
        demo,
        "replace_ocr_modules",
        lambda model, **kwargs: replace(model, filter=lambda module, name: "gather" in name, **kwargs),
    )
    assert demo.run_demo(image, "cpu", "reference", tmp_path, steps=1) == 1
    assert "not replaced: attention" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"image": "missing.jpg"}, "--image missing.jpg: no such file"),
        ({"image": __file__}, "test_demo.py: not an image that Pillow can read"),
        ({"backend": "cudnn"}, "backend must be one of reference, triton, native, but is 'cudnn'"),
        ({"device": "banana"}, "--device banana is not available: "),
        ({"device": "cuda:99"}, "--device cuda:99 is not available: "),
        ({"device": "meta"}, "--device must be cpu or cuda, but is meta"),
        ({"steps": 0}, "--steps must be at least 1, but is 0"),
    ],
)
def test_what_cannot_run_is_one_line_and_exit_code_2(
    arguments: dict[str, Any], complaint: str, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert demo.run_demo(**{"image": image, "device": "cpu", "out": out, **arguments}) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("ocr-kernels demo: ")
    assert complaint in printed.err
    assert printed.err.count("\n") == 1
    assert not out.exists()


def test_truncated_image_and_occupied_directory_are_exit_code_2(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes(image.read_bytes()[:2000])
    assert demo.run_demo(truncated, "cpu", out=tmp_path / "out") == 2
    assert demo.run_demo(image, "cpu", out=truncated) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "truncated.png: not an image that Pillow can read" in first
    assert second.endswith("truncated.png: not a directory")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_found_before_training(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**_: Any) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(demo.tempfile, "TemporaryFile", refuse)
    assert demo.run_demo(image, "cpu", out=tmp_path) == 2
    assert capsys.readouterr().err == f"ocr-kernels demo: [Errno 13] Permission denied: '{tmp_path}'\n"


def test_missing_packages_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("rich", "sklearn") else find(name))
    assert demo.run_demo(out=tmp_path / "out") == 2
    expected = "ocr-kernels demo: needs rich, scikit-learn: pip install rich scikit-learn\n"
    assert capsys.readouterr().err == expected


def test_the_default_image_is_a_photo() -> None:
    assert demo._photo(demo._default_image()).shape == (1, 3, 256, 384)


def test_arguments_reach_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(demo, "run_demo", lambda *args: calls.append(args) or 5)
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    assert demo.main(parser.parse_args([])) == 5
    line = "--image a.jpg --device cpu --backend triton --out b --steps 7"
    assert demo.main(parser.parse_args(line.split())) == 5
    assert calls == [
        (None, None, None, Path("demo-output"), demo.STEPS),
        (Path("a.jpg"), "cpu", "triton", Path("b"), 7),
    ]
