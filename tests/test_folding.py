"""Folding: z stays what it was, within the error budget, whatever changes; and what cannot be folded says why."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ocr_kernels.folding import fold_ocr_modules, unfold_ocr_modules
from ocr_kernels.replace import replace_ocr_modules, restore_ocr_modules
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ocr_kernels import modules, record_maps, reference
from ocr_kernels.testing import assert_parity, lay_out

C, D, OUT, K = 8, 6, 10, 4


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


# Modules of the known structures, in plain PyTorch


def bn_relu(channels: int, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    return nn.Sequential(norm(channels), nn.ReLU())


class Block(nn.Module):
    """HRNet's `ObjectAttentionBlock2D`."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d, bias: bool = False) -> None:
        super().__init__()
        self.scale, self.key_channels = 1, D
        self.pool = nn.MaxPool2d(1)

        def block(*channels: int) -> nn.Sequential:
            steps = [(nn.Conv2d(a, b, 1, bias=bias), bn_relu(b, norm)) for a, b in itertools.pairwise(channels)]
            return nn.Sequential(*(layer for step in steps for layer in step))

        self.f_pixel, self.f_object, self.f_down, self.f_up = block(C, D, D), block(C, D, D), block(C, D), block(D, C)

    def forward(self, x: Tensor, proxy: Tensor) -> Any:
        query = self.f_pixel(x).view(x.size(0), D, -1).permute(0, 2, 1)
        key = self.f_object(proxy).view(x.size(0), D, -1)
        value = self.f_down(proxy).view(x.size(0), D, -1).permute(0, 2, 1)
        context = torch.matmul(self.weigh(query, key), value).permute(0, 2, 1).contiguous()
        return self.f_up(context.view(x.size(0), D, *x.size()[2:]))

    def weigh(self, query: Tensor, key: Tensor) -> Tensor:
        return F.softmax(D**-0.5 * torch.matmul(query, key), dim=-1)


class HRNet(nn.Module):
    """HRNet's `SpatialOCR_Module`; openseg's takes a label as well."""

    def __init__(self, block: nn.Module | None = None, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.object_context_block = block or Block(norm)
        self.conv_bn_dropout = nn.Sequential(
            nn.Conv2d(2 * C, OUT, 1, bias=False), bn_relu(OUT, norm), nn.Dropout2d(0.5)
        )

    def forward(self, feats: Tensor, proxy_feats: Tensor, gt_label: Tensor | None = None) -> Any:
        context = self.object_context_block(feats, proxy_feats)
        if gt_label is not None:
            context = context * gt_label
        return self.conv_bn_dropout(torch.cat([context, feats], 1))


class Mmseg(nn.Module):
    """mmsegmentation's `ObjectAttentionBlock`, with plain layers."""

    def __init__(self) -> None:
        super().__init__()
        block = Block()
        self.query_project, self.key_project = block.f_pixel, block.f_object
        self.value_project, self.out_project = block.f_down, block.f_up
        self.query_downsample = None
        self.bottleneck = nn.Sequential(nn.Conv2d(2 * C, C, 1), nn.BatchNorm2d(C), nn.ReLU())

    def forward(self, query_feats: Tensor, key_feats: Tensor) -> Tensor:
        query = self.query_project(query_feats).flatten(2).permute(0, 2, 1)
        key, value = self.key_project(key_feats).flatten(2), self.value_project(key_feats).flatten(2)
        sim_map = torch.matmul(query, key)
        sim_map = D**-0.5 * sim_map
        sim_map = F.softmax(sim_map, dim=-1)
        context = torch.matmul(sim_map, value.permute(0, 2, 1))
        context = context.permute(0, 2, 1).reshape(-1, D, *query_feats.shape[2:])
        return self.bottleneck(torch.cat([self.out_project(context), query_feats], dim=1))


def trained(module: nn.Module) -> nn.Module:
    """`module` in eval mode, with BatchNorm that has seen data."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is not None:
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 1.5)
            if part.affine:
                part.weight.data.uniform_(0.5, 1.5)
                part.bias.data.normal_()
    return module.eval()


class FrozenBatchNorm2d(nn.Module):
    """torchvision's: buffers alone."""

    __module__ = "torchvision.ops.misc"

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps = 1e-5
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, 0.5 + torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (t.view(-1, 1, 1) for t in self.buffers())
        scale = weight * (var + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)


def ours(library: Any = modules, **options: Any) -> nn.Module:
    return library.SpatialOCR(C, D, OUT, **options)


BUILDS: dict[str, Callable[[], nn.Module]] = {
    "ours": ours,
    "reference": functools.partial(ours, reference),
    "hrnet": HRNet,
    "mmseg": Mmseg,
    "sync": lambda: HRNet(norm=nn.SyncBatchNorm),
    "frozen": lambda: HRNet(norm=FrozenBatchNorm2d),
    "no norm, biases": lambda: HRNet(Block(nn.Identity, bias=True), nn.Identity),
    "no affine": lambda: HRNet(norm=functools.partial(nn.BatchNorm2d, affine=False)),
}


def inputs(*, batch: int = 2, spatial: tuple[int, ...] = (5, 3), regions: int = K) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, C, *spatial), torch.randn(batch, C, regions, 1)


