"""What cannot be seen is not assumed: code, modules and libraries around a computation that would be fooled by one."""

from __future__ import annotations

import copy
import functools
import gc
import importlib.util
import io
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from module_results import CountOps
from torch import Tensor, nn

from ocr_kernels import reference, replace_ocr_modules, restore_ocr_modules, use_backend
from ocr_kernels.models.errors import distance, errors, relative_error

SHAPES = (2, 5, 3, 6), (2, 5, 4), (2, 6, 4)


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in SHAPES)
    return query, key, value


def of(forward: Callable[..., Any], **members: Any) -> nn.Module:
    """A module with this forward, and children or attributes."""
    module = type(forward.__name__, (nn.Module,), {"forward": forward})()
    for name, member in members.items():
        setattr(module, name, member)
    return module


def check(module: nn.Module, attentions: int, *, arguments: tuple[Any, ...] | None = None, gathers: int = 0) -> Any:
    """Assert that a replaced copy gives what `module` does, with this many ops; its report."""
    arguments = inputs() if arguments is None else arguments
    replaced = copy.deepcopy(module)
    report = replace_ocr_modules(replaced, example_inputs=arguments)
    expected = module(*arguments)
    replace_ocr_modules(replaced)
    with CountOps() as ops:
        found = replaced(*arguments)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert (ops.gather, ops.attention) == (gathers, attentions), report
    return report


def rows(query: Tensor) -> Tensor:
    return query.flatten(2).mT


# Helpers between the product and the softmax


def temper(scores, factor):
    return scores * factor if torch.is_tensor(scores) else scores


def temper_instance(scores, factor):
    return scores * factor if isinstance(scores, torch.Tensor) else scores


def temper_type(scores, factor):
    return scores * factor if type(scores) is Tensor else scores


def typed(function: Callable[..., Any]) -> Callable[..., Any]:
    """As beartype and jaxtyping do: arguments of another type are refused."""

    @functools.wraps(function)
    def checked(scores: Any, factor: Any) -> Any:
        if not isinstance(scores, Tensor):
            raise TypeError(f"scores must be a Tensor, but is a {type(scores).__name__}")
        return function(scores, factor)

    return checked


@typed
def temper_typed(scores, factor):
    return scores * factor


def product(scores, factor: float):
    return scores * factor


temper_scripted = torch.jit.script(product)
temper_compiled = torch.compile(product, backend="eager")
temper_mapped = torch.vmap(product, in_dims=(0, None))


class TemperModule(nn.Module):
    def forward(self, scores, factor):
        return scores.mul(factor) if torch.is_tensor(scores) else scores


HELPERS = [
    *(temper, temper_instance, temper_type, temper_typed, temper_scripted, temper_compiled, temper_mapped),
    *(TemperModule(), functools.partial(temper, factor=3.0), lambda scores, factor: temper(scores, factor)),
]


def attention_with_a_helper(self, query, key, value):
    scores = torch.matmul(rows(query), key)
    scores = self.helper(scores) if isinstance(self.helper, functools.partial) else self.helper(scores, 3.0)
    return torch.matmul(F.softmax(scores, dim=-1), value.mT)


@pytest.mark.parametrize("helper", range(len(HELPERS)))
def test_a_helper_is_given_a_tensor(helper: int) -> None:
    module = of(attention_with_a_helper, helper=HELPERS[helper])
    replaced = of(attention_with_a_helper, helper=HELPERS[helper])
    replace_ocr_modules(replaced)
    torch.testing.assert_close(replaced(*inputs()), module(*inputs()), rtol=1e-12, atol=1e-12)


def attention_asking(self, query, key, value):
    scores = torch.matmul(rows(query), key)
    if isinstance(scores, Tensor) and torch.is_tensor(scores) and type(scores) is Tensor:
        scores = scores * 3
    return torch.matmul(F.softmax(scores, dim=-1), value.mT)


def attention_matching(self, query, key, value):
    scores = torch.matmul(rows(query), key)
    match scores:
        case Tensor():
            scores = scores * 3
    return torch.matmul(F.softmax(scores, dim=-1), value.mT)


