"""What changes between two calls of a replaced block is seen, and what its checks must not miss."""

from __future__ import annotations

import copy
import gc
import random
import types
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from module_results import CountOps
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ocr_kernels import reference, replace_ocr_modules, restore_ocr_modules
from ocr_kernels.models.block_cache import MOST_PLANS

SCALE = 1.0
SCALES = [1.0]
settings = types.ModuleType("settings")


def temperature() -> float:
    return SCALE


class Temper(nn.Module):
    """What it has of its own is one list."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = [1.0]

    def forward(self) -> float:
        return self.factors[0]


class Attention(reference.ObjectAttentionBlock):
    shared = 1.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._private, self.listed, self.named = 1.0, [1.0], {"scale": 1.0}
        self.nested = {"scales": [[1.0], 2.0]}
        self.temper = Temper()

    def factor(self) -> Any:
        return self._private

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = (self.factor() * torch.matmul(query.flatten(2).mT, key)).softmax(-1)
        return torch.matmul(weights, value.mT).mT.reshape(query.shape)


class Listed(Attention):
    def factor(self) -> Any:
        return self.listed[0]


class Named(Attention):
    def factor(self) -> Any:
        return self.named["scale"]


class Shared(Attention):
    def factor(self) -> Any:
        return self.shared


class Nested(Attention):
    def factor(self) -> Any:
        return self.nested["scales"][0][0]


class OfChild(Attention):
    def factor(self) -> Any:
        return self.temper()


class Global(Attention):
    def factor(self) -> Any:
        return SCALE


class GlobalList(Attention):
    def factor(self) -> Any:
        return SCALES[0]


class Helper(Attention):
    def factor(self) -> Any:
        return temperature()


class OfModule(Attention):
    def factor(self) -> Any:
        return settings.scale


def set_scale(kind: type[Attention], module: nn.Module, value: float) -> None:
    """The one that the kind reads, and no other."""
    global SCALE
    attention: Any = module.object_context_block
    if kind is Attention:
        attention._private = value
    elif kind is Listed:
        attention.listed[0] = value
    elif kind is Named:
        attention.named["scale"] = value
    elif kind is Nested:
        attention.nested["scales"][0][0] = value
    elif kind is OfChild:
        attention.temper.factors[0] = value
    elif kind is GlobalList:
        SCALES[0] = value
    elif kind is Shared:
        kind.shared = value
    elif kind is OfModule:
        settings.scale = value
    else:
        SCALE = value


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    global SCALE
    Later.scales[0] = 1.0
    SCALE = SCALES[0] = settings.scale = Shared.shared = 1.0
    torch._dynamo.reset()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def pair(kind: type[nn.Module] = reference.SpatialOCR, *, train: bool = False, **options: Any) -> Any:
    """A module that is replaced by a block, and its twin that is not."""
    plain = kind(16, 8, 12, dropout=0.0, **options).train(train)
    module = copy.deepcopy(plain)
    (row, *_) = replace_ocr_modules(module).replaced
    assert "block" in row.computations
    return module, plain


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 16, 7, 6), torch.randn(2, 16, 5, 1)


def assert_same(module: Any, plain: Any, args: Any) -> None:
    torch.testing.assert_close(module(*args), plain(*args), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kind", [Attention, Listed, Named, Nested, OfChild, Shared, Global, GlobalList, Helper, OfModule]
)
@pytest.mark.parametrize("train", [True, False])
def test_attributes_and_globals(kind: type[Attention], train: bool) -> None:
    module, plain = pair(type("Block", (reference.SpatialOCR,), {"attention": kind}), train=train)
    args = inputs()
    with torch.set_grad_enabled(train):
        assert_same(module, plain, args)
        for each in (module, plain):
            set_scale(kind, each, 3.0)
        assert_same(module, plain, args)
        with CountOps() as ops:
            module(*args)
        assert ops.block + ops.inference == 1


@pytest.mark.parametrize("kind", [Attention, Listed, Named, Nested, OfChild, Shared])
@pytest.mark.parametrize("train", [True, False])
def test_attributes_in_a_compiled_program(kind: type[Attention], train: bool) -> None:
    module, plain = pair(type("Block", (reference.SpatialOCR,), {"attention": kind}), train=train)
    compiled, args = torch.compile(module, backend="eager", fullgraph=True), inputs()
    with torch.set_grad_enabled(train):
        assert_same(compiled, plain, args)
        for each in (module, plain):
            set_scale(kind, each, 3.0)
        assert_same(compiled, plain, args)


def test_back_to_what_it_was() -> None:
    """Inference and training plan by turns, each for what the other has not seen."""
    module, plain = pair(type("Block", (reference.SpatialOCR,), {"attention": Global}))
    args = inputs()
    for value, train in ((1.0, True), (3.0, False), (1.0, True), (5.0, True), (3.0, False), (3.0, True)):
        set_scale(Global, module, value)
        for each in (module, plain):
            each.conv_bn_dropout[0].weight.data += 0.01
        with torch.set_grad_enabled(train):
            assert_same(module, plain, args)


def test_settings_that_change_at_every_step_are_not_planned_at_every_step() -> None:
    module, plain = pair(type("Block", (reference.SpatialOCR,), {"attention": Attention}), train=True)
    args = inputs()
    planned = []
    for step in range(2 * MOST_PLANS):
        for each in (module, plain):
            set_scale(Attention, each, 1.0 + step / 10)
        assert_same(module, plain, args)
        with CountOps() as ops:
            module(*args)
        planned.append(ops.block)
    assert planned == [1] * (MOST_PLANS + 1) + [0] * (MOST_PLANS - 1)


@torch.no_grad()
def test_weights_changed_through_data() -> None:
    """As those of a mean teacher are, which never sees a gradient."""
    module, plain = pair()
    args = inputs()
    assert_same(module, plain, args)
    for each in (module, plain):
        torch.manual_seed(1)
        for parameter in each.parameters():
            parameter.data.mul_(0.5).add_(torch.randn_like(parameter), alpha=0.1)
    assert_same(module, plain, args)


class Gained(reference.SpatialOCR):
    def forward(self, feats: Tensor, proxy_feats: Tensor, gain: float | None = None) -> Tensor:
        z = super().forward(feats, proxy_feats)
        return z if gain is None else z * gain


@pytest.mark.parametrize("way", ["compiled", "a third argument"])
def test_weights_changed_by_a_fused_optimizer(way: str) -> None:
    """In calls that are no block's, before one that is."""
    module, plain = pair(Gained)
    args = inputs()
    with torch.no_grad():
        module(*args)
    call: Any = torch.compile(module, backend="eager") if way == "compiled" else lambda *a: module(*a, 2.0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)
    call(*args).square().sum().backward()
    optimizer.step()
    plain.load_state_dict(module.state_dict())
    with torch.no_grad():
        assert_same(module, plain, args)


