"""Step 4 found by what it computes: heads of many styles, reasons where it is another computation, nothing stale."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from blocks import (
    HEADS,
    REFUSALS,
    C,
    ConvBnAct,
    D,
    Einsum,
    Head,
    NoFactor,
    RegionNorms,
    RegionRows,
    Volume,
    inputs,
    ours,
    parametrized,
    trained,
)
from torch import Tensor, nn

from ocr_kernels import modules, record_maps, reference
from ocr_kernels.models.block_cache import BlockCache
from ocr_kernels.models.block_plan import plan_block, verify
from ocr_kernels.models.block_weights import BlockPlan, computed_in
from ocr_kernels.testing import assert_parity, lay_out


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


HALVES = torch.bfloat16, torch.float16
all_heads = pytest.mark.parametrize("build", HEADS.values(), ids=HEADS)


def planned(module: nn.Module) -> BlockPlan:
    plan = plan_block(module)
    assert isinstance(plan, BlockPlan), plan
    return plan


@torch.no_grad()
def z_of(plan: BlockPlan, module: nn.Module, feats: Tensor, regions: Tensor) -> Tensor:
    return plan.weights(module, computed_in(feats)).compute(feats, regions)


@torch.no_grad()
def agree(found: Tensor, module: nn.Module, args: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(found, module(*args), rtol=1e-4, atol=1e-5)


# What it computes


@pytest.mark.parametrize("dtype", [torch.float32, *(pytest.param(t, marks=pytest.mark.wide) for t in HALVES)])
@pytest.mark.parametrize("layout", ["contiguous", pytest.param("channels_last", marks=pytest.mark.wide)])
@all_heads
@torch.no_grad()
def test_parity(build: Callable[[], nn.Module], layout: Any, dtype: torch.dtype) -> None:
    module = trained(build()).to(dtype)
    plan = planned(module)
    feats, regions = (t.to(dtype) for t in inputs(module, batch=3, regions=19))
    feats = lay_out(feats, layout)
    factors = {torch.float32: 4.0, torch.bfloat16: 2.0, torch.float16: 2.0}  # few numbers: much is luck
    exact = copy.deepcopy(module).double()
    assert_parity(
        lambda *a: z_of(plan, module, *a), lambda *a: module(*a), (feats, regions), oracle=exact, factors=factors
    )
    assert z_of(plan, module, feats, regions).stride() == lay_out(module(feats, regions), layout).stride()
    checked = verify(module, plan, (feats, regions))
    assert not isinstance(checked, str), checked
    assert checked.relative_error < {torch.float32: 1e-5, torch.bfloat16: 1e-1, torch.float16: 1e-2}[dtype]


@all_heads
@torch.no_grad()
def test_float64(build: Callable[[], nn.Module]) -> None:
    module = trained(build()).double()
    plan = planned(module)
    args = [tensor.double() for tensor in inputs(module, batch=3, regions=19)]
    with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 alone
        torch.testing.assert_close(z_of(plan, module, *args), module(*args), rtol=1e-11, atol=1e-12)
    checked = verify(module, plan, args)
    assert not isinstance(checked, str), checked
    assert checked.eager_error is None
    assert checked.relative_error < 1e-13


def test_weights_of_several_dtypes() -> None:
    module = trained(Head())
    module.fuse.double()
    assert "it has weights of several dtypes" in plan_block(module)


@torch.no_grad()
def test_example_says_what_the_inputs_are() -> None:
    module = trained(Volume())
    plan = plan_block(module, inputs(module, regions=5))
    assert isinstance(plan, BlockPlan)
    assert (plan.dims, plan.region_dims, plan.transposed) == (5, 5, False)
    assert plan_block(module, (torch.randn(1, C, 2, 2, 2), torch.randn(1, 3, C))) != plan
    assert "it fails on pixels and regions" in plan_block(module, (torch.randn(1, 3, 2), torch.randn(1, 3, 4)))


@pytest.mark.parametrize("scale", [3, 4, 8])
@torch.no_grad()
def test_scale(scale: int) -> None:
    module = trained(ours(reference, scale=scale))
    plan = planned(module)
    args = torch.randn(2, C, 2 * scale + 1, 3 * scale), torch.randn(2, C, 19, 1)
    agree(z_of(plan, module, *args), module, args)


def test_it_leaves_no_trace() -> None:
    module = Head().train()
    calls: list[Any] = []
    module.fuse.register_forward_hook(lambda *_: calls.append(1)).remove()
    before, state = torch.get_rng_state(), copy.deepcopy(module.state_dict())
    planned(module)
    assert module.training
    assert not calls
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), state.values(), strict=True))


@pytest.mark.parametrize("build", [Head, Einsum, RegionRows])
def test_defaults_do_not_matter(build: Callable[[], nn.Module]) -> None:
    module = trained(build())
    args = inputs(module)
    try:
        torch.set_default_dtype(torch.float16)
        with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu"):
            plan = planned(module)
            assert not isinstance(verify(module, plan), str)
    finally:
        torch.set_default_dtype(torch.float32)
    agree(z_of(plan, module, *args), module, args)


# What is another computation


@pytest.mark.parametrize(("build", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_reasons(build: Callable[[], nn.Module], reason: str) -> None:
    module = build()
    found = plan_block(module)
    if isinstance(found, BlockPlan):  # on other weights or sizes
        found = verify(module, found)
    assert isinstance(found, str)
    assert reason in found


def test_hooks_and_own_forwards_are_reasons() -> None:
    module = Head()
    module.out.register_forward_hook(print)
    assert plan_block(module) == "out has a forward hook, which would not run"
    module = Head()
    module.out.forward = module.out.forward
    assert plan_block(module) == "the forward of out is the instance's own, not its class's"
    module = Head()
    module.forward = module.forward
    assert plan_block(module) == "its forward is the instance's own, not its class's"


class Failing(Head):
    def forward(self, x: Tensor, proxies: Tensor) -> Any:
        raise KeyError("x")


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Conv2d(3, 3, 1),
        lambda: reference.ObjectAttentionBlock(C, D),
        modules.SpatialGather,
        lambda: nn.Bilinear(3, 4, 5),
        lambda: nn.TransformerDecoderLayer(8, 2, 16),
        Failing,
        nn.Identity,
    ],
)
def test_others_are_not_mentioned(build: Callable[[], nn.Module]) -> None:
    assert plan_block(build()) == ""


def test_a_wrong_plan_is_seen() -> None:
    module, other = trained(Head()), trained(NoFactor())
    assert "its forward computes something else (off by" in verify(module, planned(other))
    module.fuse[0].bn.running_var.fill_(1e-12)
    module.fuse[0].bn.eps = 1e-12
    module.fuse[0].bn.weight.data.fill_(1e4)
    assert isinstance(verify(module.half(), planned(module)), str)


# The weights of a call


def edit(module: Any) -> None:
    module.fuse[0].conv.weight.mul_(1.5)


def edit_statistics(module: Any) -> None:
    module.out.bn.running_var.mul_(3)


def new_parameter(module: Any) -> None:
    module.theta[0].conv.weight = nn.Parameter(2 * module.theta[0].conv.weight.detach())


def new_data(module: Any) -> None:
    module.theta[0].conv.weight.data = 2 * module.theta[0].conv.weight.data


def new_layer(module: Any) -> None:
    module.g.bn = trained(nn.BatchNorm2d(D))


def new_activation(module: Any) -> None:
    module.g.act = nn.LeakyReLU(0.5).eval()


def new_slope(module: Any) -> None:
    new_activation(module)
    BlockCaches.now(module)
    module.g.act.negative_slope = 0.25


def new_eps(module: Any) -> None:
    module.out.bn.eps = 0.3


def new_bias(module: Any) -> None:
    module.theta[0].conv.bias = nn.Parameter(torch.randn(D))


def no_affine(module: Any) -> None:
    module.out.bn.weight = module.out.bn.bias = None


def new_method(module: Any) -> None:
    """On the class."""
    kind = type(module)
    BlockCaches.undo = functools.partial(setattr, kind, "attend", kind.attend)
    kind.attend = NoFactor.attend


def more_layers(module: Any) -> None:
    module.phi.append(trained(ConvBnAct(D, D)))


def assign(module: nn.Module) -> None:
    state = {k: 1.1 * v if v.is_floating_point() else v for k, v in module.state_dict().items()}
    module.load_state_dict(state, assign=True)


def rounded(module: nn.Module) -> None:
    module.half().float()


def normalised(module: Any) -> None:
    nn.utils.parametrizations.weight_norm(module.out.conv)
    module.eval().out.conv.parametrizations.weight.original0.mul_(2)


class BlockCaches:
    """So that a change in two steps is seen after the first."""

    now: Any = None
    undo: Any = staticmethod(lambda: None)


CHANGES = [
    edit,
    edit_statistics,
    new_parameter,
    new_data,
    new_layer,
    new_activation,
    new_slope,
    new_eps,
    new_bias,
    no_affine,
    new_method,
    more_layers,
    assign,
    rounded,
    normalised,
]


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_no_weight_is_stale(change: Callable[[Any], None]) -> None:
    module = trained(Head())
    cache, args = BlockCache(planned(module)), inputs(module)
    BlockCaches.now = lambda module: cache.weights_for(module, *args)
    before = cache.weights_for(module, *args)
    assert before is not None
    assert cache.weights_for(module, *args) is before
    expected = module(*args)
    try:
        change(module)
        after = cache.weights_for(module, *args)
        assert after is not None
        assert not torch.equal(expected, module(*args))
        agree(after.compute(*args), module, args)
        assert cache.weights_for(module, *args) is after
    finally:
        BlockCaches.undo()


@torch.no_grad()
def test_where_the_own_forward_runs() -> None:
    module = trained(Head())
    cache, args = BlockCache(planned(module)), inputs(module)

    def folds(*args: Tensor) -> bool:
        return cache.weights_for(module, *args) is not None

    assert folds(*args)
    for register in (module.out.register_forward_hook, module.out.register_forward_pre_hook):
        handle = register(lambda *_: None)
        assert not folds(*args)
        handle.remove()
        assert folds(*args)
    for register in (
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    ):
        handle = register(lambda *_: None)
        assert not folds(*args)
        handle.remove()
        assert folds(*args)
    module.out.train()
    assert not folds(*args)
    module.eval()
    assert folds(*args)
    module.train()
    assert not folds(*args)
    module.eval()
    module.out.forward = lambda x: x
    assert not folds(*args)
    del module.out.forward
    assert folds(*args)
    module.out.bn = nn.GroupNorm(2, C)
    assert not folds(*args)
    module.out.bn = nn.BatchNorm2d(C).eval()
    assert folds(*args)
    handle = module.out.register_forward_hook(lambda *_: None)
    module.out.bn.eps = 0.1
    assert not folds(*args)
    handle.remove()
    assert folds(*args)
    assert not folds(args[0], args[1][..., 0])
    assert not folds(args[0][:, 1:], args[1])
    assert not folds(args[0].double(), args[1].double())
    assert not folds(args[0].half(), args[1].half())
    with torch.autocast("cpu", torch.bfloat16):
        assert folds(*args)
    with record_maps():
        assert not folds(*args)
    with torch.enable_grad():
        assert not folds(*args)
        module.requires_grad_(False)
        assert folds(*args)
        assert not folds(args[0].clone().requires_grad_(), args[1])
    torch.func.vmap(lambda x, f: torch.zeros(int(folds(x, f))))(args[0][:, None], args[1][:, None])


@pytest.mark.parametrize("build", [Head, RegionRows, RegionNorms, ours, parametrized])
@torch.no_grad()
def test_compiled_programs_fold_each_time(build: Callable[[], nn.Module]) -> None:
    torch._dynamo.reset()
    module = trained(build())
    cache, args = BlockCache(planned(module)), inputs(module)

    def forward(feats: Tensor, regions: Tensor) -> Tensor:
        folded = cache.weights_for(module, feats, regions)
        return module(feats, regions) if folded is None else folded.compute(feats, regions)

    graphs: list[torch.fx.GraphModule] = []
    compiled = torch.compile(forward, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    agree(compiled(*args), module, args)
    assert not any("batch_norm" in str(node.target) for node in graphs[0].graph.nodes)
    next(module.parameters()).mul_(2)
    agree(compiled(*args), module, args)
    assert len(graphs) == 1
    norm = next((part for part in module.modules() if isinstance(part, nn.BatchNorm2d)), None)
    norm.eps = 0.5
    agree(compiled(*args), module, args)
    assert len(graphs) == 2


@pytest.mark.parametrize("build", [Head, RegionNorms, parametrized])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda plan: pickle.loads(pickle.dumps(plan))])
@torch.no_grad()
def test_copies(build: Callable[[], nn.Module], duplicate: Callable[[Any], Any]) -> None:
    module = trained(build())
    plan = planned(module)
    args = inputs(module)
    cache = duplicate(BlockCache(duplicate(plan)))
    assert cache.snapshot is None
    assert torch.equal(z_of(duplicate(plan), module, *args), z_of(plan, module, *args))
    other = copy.deepcopy(module)
    next(other.parameters()).mul_(2)
    agree(cache.weights_for(other, *args).compute(*args), other, args)