def attention_trying(self, query, key, value):
    scores = torch.matmul(rows(query), key)
    try:
        scores = temper_typed(scores, 3.0)
    except TypeError:
        scores = -scores
    return torch.matmul(F.softmax(scores, dim=-1), value.mT)


def attention_in_a_closure(self, query, key, value):
    scores = torch.matmul(rows(query), key)

    def tempered():
        return temper(scores, 3.0)

    return torch.matmul(F.softmax(tempered(), dim=-1), value.mT)


def attention_in_a_lambda(self, query, key, value):
    scores = torch.matmul(rows(query), key)
    return (lambda: torch.matmul(F.softmax(temper_instance(scores, 3.0), dim=-1), value.mT))()


def attention_generating(self, query, key, value):
    scores = torch.matmul(rows(query), key)
    largest = max(float(row.max()) for row in scores)
    return torch.matmul(F.softmax(scores / largest, dim=-1), value.mT)


@pytest.mark.parametrize(
    "forward",
    [
        attention_asking,
        attention_matching,
        attention_trying,
        attention_in_a_closure,
        attention_in_a_lambda,
        attention_generating,
    ],
)
def test_questions_get_the_answers_of_a_tensor(forward: Callable[..., Any]) -> None:
    check(of(forward), 0)


def attention_leaving_a_mode(self, query, key, value):
    for _ in range(2):
        with torch.no_grad():
            scores = torch.matmul(rows(query), key)
            break
    return torch.matmul(F.softmax(scores, dim=-1), value.mT)


def attention_under_a_mode(self, query, key, value):
    with torch.no_grad():
        scores = torch.matmul(rows(query), key)
        weights = F.softmax(scores, dim=-1)
        context = torch.matmul(weights, value.mT)
    return context * query.sum()


def attention_setting_a_mode(self, query, key, value):
    scores = torch.matmul(rows(query), key)
    torch.set_grad_enabled(False)
    weights = F.softmax(scores, dim=-1)
    torch.set_grad_enabled(True)
    return torch.matmul(weights, value.mT)