def test_weights_changed_after_a_transform() -> None:
    module, plain = pair()
    args = inputs()
    with torch.no_grad():
        module(*args)
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def loss(given: dict[str, Tensor]) -> Tensor:
        result: Tensor = torch.func.functional_call(module, given, args).square().sum()
        return result

    gradients = torch.func.grad(loss)(parameters)
    for name, parameter in module.named_parameters():
        parameter.data -= 1e-3 * gradients[name]
    plain.load_state_dict(module.state_dict())
    with torch.no_grad():
        assert_same(module, plain, args)


class OtherInEval(reference.SpatialOCR):
    def forward(self, feats: Tensor, proxy_feats: Tensor) -> Tensor:
        return super().forward(feats, proxy_feats if self.training else 2 * proxy_feats)


class DetachedInEval(reference.SpatialOCR):
    def forward(self, feats: Tensor, proxy_feats: Tensor) -> Tensor:
        return super().forward(feats if self.training else feats.detach(), proxy_feats)


class FrozenWeight(reference.SpatialOCR):
    def forward(self, feats: Tensor, proxy_feats: Tensor) -> Tensor:
        context = self.object_context_block(feats, proxy_feats)
        weight = self.conv_bn_dropout[0].weight.detach()
        return self.conv_bn_dropout[1](F.conv2d(torch.cat([context, feats], 1), weight))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [OtherInEval, DetachedInEval, FrozenWeight])
