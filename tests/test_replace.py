"""Replacement: what is recognised runs on our ops, everything else as it always did, and nothing else changes."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from module_results import CountOps, assert_same, results
from torch import Tensor, nn

from ocr_kernels import modules, reference, use_backend
from ocr_kernels.models.replace import replace_ocr_modules, restore_ocr_modules


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def head(**kwargs: Any) -> reference.OCRHead:
    return reference.OCRHead(12, 4, 8, 6, **kwargs)


HEAD_INPUT = (2, 12, 5, 4)
SWAPPED_NAMES = ["ocr_gather_head", "ocr_distri_head.object_context_block"]


def with_forward(forward: Callable[..., Any], **children: nn.Module) -> nn.Module:
    """A module with this forward."""
    module = type(forward.__name__, (nn.Module,), {"forward": forward})()
    for name, child in children.items():
        setattr(module, name, child)
    return module


def compare(module: nn.Module, *inputs: Tensor) -> tuple[int, int]:
    """Assert that replacing changes neither outputs nor gradients; how often gather and attention ran."""
    replaced = copy.deepcopy(module)
    report = replace_ocr_modules(replaced, blocks=False)
    assert len(report.replaced) == 1, report
    expected = results(module, *inputs)
    with CountOps() as ops:
        found = results(replaced, *inputs)
    assert_same(found, expected, 1e-12)
    return ops.gather, ops.attention


def require(condition: bool) -> None:
    """`assert`, which pytest compiles to other code than the source's, so that it would not be followed."""
    if not condition:
        raise AssertionError


# Forks of the gather: feats [2, 6, 3, 5], logits [2, 4, 3, 5]