@pytest.mark.parametrize(
    ("forward", "attentions"),
    [(attention_leaving_a_mode, 0), (attention_under_a_mode, 1), (attention_setting_a_mode, 0)],
)
def test_modes_are_those_of_the_code(forward: Callable[..., Any], attentions: int) -> None:
    module = of(forward)
    replaced = copy.deepcopy(module)
    replace_ocr_modules(replaced)
    arguments = [t.requires_grad_() for t in inputs()]
    with CountOps() as ops:
        found = replaced(*arguments)
    assert ops.attention == attentions
    expected = module(*arguments)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(expected.sum(), arguments, allow_unused=True, materialize_grads=True)
    gradients = torch.autograd.grad(found.sum(), arguments, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(gradients, wanted, rtol=1e-10, atol=1e-10)


class Above:
    @staticmethod
    def double(scores):
        return 2 * scores

    @classmethod
    def half(cls, scores):
        return 0.5 * scores

    def expand(self, scores):
        try:  # so that it has no copy
            return scores * 3 if isinstance(scores, Tensor) else scores
        except ZeroDivisionError:
            return scores


class Static(Above, nn.Module):
    def forward(self, query, key, value):
        scores = super().half(super().double(torch.matmul(rows(query), key)))
        return torch.matmul(F.softmax(self.expand(scores), dim=-1), value.mT)


class Doubled(nn.Softmax):
    def __call__(self, scores):
        return 2 * super().__call__(scores)


def attention_of_a_called_child(self, query, key, value):
    return torch.matmul(self.weigh(torch.matmul(rows(query), key)), value.mT)


def attention_filling_containers(self, query, key, value):
    kept, levels, level = [], [], {}
    context = torch.matmul(F.softmax(torch.matmul(rows(query), key), dim=-1), value.mT)
    keep(kept, context)
    levels.append(level)
    level["context"] = context
    return kept[0], levels[0]["context"], len(level.values())


def keep(kept, value):
    kept.append(value)


def attention_with_defaults(self, query, key, value):
    scores = torch.matmul(rows(query), key)
    tempered = lambda x=scores: temper(x, 3.0)  # noqa: E731 (what is tried here)
    return torch.matmul(F.softmax(tempered(), dim=-1), value.mT)


def attention_asking_its_class(self, query, key, value):
    scores = torch.matmul(rows(query), key)
    scores.scale = 3.0
    scores = scores * scores.scale if scores.__class__ is Tensor else scores
    return torch.matmul(F.softmax(scores, dim=-1), value.mT)


def attention_of_aliases(self, query, key, value):
    context = torch.matmul(F.softmax(torch.matmul(rows(query), key), dim=-1), value.mT)
    turned = context.permute(0, 2, 1)
    turned.mul_(2)
    return context


def attention_in_comprehensions(self, query, key, value):
    with torch.no_grad():
        weights = F.softmax(torch.matmul(rows(query), key), dim=-1)
        turned = weights.transpose(1, 2)
        [t.mul_(2) for t in [weights]]
        return value @ turned


def attention_of_data(self, query, key, value):
    query = query.clone()
    scores = torch.matmul(rows(query), key)
    query.data = 2 * query.data
    return torch.matmul(F.softmax(scores, dim=-1), value.mT) + rows(query).sum()


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    "module",
    [
        Static(),
        of(attention_of_a_called_child, weigh=Doubled(dim=-1)),
        of(attention_filling_containers),
        of(attention_with_defaults),
        of(attention_asking_its_class),
        of(attention_of_aliases),
        of(attention_in_comprehensions),
        of(attention_of_data),
    ],
    ids=lambda module: type(module).__name__,
)
def test_traps(module: nn.Module, compiled: bool) -> None:
    replaced = copy.deepcopy(module)
    expected = module(*inputs())
    replace_ocr_modules(replaced)
    if compiled:
        torch._dynamo.reset()
        replaced = torch.compile(replaced, backend="aot_eager")
    with use_backend("reference"):
        torch.testing.assert_close(replaced(*inputs()), expected, rtol=1e-12, atol=1e-12)


# Source files


SOURCE = """
import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def forward(self, query, key, value):
        scores = torch.matmul(query.flatten(2).transpose(1, 2), key) * 16**-0.5
        return torch.matmul(F.softmax(scores, dim=-1), value.transpose(1, 2))
"""


def imported(path: Path, source: str = SOURCE) -> Any:
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("imported", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "edit", [("16**-0.5", "64**-0.5"), ("dim=-1", "dim=-2"), ("F.softmax", "F.relu"), (SOURCE, "")]
)
def test_a_file_edited_after_its_import_is_not_executed(tmp_path: Path, edit: tuple[str, str]) -> None:
    path = tmp_path / "edited.py"
    module = imported(path).Attention()
    path.write_text(SOURCE.replace(*edit))
    os.utime(path, (1, 1))
    expected = module(*inputs())
    report = replace_ocr_modules(module)
    assert not report
    assert "its source" in report.left_alone[0].reason
    torch.testing.assert_close(module(*inputs()), expected, rtol=0, atol=0)


def test_what_is_imported_is_followed(tmp_path: Path) -> None:
    check(imported(tmp_path / "imported.py").Attention(), 1)


def test_a_method_replaced_after_the_replacement_is_the_one_that_runs() -> None:
    class Head(nn.Module):
        def forward(self, query, key, value):
            return self.attend(query, key, value)

        def attend(self, query, key, value):
            return torch.matmul(F.softmax(torch.matmul(rows(query), key), dim=-1), value.mT)

    module = Head()
    assert replace_ocr_modules(module)
    Head.attend = lambda self, query, key, value: query + 1  # type: ignore[assignment, method-assign]
    assert torch.equal(module(*inputs()), inputs()[0] + 1)
    Head.forward = lambda self, query, key, value: query + 2  # type: ignore[assignment, method-assign]
    assert torch.equal(module(*inputs()), inputs()[0] + 2)


# Questions about the class


