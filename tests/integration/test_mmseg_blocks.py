"""mmsegmentation's own OCRHead, its step 4 as one op: the same predictions in eval mode, the same training."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from ocr_kernels import replace_ocr_modules, restore_ocr_modules
from ocr_kernels.testing import assert_parity

pytestmark = pytest.mark.integration
pytest.importorskip("mmcv", reason="`make integration` installs mmsegmentation")


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def head(**options: object) -> nn.Module:
    from mmseg.models.decode_heads import OCRHead

    module = OCRHead(
        in_channels=12, channels=16, ocr_channels=8, num_classes=5, **{"norm_cfg": {"type": "BN"}, **options}
    )
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 1.5)
    return module.eval()


def example() -> tuple[list[Tensor], Tensor]:
    return [torch.randn(2, 12, 7, 5)], torch.randn(2, 5, 7, 5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_cfg": {"type": "SyncBN"}},
        {"act_cfg": {"type": "LeakyReLU"}},
        {"act_cfg": None},
    ],
)
def test_predictions_and_gradients(options: dict[str, object]) -> None:
    plain = head(**options)
    replaced = copy.deepcopy(plain)
    (feats,), logits = example()
    report = replace_ocr_modules(replaced, example_inputs=([feats], logits))
    assert {row.name: row.computations for row in report.replaced} == {
        "object_context_block": ("block", "training", "attention"),
        "spatial_gather_module": ("gather",),
    }
    report.raise_if_incomplete()
    with torch.no_grad():
        torch.testing.assert_close(replaced([feats], logits), plain([feats], logits), rtol=1e-4, atol=1e-5)
    block = copy.deepcopy(replaced).object_context_block
    regions = torch.randn(2, 16, 5, 1)
    assert_parity(block, plain.object_context_block, (torch.randn(2, 16, 7, 5).requires_grad_(), regions))
    assert len(restore_ocr_modules(replaced)) == 2


def test_what_runs_as_two_ops() -> None:
    (feats,), logits = example()
    report = replace_ocr_modules(head(norm_cfg={"type": "GN", "num_groups": 2}), example_inputs=([feats], logits))
    assert [row.computations for row in report.replaced] == [("attention",), ("gather",)], report
    assert "no block: it has a GroupNorm on the pixels" in str(report)
