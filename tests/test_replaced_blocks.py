"""Step 4 of a model as one op: in eval mode, by its present weights, and by the module's own forward otherwise."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks import HEADS, C, D, Head, K, Label, Mmseg, inputs, ours, trained
from module_results import CountOps
from ops import native_on
from torch import Tensor, nn

from ocr_kernels import modules, record_maps, reference, replace_ocr_modules, restore_ocr_modules, use_backend
from ocr_kernels.core.backends import resolve_backend
from ocr_kernels.testing import assert_parity


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def replaced(module: nn.Module) -> nn.Module:
    report = replace_ocr_modules(module)
    assert [row.name for row in report.replaced if "block" in (row.computations or ())] == [""], report
    return module


def runs(module: nn.Module, *args: Any, **kwargs: Any) -> int:
    """How often a call runs the op of whole blocks."""
    with CountOps() as ops:
        module(*args, **kwargs)
    return ops.inference


@torch.no_grad()
def agree(module: nn.Module, plain: nn.Module, *args: Tensor) -> None:
    assert runs(module, *args) == 1
    torch.testing.assert_close(module(*args), plain(*args), rtol=1e-4, atol=1e-5)


def test_the_report_of_a_head() -> None:
    model = reference.OCRHead(12, K, C, D)
    images = torch.randn(2, 12, 5, 4)
    random = torch.get_rng_state()
    report = replace_ocr_modules(model, example_inputs=images)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert [(row.name, row.computations) for row in report.replaced] == [
        ("", ("logits",)),
        ("ocr_gather_head", ("gather",)),
        ("ocr_distri_head", ("block", "training")),
        ("ocr_distri_head.object_context_block", ("attention",)),
    ]
    assert "not faster" not in str(report).partition("ocr_gather_head")[0]  # of logits
    row = report.replaced[2]
    assert row.backend == resolve_backend(images.device)
    assert row.saved_bytes > report.replaced[1].saved_bytes
    assert 0 < row.max_error < 1e-5
    assert 0 < row.eager_error < 1e-5
    restore_ocr_modules(model)
    rest = replace_ocr_modules(model, filter=lambda module, name: name != "ocr_distri_head")
    assert [(row.name, row.reason) for row in rest.left_alone] == [("ocr_distri_head", "the filter says so")]


@torch.no_grad()
def test_one_call_turns_blocks_off() -> None:
    module = Head().eval()
    report = replace_ocr_modules(module, blocks=False)
    assert [row.computations for row in report.replaced] == [None]
    with CountOps() as ops:
        module(*inputs(module))
    assert (ops.attention, ops.inference) == (1, 0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_defaults_of_dtype_and_device_do_not_matter(dtype: torch.dtype) -> None:
    module = reference.SpatialOCR(C, D, 10).eval()
    args = inputs(module)
    plain = copy.deepcopy(module)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            replaced(module)
    finally:
        torch.set_default_dtype(before)
    agree(module, plain, *args)


def test_autocast() -> None:
    plain = ours().eval()
    module = replaced(copy.deepcopy(plain))
    args = inputs(plain)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert runs(module, *args) == 1
        found, expected = module(*args), plain(*args)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)
    agree(module, plain, *args)


@pytest.mark.parametrize("later", [False, True])
def test_float64(later: bool) -> None:
    """As a gradcheck of a model needs it; it may be made float64 before or after."""
    plain, args = reference.SpatialOCR(4, 3, 5), (torch.randn(2, 4, 3, 2), torch.randn(2, 4, 3, 1))
    plain.conv_bn_dropout[-1].p = 0.0  # the same at each call
    exact = [each.double().requires_grad_() for each in args]
    module = copy.deepcopy(plain)
    report = replace_ocr_modules(module if later else module.double(), example_inputs=args if later else tuple(exact))
    report.raise_if_incomplete()
    plain, module, args = plain.double(), module.double(), exact
    for training in (True, False):
        for each in (plain, module):
            each.train(training)
        plain.load_state_dict(module.state_dict())
        with CountOps() as ops:
            module(*args)
        assert ops.block == 1
        assert torch.autograd.gradcheck(module, args)
        torch.testing.assert_close(module(*args), plain(*args), rtol=1e-10, atol=1e-12)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert runs(module, *args) == 1
        assert module(*args).dtype == torch.float64
        torch.testing.assert_close(module(*args), plain(*args), rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_arguments_by_name_and_others() -> None:
    module = replaced(Label().eval())
    x, proxies = inputs(module)
    expected = module(x, proxies)
    assert torch.equal(module(x, proxies=proxies), expected)
    assert torch.equal(module(proxies=proxies, x=x), expected)
    assert runs(module, x=x, proxies=proxies) == 1
    assert runs(module, x, proxies, None) == 0
    torch.testing.assert_close(module(x, proxies, None), expected)


def test_gradients_are_its_own() -> None:
    plain = ours().eval()
    module = replaced(copy.deepcopy(plain))
    args = inputs(plain)
    assert runs(module, *args) == 0
    assert_parity(module, plain, tuple(t.clone().requires_grad_() for t in args))
    module.requires_grad_(False)
    assert runs(module, *args) == 1
    assert runs(module, *(t.clone().requires_grad_() for t in args)) == 0


@torch.no_grad()
def test_training_hooks_and_maps() -> None:
    module = replaced(ours(reference).eval())
    args = inputs(module)
    assert runs(module.train(), *args) == 0
    assert runs(module.eval(), *args) == 1
    calls: list[int] = []
    for handle in (
        module.object_context_block.register_forward_hook(lambda *_: calls.append(1)),
        nn.modules.module.register_module_forward_pre_hook(lambda *_: calls.append(2)),
    ):
        assert runs(module, *args) == 0
        handle.remove()
    assert calls
    assert runs(module, *args) == 1
    with record_maps() as maps:
        module(*args)
    assert len(maps.attention) == 1
    program = torch.export.export(module, args)
    assert not any("ocr_kernels" in str(node.target) for node in program.graph.nodes)
    traced = torch.jit.trace(module, args)
    assert "ocr_kernels::" not in str(traced.inlined_graph)


# Weights that change


def edit(module: Any) -> None:
    module.fuse[0].conv.weight.mul_(1.5)


def new_eps(module: Any) -> None:
    module.fuse[0].bn.eps = 0.5


def load(module: nn.Module) -> None:
    module.load_state_dict({k: 1.1 * v if v.is_floating_point() else v for k, v in module.state_dict().items()})


def unseen(module: Any) -> None:
    """PyTorch does not count changes of `data`; a call in training may come with them."""
    module.fuse[0].conv.weight.data.mul_(2)
    module.train()(*inputs(module))
    module.eval()


@torch.enable_grad()
def fused_step(module: nn.Module) -> None:
    """In eval mode throughout; PyTorch does not count what a fused step changes."""
    torch.manual_seed(1)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1, fused=True)
    module(*inputs(module)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("change", [edit, new_eps, load, unseen, fused_step])
@torch.no_grad()
def test_no_weight_is_stale(change: Callable[[nn.Module], None]) -> None:
    plain = Head().eval()
    module = replaced(copy.deepcopy(plain))
    args = inputs(plain)
    before = module(*args)
    for changed in (module, plain):
        torch.manual_seed(2)
        change(changed)
    assert not torch.equal(module(*args), before)
    agree(module, plain, *args)


@torch.no_grad()
def test_order_of_layers_is_seen() -> None:
    """The same layers under the same names, which a Sequential runs in another order."""
    plain = ours(reference).eval()
    for norm in (plain.object_context_block.f_pixel[1][0], plain.object_context_block.f_pixel[3][0]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    module = replaced(copy.deepcopy(plain))
    args = inputs(plain)
    before = module(*args)
    for changed in (module, plain):
        layers = changed.object_context_block.f_pixel._modules
        for name in "321":
            layers[name] = layers.pop(name)
    assert not torch.equal(module(*args), before)
    agree(module, plain, *args)


@torch.no_grad()
def test_a_tensor_of_one_element_is_seen_when_it_changes() -> None:
    """Under whose name another one stood before, that was equal to it: values are what is compared then."""
    plain = reference.SpatialOCR(C, D, 1).eval()
    module = replaced(copy.deepcopy(plain))
    args = inputs(plain)
    module(*args)
    weight = nn.Parameter(torch.ones(1))  # of a norm of one channel
    for changed in (module, plain):
        changed.conv_bn_dropout[1][0].weight = weight
    agree(module, plain, *args)
    before = module(*args)
    weight.fill_(3)
    assert not torch.equal(module(*args), before)
    agree(module, plain, *args)


@native_on("cpu")
@torch.no_grad()
def test_no_weight_is_stale_after_a_step_on_a_backend_without_blocks() -> None:
    plain = Head().eval()
    module = replaced(copy.deepcopy(plain))
    args = inputs(plain)
    module(*args)
    fused_step(plain)
    with use_backend("native"):
        fused_step(module)
    agree(module, plain, *args)


# Copies and programs


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, copy.copy, lambda module: pickle.loads(pickle.dumps(module)), saved],
    ids=["deepcopy", "copy", "pickle", "torch.save"],
)
@torch.no_grad()
def test_copies(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    plain = Mmseg().eval()
    module = replaced(copy.deepcopy(plain))
    args = inputs(plain)
    for duplicated in (duplicate(module), duplicate(duplicate(module))):
        agree(duplicated, plain, *args)
        if duplicate is not copy.copy:
            duplicated.fuse[0].conv.weight.mul_(2)
            assert not torch.equal(duplicated(*args), module(*args))
            agree(module, plain, *args)
            assert restore_ocr_modules(duplicated) == [""]
            assert runs(duplicated, *args) == 0
    assert restore_ocr_modules(module) == [""]
    assert vars(module).keys() == vars(plain).keys()
    assert runs(module, *args) == 0


@torch.no_grad()
def test_a_replica_has_weights_of_its_own() -> None:
    module = replaced(Head().eval())
    args = inputs(module)
    expected = module(*args)
    replica = module._replicate_for_data_parallel()
    replica._modules = copy.deepcopy(module)._modules  # as nn.DataParallel gives each its own
    replica.fuse[0].conv.weight.mul_(2)
    assert runs(replica, *args) == 1
    assert not torch.equal(replica(*args), expected)
    assert torch.equal(module(*args), expected)


@pytest.mark.parametrize("build", [Head, Mmseg, ours])
@pytest.mark.parametrize("backend", ["reference", None])
@torch.no_grad()
def test_compiled_programs_fold_each_time(build: Callable[[], nn.Module], backend: str | None) -> None:
    """For a CPU, what Inductor makes of the formula; the op if somebody names a backend. Weights stay live."""
    plain = build().eval()
    module = replaced(copy.deepcopy(plain))
    args = inputs(plain)
    graphs: list[torch.fx.GraphModule] = []
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    with use_backend(backend):
        torch.testing.assert_close(compiled(*args), plain(*args), rtol=1e-4, atol=1e-5)
        (graph,) = graphs
        targets = {str(node.target) for node in graph.graph.nodes}
        assert ("ocr_kernels.ocr_block_inference.default" in targets) == (backend is not None)
        assert not any("batch_norm" in target for target in targets)
        for changed in (plain, module):
            next(changed.parameters()).mul_(2)
        torch.testing.assert_close(compiled(*args), plain(*args), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_compiled_gather_beside_a_block(blocks: bool, memory_format: torch.memory_format) -> None:
    """For a CPU it is an op where images are channels last and the block is one; a block to logits is one anyway."""
    plain = reference.OCRHead(12, K, C, D).eval().to(memory_format=memory_format)
    model = copy.deepcopy(plain)
    replace_ocr_modules(model, blocks=blocks)
    images = torch.randn(2, 12, 6, 5).contiguous(memory_format=memory_format)
    graphs: list[torch.fx.GraphModule] = []
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    torch.testing.assert_close(compiled(images), plain(images), rtol=1e-4, atol=1e-5)
    (graph,) = graphs
    targets = {str(node.target).partition(".")[2] for node in graph.graph.nodes}
    assert ("spatial_gather.default" in targets) == (blocks and memory_format == torch.channels_last)
    assert ("ocr_block_inference.default" in targets) == blocks


# Training

NOT_IN_TRAINING = {
    "linear layers": "more than layers, norms and slopes",
    "norms on regions": "more than layers, norms and slopes",
    "sum": "adds up projections of pixels and contexts",
    "residual": "gamma takes part, in no layer",
    "learned temperature": "temperature takes part, in no layer",
    "ABN": "a ActivatedNorm, is no layer",
    "frozen": "a FrozenNorm, is no layer",
    "parametrized": "a ParametrizationList, is no layer",
    **dict.fromkeys(
        ("scale", "scale, reference", "pooled", "pooled sideways", "pooled volume"), "attend at a lower resolution"
    ),
    **dict.fromkeys((name for name in HEADS if name.startswith("joined by")), "joins by a convolution that is not 1x1"),
}


@pytest.mark.parametrize("name", HEADS)
def test_training(name: str) -> None:
    plain = HEADS[name]().train()
    module = copy.deepcopy(plain)
    report = replace_ocr_modules(module)
    (row,) = (row for row in report.replaced if "block" in (row.computations or ()))
    assert ("training" in row.computations) == (name not in NOT_IN_TRAINING), report
    assert NOT_IN_TRAINING.get(name, "") in str(row.notes)
    args = inputs(plain)
    found, expected = (step(each, args, name not in NOT_IN_TRAINING) for each in (module, plain))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    for buffer, other in zip(module.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=1e-4, atol=1e-5)


def step(module: nn.Module, args: tuple[Tensor, Tensor], is_one_op: bool) -> list[Tensor]:
    """The output, and gradients, of one step with dropout."""
    args = tuple(arg.clone().requires_grad_() for arg in args)
    torch.manual_seed(1)
    with CountOps() as ops:
        out = module(*args)
    assert ops.block in (0, is_one_op or isinstance(module, modules.SpatialOCR))
    wanted = [*args, *module.parameters()]
    return [out, *torch.autograd.grad(out.square().sum(), wanted, allow_unused=True, materialize_grads=True)]


UNTRACKED = {
    "all": (lambda name: True, nn.BatchNorm2d),
    "of pixels": (lambda name: not name.startswith(("phi", "g")), nn.BatchNorm2d),
    "of regions": (lambda name: name.startswith(("phi", "g")), nn.BatchNorm2d),
    "the last": (lambda name: name.startswith("fuse"), nn.BatchNorm2d),
    "of processes": (lambda name: True, nn.SyncBatchNorm),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("which", UNTRACKED)
def test_norms_that_track_nothing(which: str, compiled: bool) -> None:
    """They take the statistics of the batch in eval mode, too: nothing can be folded, and both modes are one op."""
    takes, kind = UNTRACKED[which]
    plain: Any = trained(Head(norm=kind))
    plain.fuse[1].p = 0.0
    for name, part in plain.named_modules():
        if isinstance(part, kind) and takes(name):
            part.track_running_stats = False
            part.running_mean = part.running_var = part.num_batches_tracked = None
    module = replaced(copy.deepcopy(plain))
    ran: list[torch.fx.GraphModule] = []
    if compiled:
        torch._dynamo.reset()
        watched = lambda graph, _: lambda *args: ran.append(graph) or graph(*args)  # noqa: E731
        run = torch.compile(module, fullgraph=True, backend=watched)
    args = inputs(plain)
    for training in (True, False, True):
        module.train(training), plain.train(training)
        for grad in (True, False):
            is_folded = which == "of regions" and not (training or grad)
            given = [tuple(arg.clone().requires_grad_(grad) for arg in args) for _ in range(2)]
            with torch.set_grad_enabled(grad):
                if compiled:
                    found = run(*given[0])
                    targets = [str(node.target).partition(".")[2] for node in ran[-1].graph.nodes]
                    assert targets.count("ocr_block.default") == (not is_folded)  # what is, is left to a compiler
                else:
                    with CountOps() as ops:
                        found = module(*given[0])
                    assert (ops.block, ops.inference, ops.attention) == (not is_folded, is_folded, 0)
                expected = plain(*given[1])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            if grad:
                wanted = [
                    torch.autograd.grad(out.square().sum(), [*inputs, *each.parameters()], materialize_grads=True)
                    for out, inputs, each in zip((found, expected), given, (module, plain), strict=True)
                ]
                torch.testing.assert_close(*wanted, rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)


def test_norms_that_track_nothing_until_they_do() -> None:
    plain = Head(norm=functools.partial(nn.BatchNorm2d, track_running_stats=False)).eval()
    module = replaced(copy.deepcopy(plain))
    args = inputs(plain)
    norm = trained(nn.BatchNorm2d(C))
    for each in (module, plain):
        each.out.bn = copy.deepcopy(norm)
    with torch.no_grad():
        torch.testing.assert_close(module(*args), plain(*args), rtol=1e-4, atol=1e-5)
        model = nn.Sequential(module)
        torch.testing.assert_close(copy.deepcopy(model)[0](*args), plain(*args), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="one pixel"):
        replaced(Head(norm=functools.partial(nn.BatchNorm2d, track_running_stats=False)))(
            torch.randn(1, C, 1, 1), torch.randn(1, C, 2, 1)
        )


class NormFirst(nn.Module):
    """A layer whose parts are registered in another order than they run."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm, self.convolution = nn.BatchNorm1d(outputs), nn.Conv1d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.convolution(x)))