@pytest.mark.parametrize("train", [True, False])
def test_gradients_in_either_mode(kind: type[nn.Module], train: bool) -> None:
    module, plain = pair(kind, train=train)
    feats, regions = inputs()
    found = []
    for each in (module, plain):
        x = feats.clone().requires_grad_()
        z = each(x, regions)
        gradients = torch.autograd.grad(z.square().sum(), [x, *each.parameters()], allow_unused=True)
        found.append([z, *gradients])
    assert [each is None for each in found[0]] == [each is None for each in found[1]]
    for a, b in zip(*found, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


HISTORY: list[float] = []


class Beside(reference.SpatialOCR):
    """In training alone it does something beside its result."""

    history: ClassVar[list[float]] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.memory = nn.Parameter(torch.zeros(12), requires_grad=False)
        self._kept: dict[str, list[float]] = {"z": []}

    def forward(self, feats: Tensor, proxy_feats: Tensor) -> Tensor:
        z = super().forward(feats, proxy_feats)
        return self.beside(z) if self.training else z

    def beside(self, z: Tensor) -> Tensor:
        return z


class SetsAnAttribute(Beside):
    def beside(self, z: Tensor) -> Tensor:
        self.last = z.detach()
        return z


class AddsToAList(Beside):
    def beside(self, z: Tensor) -> Tensor:
        self._kept["z"].append(float(z.detach().sum()))
        return z


class AddsToItsClass(Beside):
    def beside(self, z: Tensor) -> Tensor:
        self.history.append(float(z.detach().sum()))
        return z


class AddsToAGlobal(Beside):
    def beside(self, z: Tensor) -> Tensor:
        HISTORY.append(float(z.detach().sum()))
        return z


class Meter:
    def __init__(self) -> None:
        self.seen: list[float] = []
        self.count = 0

    def update(self, z: Tensor) -> None:
        self.seen.append(float(z.detach().sum()))
        self.count += 1

    __call__ = update


METER = Meter()


class ToldToAGlobal(Beside):
    def beside(self, z: Tensor) -> Tensor:
        METER.update(z)
        return z


class ToldByAMethod(Beside):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.log = Meter().update

    def beside(self, z: Tensor) -> Tensor:
        self.log(z)
        return z


class ToldToAnObject(Beside):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.meter = Meter()

    def beside(self, z: Tensor) -> Tensor:
        self.meter(z)
        return z


class CountsInItsClass(Beside):
    calls = 0

    def beside(self, z: Tensor) -> Tensor:
        type(self).calls += 1
        return z


class SetsABuffer(Beside):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("mean", torch.zeros(12))

    def beside(self, z: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * z.detach().mean((0, 2, 3))
        return z


class Averages(Beside):
    def beside(self, z: Tensor) -> Tensor:
        self.memory.data.mul_(0.9).add_(0.1 * z.detach().mean((0, 2, 3)))
        return z


class Draws(Beside):
    """What it does by what it draws is seen once in a hundred calls."""

    def beside(self, z: Tensor) -> Tensor:
        return z * 0 if torch.rand(()) < 0.01 else z


class DrawsByPython(Beside):
    def beside(self, z: Tensor) -> Tensor:
        return z * 0 if random.random() < 0.01 else z


TOLD = [ToldToAGlobal, ToldByAMethod, ToldToAnObject, CountsInItsClass, SetsABuffer]


@pytest.mark.parametrize(
    "kind", [SetsAnAttribute, AddsToAList, AddsToItsClass, AddsToAGlobal, Averages, Draws, DrawsByPython, *TOLD]
)
def test_what_training_does_beside_its_result(kind: type[nn.Module]) -> None:
    state = random.getstate()
    module = kind(16, 8, 12, dropout=0.0)
    (row, *_) = replace_ocr_modules(module).replaced
    assert row.computations is not None
    assert "block" in row.computations
    assert "training" not in row.computations
    assert "no block in training: in training it " in " ".join(row.notes)
    assert random.getstate() == state
    for train in (True, False):
        with CountOps() as ops:
            module.train(train)(*inputs())
        assert ops.block == 0


@pytest.mark.parametrize("kind", TOLD)
def test_what_inference_does_beside_its_result(kind: type[Beside]) -> None:
    def forward(self: Any, feats: Tensor, proxy_feats: Tensor) -> Tensor:
        return self.beside(reference.SpatialOCR.forward(self, feats, proxy_feats))

    module = type("Always", (kind,), {"forward": forward})(16, 8, 12, dropout=0.0).eval()
    before = METER.count, CountsInItsClass.calls
    (row, *_) = replace_ocr_modules(module, example_inputs=inputs()).replaced
    assert "block" not in row.computations
    assert before == (METER.count, CountsInItsClass.calls)  # replacing leaves nothing behind
    module(*inputs())
    if kind is ToldToAGlobal:
        assert METER.count == before[0] + 1
    elif kind is ToldByAMethod:
        assert module.log.__self__.count == 1
    elif kind is ToldToAnObject:
        assert module.meter.count == 1
    elif kind is CountsInItsClass:
        assert type(module).calls == before[1] + 1
    else:
        assert module.mean.any()


class Later(reference.SpatialOCR):
    """Its code reads what may come later, or stands in other places than a forward."""

    scales: ClassVar[list[float]] = [1.0]

    def gain(self) -> float:
        return getattr(self, "later", 1.0)

    @property
    def temperature(self) -> float:
        return SCALE

    def forward(self, feats: Tensor, proxy_feats: Tensor) -> Tensor:
        factor = self.gain() * self.temperature * self.scales[0] * helper()
        return super().forward(feats, factor * proxy_feats)


def helper() -> float:
    return 1.0


@pytest.mark.parametrize("what", ["attribute", "method", "property", "class", "function"])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("copied", [False, True])
def test_what_comes_later(what: str, train: bool, copied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module, plain = pair(Later, train=train)
    with torch.set_grad_enabled(train):
        assert_same(module, plain, inputs())
        if what == "attribute":
            module.later = plain.later = 3.0
        elif what == "method":
            module.gain = plain.gain = lambda: 3.0
        elif what == "property":
            monkeypatch.setitem(globals(), "SCALE", 3.0)
        elif what == "class":
            Later.scales[0] = 3.0
        else:
            monkeypatch.setitem(globals(), "helper", lambda: 3.0)
        assert_same(copy.deepcopy(module) if copied else module, plain, inputs())


class Above(reference.SpatialOCR):
    """What it reads belongs to another module."""

    def forward(self, feats: Tensor, proxy_feats: Tensor) -> Tensor:
        return super().forward(feats, self.above().factor * proxy_feats)


class Shares(reference.SpatialOCR):
    def forward(self, feats: Tensor, proxy_feats: Tensor) -> Tensor:
        return self.shared(super().forward(feats, proxy_feats))


def test_what_belongs_to_another_module_is_not_assumed() -> None:
    owner = nn.Module()
    owner.factor, owner.drop = 1.0, nn.Dropout2d(0.5)
    above, shares = Above(16, 8, 12, dropout=0.0).eval(), Shares(16, 8, 12, dropout=0.0).eval()
    above.above, vars(shares)["shared"] = weakref.ref(owner), owner.drop.eval()
    for module, name in ((above, "above"), (shares, "shared")):
        report = replace_ocr_modules(module, example_inputs=inputs())
        assert f"it reads {name}, whose changes would not be seen" in str(report)
        with CountOps() as ops, torch.no_grad():
            module(*inputs())
        assert ops.inference == 0


def test_a_pass_in_eval_mode_and_one_in_training_have_one_backward_pass() -> None:
    """As of a teacher and a student in one module: statistics change between them."""
    module, plain = (each.double() for each in pair())
    args = [each.double() for each in inputs()]
    first, second = module.eval()(*args), module.train()(*args)
    (first.square().mean() + second.square().mean()).backward()
    for train in (False, True):  # else PyTorch's own norm takes the changed statistics for those of the first pass
        plain.train(train)(*args).square().mean().backward()
    for name, parameter in module.named_parameters():
        if not any(part in name for part in ("f_object", "f_down")):  # the regions' norms are PyTorch's
            torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_under_checkpointing(momentum: float | None) -> None:
    """Those of norms on pixels see each batch once, whatever is computed again."""
    module, plain = pair(train=True, norm_layer=lambda channels: nn.BatchNorm2d(channels, momentum=momentum))
    for _ in range(3):
        feats, regions = inputs()
        checkpoint(module, feats.requires_grad_(), regions, use_reentrant=False).sum().backward()
        plain(feats, regions)
    of_regions = ("f_object", "f_down")
    for name, buffer in plain.named_buffers():
        if not any(part in name for part in of_regions):
            torch.testing.assert_close(module.get_buffer(name), buffer)


class InFloat32(reference.SpatialOCR):
    def forward(self, feats: Tensor, proxy_feats: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(feats, proxy_feats)


@pytest.mark.parametrize("train", [True, False])
def test_autocast_that_a_forward_switches_off(train: bool) -> None:
    module, plain = pair(InFloat32, train=train)
    args = inputs()
    with torch.set_grad_enabled(train):
        with torch.autocast("cpu", torch.bfloat16):
            assert_same(module, plain, args)
        with CountOps() as ops:
            module(*args)
        assert ops.block + ops.inference == 1  # outside of it, it is a block


def test_a_second_call_hides_nothing() -> None:
    model = reference.OCRHead(in_channels=8, num_classes=3, mid_channels=16, key_channels=8)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not every OCR module of the model was replaced"):
            replace_ocr_modules(model).raise_if_incomplete()
    restore_ocr_modules(model)
    for _ in range(2):
        replace_ocr_modules(model, example_inputs=torch.randn(2, 8, 16, 16)).raise_if_incomplete()


def test_nothing_is_kept() -> None:
    """Neither the weights of one functional call, nor a module that was restored."""
    module, _ = pair(train=True)
    weights = {name: parameter * 1.0 for name, parameter in module.named_parameters()}
    fast = weakref.ref(weights["conv_bn_dropout.0.weight"])
    torch.func.functional_call(module, weights, inputs())
    del weights
    gc.collect()
    assert fast() is None
    module(*inputs()).sum().backward()
    restore_ocr_modules(module)
    kept = weakref.ref(module)
    gc.collect()
    gc.disable()
    try:
        del module
        assert kept() is None
    finally:
        gc.enable()
