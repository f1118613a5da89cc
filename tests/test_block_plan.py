"""Step 4 found by what it computes: heads of many styles, reasons where it is another computation, nothing stale."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ocr_kernels import modules, record_maps, reference
from ocr_kernels.models.block_cache import BlockCache
from ocr_kernels.models.block_plan import plan_block, verify
from ocr_kernels.models.block_weights import BlockPlan
from ocr_kernels.testing import assert_parity, lay_out

C, D, OUT, K = 8, 6, 10, 4


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


# Heads, after those that people write


class ConvBnAct(nn.Module):
    """A block of a library: the norm and the activation are options."""

    def __init__(self, inputs: int, outputs: int, *, dims: int = 2, norm: Any = None, act: Any = nn.ReLU) -> None:
        super().__init__()
        self.conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](inputs, outputs, 1, bias=norm is nn.Identity)
        self.bn = norm(outputs) if norm else (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](outputs)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Head(nn.Module):
    """Layers under names of their own; what differs from head to head are its methods and its blocks."""

    dims, region_dims = 2, 2
    layers = (2, 2)  # in phi and psi

    def __init__(self, block: Callable[..., nn.Module] = ConvBnAct, contexts: int = C, **options: Any) -> None:
        super().__init__()
        pixel, region = (functools.partial(block, dims=d, **options) for d in (self.dims, self.region_dims))
        self.theta = nn.Sequential(*(pixel(D if i else C, D) for i in range(self.layers[0])))
        self.phi = nn.Sequential(*(region(D if i else C, D) for i in range(self.layers[1])))
        self.g = region(C, D)
        self.out = pixel(D, contexts)
        self.fuse = nn.Sequential(pixel(C + contexts, OUT), nn.Dropout(0.3))

    def forward(self, x: Tensor, proxies: Tensor) -> Any:
        query, key, value = self.theta(x), self.phi(proxies), self.g(proxies)
        context = self.attend(query.flatten(2), key.flatten(2), value.flatten(2))
        return self.join(x, self.out(context.reshape(query.shape)))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return value @ (D**-0.5 * query.mT @ key).softmax(-1).mT

    def join(self, x: Tensor, context: Tensor) -> Any:
        return self.fuse(torch.cat([x, context], 1))


class NoFactor(Head):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.bmm(value, F.softmax(torch.bmm(key.mT, query), dim=1))


class Einsum(Head):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = torch.einsum("bdk,bdn->bkn", key, query) / torch.sqrt(torch.tensor(float(D)))
        return torch.einsum("bdk,bkn->bdn", value, scores.softmax(1))


class ScaledDotProduct(Head):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query.mT[:, None], key.mT[:, None], value.mT[:, None])[:, 0].mT


class AddedProduct(Head):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = torch.baddbmm(query.new_zeros(1, 1, 1), query.mT, key, beta=0, alpha=D**-0.5)
        return torch.bmm(value, scores.softmax(2).transpose(1, 2))


class RegionColumns(Head):
    """Conv1d on regions `[B, C, K]`."""

    region_dims = 1


class Volume(Head):
    dims = region_dims = 3


class Sequence(Head):
    dims = region_dims = 1


class OneLayer(Head):
    layers = (1, 1)


class RegionRows(OneLayer):
    """Regions `[B, K, C]` and linear layers, with what stands on regions alone: a norm and a smooth activation."""

    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(C, D), nn.LayerNorm(D), nn.GELU(), nn.Linear(D, D, bias=False))
        self.g = nn.Linear(C, D)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return super().attend(query, key.mT, value.mT)


class RegionNorms(RegionColumns):
    """GroupNorm on regions."""

    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Sequential(nn.Conv1d(C, D, 1), nn.GroupNorm(2, D), nn.SiLU())


class Sum(Head):
    """Two projections are added up, where others join maps and project them."""

    def __init__(self) -> None:
        super().__init__()
        self.of_x, self.of_y = nn.Conv2d(C, OUT, 1, bias=False), nn.Conv2d(C, OUT, 1)
        self.norm = nn.BatchNorm2d(OUT)

    def join(self, x: Tensor, context: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.of_x(x) + self.of_y(context)), 0.2)


class Residual(Head):
    """Of a context that a learned number weighs."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1))

    def join(self, x: Tensor, context: Tensor) -> Tensor:
        return super().join(x, self.gamma * context + x)


class Resized(Head):
    """Pooled and brought back by a factor that is 1."""

    def forward(self, x: Tensor, proxies: Tensor) -> Any:
        return super().forward(F.max_pool2d(x, 1), proxies)

    def join(self, x: Tensor, context: Tensor) -> Tensor:
        return super().join(x, F.interpolate(context, scale_factor=1, mode="bilinear", align_corners=True))


class NoUp(Head):
    """No layer after the attention, and a product with rows of pixels."""

    def __init__(self) -> None:
        super().__init__(contexts=D)
        self.out = nn.Identity()
        self.last = nn.Linear(C + D, OUT)

    def join(self, x: Tensor, context: Tensor) -> Tensor:
        rows = torch.cat([context, x], 1).flatten(2).transpose(1, 2)
        return F.relu_(self.last(rows)).permute(0, 2, 1).reshape(-1, OUT, *x.shape[2:])


