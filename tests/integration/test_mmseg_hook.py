"""The hook and the config of examples, in a `Runner` that trains, validates and saves."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fresh import run
from torch import Tensor, nn

from ocr_kernels.models.replacement import replacement_of
from ocr_kernels.reference import OCRHead

pytestmark = pytest.mark.integration
pytest.importorskip("mmcv", reason="`make integration` installs mmsegmentation")

EXAMPLE = Path(__file__).parents[2] / "examples" / "mmseg_ocrnet.py"
SIZE = (64, 128)  # of an image; (height, width)


@pytest.fixture
def head() -> OCRHead:
    return OCRHead(in_channels=8, num_classes=3, mid_channels=16, key_channels=8)


def run_hook(model: nn.Module, **options: Any) -> None:
    from ocr_kernels.integrations.mmseg import ReplaceOCRModules

    ReplaceOCRModules(**options).before_run(SimpleNamespace(model=model, logger=logging.getLogger("runner")))


def replaced(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if replacement_of(module) is not None]


def test_options_are_those_of_the_call(head: OCRHead, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run_hook(head, filter="distri", example_inputs=(1, 8, 16, 16), blocks=False)
    assert replaced(head) == ["ocr_distri_head.object_context_block"]
    assert "the filter says so" in caplog.text
    assert "attention" in caplog.text
    assert "block," not in caplog.text


def test_example_inputs(head: OCRHead, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run_hook(head, example_inputs=[1, 8, 16, 16], raise_if_incomplete=True)
    assert "4 replaced, 0 left alone" in caplog.text
    assert "to be seen when it runs" not in caplog.text
    run_hook(head, raise_if_incomplete=True)  # once more, as before `Runner.test`


def test_a_wrapped_model(head: OCRHead) -> None:
    from mmengine.model import BaseModel
    from mmengine.model.wrappers import MMDistributedDataParallel

    class Model(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.head = head

        def forward(self, images: Tensor) -> list[Tensor]:
            return self.head(images)

    wrapped = MMDistributedDataParallel.__new__(MMDistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = Model()
    run_hook(wrapped, example_inputs=torch.randn(1, 8, 16, 16), raise_if_incomplete=True)
    assert len(replaced(head)) == 4


def test_a_model_without_ocr_can_stop_the_run() -> None:
    run_hook(nn.Conv2d(3, 3, 1))
    with pytest.raises(RuntimeError, match="not every OCR module"):
        run_hook(nn.Conv2d(3, 3, 1), raise_if_incomplete=True)


def cityscapes(folder: Path) -> None:
    """An image of each split, laid out as Cityscapes is."""
    import numpy as np
    from PIL import Image

    height, width = SIZE
    labels = np.arange(height)[:, None].repeat(width, 1) * 19 // height
    for split in ("train", "val"):
        for kind, picture, suffix in (
            ("leftImg8bit", np.stack([labels * 13] * 3, 2), "_leftImg8bit.png"),
            ("gtFine", labels, "_gtFine_labelTrainIds.png"),
        ):
            (folder / kind / split).mkdir(parents=True)
            Image.fromarray(picture.astype(np.uint8)).save(folder / kind / split / f"image{suffix}")


def small(config: Any, folder: Path) -> Any:
    """The example's config for one image of each split, on a CPU, without weights from elsewhere."""
    height, width = SIZE
    config.model.pretrained = None
    config.model.data_preprocessor.size = SIZE
    for stage in config.model.backbone.extra.values():
        stage.update(num_modules=1, num_blocks=(1,) * stage.num_branches)
    config.custom_hooks[0].update(example_inputs=(1, 3, height, width), raise_if_incomplete=True)
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(folder)
        for transform in loader.dataset.pipeline:
            if "scale" in transform:
                transform.scale = (width, height)
            if "crop_size" in transform:
                transform.crop_size = SIZE
    config.train_cfg.update(max_iters=2, val_interval=2)
    config.default_hooks.checkpoint.interval = 2
    config.default_hooks.logger.interval = 1
    config.work_dir = str(folder / "work")
    return config


@pytest.mark.slow
def test_the_example_trains_and_validates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mmseg
    from mmengine.config import Config
    from mmengine.runner import Runner
    from mmengine.runner.checkpoint import load_checkpoint
    from mmseg.registry import MODELS

    # where a config of mmsegmentation lies, mmengine asks `pkg_resources`, which left setuptools with version 82
    monkeypatch.setattr("mmengine.config.config.is_installed", lambda package: True)
    monkeypatch.setattr("mmengine.config.config.get_installed_path", lambda package: os.path.dirname(mmseg.__file__))
    cityscapes(tmp_path)
    runner = Runner.from_cfg(small(Config.fromfile(EXAMPLE), tmp_path))
    runner.train()
    names = replaced(runner.model)
    assert names == ["decode_head.1.object_context_block", "decode_head.1.spatial_gather_module"]
    log = next((tmp_path / "work").rglob("*.log")).read_text()
    assert "ocr_kernels: 2 replaced, 0 left alone" in log
    assert "mIoU" in log

    plain = MODELS.build(runner.cfg.model)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # a Runner's checkpoint holds its history, too
    load_checkpoint(plain, str(tmp_path / "work" / "iter_2.pth"), strict=True, logger=None)
    assert replaced(plain) == []


def test_without_mmengine_the_import_says_what_it_needs() -> None:
    out = run(
        """
import sys
sys.modules["mmengine"] = None
try:
    import ocr_kernels.integrations.mmseg
except ImportError as error:
    print(error)
"""
    )
    assert out.strip() == "ocr_kernels.integrations.mmseg needs mmengine: pip install mmengine"
