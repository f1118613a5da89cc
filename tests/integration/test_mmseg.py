"""mmsegmentation's own OCRNet, replaced: the same predictions, gradients, losses and checkpoints."""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Iterator

import pytest
import torch
from module_results import CountOps
from test_readme import BLOCKS
from torch import Tensor, nn

from ocr_kernels import replace_ocr_modules, restore_ocr_modules
from ocr_kernels.testing import assert_parity, judge

pytestmark = pytest.mark.integration
pytest.importorskip("mmcv", reason="`make integration` installs mmsegmentation")

CLASSES = 5
ATTENTION, GATHER = "decode_head.1.object_context_block", "decode_head.1.spatial_gather_module"


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 64, 48)


def ocrnet() -> nn.Module:
    """What `configs/_base_/models/ocrnet_hr18.py` describes, but small: HRNet, then FCNHead and OCRHead in cascade."""
    import mmseg.models
    from mmengine.config import ConfigDict
    from mmseg.registry import MODELS

    widths = (4, 6, 8, 10)
    norm = {"type": "BN"}
    stages = {
        f"stage{i}": {
            "num_modules": 1,
            "num_branches": i,
            "block": "BOTTLENECK" if i == 1 else "BASIC",
            "num_blocks": (1,) * i,
            "num_channels": widths[:i],
        }
        for i in (1, 2, 3, 4)
    }
    head = {
        "in_channels": list(widths),
        "in_index": (0, 1, 2, 3),
        "input_transform": "resize_concat",
        "dropout_ratio": -1,
        "num_classes": CLASSES,
        "norm_cfg": norm,
    }
    first = {"type": "FCNHead", "channels": 12, "kernel_size": 1, "num_convs": 1, "concat_input": False}
    second = {"type": "OCRHead", "channels": 16, "ocr_channels": 8}
    model = MODELS.build(
        ConfigDict(
            type=mmseg.models.segmentors.CascadeEncoderDecoder,
            num_stages=2,
            backbone={"type": "HRNet", "norm_cfg": norm, "norm_eval": False, "extra": stages},
            decode_head=[head | first, head | second],
            test_cfg={"mode": "whole"},
        )
    )
    assert isinstance(model, nn.Module)
    return model


def train(model: nn.Module, images: Tensor, *, replaced_at: int | None = None) -> Tensor:
    """The losses of a few steps, with the optimizer built before the replacement, and that between two of them."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    labels = torch.arange(images.shape[2]).mul(CLASSES).div(images.shape[2], rounding_mode="floor")
    labels = labels.view(1, -1, 1).expand(1, *images.shape[2:])
    samples = [SegDataSample(gt_sem_seg=PixelData(data=labels)) for _ in images]
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(5):
        if step == replaced_at:
            replace_ocr_modules(model)
        found = {name: loss for name, loss in model(images, samples, mode="loss").items() if "loss" in name}
        optimizer.zero_grad()
        sum(found.values()).backward()
        optimizer.step()
        losses.append(torch.stack(list(found.values())).detach())
    return torch.stack(losses)


def test_both_computations_are_found_and_restored(images: Tensor) -> None:
    model = ocrnet()
    classes = [type(module) for module in model.modules()]
    parameters = list(model.parameters())
    report = replace_ocr_modules(model, example_inputs=images)
    assert [(row.name, row.computations) for row in report.replaced] == [
        (ATTENTION, ("block", "training", "attention")),
        (GATHER, ("gather",)),
    ]
    assert report.left_alone == ()
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    with CountOps() as ops, torch.no_grad():
        model.eval().predict(images)
    assert (ops.gather, ops.attention, ops.inference) == (1, 0, 1)
    with CountOps() as ops:
        model.train()(images)
    assert (ops.gather, ops.attention, ops.inference, ops.block) == (1, 0, 0, 1)
    assert restore_ocr_modules(model) == [ATTENTION, GATHER]
    assert classes == [type(module) for module in model.modules()]


@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients(training: bool, images: Tensor) -> None:
    plain = ocrnet().train(training)
    replaced = copy.deepcopy(plain)
    replace_ocr_modules(replaced)
    assert_parity(replaced, plain, (images.requires_grad_(),))


def test_training_goes_on_after_the_replacement(images: Tensor) -> None:
    model = ocrnet()
    exact = train(copy.deepcopy(model).double(), images.double())
    runs = [train(copy.deepcopy(model), images)]
    for _ in range(3):  # which of two orders of summation comes closer is luck, so the inputs move by an eps or two
        noise = torch.finfo(images.dtype).eps * torch.randn_like(images)
        runs.append(train(copy.deepcopy(model), images * (1 + noise)))
    with CountOps() as ops:
        losses = train(model, images, replaced_at=2)
    assert (ops.gather, ops.block) == (3, 6 + 3)  # six to verify that the op computes what the module does
    assert losses[-1].sum() < losses[0].sum()
    measurements = judge("losses", losses, [(run, exact, 1.0) for run in runs])
    assert all(m.passed for m in measurements), "\n".join(map(str, measurements))


def test_checkpoints_go_in_and_out(images: Tensor, tmp_path: pathlib.Path) -> None:
    from mmengine.runner.checkpoint import load_checkpoint, save_checkpoint

    plain, replaced = ocrnet().eval(), ocrnet().eval()
    replace_ocr_modules(replaced)
    assert list(replaced.state_dict()) == list(plain.state_dict())
    expected = plain(images)
    for source, target in ((plain, replaced), (replaced, ocrnet().eval())):
        file = str(tmp_path / "checkpoint.pth")
        save_checkpoint({"state_dict": source.state_dict()}, file)
        load_checkpoint(target, file, strict=True, logger=None)
        torch.testing.assert_close(target(images), expected)


@pytest.mark.parametrize("block", [block for block in BLOCKS.values() if "mmseg" in block])
def test_code_of_the_page(block: str) -> None:
    exec(block, {})