class CountHeads(TorchDispatchMode):
    """How often our op ran."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.ocr_kernels.ocr_head.default
        return func(*args, **(kwargs or {}))


def runs(module: nn.Module, *args: Any, **kwargs: Any) -> int:
    """How often a call runs our op."""
    with CountHeads() as heads:
        module(*args, **kwargs)
    return heads.count


def folded(module: nn.Module) -> nn.Module:
    report = fold_ocr_modules(module)
    assert len(report.folded) == 1, report
    return module


@torch.no_grad()
def agree(module: nn.Module, plain: nn.Module, *args: Tensor) -> None:
    assert runs(module, *args) == 1
    torch.testing.assert_close(module(*args), plain(*args), rtol=1e-4, atol=1e-5)


# What it computes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("batch", "spatial", "regions"), [(1, (1, 1), 1), (2, (7, 5), K), (3, (4, 6), 19)])
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_parity(
    build: Callable[[], nn.Module], batch: int, spatial: tuple[int, ...], regions: int, layout: Any, dtype: torch.dtype
) -> None:
    plain = trained(build()).to(dtype)
    module = folded(copy.deepcopy(plain))
    feats, proxy = (t.to(dtype) for t in inputs(batch=batch, spatial=spatial, regions=regions))
    feats = lay_out(feats, layout)
    with torch.no_grad():
        assert runs(module, feats, proxy) == 1
        assert module(feats, proxy).stride() == lay_out(plain(feats, proxy), layout).stride()
        factors = {torch.float32: 4.0, torch.bfloat16: 1.5, torch.float16: 1.5}  # few numbers: much is luck
        assert_parity(module, plain, (feats, proxy), factors=factors)


def test_autocast_folds_to_its_dtype() -> None:
    plain = trained(ours())
    module = folded(copy.deepcopy(plain))
    args = inputs()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert runs(module, *args) == 1
        found, expected = module(*args), plain(*args)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)
    agree(module, plain, *args)


def test_keyword_arguments_and_others() -> None:
    module = folded(trained(HRNet()))
    feats, proxy = inputs()
    with torch.no_grad():
        expected = module(feats, proxy)
        assert torch.equal(module(feats, proxy_feats=proxy), expected)
        assert torch.equal(module(proxy_feats=proxy, feats=feats), expected)
        assert runs(module, feats=feats, proxy_feats=proxy) == 1
        assert runs(module, feats, proxy, torch.ones(())) == 0
        torch.testing.assert_close(module(feats, proxy, torch.ones(())), expected)


def test_report() -> None:
    model = reference.OCRHead(12, K, C, D)
    images = torch.randn(2, 12, 5, 4)
    report = fold_ocr_modules(model, example_inputs=images)
    (row,) = report.folded
    assert (row.name, row.module_class) == ("ocr_distri_head", "SpatialOCR")
    assert 0 < row.max_error < 1e-5
    assert model.training
    assert "1 folded, 0 left alone" in str(report)
    again = fold_ocr_modules(model)
    assert [row.reason for row in again.left_alone] == ["it was folded before"]
    assert "it was folded before" in str(again)
    assert fold_ocr_modules(reference.OCRHead(12, K, C, D), filter=lambda module, name: False).left_alone[0].reason == (
        "the filter says so"
    )


# Where the module's own forward runs


def test_gradients_are_its_own() -> None:
    module = folded(trained(ours()))
    plain = copy.deepcopy(module)
    unfold_ocr_modules(plain)
    assert runs(module, *inputs()) == 0
    assert_parity(module, plain, tuple(t.requires_grad_() for t in inputs()))
    module.requires_grad_(False)
    assert runs(module, *inputs()) == 1
    assert runs(module, *(t.requires_grad_() for t in inputs())) == 0


@torch.no_grad()
def test_training_and_other_cases() -> None:
    module = folded(trained(HRNet()))
    args = inputs()
    assert runs(module.train(), *args) == 0
    assert runs(module.eval(), *args) == 1
    module.object_context_block.f_up.train()
    assert runs(module, *args) == 0
    assert runs(module.eval(), *args) == 1
    handle = module.object_context_block.register_forward_hook(lambda *_: None)
    assert runs(module, *args) == 0
    handle.remove()
    assert runs(module, *args) == 1
    assert runs(copy.deepcopy(module).double(), *(t.double() for t in args)) == 0
    torch.func.vmap(module)(*(t[:, None] for t in args))
    module = folded(trained(ours()))
    with record_maps() as maps:
        module(*args)
    assert len(maps.attention) == 1


# Weights that change


def edit_weight(module: Any) -> None:
    module.conv_bn_dropout[0].weight.mul_(1.5)


def edit_statistics(module: Any) -> None:
    module.object_context_block.f_up[1][0].running_var.mul_(3)


def load(module: nn.Module) -> None:
    module.load_state_dict({k: 1.1 * v if v.is_floating_point() else v for k, v in module.state_dict().items()})


def assign(module: nn.Module) -> None:
    state = {k: 1.1 * v if v.is_floating_point() else v for k, v in module.state_dict().items()}
    module.load_state_dict(state, assign=True)


def new_parameter(module: Any) -> None:
    conv = module.object_context_block.f_pixel[0]
    conv.weight = nn.Parameter(2 * conv.weight.detach())


def new_data(module: Any) -> None:
    conv = module.object_context_block.f_pixel[0]
    conv.weight.data = 2 * conv.weight.data


def new_layer(module: Any) -> None:
    module.object_context_block.f_down[1][0] = trained(nn.BatchNorm2d(D))


def rounded(module: nn.Module) -> None:
    """Two moves, so that the second may get the first one's memory."""
    module.half().float()