class Temperature(Head):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.7))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return value @ (query.mT @ key / self.temperature).softmax(-1).mT


class ActivatedNorm(nn.Module):
    """Norm and activation in one, as InPlaceABN."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        self.slope, self.eps = 0.01, 1e-5

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return F.leaky_relu_(x, self.slope)


class FrozenNorm(nn.Module):
    """Buffers alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps = 1e-5
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, 0.5 + torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (t.view(-1, 1, 1) for t in self.buffers())
        scale = weight * (var + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)


class Mmseg(Head):
    """mmsegmentation's: regions `[B, C, K, 1]`, contexts before pixels."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        sim_map = torch.matmul(query.permute(0, 2, 1), key)
        sim_map = (D**-0.5) * sim_map
        context = torch.matmul(F.softmax(sim_map, dim=-1), value.permute(0, 2, 1))
        return context.permute(0, 2, 1).contiguous()

    def join(self, x: Tensor, context: Tensor) -> Tensor:
        return self.fuse(torch.cat([context, x], dim=1))


class Label(Mmseg):
    """openseg's forward takes a label as well."""

    def forward(self, x: Tensor, proxies: Tensor, label: Tensor | None = None) -> Any:
        assert label is None
        return super().forward(x, proxies)


def ours(library: Any = modules, **options: Any) -> nn.Module:
    return library.SpatialOCR(C, D, OUT, **options)


def parametrized() -> nn.Module:
    head: Any = Head()
    nn.utils.parametrizations.weight_norm(head.fuse[0].conv)
    return head


HEADS: dict[str, Callable[[], nn.Module]] = {
    "ours": ours,
    "reference": functools.partial(ours, reference),
    "LeakyReLU": functools.partial(ours, act_layer=nn.LeakyReLU),
    "no activation": functools.partial(ours, act_layer=nn.Identity),
    "blocks": Head,
    "mmsegmentation": Mmseg,
    "openseg": Label,
    "no factor": NoFactor,
    "einsum": Einsum,
    "scaled_dot_product_attention": ScaledDotProduct,
    "baddbmm": AddedProduct,
    "Conv1d on regions": RegionColumns,
    "volume": Volume,
    "sequence": Sequence,
    "one layer": OneLayer,
    "linear layers": RegionRows,
    "norms on regions": RegionNorms,
    "sum": Sum,
    "residual": Residual,
    "learned temperature": Temperature,
    "resized by 1": Resized,
    "no up": NoUp,
    "few contexts": lambda: Head(contexts=5),
    "ABN": lambda: Head(norm=ActivatedNorm, act=nn.Identity),
    "frozen": lambda: Head(norm=FrozenNorm),
    "SyncBatchNorm": lambda: Head(norm=nn.SyncBatchNorm),
    "no norm": lambda: Head(norm=nn.Identity),
    "no affine": lambda: Head(norm=functools.partial(nn.BatchNorm2d, affine=False)),
    "in place": lambda: Head(act=functools.partial(nn.ReLU, inplace=True)),
    "parametrized": parametrized,
}
all_heads = pytest.mark.parametrize("build", HEADS.values(), ids=HEADS)


def trained(module: nn.Module) -> nn.Module:
    """`module` in eval mode, with statistics that have seen data."""
    for name, tensor in (*module.named_buffers(), *module.named_parameters()):
        if name.endswith("running_var"):
            tensor.data.uniform_(0.5, 1.5)
        elif tensor.is_floating_point() and tensor.dim() == 1:
            tensor.data.uniform_(-1, 1.5)
    return module.eval()


def inputs(module: nn.Module, *, batch: int = 2, regions: int = K) -> tuple[Tensor, Tensor]:
    feats = torch.randn(batch, C, *(7, 5, 3)[: getattr(module, "dims", 2)])
    if isinstance(module, RegionRows):
        return feats, torch.randn(batch, regions, C)
    return feats, torch.randn(batch, C, regions, *[1] * (getattr(module, "region_dims", 2) - 1))


def planned(module: nn.Module) -> BlockPlan:
    plan = plan_block(module)
    assert isinstance(plan, BlockPlan), plan
    return plan


@torch.no_grad()
def agree(found: Tensor, module: nn.Module, args: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(found, module(*args), rtol=1e-4, atol=1e-5)


# What it computes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
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
        lambda *a: plan.run(module, *a), lambda *a: module(*a), (feats, regions), oracle=exact, factors=factors
    )
    assert plan.run(module, feats, regions).stride() == lay_out(module(feats, regions), layout).stride()
    checked = verify(module, plan, (feats, regions))
    assert not isinstance(checked, str), checked
    assert checked[2] < {torch.float32: 1e-5, torch.bfloat16: 1e-1, torch.float16: 1e-2}[dtype]