SCALES: dict[type, float] = {}


class Registered(nn.Module):
    """A base class that knows its subclasses, and wants something of each."""

    known: dict[str, type] = {}  # noqa: RUF012 (a registry)

    def __init_subclass__(cls, *, key: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if key in Registered.known:
            raise KeyError(key)
        Registered.known[key] = cls


class Plain(Registered, key="plain"):
    def forward(self, query, key, value):
        scores = torch.matmul(rows(query), key) * SCALES.get(type(self), 1.0)
        return torch.matmul(F.softmax(scores, dim=-1), value.mT)


class Derived(Plain, key="derived"):
    def forward(self, query, key, value):
        return super(self.__class__, self).forward(query, key, value)


SCALES.update({Plain: 3.0, Derived: 2.0})


@pytest.mark.parametrize("kind", [Plain, Derived])
def test_the_class_is_what_it_was(kind: type[nn.Module]) -> None:
    known, below = dict(Registered.known), kind.__subclasses__()
    module = kind()
    check(module, 1)
    replace_ocr_modules(module)
    assert type(module) is kind
    assert Registered.known == known
    assert kind.__subclasses__() == below


def test_another_library_may_change_the_class_after_the_replacement() -> None:
    module = Plain()
    expected = module(*inputs())
    replace_ocr_modules(module)
    module.__class__ = type.__new__(type, "Sharded", (nn.Module,), {"forward": Plain.forward})
    torch.testing.assert_close(module(*inputs()), Plain.forward(module, *inputs()))
    assert restore_ocr_modules(module) == [""]
    assert restore_ocr_modules(module) == []
    module.__class__ = Plain
    with CountOps() as ops:
        torch.testing.assert_close(module(*inputs()), expected, rtol=0, atol=0)
    assert ops.attention == 0
    assert replace_ocr_modules(module)


def test_another_library_may_wrap_the_forward_after_the_replacement() -> None:
    module = Plain()
    expected = module(*inputs())
    replace_ocr_modules(module)
    module._old_forward = module.forward
    module.forward = lambda *args: module._old_forward(*args) + 1
    (row,) = replace_ocr_modules(module).left_alone
    assert row.reason.startswith("it was replaced before")
    assert restore_ocr_modules(module) == [""]
    with CountOps() as ops:
        torch.testing.assert_close(module(*inputs()), expected + 1, rtol=0, atol=0)
    assert ops.attention == 0


def test_classes_made_in_a_loop_are_collected() -> None:
    def make() -> weakref.ref[type]:
        class Made(nn.Module):
            def forward(self, query, key, value):
                return torch.matmul(F.softmax(torch.matmul(rows(query), key), dim=-1), value.mT)

        module = Made()
        assert replace_ocr_modules(module, example_inputs=inputs())
        module(*inputs())
        return weakref.ref(Made)

    made = [make() for _ in range(3)]
    gc.collect()
    assert [reference() for reference in made] == [None] * 3


def test_nothing_is_kept_until_it_is_collected() -> None:
    module = Plain()
    replace_ocr_modules(module)
    query, key, value = inputs()
    gc.collect()
    gc.disable()
    try:
        watched = weakref.ref(query)
        module(query, key, value)
        del query
        assert watched() is None
    finally:
        gc.enable()


# Compilers


def test_scripting_says_what_to_do() -> None:
    module = reference.OCRHead(12, 4, 8, 6)
    replace_ocr_modules(module)
    with pytest.raises(RuntimeError, match=r"restore_ocr_modules\(model\) first"):
        torch.jit.script(module)
    restore_ocr_modules(module)
    assert "forward" not in vars(module.ocr_gather_head)


@pytest.mark.parametrize("inner", [True, False])
def test_the_dry_run_of_a_compiled_model(inner: bool) -> None:
    model = reference.OCRHead(12, 4, 8, 6).eval()
    feats = torch.randn(2, 12, 5, 4)
    expected = model(feats)
    if inner:
        model.ocr_distri_head.object_context_block.compile(backend="eager")
    compiled = torch.compile(model, backend="eager")
    compiled(feats)
    report = replace_ocr_modules(compiled, example_inputs=feats, blocks=False)
    assert [row.computations for row in report.replaced] == [("gather",), ("attention",)]
    torch.testing.assert_close(compiled(feats), expected)


def gather_of_unknown_sizes(self, feats, logits):
    b, k = torch.tensor(logits.shape[:2]).tolist()
    torch._check(b >= 0)
    torch._check(k >= 0)
    scores = logits.view(b, k, -1)
    return torch.matmul(F.softmax(scores, dim=2), feats.flatten(2).mT)


def test_sizes_that_a_compiler_does_not_know() -> None:
    module = of(gather_of_unknown_sizes)
    arguments = torch.randn(2, 6, 3, 5), torch.randn(2, 4, 3, 5)
    expected = torch.compile(module, fullgraph=True, backend="eager")(*arguments)
    replace_ocr_modules(module)
    torch._dynamo.reset()
    with use_backend("reference"):
        torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="eager")(*arguments), expected)
    with CountOps() as ops:
        module(*arguments)
    assert ops.gather == 1