def unseen(module: Any) -> None:
    module.conv_bn_dropout[0].weight.data.mul_(2)
    module.train().eval()


@torch.enable_grad()
def step(module: nn.Module) -> None:
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(module.train().parameters(), lr=0.1)
    module(*inputs()).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    module.eval()


@torch.enable_grad()
def fused_step(module: nn.Module) -> None:
    """In eval mode throughout; PyTorch does not count what a fused step changes."""
    torch.manual_seed(1)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1, fused=True)
    module(*inputs()).square().sum().backward()
    optimizer.step()


CHANGES = [
    edit_weight,
    edit_statistics,
    load,
    assign,
    new_parameter,
    new_data,
    new_layer,
    rounded,
    unseen,
    step,
    fused_step,
]


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_no_weight_is_stale(change: Callable[[nn.Module], None]) -> None:
    plain = trained(HRNet())
    module = folded(copy.deepcopy(plain))
    args = inputs()
    before = module(*args)
    for changed in (module, plain):
        torch.manual_seed(2)
        change(changed)
    assert not torch.equal(module(*args), before)
    agree(module, plain, *args)


@torch.no_grad()
def test_weights_are_kept_until_they_change() -> None:
    module = folded(trained(HRNet()))
    args = inputs()
    module(*args)
    snapshot = module._ocr_kernels_cache.snapshot
    module(*args)
    assert module._ocr_kernels_cache.snapshot is snapshot
    edit_weight(module)
    module(*args)
    assert module._ocr_kernels_cache.snapshot is not snapshot


