"""Heads after what is in use: the report says what ran fused and why the rest did not, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from families import FAMILIES, FEATS, Family, Head, RegionRows
from module_results import CountOps, assert_same, results
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ocr_kernels import replace_ocr_modules, restore_ocr_modules, use_backend


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_family(family: Family) -> None:
    plain = family.make().double()
    inputs = tuple(torch.rand(shape, dtype=torch.float64) * 3 for shape in family.inputs)
    replaced, dry = copy.deepcopy(plain), copy.deepcopy(plain)
    replace_ocr_modules(replaced)
    report = replace_ocr_modules(dry, example_inputs=inputs)
    expected = results(plain, *inputs)
    for module in (replaced, dry):
        with CountOps() as ops:
            found = results(module, *inputs)
        assert (ops.gather, ops.attention + ops.block) == (family.gathers, family.attentions or ops.block)
        assert_same(found, expected, 1e-10)
        assert_same(dict(module.named_buffers()), dict(plain.named_buffers()), 1e-10)
        assert list(module.state_dict()) == list(plain.state_dict())
    fused = {computation for row in report.replaced for computation in row.computations}
    fused -= {"block", "training", "logits"}
    wanted = {name for name, runs in (("gather", family.gathers), ("attention", family.attentions)) if runs}
    assert fused == wanted or {row.reason for row in report.left_alone} >= {"it calls ocr_kernels itself"}
    assert family.reason in str(report)
    restore_ocr_modules(replaced)
    assert_same(results(replaced, *inputs), expected, 0)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@torch.no_grad()
def test_family_in_eval_mode(family: Family) -> None:
    module = family.make().eval()
    inputs = tuple(torch.rand(shape) * 3 for shape in family.inputs)
    with torch.random.fork_rng():
        expected = module(*(t.clone() for t in inputs))
    report = replace_ocr_modules(module, example_inputs=inputs)
    with CountOps() as ops:
        found = module(*(t.clone() for t in inputs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    attentions = family.attentions if family.eval_attentions is None else family.eval_attentions
    attentions *= family.attends_apart or not family.blocks
    heads = family.blocks * (not family.attends_apart)
    assert (ops.gather, ops.attention, ops.inference) == (family.gathers, attentions, heads)
    assert sum("block" in row.computations for row in report.replaced) == family.blocks
    assert family.why_no_block in str(report)


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[pytest.mark.wide] * ("step 4" in f.name), id=f.name) for f in FAMILIES],
)
def test_compiled_family(family: Family) -> None:
    plain, replaced = with_replaced_copy(family.make().double().eval())
    inputs = [torch.rand(shape, dtype=torch.float64) * 3 for shape in family.inputs]
    torch._dynamo.reset()
    whole = True
    try:
        torch.manual_seed(1)
        expected = torch.compile(plain, fullgraph=True, backend="eager")(*inputs)
    except torch._dynamo.exc.Unsupported:
        whole = False
        torch.manual_seed(1)
        expected = plain(*inputs)
    torch.manual_seed(1)
    with use_backend("reference"):
        found = torch.compile(replaced, fullgraph=whole, backend="eager")(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


# What is done to a model after the replacement


def with_replaced_copy(head: nn.Module) -> tuple[nn.Module, nn.Module]:
    replaced = copy.deepcopy(head)
    replace_ocr_modules(replaced)
    return head, replaced


def train(head: nn.Module, change: Callable[[nn.Module], object] | None = None) -> dict[str, Tensor]:
    """The parameters after a few steps, with `change` made to the head after the first."""
    feats = torch.rand(FEATS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    decayed = [p for p in head.parameters() if not hasattr(p, "no_decay")]
    plain = [p for p in head.parameters() if hasattr(p, "no_decay")]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}])
    for step in range(4):
        if step == 1 and change is not None:
            change(head)
        optimizer.zero_grad()
        sum(out.square().sum() for out in head(feats)).backward()
        optimizer.step()
    return dict(head.named_parameters())


def test_what_hangs_on_parameters_stays() -> None:
    head = Head().double()
    calls: list[str] = []
    for name, parameter in head.named_parameters():
        parameter.no_decay = name.endswith("bias")
        parameter.register_post_accumulate_grad_hook(lambda parameter, name=name: calls.append(name))
    before = dict(head.named_parameters())
    replace_ocr_modules(head)
    assert all(parameter is before[name] for name, parameter in head.named_parameters())
    assert all(parameter.no_decay == name.endswith("bias") for name, parameter in head.named_parameters())
    sum(out.sum() for out in head(torch.rand(FEATS, dtype=torch.float64))).backward()
    assert sorted(calls) == sorted(before)


def test_an_optimizer_made_before_the_replacement_goes_on() -> None:
    head = Head().double()
    for name, parameter in head.named_parameters():
        if name.endswith("bias"):
            parameter.no_decay = True
    twin = copy.deepcopy(head)
    for parameter, other in zip(twin.parameters(), head.parameters(), strict=True):
        vars(parameter).update(vars(other))
    with CountOps() as ops:
        found = train(twin, replace_ocr_modules)
    assert (ops.gather, ops.attention) == (3, 3)
    assert_same(found, train(head), 1e-9)


def test_initialisers_find_what_they_look_for() -> None:
    def initialise(module: nn.Module) -> None:
        if isinstance(module, Head):
            nn.init.constant_(module.up.weight, 0.01)
        if type(module).__name__ == "RegionRows":
            nn.init.normal_(module.value.weight)
        if isinstance(module, nn.Conv2d) and "Conv2d" in module._get_name():
            nn.init.normal_(module.bias)

    plain, replaced = with_replaced_copy(RegionRows())
    for head in (plain, replaced):
        torch.manual_seed(1)
        head.apply(initialise)
        head.classify.weight = nn.Parameter(torch.ones_like(head.classify.weight))
        head.key = nn.Linear(*head.key[0].weight.shape[::-1])
        head.load_state_dict({name: t + 1 for name, t in head.state_dict().items()})
    assert_same(replaced.state_dict(), plain.state_dict(), 0)
    feats = torch.rand(FEATS)
    torch.testing.assert_close(replaced.eval()(feats), plain.eval()(feats))


def checkpointed(head: nn.Module, feats: Tensor, *, use_reentrant: bool) -> list[Tensor]:
    """Gradients of a head that is run again in the backward pass."""
    feats = feats.clone().requires_grad_()
    sum(out.square().sum() for out in checkpoint(head, feats, use_reentrant=use_reentrant)).backward()
    return [feats.grad, *(p.grad for p in head.parameters())]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_around_a_head(use_reentrant: bool) -> None:
    plain, replaced = with_replaced_copy(Head().double().eval())
    feats = torch.rand(FEATS, dtype=torch.float64)
    with CountOps() as ops:
        found = checkpointed(replaced, feats, use_reentrant=use_reentrant)
    assert (ops.gather, ops.attention) == (2, 2)
    torch.testing.assert_close(found, checkpointed(plain, feats, use_reentrant=use_reentrant), rtol=1e-10, atol=1e-10)


def test_a_child_with_a_parametrization() -> None:
    head = Head().double().eval()
    nn.utils.parametrizations.weight_norm(head.key)
    plain, replaced = with_replaced_copy(head)
    assert list(replaced.state_dict()) == list(plain.state_dict())
    feats = torch.rand(FEATS, dtype=torch.float64)
    assert_same(results(replaced, feats), results(plain, feats), 1e-10)


def test_other_parameters_in_a_functional_call() -> None:
    plain, replaced = with_replaced_copy(Head().double().eval())
    feats = torch.rand(FEATS, dtype=torch.float64)
    other = {name: t + 0.1 for name, t in plain.state_dict().items() if t.is_floating_point()}
    found, expected = (torch.func.functional_call(head, other, (feats,)) for head in (replaced, plain))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