def attention_with_an_activation_between(self, query, key, value):
    scores = torch.bmm(rows(query), key)
    value = self.activate(value)
    return torch.bmm(self.softmax(scores), value.mT)


def attention_that_modifies_between(self, query, key, value):
    query, key = rows(query).clone(), key.clone()
    scores = torch.bmm(query, key)
    self.activate(query if self.which == "query" else key[:, :, 1:])
    return torch.bmm(self.softmax(scores), value.mT) + query.sum() + key.sum()


@pytest.mark.parametrize("compiled", [True, False])
def test_an_activation_in_place_between_product_and_softmax(compiled: bool) -> None:
    parts = {"softmax": nn.Softmax(dim=-1), "activate": nn.ReLU(inplace=True)}
    module = of(attention_with_an_activation_between, **parts)
    check(module, 1)
    if compiled:
        expected = module(*inputs())
        replace_ocr_modules(module)
        targets: list[str] = []

        def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
            targets.extend(str(node.target) for node in graph.graph.nodes)
            return graph

        torch._dynamo.reset()
        with use_backend("reference"):
            torch.testing.assert_close(torch.compile(module, fullgraph=True, backend=keep)(*inputs()), expected)
        assert targets.count("ocr_kernels.pixel_region_attention.default") == 1


@pytest.mark.parametrize("which", ["query", "key"])
@pytest.mark.parametrize("compiled", [True, False])
def test_operands_modified_in_place_between(compiled: bool, which: str) -> None:
    parts = {"softmax": nn.Softmax(dim=-1), "activate": nn.ReLU(inplace=True), "which": which}
    module = of(attention_that_modifies_between, **parts)
    expected = module(*inputs())
    replace_ocr_modules(module)
    torch._dynamo.reset()
    found = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
    with use_backend("reference"):
        torch.testing.assert_close(found(*inputs()), expected, rtol=1e-12, atol=1e-12)


class Halving(nn.Conv1d):
    def forward(self, x):
        return super().forward(x.mul_(0.5))


def attention_beside_a_child(self, query, key, value):
    scores = rows(query) @ key
    seen = self.child(key)
    return torch.matmul(scores.softmax(dim=-1), value.mT) + seen.sum()


def test_a_child_whose_class_may_do_more_than_its_base() -> None:
    module = of(attention_beside_a_child, child=Halving(5, 6, 1).double())
    expected = module(*inputs())
    replace_ocr_modules(module)
    torch.testing.assert_close(module(*inputs()), expected, rtol=1e-12, atol=1e-12)


def test_a_script_is_a_row() -> None:
    model = nn.Sequential(torch.jit.script(reference.SpatialGather()), torch.jit.script(nn.Conv2d(3, 3, 1)))
    report = replace_ocr_modules(model)
    assert [(row.name, row.reason) for row in report.left_alone] == [
        ("0", "it is a script of torch.jit, whose code is not Python's")
    ]


# Other spellings of OCR's mathematics