@torch.no_grad()
def test_dtype_and_foreign_layers() -> None:
    plain = trained(HRNet())
    module = folded(copy.deepcopy(plain))
    args = inputs()
    half = tuple(t.bfloat16() for t in args)
    assert module.bfloat16()(*half).dtype == torch.bfloat16
    assert runs(module, *half) == 1
    module.float().load_state_dict(plain.state_dict())
    agree(module, plain, *args)
    module.conv_bn_dropout[1][0] = nn.GroupNorm(2, OUT)
    assert runs(module, *args) == 0
    with torch.inference_mode():
        inference = folded(copy.deepcopy(plain))
        agree(inference, plain, *args)
        moved = copy.deepcopy(inference).half().float()
        moved.conv_bn_dropout[0].weight.mul_(2)
        other = copy.deepcopy(moved)
        unfold_ocr_modules(other)
        agree(moved, other, *args)


# What stays as it was


def test_undo_and_state() -> None:
    plain = trained(HRNet())
    module = copy.deepcopy(plain)
    parameters, classes = list(module.parameters()), [type(part) for part in module.modules()]
    folded(module)
    assert isinstance(module, HRNet)
    assert repr(module) == repr(plain)
    assert list(module.state_dict()) == list(plain.state_dict())
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    assert unfold_ocr_modules(module) == [""]
    assert unfold_ocr_modules(module) == []
    assert classes == [type(part) for part in module.modules()]
    assert vars(module).keys() == vars(plain).keys()
    with torch.no_grad():
        assert runs(module, *inputs()) == 0


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, copy.copy, lambda module: pickle.loads(pickle.dumps(module)), saved]


