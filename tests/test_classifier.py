"""A classifier that alone takes the z of a block: one op to logits, and what nothing may be joined for."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from blocks import OUT, C, Head, Pooled, ours
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ocr_kernels import reference, replace_ocr_modules, restore_ocr_modules
from ocr_kernels.testing import lay_out

L, K = 5, 4


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


class Network(nn.Module):
    """What the heads of HRNet and its relatives do."""

    def __init__(self, block: Callable[[], nn.Module] = ours, classifier: nn.Module | None = None) -> None:
        super().__init__()
        self.aux = nn.Conv2d(C, K, 1)
        self.gather = reference.SpatialGather()
        self.block = block()
        self.classifier = nn.Conv2d(OUT, L, 1) if classifier is None else classifier

    def forward(self, feats: Tensor) -> Any:
        aux = self.aux(feats)
        context = self.gather(feats, aux)
        feats = self.block(feats, context)
        out = self.classifier(feats)
        return [aux, out]


class AtOnce(Network):
    def forward(self, feats: Tensor) -> Any:
        aux = self.aux(feats)
        return self.classifier(self.block(feats, self.gather(feats, aux)))


class InAList(Network):
    def forward(self, feats: Tensor) -> Any:
        aux = self.aux(feats)
        context = self.gather(feats, aux)
        return [aux, self.classifier(self.block(feats, context))]


class SameName(Network):
    def forward(self, x: Tensor) -> Any:
        x = self.block(x, self.gather(x, self.aux(x)))
        x = self.classifier(x)
        return x * 2


class ByKeyword(Network):
    def forward(self, feats: Tensor) -> Any:
        if feats.numel() > 1:
            z = self.block(feats, proxy_feats=self.gather(feats, self.aux(feats)))
            return self.classifier(z)
        return feats


class ReadLater(Network):
    def forward(self, feats: Tensor) -> Any:
        z = self.block(feats, self.gather(feats, self.aux(feats)))
        out = self.classifier(z)
        return out, z


class ReadInPlace(Network):
    def forward(self, feats: Tensor) -> Any:
        z = self.block(feats, self.gather(feats, self.aux(feats)))
        out = self.classifier(z)
        z += 1
        return out


class ReadTwice(Network):
    def forward(self, feats: Tensor) -> Any:
        out = {}
        z = self.block(feats, self.gather(feats, self.aux(feats)))
        out[z] = self.classifier(z)
        return list(out.values())


class InALoop(Network):
    def forward(self, feats: Tensor) -> Any:
        z = out = feats
        for _ in range(2):
            seen = z
            z = self.block(feats, self.gather(feats, self.aux(feats)))
            out = self.classifier(z)
        return out, seen


class InAFunction(Network):
    def forward(self, feats: Tensor) -> Any:
        later = lambda: z  # noqa: E731
        z = self.block(feats, self.gather(feats, self.aux(feats)))
        out = self.classifier(z)
        return out, later()


class Between(Network):
    def forward(self, feats: Tensor) -> Any:
        z = self.block(feats, self.gather(feats, self.aux(feats)))
        feats.zero_()
        return self.classifier(z)


class Stored(Network):
    def forward(self, feats: Tensor) -> Any:
        self.z = self.block(feats, self.gather(feats, self.aux(feats)))
        return self.classifier(self.z)


JOINED: dict[str, Callable[[], Network]] = {
    "HRNet": Network,
    "other layers": lambda: Network(Head),
    "at once": AtOnce,
    "in a list": InAList,
    "one name": SameName,
    "keyword": ByKeyword,
    "no bias": lambda: Network(classifier=nn.Conv2d(OUT, L, 1, bias=False)),
    "dropout": lambda: Network(classifier=nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(OUT, L, 1), nn.Identity())),
}
APART: dict[str, Callable[[], Network]] = {
    "read later": ReadLater,
    "read in place": ReadInPlace,
    "read twice": ReadTwice,
    "in a loop": InALoop,
    "in a function": InAFunction,
    "between": Between,
    "stored": Stored,
    "3x3": lambda: Network(classifier=nn.Conv2d(OUT, L, 3, padding=1)),
    "stride": lambda: Network(classifier=nn.Conv2d(OUT, L, 1, stride=2)),
    "groups": lambda: Network(classifier=nn.Conv2d(OUT, L * 2, 1, groups=2)),
    "padding": lambda: Network(classifier=nn.Conv2d(OUT, L, 1, padding=1)),
    "two layers": lambda: Network(classifier=nn.Sequential(nn.Conv2d(OUT, L, 1), nn.ReLU())),
    "norm": lambda: Network(classifier=nn.BatchNorm2d(OUT)),
    "lower resolution": lambda: Network(Pooled),
}


class Outputs(TorchDispatchMode):
    """What each call of the op was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.ocr_kernels.ocr_block_inference.default:
            self.seen.append(args[6])
        return func(*args, **(kwargs or {}))