class PixelSoftmax(nn.Module):
    def forward(self, logits):
        return F.softmax(logits.flatten(2), dim=2)


class ScoreSoftmax(nn.Module):
    def forward(self, query, key):
        return torch.softmax(query @ key * 0.5, dim=-1)


def gather_by_a_child(self, feats, logits):
    return torch.matmul(self.weigh(logits), feats.flatten(2).mT)


def attention_by_a_child(self, query, key, value):
    return torch.matmul(self.weigh(rows(query), key), value.mT)


def test_a_softmax_in_a_child_of_its_own_code() -> None:
    arguments = inputs()[0], torch.randn(2, 4, 3, 6, dtype=torch.float64)
    check(of(gather_by_a_child, weigh=PixelSoftmax()), 0, arguments=arguments, gathers=1)
    check(of(attention_by_a_child, weigh=ScoreSoftmax()), 1)


def test_a_hook_on_such_a_child_is_called_with_tensors() -> None:
    module = of(attention_by_a_child, weigh=ScoreSoftmax())
    module.weigh.register_forward_hook(lambda module, args, out: out.clamp(max=0.4))
    expected = module(*inputs())
    replace_ocr_modules(module)
    torch.testing.assert_close(module(*inputs()), expected)


def attention_of_pytorch(self, query, key, value):
    return F.scaled_dot_product_attention(rows(query), key.mT, value.mT, scale=0.7)


def attention_of_two_heads(self, query, key, value):
    q, k, v = (x.flatten(2).unflatten(1, (1, -1)).mT for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v)


def attention_by_baddbmm(self, query, key, value):
    scores = torch.baddbmm(query.new_zeros(1), rows(query), key, beta=0, alpha=0.3)
    return torch.bmm(scores.softmax(-1), value.mT)


def attention_squeezed(self, query, key, value):
    weights = F.softmax(torch.matmul(rows(query), key), dim=-1).squeeze()
    return torch.matmul(weights, value.mT)


@pytest.mark.parametrize(
    "forward", [attention_of_pytorch, attention_of_two_heads, attention_by_baddbmm, attention_squeezed]
)
def test_spellings_of_the_attention(forward: Callable[..., Any]) -> None:
    check(of(forward), 1)


def gather_by_einsum(self, feats, logits):
    weights = F.softmax(logits.flatten(2), dim=2).view(logits.shape)
    return torch.einsum("bkhw,bchw->bkc", weights, feats)


def gather_viewed(self, feats, logits):
    weights = F.softmax(logits.flatten(2), dim=2).view(logits.shape)
    return torch.matmul(weights, feats.mT[:, :4]).sum() + torch.einsum("bkhw,bkhw->bk", weights, logits).sum()


def test_spellings_of_the_gather() -> None:
    arguments = inputs()[0], torch.randn(2, 4, 3, 6, dtype=torch.float64)
    check(of(gather_by_einsum), 0, arguments=arguments, gathers=1)
    check(of(gather_viewed), 0, arguments=arguments)


def attention_by_sums(self, query, key, value):
    weights = F.softmax((rows(query).unsqueeze(3) * key.unsqueeze(1)).sum(2), dim=-1)
    return (weights.unsqueeze(2) * value.unsqueeze(1)).sum(-1)


def attention_scaled_by_a_parameter(self, query, key, value):
    scores = torch.bmm(rows(query), key) * self.temperature
    return torch.bmm(scores.softmax(-1), value.mT)


class Tagged(Tensor):
    pass


def attention_of_a_subclass(self, query, key, value):
    return torch.bmm(torch.bmm(rows(query), key).softmax(-1), value.mT.as_subclass(Tagged))