@torch.no_grad()
def test_example_says_what_the_inputs_are() -> None:
    module = trained(Volume())
    plan = plan_block(module, inputs(module, regions=5))
    assert isinstance(plan, BlockPlan)
    assert (plan.dims, plan.region_dims, plan.transposed) == (5, 5, False)
    assert plan_block(module, (torch.randn(1, C, 2, 2, 2), torch.randn(1, 3, C))) != plan
    assert "it fails on pixels and regions" in plan_block(module, (torch.randn(1, 3, 2), torch.randn(1, 3, 4)))


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
    agree(plan.run(module, *args), module, args)


# What is another computation


class Gelu(Head):
    def __init__(self) -> None:
        super().__init__(act=nn.GELU)


class WrongAxis(Head):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return value @ (query.mT @ key).softmax(1).mT


class TwoHeads(Head):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.unflatten(1, (2, -1)) for x in (query, key, value))
        return (v @ (q.mT @ k).softmax(-1).mT).flatten(1, 2)


class TwoResults(Head):
    def join(self, x: Tensor, context: Tensor) -> Any:
        return super().join(x, context), context


class Kept(Head):
    def join(self, x: Tensor, context: Tensor) -> Any:
        self.last_context = context
        return super().join(x, context)


class Prior(Head):
    def __init__(self) -> None:
        super().__init__()
        self.prior = nn.Parameter(torch.randn(1, 1, 1))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return value @ (query.mT @ key + self.prior).softmax(-1).mT


class Counting(Head):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def join(self, x: Tensor, context: Tensor) -> Any:
        self.calls += 1
        return super().join(x, context)


class Filled(Head):
    def join(self, x: Tensor, context: Tensor) -> Any:
        both = torch.cat([context, torch.zeros_like(x)], 1)
        both[:, C:] = x
        return self.fuse(both)


class Threshold(Head):
    def join(self, x: Tensor, context: Tensor) -> Any:
        return super().join(x, context if context.mean() > 0 else 2 * context)


class InPlace(Head):
    def forward(self, x: Tensor, proxies: Tensor) -> Any:
        return super().forward(x, proxies.relu_())


class Number(Head):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(()))

    def join(self, x: Tensor, context: Tensor) -> Any:
        return super().join(x, self.gamma.item() * context)


class Noise(Head):
    def join(self, x: Tensor, context: Tensor) -> Any:
        return super().join(x, context + torch.rand(context.shape))


class Gate(Head):
    def join(self, x: Tensor, context: Tensor) -> Any:
        return super().join(x, context * x)


class Wide(Head):
    def __init__(self) -> None:
        super().__init__()
        self.fuse = nn.Sequential(nn.Conv2d(2 * C, OUT, 3, padding=1))


REFUSALS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "GroupNorm": (lambda: Head(norm=functools.partial(nn.GroupNorm, 2)), "it has a GroupNorm on the pixels"),
    "GELU": (Gelu, "it has the activation gelu"),
    "PReLU": (lambda: Head(act=nn.PReLU), "it has the activation prelu"),
    "batch statistics": (
        lambda: Head(norm=functools.partial(nn.BatchNorm2d, track_running_stats=False)),
        "it has a norm without running statistics",
    ),
    "scale": (functools.partial(ours, scale=2), "it attends at a lower resolution (scale > 1)"),
    "3x3": (Wide, "it has a convolution that is not 1x1"),
    "wrong axis": (WrongAxis, "it takes its softmax over pixels, not over regions"),
    "two heads": (TwoHeads, "several heads"),
    "two results": (TwoResults, "it returns a tuple"),
    "kept": (Kept, "it sets its attribute last_context"),
    "prior": (Prior, "it adds to the scores"),
    "values": (Threshold, "it reads values"),
    "counter": (Counting, "it changes its own tensors or its arguments in place"),
    "a part changed": (Filled, "it "),
    "arguments": (InPlace, "it changes its own tensors or its arguments in place"),
    "its own value": (Number, "it reads values"),
    "noise": (Noise, "it draws random numbers"),
    "gate": (Gate, "it multiplies two maps"),
    "float64": (lambda: Head().double(), "it has weights whose dtype is not float32"),
    "meta": (lambda: Head().to("meta"), "its parameters are on the meta device"),
}


@pytest.mark.parametrize(("build", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_reasons(build: Callable[[], nn.Module], reason: str) -> None:
    found = plan_block(build())
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


CHANGES = [
    edit,
    edit_statistics,
    new_parameter,
    new_data,
    new_layer,
    new_activation,
    new_slope,
    new_eps,
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
    change(module)
    after = cache.weights_for(module, *args)
    assert after is not None
    assert not torch.equal(expected, module(*args))
    agree(after.compute(*args), module, args)
    assert cache.weights_for(module, *args) is after


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
    assert torch.ops.ocr_kernels.ocr_head.default in {node.target for node in graphs[0].graph.nodes}
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
    assert torch.equal(duplicate(plan).run(module, *args), plan.run(module, *args))
    other = copy.deepcopy(module)
    next(other.parameters()).mul_(2)
    agree(cache.weights_for(other, *args).compute(*args), other, args)
