"""mmsegmentation's own OCRHead, folded: the same predictions in eval mode, the same training."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from ocr_kernels.folding import fold_ocr_modules, unfold_ocr_modules
from ocr_kernels.replace import replace_ocr_modules
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


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_predictions_and_gradients(norm: str, swap: bool) -> None:
    plain = head(norm_cfg={"type": norm})
    folded = copy.deepcopy(plain)
    (feats,), logits = example()
    report = fold_ocr_modules(folded, example_inputs=([feats], logits))
    assert [(row.name, row.module_class) for row in report.folded] == [("object_context_block", "ObjectAttentionBlock")]
    assert report.left_alone == ()
    if swap:
        assert len(replace_ocr_modules(folded).swapped) == 2
    with torch.no_grad():
        torch.testing.assert_close(folded([feats], logits), plain([feats], logits), rtol=1e-4, atol=1e-5)
        assert folded.object_context_block._ocr_kernels_cache.snapshot.weights is not None
    block = copy.deepcopy(folded).object_context_block
    regions = torch.randn(2, 16, 5, 1)
    assert_parity(block, plain.object_context_block, (torch.randn(2, 16, 7, 5).requires_grad_(), regions))
    assert unfold_ocr_modules(folded) == ["object_context_block"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"norm_cfg": {"type": "GN", "num_groups": 2}}, "query_project has a torch.nn.modules.normalization.GroupNorm"),
        ({"act_cfg": {"type": "LeakyReLU"}}, "LeakyReLU"),
        ({"act_cfg": None}, "query_project has no ReLU between two convolutions"),
        ({"scale": 2}, "it attends at a lower resolution (scale > 1)"),
    ],
)
def test_refusals(options: dict[str, object], reason: str) -> None:
    report = fold_ocr_modules(head(**options))
    assert report.folded == ()
    assert reason in report.left_alone[0].reason