def attention_with_a_mask(self, query, key, value):
    return F.scaled_dot_product_attention(rows(query), key.mT, value.mT, key.new_ones(18, 4) > 0)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (attention_by_sums, "it sums what it multiplies by a softmax"),
        (attention_scaled_by_a_parameter, "the scores are multiplied by what is no number"),
        (attention_of_a_subclass, "is a Tagged, a subclass of Tensor"),
        (attention_with_a_mask, "the attention has a mask"),
        (attention_matching, "has a Match"),
        (attention_in_a_closure, "has a function that uses scores"),
    ],
)
def test_the_reason_is_the_true_one(forward: Callable[..., Any], reason: str) -> None:
    module = of(forward, temperature=nn.Parameter(torch.ones(1, dtype=torch.float64)))
    report = replace_ocr_modules(module, example_inputs=inputs())
    assert not report
    assert reason in report.left_alone[0].reason


def test_gates_beside_a_fused_attention_are_no_reason() -> None:
    def attention_with_a_gate(self, query, key, value):
        context = torch.bmm(torch.bmm(rows(query), key).softmax(-1), value.mT)
        return context * torch.sigmoid(context.mean(2, keepdim=True))

    assert check(of(attention_with_a_gate), 1).replaced[0].notes == ()


# Trials


def test_nan_against_a_number_is_an_error() -> None:
    nan, one = torch.tensor([torch.nan, 1.0]), torch.ones(2)
    assert distance(nan, one) == (torch.inf, 1.0)
    assert distance(one, nan) == (torch.inf, 1.0)
    assert distance(nan, nan) == (0.0, 1.0)
    assert relative_error(torch.tensor([torch.inf]), torch.tensor([-torch.inf])) == torch.inf
    assert distance(one, one[:1])[0] == torch.inf
    assert errors(nan, one, one.double).why_not() is not None


def test_small_outputs_have_bounds_of_their_own() -> None:
    large, small = 1e4 * torch.randn(1000), 1e-4 * torch.randn(1000)
    own = large * (1 + 1e-6 * torch.randn(1000)), small  # rounding
    exact = large.double(), small.double()
    assert errors(own, own, lambda: exact).why_not() is None
    assert errors((own[0], -small), own, lambda: exact).why_not() is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_off_is_found_in_every_dtype(dtype: torch.dtype) -> None:
    right = torch.linspace(-1, 1, 8, dtype=torch.float64)
    wrong = right.to(dtype) * 1.1
    assert errors(wrong, right.to(dtype), lambda: right).why_not() is not None
    assert errors(right.to(dtype), right.to(dtype), lambda: right).why_not() is None


def test_trials_in_several_threads() -> None:
    reports: list[Any] = []

    def work(seed: int) -> None:
        model = reference.OCRHead(12, 4, 8, 6, dropout=0.5)
        reports.append(replace_ocr_modules(model, example_inputs=torch.randn(2, 12, 5, 4), blocks=False))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [[row.computations for row in report.replaced] for report in reports] == [[("gather",), ("attention",)]] * 4


def draw_elsewhere_once(monkeypatch: pytest.MonkeyPatch, dropout: type[nn.Module]) -> list[Any]:
    """While a dropout runs in training for the first time, another thread draws numbers; the list is not empty then."""
    plain, drawn = dropout.forward, []

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        if self.training and not drawn:
            drawn.append(threading.Thread(target=torch.rand, args=(3,)))
            drawn[0].start()
            drawn[0].join()
        return plain(self, x)

    monkeypatch.setattr(dropout, "forward", forward)
    return drawn


def test_numbers_that_another_thread_draws_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def attention_and_dropout(self, query, key, value):
        return self.drop(torch.bmm(torch.bmm(rows(query), key).softmax(-1), value.mT))

    drawn = draw_elsewhere_once(monkeypatch, nn.Dropout)
    assert replace_ocr_modules(of(attention_and_dropout, drop=nn.Dropout(0.5)), example_inputs=inputs()).replaced
    assert drawn


def test_numbers_that_another_thread_draws_do_not_count_for_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = draw_elsewhere_once(monkeypatch, nn.Dropout2d)
    report = replace_ocr_modules(reference.OCRHead(12, 4, 8, 6, dropout=0.5))
    assert drawn
    assert ("block", "training") in [row.computations[:2] for row in report.replaced if row.computations], report


