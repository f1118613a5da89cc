"""The drop-in modules against the plain reference modules: same keys, same values, same gradients."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator

import pytest
import torch
from module_results import CountOps, assert_same, results
from torch import nn

from ocr_kernels import modules, reference, replace_ocr_modules
from ocr_kernels.core.calls import taken_apart

NORM = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
ATTENTION_KEYS = [
    "f_pixel.0.weight",
    *(f"f_pixel.1.0.{name}" for name in NORM),
    "f_pixel.2.weight",
    *(f"f_pixel.3.0.{name}" for name in NORM),
    "f_object.0.weight",
    *(f"f_object.1.0.{name}" for name in NORM),
    "f_object.2.weight",
    *(f"f_object.3.0.{name}" for name in NORM),
    "f_down.0.weight",
    *(f"f_down.1.0.{name}" for name in NORM),
    "f_up.0.weight",
    *(f"f_up.1.0.{name}" for name in NORM),
]
OCR_KEYS = [
    *(f"object_context_block.{key}" for key in ATTENTION_KEYS),
    "conv_bn_dropout.0.weight",
    *(f"conv_bn_dropout.1.0.{name}" for name in NORM),
]
HEAD_KEYS = [
    "conv3x3_ocr.0.weight",
    "conv3x3_ocr.0.bias",
    *(f"conv3x3_ocr.1.{name}" for name in NORM),
    *(f"ocr_distri_head.{key}" for key in OCR_KEYS),
    "cls_head.weight",
    "cls_head.bias",
    "aux_head.0.weight",
    "aux_head.0.bias",
    *(f"aux_head.1.{name}" for name in NORM),
    "aux_head.3.weight",
    "aux_head.3.bias",
]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def pair(name: str, *args: object, **kwargs: object) -> tuple[nn.Module, nn.Module]:
    """The reference module and ours, in float64 and with the same parameters."""
    expected = getattr(reference, name)(*args, **kwargs).double()
    ours = getattr(modules, name)(*args, **kwargs).double()
    ours.load_state_dict(expected.state_dict())
    return expected, ours


@pytest.mark.parametrize("library", [reference, modules])
def test_state_dict_keys_are_those_of_hrnet(library) -> None:
    assert list(library.SpatialGather(19).state_dict()) == []
    assert list(library.ObjectAttentionBlock(8, 4).state_dict()) == ATTENTION_KEYS
    assert list(library.SpatialOCR(8, 4, 8).state_dict()) == OCR_KEYS
    assert list(library.OCRHead(12, 5, 8, 4).state_dict()) == HEAD_KEYS


def test_hrnets_class_names_are_aliases() -> None:
    assert modules.SpatialGather_Module is modules.SpatialGather
    assert modules.ObjectAttentionBlock2D is modules.ObjectAttentionBlock
    assert modules.SpatialOCR_Module is modules.SpatialOCR


def test_hrnets_calls_work() -> None:
    gather = modules.SpatialGather_Module(5, 1)
    distribute = modules.SpatialOCR_Module(
        in_channels=8, key_channels=4, out_channels=6, scale=1, dropout=0.05, bn_type="torchbn"
    )
    feats, probs = torch.randn(2, 8, 4, 6), torch.randn(2, 5, 4, 6)
    context = gather(feats, probs)
    assert context.shape == (2, 8, 5, 1)
    assert distribute(feats, context).shape == (2, 6, 4, 6)


def test_unknown_bn_type_is_named() -> None:
    with pytest.raises(ValueError, match=r"bn_type .*'inplace_abn'.*norm_layer="):
        modules.SpatialOCR(8, 4, 8, bn_type="inplace_abn")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("size", [(4, 6), (7, 5)])
@pytest.mark.parametrize("factor", [1, 0.5])
def test_gather(size: tuple[int, int], factor: float, dtype: torch.dtype, tolerance: float) -> None:
    expected, ours = pair("SpatialGather", 5, factor)
    inputs = torch.randn(2, 8, *size, dtype=dtype), torch.randn(2, 5, *size, dtype=dtype)
    with CountOps() as ops:
        found = results(ours, *inputs)
    assert (ops.gather, ops.attention) == (1, 0)
    assert_same(found, results(expected, *inputs), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize(("scale", "size"), [(1, (4, 6)), (1, (7, 5)), (2, (8, 6)), (2, (7, 5)), (3, (7, 11))])
@pytest.mark.parametrize("align_corners", [True, False])
def test_attention(
    scale: int, size: tuple[int, int], align_corners: bool, dtype: torch.dtype, tolerance: float
) -> None:
    expected, ours = pair("ObjectAttentionBlock", 8, 4, scale, align_corners=align_corners)
    inputs = torch.randn(2, 8, *size, dtype=dtype), torch.randn(2, 8, 5, 1, dtype=dtype)
    with CountOps() as ops:
        found = results(ours.to(dtype), *inputs)
    assert (ops.gather, ops.attention) == (0, 1)
    assert found["output 0"].shape == inputs[0].shape
    assert_same(found, results(expected.to(dtype), *inputs), tolerance)


def test_align_corners_matters() -> None:
    feats, regions = torch.randn(1, 8, 8, 8), torch.randn(1, 8, 5, 1)
    aligned = modules.ObjectAttentionBlock(8, 4, 2).eval()
    other = modules.ObjectAttentionBlock(8, 4, 2, align_corners=False).eval()
    other.load_state_dict(aligned.state_dict())
    assert not torch.allclose(aligned(feats, regions), other(feats, regions))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("scale", "size"), [(1, (5, 7)), (2, (8, 6))])
def test_head(scale: int, size: tuple[int, int], training: bool) -> None:
    expected, ours = (m.train(training) for m in pair("OCRHead", 12, 5, 8, 4, 0.5, scale))
    feats = torch.randn(2, 12, *size, dtype=torch.float64)
    with CountOps() as ops:
        found = results(ours, feats)
    assert (ops.gather, ops.attention, ops.block) == ((1, 0, 1) if scale == 1 else (1, 1, 0))
    assert found["output 0"].shape == found["output 1"].shape == (2, 5, *size)
    assert_same(found, results(expected, feats), 1e-11)
    assert_same(dict(ours.named_buffers()), dict(expected.named_buffers()), 1e-13)


@torch.no_grad()
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_inference_is_one_op(memory_format: torch.memory_format) -> None:
    plain, ours = pair("SpatialOCR", 8, 4, 8)
    plain.eval(), ours.eval()
    feats = torch.randn(2, 8, 5, 7, dtype=torch.float64).contiguous(memory_format=memory_format)
    regions = torch.randn(2, 8, 3, 1, dtype=torch.float64)
    with CountOps() as ops:
        z = ours(feats, regions)
    assert (ops.inference, ops.attention) == (1, 0)
    assert z.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(z, plain(feats, regions))
    with CountOps() as ops, taken_apart():
        ours(feats, regions)
    assert (ops.inference, ops.attention) == (0, 1)


def test_head_is_in_hrnets_order() -> None:
    head = modules.OCRHead(12, 5, 8, 4).eval()
    feats = torch.randn(1, 12, 6, 6)
    aux_logits, logits = head(feats)
    pixels = head.conv3x3_ocr(feats)
    torch.testing.assert_close(aux_logits, head.aux_head(feats))
    regions = head.ocr_gather_head(pixels, aux_logits)
    torch.testing.assert_close(logits, head.cls_head(head.ocr_distri_head(pixels, regions)))


@pytest.mark.parametrize("name", ["ObjectAttentionBlock", "SpatialOCR", "OCRHead"])
def test_norm_and_activation_are_the_users_choice(name: str) -> None:
    layers = {"norm_layer": functools.partial(nn.GroupNorm, 2), "act_layer": nn.GELU}
    args = {"ObjectAttentionBlock": (8, 4), "SpatialOCR": (8, 4, 8), "OCRHead": (12, 5, 8, 4)}[name]
    expected, ours = pair(name, *args, **layers)
    kinds = {type(m) for m in ours.modules()}
    assert {nn.GroupNorm, nn.GELU} <= kinds
    assert not {nn.BatchNorm2d, nn.ReLU} & kinds
    feats = torch.randn(2, args[0], 4, 6, dtype=torch.float64)
    inputs = (feats,) if name == "OCRHead" else (feats, torch.randn(2, 8, 5, 1, dtype=torch.float64))
    assert_same(results(ours, *inputs), results(expected, *inputs), 1e-12)


def test_bfloat16_autocast() -> None:
    exact, _ = pair("SpatialOCR", 8, 4, 8, dropout=0.0)
    expected, ours = copy.deepcopy(exact).float(), modules.SpatialOCR(8, 4, 8, dropout=0.0)
    ours.load_state_dict(exact.state_dict())
    inputs = torch.randn(2, 8, 8, 8), 3 * torch.randn(2, 8, 5, 1)
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = results(ours, *inputs), results(expected, *inputs)
    oracle = results(exact, *(t.double() for t in inputs))
    assert found["output 0"].dtype == plain["output 0"].dtype == torch.bfloat16
    for name, tensor in oracle.items():
        if name.endswith(("output 0", "input 0", "input 1", "0.weight")):
            error, allowed = ((t[name].double() - tensor).norm() / tensor.norm() for t in (found, plain))
            assert error <= 1.25 * allowed + torch.finfo(torch.bfloat16).eps, name


def test_channels_last_stays() -> None:
    ours = modules.OCRHead(12, 5, 8, 4).eval().to(memory_format=torch.channels_last)
    feats = torch.randn(2, 12, 6, 6)
    out = ours(feats.to(memory_format=torch.channels_last))[1]
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, ours(feats)[1])


@pytest.mark.parametrize(
    ("training", "compiled"), [(False, False), (True, False), (False, True)], ids=["eval", "train", "compiled"]
)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("kind", ["modules", "replaced"])
def test_an_ensemble_by_vmap(kind: str, training: bool, grad: bool, compiled: bool) -> None:
    """The derivative of the parameters is taken outside of the transform, whose tensors do not tell."""
    members = [reference.OCRHead(8, 3, 16, 8) for _ in range(2)]
    ours = copy.deepcopy(members[0]) if kind == "replaced" else modules.OCRHead(8, 3, 16, 8)
    if kind == "replaced":
        replace_ocr_modules(ours)
    parameters, buffers = torch.func.stack_module_state(members)
    feats = torch.randn(2, 8, 5, 7)
    for head in (members[0], ours):
        for layer in head.train(training).modules():
            if isinstance(layer, nn.Dropout2d):
                layer.p = 0.0

    def results_of(head: nn.Module) -> list[torch.Tensor]:
        def member(*state: dict[str, torch.Tensor]) -> torch.Tensor:
            logits, auxiliary = torch.func.functional_call(head, state, (feats,))
            return logits + 2 * auxiliary

        def ensemble(*state: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.func.vmap(member)(*state)

        with torch.set_grad_enabled(grad):
            run = torch.compile(ensemble, backend="aot_eager") if compiled else ensemble
            out = run(parameters, {name: buffer.clone() for name, buffer in buffers.items()})
        gradients = torch.autograd.grad(out.square().sum(), [*parameters.values()], allow_unused=True) if grad else []
        return [out.detach(), *(each for each in gradients if each is not None)]

    torch._dynamo.reset()
    for actual, expected in zip(results_of(ours), results_of(members[0]), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-2 if training else 1e-5)