@pytest.mark.parametrize("duplicate", COPIES, ids=["deepcopy", "copy", "pickle", "torch.save"])
@pytest.mark.parametrize("order", ["fold", "fold, swap", "swap, fold"])
@torch.no_grad()
def test_copies(order: str, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    plain = trained(Mmseg())
    module = copy.deepcopy(plain)
    for name in order.split(", "):
        {"fold": fold_ocr_modules, "swap": replace_ocr_modules}[name](module)
    args = inputs()
    for duplicated in (duplicate(module), duplicate(duplicate(module))):
        agree(duplicated, plain, *args)
        if duplicate is not copy.copy:
            duplicated.bottleneck[0].weight.mul_(2)
            assert not torch.equal(duplicated(*args), module(*args))
            agree(module, plain, *args)


@pytest.mark.parametrize("build", [Mmseg, HRNet, functools.partial(ours, reference)])
@pytest.mark.parametrize("fold_first", [True, False])
@torch.no_grad()
def test_together_with_the_swap(build: Callable[[], nn.Module], fold_first: bool) -> None:
    plain = trained(build())
    module = copy.deepcopy(plain)
    classes = [type(part) for part in module.modules()]
    if fold_first:
        folded(module)
        assert len(replace_ocr_modules(module).swapped) == 1
    else:
        assert len(replace_ocr_modules(module).swapped) == 1
        folded(module)
    args = inputs()
    agree(module, plain, *args)
    assert len(fold_ocr_modules(module).folded) == len(replace_ocr_modules(module).swapped) == 0
    other = copy.deepcopy(module)
    with record_maps() as maps:  # by its own forward, which is swapped
        module(*args)
    assert len(maps.attention) == 1
    assert len(restore_ocr_modules(module)) == 1
    agree(module, plain, *args)
    assert len(unfold_ocr_modules(module)) == 1
    assert classes == [type(part) for part in module.modules()]
    assert len(unfold_ocr_modules(other)) == 1
    assert runs(other, *args) == 0
    torch.testing.assert_close(other(*args), plain(*args))
    assert len(restore_ocr_modules(other)) == 1
    assert classes == [type(part) for part in other.modules()]


@pytest.mark.parametrize("build", [HRNet, Mmseg, ours])
@torch.no_grad()
def test_compiled_programs_fold_each_time(build: Callable[[], nn.Module]) -> None:
    plain = trained(build())
    module = folded(copy.deepcopy(plain))
    args = inputs()
    graphs: list[torch.fx.GraphModule] = []
    compiled = torch.compile(module, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    torch.testing.assert_close(compiled(*args), plain(*args), rtol=1e-4, atol=1e-5)
    (graph,) = graphs
    assert torch.ops.ocr_kernels.ocr_head.default in {node.target for node in graph.graph.nodes}
    for changed in (plain, module):
        next(changed.parameters()).mul_(2)
    torch.testing.assert_close(compiled(*args), plain(*args), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


def test_export_is_its_own() -> None:
    module = folded(trained(HRNet()))
    program = torch.export.export(module, inputs())
    assert not any("ocr_head" in str(node.target) for node in program.graph.nodes)


# What cannot be folded


class NoScale(Block):
    def weigh(self, query: Tensor, key: Tensor) -> Tensor:
        return F.softmax(torch.matmul(query, key), dim=-1)


class WrongAxis(Block):
    def weigh(self, query: Tensor, key: Tensor) -> Tensor:
        return F.softmax(D**-0.5 * torch.matmul(query, key), dim=1)


class MultiHead(Block):
    def forward(self, x: Tensor, proxy: Tensor) -> Tensor:
        query, key, value = (f.flatten(2).unflatten(1, (2, -1)) for f in self.maps(x, proxy))
        weights = torch.softmax(query.mT @ key / (D // 2) ** 0.5, dim=-1)
        return self.f_up((value @ weights.mT).flatten(1, 2).view(-1, D, *x.shape[2:]))

    def maps(self, x: Tensor, proxy: Tensor) -> tuple[Tensor, ...]:
        return self.f_pixel(x), self.f_object(proxy), self.f_down(proxy)


class Residual(Block):
    def forward(self, x: Tensor, proxy: Tensor) -> Tensor:
        return super().forward(x, proxy) + x


class Gamma(Residual):
    """Nothing is added before it was trained."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, proxy: Tensor) -> Tensor:
        return Block.forward(self, x, proxy) + self.gamma * x


class Fetching(HRNet):
    def forward(self, feats: Tensor, proxy_feats: Tensor) -> Any:
        return super().forward(feats, proxy_feats), feats


class Swish(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


def altered(change: Callable[[Any], object], build: Callable[[], nn.Module] = HRNet) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        module = build()
        change(module)
        return module

    return make


def set_fusing(module: Any, layer: nn.Module, at: int = 0) -> None:
    module.conv_bn_dropout[at] = layer


def set_forward(module: Any) -> None:
    module.object_context_block.forward = module.object_context_block.forward


REFUSALS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "GroupNorm": (lambda: HRNet(norm=functools.partial(nn.GroupNorm, 2)), "f_pixel has a torch.nn.modules.norm"),
    "BatchNorm that is more": (lambda: HRNet(norm=Swish), "object_context_block.f_pixel has a test_folding.Swish"),
    "batch statistics": (
        lambda: HRNet(norm=functools.partial(nn.BatchNorm2d, track_running_stats=False)),
        "has a BatchNorm2d without running statistics",
    ),
    "LeakyReLU": (functools.partial(ours, act_layer=nn.LeakyReLU), "has a torch.nn.modules.activation.LeakyReLU"),
    "no activation": (functools.partial(ours, act_layer=nn.Identity), "f_pixel has no ReLU between two convolutions"),
    "no last activation": (altered(lambda m: set_fusing(m, nn.BatchNorm2d(OUT), 1)), "does not end in a ReLU"),
    "norm first": (altered(lambda m: set_fusing(m, nn.Sequential(nn.BatchNorm2d(2 * C), m.conv_bn_dropout[0]))),
                   "has a BatchNorm2d that does not follow a convolution"),
    "3x3": (altered(lambda m: set_fusing(m, nn.Conv2d(2 * C, OUT, 3, padding=1))), "is not 1x1 with stride 1"),
    "groups": (altered(lambda m: set_fusing(m, nn.Conv2d(2 * C, OUT, 1, groups=2))), "and one group"),
    "another size": (altered(lambda m: set_fusing(m, nn.Conv2d(3 * C, OUT, 1))), "sizes of its convolutions"),
    "more layers": (altered(lambda m: m.object_context_block.f_up.extend(m.object_context_block.f_pixel[2:])),
                    "f_up has 2 convolutions instead of 1"),
    "scale": (functools.partial(ours, scale=2), "it attends at a lower resolution (scale > 1)"),
    "hook": (altered(lambda m: m.object_context_block.f_up.register_forward_hook(print)),
             "object_context_block.f_up has a forward hook"),
    "forward": (altered(set_forward), "the forward of object_context_block is the instance's own"),
    "parametrized": (altered(lambda m: nn.utils.parametrizations.weight_norm(m.conv_bn_dropout[0])),
                     "Parametrized"),
    "gamma": (lambda: HRNet(Gamma()), "it has parameters or buffers beside its layers'"),
    "residual": (lambda: HRNet(Residual()), "its forward computes something else"),
    "no factor": (lambda: HRNet(NoScale()), "its forward computes something else"),
    "wrong axis": (lambda: HRNet(WrongAxis()), "its forward computes something else"),
    "two heads": (lambda: HRNet(MultiHead()), "its forward computes something else"),
    "two results": (Fetching, "it returns a tuple"),
    "float64": (lambda: HRNet().double(), "the dtype of its convolutions"),
    "meta": (lambda: HRNet().to("meta"), "its parameters are on the meta device"),
}  # fmt: skip


@pytest.mark.parametrize(("build", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(build: Callable[[], nn.Module], reason: str) -> None:
    module = build()
    original = type(module)
    report = fold_ocr_modules(module)
    assert report.folded == ()
    assert reason in report.left_alone[0].reason
    assert type(module) is original
    assert "_ocr_kernels_cache" not in vars(module)


def test_wrong_weights_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that float16 cannot hold: BatchNorm divides by a tiny deviation."""
    module = trained(HRNet())
    norm: Any = module.conv_bn_dropout[1][0]
    norm.running_var.fill_(1e-12)
    norm.weight.data.fill_(1e4)
    norm.eps = 1e-12
    report = fold_ocr_modules(module.half())
    assert report.folded == ()


def test_arguments_are_checked() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        fold_ocr_modules(torch.zeros(1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="filter must be callable"):
        fold_ocr_modules(HRNet(), filter="f")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model must be"):
        unfold_ocr_modules(None)  # type: ignore[arg-type]


def test_nothing_else_is_mentioned() -> None:
    report = fold_ocr_modules(nn.Sequential(nn.Conv2d(1, 1, 1), modules.SpatialGather()))
    assert report.folded == report.left_alone == ()


def test_the_random_state_stays() -> None:
    model = reference.OCRHead(12, K, C, D)
    images = torch.randn(2, 12, 5, 4)
    before = torch.get_rng_state()
    fold_ocr_modules(model, example_inputs=images)
    assert torch.equal(torch.get_rng_state(), before)