def split(feats: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Feats `[B, N, C]` and logits `[B, K, N]`."""
    return feats.flatten(2).permute(0, 2, 1), logits.flatten(2)


def gather_matmul(self, feats, logits):
    x, scores = split(feats, logits)
    return torch.matmul(F.softmax(1 * scores, dim=2), x).permute(0, 2, 1).unsqueeze(3)


def gather_operator(self, feats, logits):
    x, scores = split(feats, logits)
    return (scores / 0.7).softmax(-1) @ x


def gather_bmm(self, feats, logits):
    x, scores = split(feats, logits)
    return torch.softmax(scores, 2).bmm(x).transpose(1, 2).contiguous()


def gather_einsum(self, feats, logits):
    x, scores = split(feats, logits)
    return torch.einsum("bkn, bnc -> bkc", F.softmax(0.5 * scores, dim=-1), x)


def gather_einsum_channels_first(self, feats, logits):
    weights = F.softmax(logits.flatten(2), dim=-1)
    return torch.einsum("bcn,bkn->bck", feats.flatten(2), weights)


def gather_from_the_right(self, feats, logits):
    weights = F.softmax(logits.flatten(2), dim=-1)
    return torch.matmul(feats.flatten(2), weights.transpose(1, 2))


def gather_over_rows(self, feats, logits):
    scores = logits.flatten(2).transpose(1, 2)
    return feats.flatten(2) @ F.softmax(scores, dim=1)


def gather_softmax_module(self, feats, logits):
    x, scores = split(feats, logits)
    return self.drop(self.softmax(scores)) @ x


def gather_reshaped(self, feats, logits):
    x, scores = split(feats, logits)
    regions = torch.matmul(F.softmax(scores, dim=2), x)
    return regions.view(regions.shape[0], -1)


def gather_modified(self, feats, logits):
    x, scores = split(feats, logits)
    regions = torch.matmul(F.softmax(scores, dim=2), x)
    regions *= 2
    return regions.relu_()


def helper(scores: Tensor, x: Tensor) -> Tensor:
    return torch.matmul(F.softmax(scores, dim=2), x)


def gather_in_a_helper(self, feats, logits):
    x, scores = split(feats, logits)
    return helper(scores, x)


@pytest.mark.parametrize(
    "forward",
    [
        gather_matmul,
        gather_operator,
        gather_bmm,
        gather_einsum,
        gather_einsum_channels_first,
        gather_from_the_right,
        gather_over_rows,
        gather_softmax_module,
        gather_reshaped,
        gather_modified,
        gather_in_a_helper,
    ],
)
def test_gather_is_recognised(forward: Callable[..., Any]) -> None:
    module = with_forward(forward, softmax=nn.Softmax(dim=-1), drop=nn.Dropout(0.0))
    inputs = torch.randn(2, 6, 3, 5, dtype=torch.float64), torch.randn(2, 4, 3, 5, dtype=torch.float64)
    assert compare(module, *inputs) == (1, 0)


def gather_over_regions(self, feats, logits):
    x, scores = split(feats, logits)
    return torch.matmul(F.softmax(scores, dim=1), x)


def gather_of_labels(self, feats, logits):
    x, scores = split(feats, logits)
    weights = F.one_hot(scores.argmax(1), scores.shape[1]).to(x.dtype).transpose(1, 2)
    weights = weights / weights.sum(2, keepdim=True).clamp(min=1)
    if scores.shape[1] == 1:
        weights = F.softmax(scores, dim=2)
    return torch.matmul(weights, x).permute(0, 2, 1).unsqueeze(3)


def gather_in_another_dtype(self, feats, logits):
    x, scores = split(feats, logits)
    return torch.matmul(F.softmax(scores, dim=2, dtype=torch.float32).double(), x)


def gather_of_normalised_weights(self, feats, logits):
    x, scores = split(feats, logits)
    weights = F.softmax(scores, dim=2)
    return torch.matmul(weights / weights.norm(dim=2, keepdim=True), x)


def gather_after_changing_scores(self, feats, logits):
    x, scores = split(feats, logits)
    scores = scores.clone()
    weights = F.softmax(scores, dim=2)
    scores[:, 0] = 0
    scores.mul_(3)
    return torch.matmul(weights, x) + scores.sum()


def gather_after_changing_scaled_scores(self, feats, logits):
    x, scores = split(feats, logits)
    scores = 2 * scores
    weights = F.softmax(scores, dim=2)
    scores += 1
    return torch.matmul(weights, x), weights.mean(), scores


def gather_after_changing_a_view(self, feats, logits):
    x, scores = split(feats, logits)
    scores = 2 * scores
    part = scores[:, :2]
    weights = F.softmax(scores, dim=2)
    torch.add(part.detach(), 1, out=part.detach())
    return torch.matmul(weights, x) + part.sum()


@pytest.mark.parametrize(
    "forward",
    [
        gather_over_regions,
        gather_of_labels,
        gather_in_another_dtype,
        gather_of_normalised_weights,
        gather_after_changing_scores,
        gather_after_changing_scaled_scores,
    ],
)
def test_what_is_no_gather_runs_as_before(forward: Callable[..., Any]) -> None:
    inputs = torch.randn(2, 6, 3, 5, dtype=torch.float64), torch.randn(2, 4, 3, 5, dtype=torch.float64)
    assert compare(with_forward(forward), *inputs) == (0, 0)


def test_scores_changed_through_a_view() -> None:
    module = with_forward(gather_after_changing_a_view)
    inputs = torch.randn(2, 6, 3, 5, dtype=torch.float64), torch.randn(2, 4, 3, 5, dtype=torch.float64)
    with torch.no_grad():
        expected = module(*inputs)
        replace_ocr_modules(module)
        torch.testing.assert_close(module(*inputs), expected, rtol=0, atol=1e-14)


def test_more_regions_than_pixels_are_no_gather() -> None:
    inputs = torch.randn(2, 6, 2, 2, dtype=torch.float64), torch.randn(2, 5, 2, 2, dtype=torch.float64)
    assert compare(with_forward(gather_matmul), *inputs) == (0, 0)


# Forks of the attention: query [2, 5, 3, 5], key [2, 5, 4], value [2, 6, 4]


def attention_matmul(self, query, key, value):
    size = query.shape[2:]
    query = query.flatten(2).permute(0, 2, 1)
    sim_map = torch.matmul(query, key)
    sim_map = (5**-0.5) * sim_map
    sim_map = F.softmax(sim_map, dim=-1)
    context = torch.matmul(sim_map, value.permute(0, 2, 1))
    return context.permute(0, 2, 1).contiguous().view(query.shape[0], -1, *size)


def attention_without_scale(self, query, key, value):
    sim_map = F.softmax(torch.matmul(query.flatten(2).permute(0, 2, 1), key), dim=-1)
    return torch.matmul(sim_map, value.permute(0, 2, 1))


def attention_times_root(self, query, key, value):
    sim_map = torch.matmul(query.flatten(2).permute(0, 2, 1), key) * 5**0.5
    return torch.matmul(F.softmax(sim_map, dim=2), value.permute(0, 2, 1)).permute(0, 2, 1)


def attention_scaling_the_query(self, query, key, value):
    query = query.flatten(2).permute(0, 2, 1) * 5**-0.5
    return (query @ key).softmax(dim=-1) @ value.permute(0, 2, 1)


def attention_dividing(self, query, key, value):
    sim_map = torch.bmm(query.flatten(2).transpose(1, 2), key).div(5**0.5)
    return torch.bmm(torch.softmax(sim_map, dim=-1), value.transpose(1, 2))


def attention_einsum(self, query, key, value):
    sim_map = torch.einsum("bdn,bdk->bnk", query.flatten(2), key) / 5**0.5
    return torch.einsum("bnk,bck->bcn", sim_map.softmax(-1), value)


def attention_regions_first(self, query, key, value):
    sim_map = torch.matmul(key.transpose(1, 2), query.flatten(2)) / 5**0.5
    return torch.matmul(value, F.softmax(sim_map, dim=1)).view(*value.shape[:2], *query.shape[2:])


def attention_of_a_transpose(self, query, key, value):
    sim_map = torch.matmul(key.mT, query.flatten(2)).permute(0, 2, 1).contiguous()
    weights = F.softmax(sim_map, dim=-1)
    require(tuple(weights.shape) == (weights.size(0), query[0, 0].numel(), value.size(-1)))
    require(weights.dim() == weights.ndim == 3)
    require(weights.device == value.device)
    require(weights.dtype == value.dtype)
    return value.matmul(weights.transpose(-1, -2))


def attention_conv1d(self, query, key, value):
    context = self.attend(query.flatten(2), key, value)
    return self.up(context)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    sim_map = F.softmax(query.transpose(1, 2) @ key, dim=-1)
    return (sim_map @ value.transpose(1, 2)).transpose(1, 2)


def attention_reinterpreted(self, query, key, value):
    context = F.softmax(query.flatten(2).transpose(1, 2) @ key, dim=-1) @ value.transpose(1, 2)
    return context.view(query.shape[0], value.shape[1], *query.shape[2:])


def attention_dropping_contexts(self, query, key, value):
    context = F.softmax(query.flatten(2).transpose(1, 2) @ key, dim=-1) @ value.transpose(1, 2)
    return F.dropout(context, 0.5)


def attention_of_weights_with_weights(self, query, key, value):
    weights = F.softmax(query.flatten(2).transpose(1, 2) @ key, dim=-1)
    affinity = weights @ weights.transpose(1, 2)
    return weights @ value.transpose(1, 2), affinity


def attention_modifying_a_copy(self, query, key, value):
    weights = F.softmax(query.flatten(2).transpose(1, 2) @ key, dim=-1)
    shares = weights.transpose(1, 2).contiguous()
    shares.mul_(2)
    return weights.reshape(weights.shape) @ value.transpose(1, 2), shares


def attention_modified(self, query, key, value):
    context = F.softmax(query.flatten(2).transpose(1, 2) @ key, dim=-1) @ value.transpose(1, 2)
    return context.mul_(2).transpose(1, 2)


def attention_returning_its_map(self, query, key, value):
    sim_map = F.softmax(torch.matmul(query.flatten(2).permute(0, 2, 1), key), dim=-1)
    return torch.matmul(sim_map, value.permute(0, 2, 1)), {"maps": [sim_map]}


@dataclasses.dataclass
class Output:
    context: Tensor
    weights: Tensor


def attention_returning_a_dataclass(self, query, key, value):
    sim_map = F.softmax(torch.matmul(query.flatten(2).permute(0, 2, 1), key), dim=-1)
    out = Output(torch.matmul(sim_map, value.permute(0, 2, 1)), sim_map)
    return out if self.whole else (out.context, out.weights)


@pytest.mark.parametrize(
    "forward",
    [
        attention_matmul,
        attention_without_scale,
        attention_times_root,
        attention_scaling_the_query,
        attention_dividing,
        attention_einsum,
        attention_regions_first,
        attention_of_a_transpose,
        attention_reinterpreted,
        attention_dropping_contexts,
        attention_modified,
        attention_returning_its_map,
    ],
)
def test_attention_is_recognised(forward: Callable[..., Any]) -> None:
    assert compare(with_forward(forward), *attention_inputs()) == (0, 1)


def attention_inputs(pixels: tuple[int, ...] = (3, 5), regions: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (2, 5, *pixels), (2, 5, regions), (2, 6, regions)
    query, key, value = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return query, key, value


def test_attention_with_conv1d_and_a_static_method() -> None:
    module = with_forward(attention_conv1d, up=nn.Conv1d(6, 3, 1)).double()
    type(module).attend = staticmethod(attend)
    assert compare(module, *attention_inputs()) == (0, 1)


def test_no_deferred_object_leaves_the_forward() -> None:
    module = with_forward(attention_returning_a_dataclass)
    module.whole = True
    expected = module(*attention_inputs())
    replace_ocr_modules(module)
    torch.manual_seed(0)
    found = module(*attention_inputs())
    assert type(found.weights) is Tensor
    assert found.weights.shape == expected.weights.shape
    assert found.context.is_contiguous()


def attention_over_pixels(self, query, key, value):
    sim_map = F.softmax(torch.matmul(query.flatten(2).permute(0, 2, 1), key), dim=1)
    return torch.matmul(sim_map, value.permute(0, 2, 1))


def attention_with_a_mask(self, query, key, value):
    sim_map = torch.matmul(query.flatten(2).permute(0, 2, 1), key)
    sim_map = sim_map + torch.linspace(-1, 1, 4, dtype=sim_map.dtype)
    return torch.matmul(F.softmax(sim_map, dim=-1), value.permute(0, 2, 1))


def attention_with_sigmoid_and_softmax(self, query, key, value):
    sim_map = torch.matmul(query.flatten(2).permute(0, 2, 1), key)
    context = torch.matmul(sim_map.sigmoid(), value.permute(0, 2, 1))
    return F.softmax(context.unsqueeze(0), dim=-1)


def attention_with_dropout(self, query, key, value):
    sim_map = F.softmax(torch.matmul(query.flatten(2).permute(0, 2, 1), key), dim=-1)
    return torch.matmul(self.drop(sim_map), value.permute(0, 2, 1))


def attention_scaled_by_a_parameter(self, query, key, value):
    sim_map = self.temperature.weight * torch.matmul(query.flatten(2).permute(0, 2, 1), key)
    return torch.matmul(F.softmax(sim_map, dim=-1), value.permute(0, 2, 1))


def attention_changing_its_query(self, query, key, value):
    query = query.flatten(2).permute(0, 2, 1).clone()
    key = key.clone()
    with torch.no_grad():
        sim_map = torch.matmul(query, key)
        query.zero_()
        F.relu(key, inplace=True)
    return torch.matmul(F.softmax(sim_map, dim=-1), value.permute(0, 2, 1)) + query.sum() + key.sum()


def attention_in_two_grad_modes(self, query, key, value):
    with torch.no_grad():
        sim_map = torch.matmul(query.flatten(2).permute(0, 2, 1), key)
    return torch.matmul(F.softmax(sim_map, dim=-1), value.permute(0, 2, 1))


def attention_summing_its_map(self, query, key, value):
    sim_map = F.softmax(torch.matmul(query.flatten(2).permute(0, 2, 1), key), dim=-1)
    largest = f"{sim_map.max():.3f} {sim_map!r} {len(sim_map)}"
    require("Deferred" not in largest)
    return torch.matmul(sim_map, value.permute(0, 2, 1))


def attention_storing_its_map(self, query, key, value):
    sim_map = F.softmax(torch.matmul(query.flatten(2).permute(0, 2, 1), key), dim=-1)
    self.sim_map = sim_map
    return torch.matmul(sim_map, value.permute(0, 2, 1)), self.sim_map


@pytest.mark.parametrize(
    "forward",
    [
        attention_over_pixels,
        attention_of_weights_with_weights,
        attention_modifying_a_copy,
        attention_with_a_mask,
        attention_with_sigmoid_and_softmax,
        attention_with_dropout,
        attention_scaled_by_a_parameter,
        attention_changing_its_query,
        attention_in_two_grad_modes,
        attention_summing_its_map,
        attention_storing_its_map,
    ],
)
def test_what_is_no_attention_runs_as_before(forward: Callable[..., Any]) -> None:
    module = with_forward(forward, drop=nn.Dropout(0.4), temperature=nn.Linear(4, 1, bias=False)).double()
    assert compare(module, *attention_inputs()) == (0, 0)


def test_dropout_on_the_weights_does_nothing_in_eval_mode() -> None:
    module = with_forward(attention_with_dropout, drop=nn.Dropout(0.4)).eval()
    assert compare(module, *attention_inputs()) == (0, 1)


def test_self_attention_is_left_alone() -> None:
    query, key, _ = attention_inputs((3, 5), 15)
    assert compare(with_forward(attention_matmul), query, key, key) == (0, 0)


def attention_keeping_maps(self, query, key, value):
    sim_map = F.softmax(torch.matmul(query.flatten(2).permute(0, 2, 1), key), dim=-1)
    self.maps.append(sim_map)
    KEPT["map"] = sim_map
    return torch.matmul(sim_map, value.permute(0, 2, 1))


KEPT: dict[str, Any] = {}


def test_maps_kept_in_containers_are_tensors() -> None:
    module = with_forward(attention_keeping_maps)
    module.maps = []
    inputs = attention_inputs()
    module(*inputs)
    replace_ocr_modules(module)
    module(*inputs)
    expected, found = module.maps
    assert type(found) is Tensor
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(KEPT.pop("map") + 0, expected)


def attention_under_local_autocast(self, query, key, value):
    query = query.flatten(2).permute(0, 2, 1)
    with torch.autocast("cpu", torch.bfloat16):
        sim_map = torch.matmul(query, key)
    return torch.matmul(F.softmax(sim_map, dim=-1), value.permute(0, 2, 1).to(sim_map.dtype))


@pytest.mark.parametrize("forward", [attention_matmul, attention_under_local_autocast])
@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_gives_the_same_dtype(forward: Callable[..., Any], enabled: bool) -> None:
    module = with_forward(forward)
    inputs = [t.float() for t in attention_inputs()]
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        expected = module(*inputs)
        replace_ocr_modules(module)
        with CountOps() as ops:
            found = module(*inputs)
    assert ops.attention == (forward is attention_matmul)  # scores are computed in the modes they were written in
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


class Sparsemax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores):
        weights = scores.softmax(-1)
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx, grad):
        (weights,) = ctx.saved_tensors
        return weights * (grad - (weights * grad).sum(-1, keepdim=True))


def attention_with_a_custom_function(self, query, key, value):
    sim_map = torch.matmul(query.flatten(2).permute(0, 2, 1), key)
    weights = Sparsemax.apply(sim_map) if self.training else F.softmax(sim_map, dim=-1)
    return torch.matmul(weights, value.permute(0, 2, 1))


def attention_with_a_hidden_custom_function(self, query, key, value):
    sim_map = torch.matmul(query.flatten(2).permute(0, 2, 1), key)
    weights = self.sparsemax(sim_map) if self.training else F.softmax(sim_map, dim=-1)
    return torch.matmul(weights, value.permute(0, 2, 1))


@pytest.mark.parametrize("is_hidden", [True, False])
def test_custom_autograd_functions_lose_no_gradient(is_hidden: bool) -> None:
    module = with_forward(attention_with_a_hidden_custom_function if is_hidden else attention_with_a_custom_function)
    module.sparsemax = Sparsemax.apply
    assert compare(module, *attention_inputs()) == (0, 0)
    assert compare(module.eval(), *attention_inputs()) == (0, 1)


# The module that was replaced


def replaced_head(**kwargs: Any) -> tuple[reference.OCRHead, reference.OCRHead]:
    """A reference head and its replaced copy."""
    plain = head(**kwargs)
    replaced = copy.deepcopy(plain)
    report = replace_ocr_modules(replaced, blocks=False)
    assert [row.name for row in report.replaced] == SWAPPED_NAMES
    return plain, replaced


@pytest.mark.parametrize("training", [True, False])
def test_a_head_computes_the_same(training: bool) -> None:
    plain, replaced = (m.double().train(training) for m in replaced_head(scale=2, dropout=0.5))
    feats = torch.randn(2, 12, 8, 6, dtype=torch.float64)
    expected = results(plain, feats)
    with CountOps() as ops:
        found = results(replaced, feats)
    assert (ops.gather, ops.attention) == (1, 1)
    assert_same(found, expected, 1e-11)
    assert_same(dict(replaced.named_buffers()), dict(plain.named_buffers()), 1e-13)


def test_nothing_but_the_computation_changes() -> None:
    model = head().eval()
    model.ocr_distri_head.object_context_block.train()
    calls: list[torch.Size] = []
    hook = model.ocr_gather_head.register_forward_hook(lambda module, args, out: calls.append(out.shape))
    before = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    training = [m.training for m in model.modules()]
    children = list(model.named_modules())
    hooks = dict(model.ocr_gather_head._forward_hooks)
    text = repr(model)
    replace_ocr_modules(model)
    assert {name: id(t) for name, t in model.state_dict(keep_vars=True).items()} == {
        k: i for k, (i, _) in before.items()
    }
    assert all(torch.equal(t, before[name][1]) for name, t in model.state_dict().items())
    assert training == [m.training for m in model.modules()]
    assert children == list(model.named_modules())
    assert hooks == dict(model.ocr_gather_head._forward_hooks)
    assert text == repr(model)
    assert isinstance(model.ocr_gather_head, reference.SpatialGather)
    model(torch.randn(HEAD_INPUT))
    assert calls == [(2, 8, 4, 1)]
    hook.remove()


def test_restoring_leaves_nothing_behind() -> None:
    model = head().eval()
    before = [(type(m), dict(vars(m))) for m in model.modules()]
    feats = torch.randn(HEAD_INPUT)
    expected = model(feats)
    replace_ocr_modules(model, blocks=False)
    assert [type(m) for m in model.modules()] == [kind for kind, _ in before]
    with CountOps() as ops:
        model(feats)
    assert (ops.gather, ops.attention) == (1, 1)
    assert restore_ocr_modules(model) == SWAPPED_NAMES
    assert before == [(type(m), vars(m)) for m in model.modules()]
    with CountOps() as ops:
        torch.testing.assert_close(model(feats), expected, rtol=0, atol=0)
    assert (ops.gather, ops.attention) == (0, 0)
    assert restore_ocr_modules(model) == []


def test_a_second_call_changes_nothing_and_says_so() -> None:
    model = head()
    replace_ocr_modules(model, blocks=False)
    before = [dict(vars(m)) for m in model.modules()]
    report = replace_ocr_modules(model, example_inputs=torch.randn(HEAD_INPUT), blocks=False)
    assert report.replaced == ()
    assert [row.name for row in report.left_alone] == SWAPPED_NAMES
    assert all(row.reason.startswith("it was replaced before, and no example_inputs") for row in report.left_alone)
    assert before == [vars(m) for m in model.modules()]


def test_the_root_is_replaced_in_place() -> None:
    gather = reference.SpatialGather()
    report = replace_ocr_modules(gather)
    assert report.replaced[0].name == ""
    assert "(model)" in str(report)
    with CountOps() as ops:
        gather(torch.randn(1, 3, 4, 4), torch.randn(1, 2, 4, 4))
    assert ops.gather == 1


def test_filter() -> None:
    model = head()
    asked: list[str] = []
    report = replace_ocr_modules(
        model, filter=lambda module, name: asked.append(name) or "gather" in name, blocks=False
    )
    assert asked == SWAPPED_NAMES
    assert [row.name for row in report.replaced] == SWAPPED_NAMES[:1]
    assert [(row.name, row.reason) for row in report.left_alone] == [(SWAPPED_NAMES[1], "the filter says so")]


def test_our_own_modules_need_no_replacement() -> None:
    report = replace_ocr_modules(modules.OCRHead(12, 4, 8, 6), blocks=False)
    assert report.replaced == ()
    assert {row.reason for row in report.left_alone} == {"it calls ocr_kernels itself"}


def test_modules_without_the_computation_are_not_mentioned() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.MultiheadAttention(4, 2), nn.Softmax(dim=1), nn.Bilinear(2, 2, 2))
    report = replace_ocr_modules(model)
    assert (report.replaced, report.left_alone) == ((), ())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model",), "model must be a torch.nn.Module, but is str"),
        ((nn.Identity(), "name"), "filter must be callable"),
        ((nn.Identity(), None, 3), "example_inputs must be a tensor"),
    ],
)
def test_wrong_arguments(arguments: tuple[Any, ...], message: str) -> None:
    model, filter, example_inputs = (*arguments, None, None)[:3]
    with pytest.raises(TypeError, match=message):
        replace_ocr_modules(model, filter=filter, example_inputs=example_inputs)


# The dry run


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_the_dry_run_measures_and_leaves_no_trace(form: str, training: bool) -> None:
    model = head(dropout=0.5).train(training)
    feats = torch.randn(HEAD_INPUT)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    attributes = [dict(vars(m)) for m in model.modules()]
    kept = [dict(m._modules) for m in model.modules()]
    random = torch.get_rng_state()
    inputs = feats.clone()
    report = replace_ocr_modules(
        model, example_inputs={"tensor": inputs, "tuple": (inputs,), "dict": {"feats": inputs}}[form], blocks=False
    )
    assert [(row.name, row.computations) for row in report.replaced] == [
        (SWAPPED_NAMES[0], ("gather",)),
        (SWAPPED_NAMES[1], ("attention",)),
    ]
    assert all(0 <= row.max_error < 1e-5 and 0 <= row.relative_error < 1e-5 for row in report.replaced)
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(inputs, feats)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert kept == [m._modules for m in model.modules()]
    restore_ocr_modules(model)
    assert attributes == [dict(vars(m)) for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())


def test_what_the_dry_run_finds_wrong_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = "ocr_kernels.models.recognition.spatial_gather"
    monkeypatch.setattr(wrong, lambda *args: modules.spatial_gather(*args) + 0.5)
    model = head().eval()
    report = replace_ocr_modules(model, example_inputs=torch.randn(HEAD_INPUT), blocks=False)
    assert [row.name for row in report.replaced] == SWAPPED_NAMES[1:]
    assert report.replaced[0].max_error < 1e-4
    assert "its outputs would be off by 5.0e-01" in report.left_alone[0].reason
    with CountOps() as ops:
        model(torch.randn(HEAD_INPUT))
    assert (ops.gather, ops.attention) == (0, 1)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (gather_over_regions, "the softmax over dim 1 of the scores (2, 4, 15) is not over pixels"),
        (attention_over_pixels, "the softmax over dim 1 of the product (2, 15, 4) is not over regions"),
        (attention_with_sigmoid_and_softmax, "it is a sigmoid, not a softmax"),
        (attention_with_dropout, "dropout is applied to the attention weights"),
        (gather_in_another_dtype, "the softmax converts its dtype"),
        (gather_of_normalised_weights, "the softmax is not followed by a product over its dimension"),
        (gather_of_labels, "neither computation ran"),
    ],
)
def test_the_dry_run_restores_what_did_not_fuse(forward: Callable[..., Any], reason: str) -> None:
    module = with_forward(forward, drop=nn.Dropout(0.5))
    original = type(module)
    gathers = (torch.randn(2, 6, 3, 5, dtype=torch.float64), torch.randn(2, 4, 3, 5, dtype=torch.float64))
    inputs = gathers if forward.__name__.startswith("gather") else attention_inputs()
    report = replace_ocr_modules(module, example_inputs=inputs)
    assert report.replaced == ()
    assert reason in report.left_alone[0].reason
    assert type(module) is original


def attention_with_sigmoid_only(self, query, key, value):
    sim_map = torch.sigmoid(torch.matmul(query.flatten(2).permute(0, 2, 1), key))
    return torch.matmul(sim_map, value.permute(0, 2, 1))


def test_a_sigmoid_fork_is_never_replaced() -> None:
    module = with_forward(attention_with_sigmoid_only)
    original = type(module)
    report = replace_ocr_modules(module)
    assert [row.reason for row in report.left_alone] == ["it takes a sigmoid, not a softmax"]
    assert type(module) is original


def test_a_dry_run_that_fails_is_a_row_of_the_report() -> None:
    model = head()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    broken = with_forward(lambda self, x: (1 / 0, self.head(x)), head=model)
    attributes = [dict(vars(m)) for m in broken.modules()]
    report = replace_ocr_modules(broken, example_inputs=torch.randn(HEAD_INPUT), blocks=False)
    reason = "the dry run failed before it was called: ZeroDivisionError: division by zero"
    assert [(row.name, row.reason) for row in report.left_alone] == [(f"head.{n}", reason) for n in SWAPPED_NAMES]
    assert not report
    assert attributes == [dict(vars(m)) for m in broken.modules()]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_modules_that_the_dry_run_does_not_reach_stay_replaced() -> None:
    model = with_forward(lambda self, x: x + 1, head=head())
    report = replace_ocr_modules(model, example_inputs=torch.zeros(1), blocks=False)
    assert [row.computations for row in report.replaced] == [(), ()]
    assert "not run by example_inputs" in str(report)


def test_the_report_is_a_table() -> None:
    model = nn.ModuleDict({"head": head(), "fork": with_forward(attention_with_sigmoid_only)})
    lines = str(replace_ocr_modules(model, blocks=False)).splitlines()
    assert lines[0] == "2 replaced, 1 left alone"
    columns = "replaced class fused backend error eager's own relative saves remarks"
    assert " ".join(lines[1].split()) == columns
    assert lines[2].startswith("  head.ocr_gather_head                       SpatialGather         to be seen when it ")
    assert lines[4].split() == ["left", "alone", "class", "because"]
    assert lines[5].endswith("attention_with_sigmoid_only  it takes a sigmoid, not a softmax")


def test_the_report_names_the_backend_that_runs() -> None:
    with use_backend("reference"):
        assert "reference: not faster" in str(replace_ocr_modules(head()))


def test_the_report_tells_how_much_less_is_saved() -> None:
    report = replace_ocr_modules(head(), example_inputs=torch.randn(2, 12, 16, 16), blocks=False)
    weights = 2 * 4 * 240 * 4  # of each softmax, in bytes, nearly
    assert all(row.saved_bytes >= weights for row in report.replaced)


def test_one_line_for_a_test_of_a_model() -> None:
    model = head()
    replace_ocr_modules(model, example_inputs=torch.randn(HEAD_INPUT), blocks=False).raise_if_incomplete()
    replace_ocr_modules(model).raise_if_incomplete()  # they were before
    for other in (nn.Conv2d(3, 4, 1), with_forward(attention_with_sigmoid_only)):
        with pytest.raises(RuntimeError, match="not every OCR module of the model was replaced"):
            replace_ocr_modules(other).raise_if_incomplete()
    assert str(replace_ocr_modules(nn.Conv2d(3, 4, 1))).endswith("nothing in the model looks like OCR")
    with pytest.raises(RuntimeError, match="give example_inputs"):
        replace_ocr_modules(head()).raise_if_incomplete()  # nothing ran: nothing is known to be fused
    unreached = with_forward(lambda self, x: x + 1, head=head())
    with pytest.raises(RuntimeError, match="not run by example_inputs"):
        replace_ocr_modules(unreached, example_inputs=torch.zeros(1)).raise_if_incomplete()


# Nesting


def attention_around_a_gather(self, feats, logits):
    regions = self.gather(feats, logits).squeeze(3)
    sim_map = F.softmax(feats.flatten(2).transpose(1, 2) @ regions, dim=-1)
    return (sim_map @ regions.transpose(1, 2)).transpose(1, 2).reshape(feats.shape)


def test_a_replaced_module_inside_another() -> None:
    module = with_forward(attention_around_a_gather, gather=reference.SpatialGather())
    replaced = copy.deepcopy(module)
    inputs = torch.randn(2, 6, 3, 5, dtype=torch.float64), torch.randn(2, 4, 3, 5, dtype=torch.float64)
    report = replace_ocr_modules(replaced, example_inputs=inputs)
    computations = {row.name: row.computations for row in report.replaced}
    assert computations == {"": ("gather", "attention"), "gather": ("gather",)}
    with CountOps() as ops:
        found = results(replaced, *inputs)
    assert (ops.gather, ops.attention) == (1, 1)
    assert_same(found, results(module, *inputs), 1e-12)


def attention_looking_at_its_children(self, query, key, value):
    require(isinstance(self.up, nn.Sequential) and len(self.up) == 1)
    require(self.up[0] is next(iter(self.up)) is next(self.up.children()))
    return self.up(attend(query.flatten(2), key, value))


def test_the_forward_sees_its_children() -> None:
    module = with_forward(attention_looking_at_its_children, up=nn.Sequential(nn.Conv1d(6, 3, 1))).double()
    assert compare(module, *attention_inputs()) == (0, 1)


# Copies, files, processes, compilers


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_a_file])
def test_copies_stay_replaced_and_can_be_restored(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    _, replaced = replaced_head()
    replaced.eval()
    feats = torch.randn(HEAD_INPUT)
    twin = duplicate(replaced)
    with CountOps() as ops:
        torch.testing.assert_close(twin(feats), replaced(feats), rtol=0, atol=0)
    assert (ops.gather, ops.attention) == (2, 2)
    assert all(a is not b for a, b in zip(twin.parameters(), replaced.parameters(), strict=True))
    assert restore_ocr_modules(twin) == SWAPPED_NAMES
    assert restore_ocr_modules(replaced) == SWAPPED_NAMES


def test_averaged_model() -> None:
    _, replaced = replaced_head()
    average = torch.optim.swa_utils.AveragedModel(replaced)
    average.update_parameters(replaced)
    with CountOps() as ops:
        average.eval()(torch.randn(HEAD_INPUT))
    assert (ops.gather, ops.attention) == (1, 1)


def test_changing_dtype_and_device() -> None:
    _, replaced = replaced_head()
    with CountOps() as ops:
        out = replaced.to(torch.float64).to("cpu")(torch.randn(HEAD_INPUT, dtype=torch.float64))[1]
    assert out.dtype == torch.float64
    assert (ops.gather, ops.attention) == (1, 1)


def test_conversion_to_synchronised_batch_norm() -> None:
    plain, replaced = (m.eval() for m in replaced_head())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(replaced)
    assert {type(m) for m in converted.modules()} >= {nn.SyncBatchNorm}
    feats = torch.randn(HEAD_INPUT)
    with CountOps() as ops:
        torch.testing.assert_close(converted(feats), plain(feats))
    assert (ops.gather, ops.attention) == (1, 1)
    assert restore_ocr_modules(converted) == SWAPPED_NAMES


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("training", [True, False])
def test_compiling_needs_no_graph_break(training: bool, backend: str | None) -> None:
    """The ops are in the program if somebody names a backend; for a CPU else what Inductor makes of the formula."""
    plain, replaced = (m.train(training) for m in replaced_head(dropout=0.0))
    feats = torch.randn(HEAD_INPUT)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    expected = plain(feats)
    with use_backend(backend):
        torch.testing.assert_close(torch.compile(replaced, fullgraph=True, backend=keep)(feats), expected)
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert called.count("ocr_kernels.spatial_gather.default") == (backend is not None)
    assert called.count("ocr_kernels.pixel_region_attention.default") == (backend is not None)
    torch._dynamo.reset()
    compiled = torch.compile(replaced, fullgraph=True, backend="aot_eager")
    expected_results = {f"_orig_mod.{k}" if "." in k else k: v for k, v in results(plain, feats).items()}
    with use_backend(backend):
        assert_same(results(compiled, feats), expected_results, 2e-4)


def test_tracing_records_plain_operations() -> None:
    _, replaced = replaced_head()
    replaced.eval()
    feats = torch.randn(HEAD_INPUT)
    traced = torch.jit.trace(replaced, feats)
    assert "ocr_kernels::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(feats), replaced(feats))
    exported = torch.export.export(replaced, (feats,), strict=True)
    assert not [node for node in exported.graph.nodes if "ocr_kernels" in str(node.target)]


def test_forward_mode_derivatives_and_vmap_work() -> None:
    plain, replaced = (m.double().eval() for m in replaced_head())
    feats = torch.randn(HEAD_INPUT, dtype=torch.float64)
    tangent = torch.randn_like(feats)

    def derivative(model: nn.Module) -> Tensor:
        return torch.func.jvp(lambda x: model(x)[1], (feats,), (tangent,))[1]

    torch.testing.assert_close(derivative(replaced), derivative(plain))
    many = torch.randn(3, *HEAD_INPUT, dtype=torch.float64)
    with CountOps() as ops:
        found = torch.vmap(replaced)(many)
    assert (ops.gather, ops.attention) == (1, 1)
    torch.testing.assert_close(found, torch.vmap(plain)(many))