def outputs_of(network: nn.Module, feats: Tensor) -> list[str]:
    with Outputs() as outputs:
        network(feats)
    return outputs.seen


def replaced(build: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module, Tensor]:
    network = build().eval()
    for name, buffer in network.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    plain = copy.deepcopy(network)
    replace_ocr_modules(network)
    return network, plain, torch.randn(2, C, 6, 4)


def agree(network: nn.Module, plain: nn.Module, feats: Tensor) -> None:
    torch.testing.assert_close(network(feats.clone()), plain(feats.clone()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", JOINED.values(), ids=JOINED)
@torch.no_grad()
def test_it_is_one_op(build: Callable[[], Network]) -> None:
    network, plain, feats = replaced(build)
    assert outputs_of(network, feats) == ["logits"]
    agree(network, plain, feats)
    plain.load_state_dict(network.state_dict())
    network.double(), plain.double()
    agree(network, plain, feats.double())


@pytest.mark.parametrize("build", APART.values(), ids=APART)
@torch.no_grad()
def test_what_else_reads_it_gets_it(build: Callable[[], Network]) -> None:
    network, plain, feats = replaced(build)
    assert "logits" not in outputs_of(network, feats.clone())
    agree(network, plain, feats)


@torch.no_grad()
def test_report_and_undo() -> None:
    network = Network()
    rows = {row.name: row for row in replace_ocr_modules(network, example_inputs=torch.randn(1, C, 6, 4)).replaced}
    assert rows[""].computations == ("logits",)
    assert rows[""].max_error is not None
    assert rows[""].eager_error is not None
    assert "" in restore_ocr_modules(network)
    assert "forward" not in vars(network)
    assert all(row.name for row in replace_ocr_modules(network, filter=lambda _, name: name != "").replaced)
    assert "forward" not in vars(network)


@torch.no_grad()
def test_changes_are_seen() -> None:
    network, plain, feats = replaced(Network)
    outputs_of(network, feats)
    for each in (network, plain):
        each.classifier.weight.mul_(2)
        each.classifier.bias = None
    agree(network, plain, feats)
    assert outputs_of(network, feats) == ["logits"]
    calls: list[Any] = []
    handle = network.classifier.register_forward_hook(lambda *_: calls.append(1))
    agree(network, plain, feats)
    assert calls
    handle.remove()
    handle = network.block.register_forward_hook(lambda *_: calls.append(1))
    assert "logits" not in outputs_of(network, feats)
    assert len(calls) == 2
    handle.remove()
    for each in (network, plain):
        each.classifier = nn.Conv2d(OUT, L, 3)
        torch.manual_seed(1)
        nn.init.normal_(each.classifier.weight)
        nn.init.zeros_(each.classifier.bias)
    agree(network, plain, feats)


def test_gradients_are_not_lost() -> None:
    network, plain, feats = replaced(Network)
    for each in (network, plain):
        each.block.requires_grad_(False)
    with torch.no_grad():
        assert outputs_of(network, feats) == ["logits"]
    for each in (network, plain):
        each(feats)[1].sum().backward()
    torch.testing.assert_close(network.classifier.weight.grad, plain.classifier.weight.grad)
    network.train()
    network(feats)[1].sum().backward()


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
@torch.no_grad()
def test_copies(twin: Callable[[nn.Module], nn.Module]) -> None:
    network, plain, feats = replaced(Network)
    network = twin(network)
    agree(network, plain, feats)
    assert outputs_of(network, feats) == ["logits"]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_formats_and_autocast(layout: Any, dtype: torch.dtype) -> None:
    network, plain, feats = replaced(Network)
    feats = lay_out(feats, layout)
    with torch.autocast("cpu", dtype):
        found, expected = network(feats)[1], plain(feats)[1]
    assert (found.dtype, found.stride()) == (dtype, expected.stride())
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)
    network, plain = network.to(dtype), plain.to(dtype)
    torch.testing.assert_close(network(feats.to(dtype))[1], plain(feats.to(dtype))[1], rtol=3e-2, atol=3e-2)
    with pytest.raises(RuntimeError):
        network.classifier.float()(network.block(feats.to(dtype), torch.zeros(2, C, K, 1, dtype=dtype)))
    with pytest.raises(RuntimeError):
        network(feats.to(dtype))


@torch.no_grad()
def test_compiled_whole() -> None:
    network, plain, feats = replaced(Network)
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    agree(compiled, plain, feats)