class Rows(nn.Module):
    """Step 4 on pixels `[B, C, N]`, with a dropout of its own."""

    def __init__(self, dropout: nn.Module) -> None:
        super().__init__()
        self.phi, self.psi, self.delta, self.rho = (NormFirst(*sizes) for sizes in ((8, 4), (8, 4), (8, 4), (4, 8)))
        self.fuse, self.dropout = NormFirst(16, 6), dropout

    def forward(self, feats: Tensor, regions: Tensor) -> Tensor:
        pixels = feats.flatten(2)
        weights = torch.matmul(self.psi(regions).mT, self.phi(pixels)).softmax(1)
        context = self.rho(torch.matmul(self.delta(regions), weights))
        return self.dropout(self.fuse(torch.cat([pixels, context], 1)).unflatten(2, feats.shape[2:]))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("dropout", "sides"), [(nn.Dropout2d(0.5), (5, 4)), (nn.Dropout3d(0.5), (3, 4, 2))])
def test_layers_whose_norms_are_registered_first(dropout: nn.Module, sides: tuple[int, ...]) -> None:
    plain = Rows(dropout)
    module = copy.deepcopy(plain)
    args = torch.randn(2, 8, *sides), torch.randn(2, 8, 5)
    (row, *_) = replace_ocr_modules(module, example_inputs=args).replaced
    assert row.computations is not None
    assert "training" in row.computations
    results = []
    for each in (module, plain):
        torch.manual_seed(3)
        z = each(*args)
        results.append([z, *torch.autograd.grad(z.square().sum(), list(each.parameters())), *each.buffers()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_norm_of_pixels_and_of_regions_is_named() -> None:
    module = Rows(nn.Identity())
    module.psi.norm = module.phi.norm
    (row, *_) = replace_ocr_modules(module, example_inputs=(torch.randn(2, 8, 5, 4), torch.randn(2, 8, 5))).replaced
    assert "no block in training: phi.norm is a norm of pixels and of regions" in row.notes


class BySize(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if x.shape[-1] > 6 else 1)


@torch.no_grad()
def test_a_layer_that_came_later_is_checked_too() -> None:
    plain: Any = trained(Head())
    module: Any = replaced(copy.deepcopy(plain))
    for each in (module, plain):
        each.out = BySize(*copy.deepcopy(plain.out).children()).eval()
    regions = torch.randn(2, C, K, 1)
    for side in (3, 9, 12):
        feats = torch.randn(2, C, side, side)
        torch.testing.assert_close(module(feats, regions), plain(feats, regions), rtol=1e-4, atol=1e-5)


def test_a_mode_changes_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is replaced, trained and validated: its blocks are not looked for again."""
    plain: Any = Head()
    module: Any = replaced(copy.deepcopy(plain)).train()
    monkeypatch.setattr("ocr_kernels.models.block_cache.plan_block", lambda *_, **__: pytest.fail("planned anew"))
    args = inputs(plain)
    for _ in range(2):
        module(*args).sum().backward()
        plain.load_state_dict(module.state_dict())
        agree(module.eval(), plain.eval(), *args)
        module.train(), plain.train()
    module.eval().fuse[1].train()
    with torch.no_grad():
        assert runs(module, *args) == 0
        module.eval()
        agree(module, plain.eval(), *args)


@native_on("cpu")
def test_a_backend_that_has_no_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module's own forward runs on it."""
    monkeypatch.setattr("ocr_kernels.block.registration.BACKENDS", ("reference", "triton"))  # as on a GPU
    plain = Head().train()
    module = replaced(copy.deepcopy(plain))
    args = inputs(plain)
    for mode in ("train", "eval"):
        getattr(module, mode)()
        with use_backend("native"), torch.set_grad_enabled(mode == "train"), CountOps() as ops:
            module(*args)
        assert (ops.attention, ops.block, ops.inference) == (1, 0, 0)


def test_what_changes_in_training_is_seen() -> None:
    plain = Head().train()
    module = replaced(copy.deepcopy(plain))
    args = inputs(plain)

    def is_one_op() -> bool:
        with CountOps() as ops:
            torch.manual_seed(0)
            found = module(*args)
        torch.manual_seed(0)
        torch.testing.assert_close(found, plain(*args), rtol=1e-4, atol=1e-4)
        return bool(ops.block)

    assert is_one_op()
    calls: list[Any] = []
    handle = module.theta[0].conv.register_forward_hook(lambda *_: calls.append(1))
    assert not is_one_op()
    assert calls
    handle.remove()
    assert is_one_op()
    handle = module.theta[0].conv.register_full_backward_hook(lambda *_: None)
    assert not is_one_op()
    handle.remove()
    assert is_one_op()
    for each in (module, plain):
        each.theta[0].bn.eps = 0.5
    assert is_one_op()  # planned anew
    for each in (module, plain):
        each.theta[0].bn.eps = 1e-5
        each.theta[0].bn.eval()
        each.fuse[1].p = 0.9
    is_one_op()
    for each in (module, plain):
        each.theta[0].bn.train()
        each.fuse[1].p = 0.3
    assert is_one_op()
    torch.manual_seed(3)
    layer = nn.Conv2d(C, D, 1)
    for each in (module, plain):
        each.theta = copy.deepcopy(layer)  # under whose path there is no layer that was planned
    assert is_one_op()
    restore_ocr_modules(module)
    assert not is_one_op()


@pytest.mark.parametrize("training", [True, False])
def test_weights_that_are_channels_last(training: bool) -> None:
    """As `model.to(memory_format=torch.channels_last)` leaves them."""
    torch.manual_seed(0)
    plain = reference.SpatialOCR(16, 8, 12, dropout=0.0).to(memory_format=torch.channels_last).train(training)
    replaced = copy.deepcopy(plain)
    rows = {row.name: row.computations for row in replace_ocr_modules(replaced).replaced}
    assert rows[""] == ("block", "training"), rows
    regions = torch.randn(2, 16, 5, 1)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        feats = torch.randn(2, 16, 9, 7).contiguous(memory_format=memory_format)
        with torch.set_grad_enabled(training), CountOps() as ops:
            found = replaced(feats, regions)
        assert (ops.block, ops.inference) == ((1, 0) if training else (0, 1))
        torch.testing.assert_close(found, plain(feats, regions), rtol=1e-4, atol=1e-5)
        assert found.is_contiguous(memory_format=memory_format)


class InFloat32(reference.ObjectAttentionBlock):
    """Its softmax is float32 whatever the model is."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = (self.key_channels**-0.5 * torch.matmul(query.flatten(2).mT, key)).float().softmax(-1).to(value.dtype)
        return torch.matmul(weights, value.mT).mT.reshape(query.shape)


def test_a_softmax_in_float32_is_a_block_in_training() -> None:
    module = type("Block", (reference.SpatialOCR,), {"attention": InFloat32})(8, 6, 10)
    (row, *_) = replace_ocr_modules(module, example_inputs=(torch.randn(2, 8, 5, 4), torch.randn(2, 8, 3, 1))).replaced
    assert {"block", "training"} <= set(row.computations or ()), row.notes


class GathersItself(nn.Module):
    """With step 4 in one module beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.aux, self.ocr = nn.Conv2d(8, 5, 1), Rows(nn.Identity())

    def forward(self, feats: Tensor) -> Tensor:
        weights = self.aux(feats).flatten(2).softmax(2)
        regions = torch.matmul(weights, feats.flatten(2).mT).mT
        return self.ocr(feats, regions)


def test_a_block_inside_of_what_gathers_is_a_block() -> None:
    module, feats = GathersItself().eval(), torch.randn(2, 8, 5, 4)
    assert "block" in str(replace_ocr_modules(module, example_inputs=feats))
    with CountOps() as ops, torch.no_grad():
        module(feats)
    assert (ops.gather, ops.inference, ops.attention) == (1, 1, 0)


def test_what_the_filter_leaves_out_is_left_alone_inside_of_others() -> None:
    module, feats = GathersItself().eval(), torch.randn(2, 8, 5, 4)
    replace_ocr_modules(module, example_inputs=feats, filter=lambda _, name: name != "ocr")
    with CountOps() as ops, torch.no_grad():
        module(feats)
    assert (ops.gather, ops.inference, ops.attention) == (1, 0, 0)


def test_masks_drawn_after_the_gather_are_the_same() -> None:
    """Random numbers follow the order of memory, so regions have that of the plain product."""

    class Gather(nn.Module):
        def forward(self, feats: Tensor, logits: Tensor) -> Tensor:
            weights = logits.flatten(2).softmax(2)
            return F.dropout(torch.matmul(weights, feats.flatten(2).mT).permute(0, 2, 1).unsqueeze(3), 0.5, True)

    plain, args = Gather(), (torch.randn(2, 8, 5, 4), torch.randn(2, 5, 5, 4))
    module = copy.deepcopy(plain)
    assert replace_ocr_modules(module, example_inputs=args)
    results = []
    for each in (module, plain):
        torch.manual_seed(1)
        results.append(each(*args))
    torch.testing.assert_close(*results)


def test_an_attribute_that_changes_in_place_before_the_softmax() -> None:
    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("memory", torch.randn(2, 6, 4))

        def forward(self, query: Tensor, key: Tensor) -> Tensor:
            scores = torch.matmul(query.flatten(2).mT, self.memory)
            if self.training:
                self.memory *= 0.9
            return torch.matmul(scores.softmax(2), key.mT)

    plain, args = Memory().eval(), (torch.randn(2, 6, 5, 4), torch.randn(2, 6, 4))
    module = copy.deepcopy(plain)
    replace_ocr_modules(module, example_inputs=args)
    for train in (False, True, True):
        torch.testing.assert_close(module.train(train)(*args), plain.train(train)(*args))
    torch.testing.assert_close(module.memory, plain.memory)