class Lazy(nn.Module):
    """Makes a child, a parameter, a buffer and an attribute at its first call, and remembers all results."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[Tensor] = []

    def forward(self, query, key, value):
        if not hasattr(self, "extra"):
            self.extra = nn.Linear(6, 6, dtype=torch.float64)
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
            self.register_buffer("calls", torch.zeros(()))
            self.seen = True
        context = torch.bmm(torch.bmm(rows(query), key).softmax(-1), value.mT)
        self.results.append(context)
        return self.extra(context) * self.scale


def test_a_dry_run_leaves_no_children_behind() -> None:
    module = Lazy()
    before = dict(vars(module))
    assert replace_ocr_modules(module, example_inputs=inputs())
    restore_ocr_modules(module)
    assert vars(module) == before
    assert not module._modules and not module._parameters and not module._buffers  # noqa: PT018 (one question)
    assert module.results == []


def attention_modifying_its_query(self, query, key, value):
    query *= 0.5
    return torch.matmul(F.softmax(torch.matmul(rows(query), key), dim=-1), value.mT)


def test_arguments_that_are_modified_and_buffers_of_other_kinds() -> None:
    module = of(attention_modifying_its_query)
    module.register_buffer("mask", torch.eye(3).to_sparse())
    module.register_buffer("absent", torch.empty(2, device="meta"))
    report = replace_ocr_modules(module, example_inputs=inputs())
    assert [row.computations for row in report.replaced] == [("attention",)]


def attention_counting(self, query, key, value):
    self.seen.mul_(2)
    self.calls.add_(1)
    return torch.matmul(F.softmax(torch.matmul(rows(query), key), dim=-1), value.mT)


def test_buffers_of_every_kind_are_put_back() -> None:
    module = of(attention_counting)
    module.register_buffer("seen", torch.eye(3).to_sparse())
    module.register_buffer("calls", torch.tensor([torch.nan, 0.0]))
    module.register_buffer("expanded", torch.full((1,), torch.nan).expand(3))
    assert replace_ocr_modules(module, example_inputs=inputs())
    assert torch.equal(module.seen.to_dense(), torch.eye(3))
    assert module.calls[1] == 0


def test_an_error_of_the_model_in_a_dry_run_is_a_row() -> None:
    model = nn.Sequential(reference.OCRHead(12, 4, 8, 6))
    model[0].conv3x3_ocr.register_forward_hook(lambda module, args, out: out.register_hook(print) and None)
    report = replace_ocr_modules(model, example_inputs=torch.randn(2, 12, 5, 4), blocks=False)
    assert not report
    assert all("cannot register a hook" in row.reason for row in report.left_alone)


def test_parameters_that_the_first_call_makes() -> None:
    model = nn.Sequential(nn.LazyConv2d(12, 1), reference.OCRHead(12, 4, 8, 6))
    feats = torch.randn(2, 5, 5, 4)
    report = replace_ocr_modules(model, example_inputs=feats, blocks=False)
    assert {row.reason for row in report.left_alone} == {
        "the dry run failed before it was called: the model has parameters that its first call makes; "
        "call it once before"
    }
    model(feats)
    assert len(replace_ocr_modules(model, example_inputs=feats).replaced) == 4


# Files and processes


def test_a_file_of_a_whole_model_names_this_library_until_it_is_restored() -> None:
    model = reference.SpatialGather()
    replace_ocr_modules(model)
    file = io.BytesIO()
    torch.save(model, file)
    assert b"ocr_kernels.models" in file.getvalue() or b"ocr_kernels" in file.getvalue()
    restore_ocr_modules(model)
    file = io.BytesIO()
    torch.save(model, file)
    assert b"ocr_kernels.models" not in file.getvalue()


def test_replicas_of_data_parallel_run_with_their_own_parameters() -> None:
    module = of(attention_by_a_child, weigh=ScoreSoftmax())
    replace_ocr_modules(module)
    replica = module._replicate_for_data_parallel()
    assert vars(replica)["forward"].module is replica
    with CountOps() as ops:
        torch.testing.assert_close(replica(*inputs()), module(*inputs()))
    assert ops.attention == 2
