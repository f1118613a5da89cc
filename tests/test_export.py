"""Where PyTorch takes a model: torch.compile, torch.export, AOTInductor, torch.jit.trace and ONNX."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh import run
from module_results import assert_same, results
from ops import GATHER, Op, all_dtypes, both_ops
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

import ocr_kernels
from ocr_kernels import modules, reference
from ocr_kernels.testing import LAYOUTS, Layout

SIZES = ((2, 12, 6, 10), (3, 12, 7, 9), (4, 12, 11, 5))  # equal sizes would share a symbol
DYNAMIC = ({0: Dim("batch", min=1), 2: Dim("height", min=3), 3: Dim("width", min=3)},)
OURS = ["ocr_kernels.pixel_region_attention.default", "ocr_kernels.spatial_gather.default"]

heads = pytest.mark.parametrize("kind", ["replaced", "ours"])
compiled_heads = pytest.mark.parametrize(
    "kind", ["ours", *(pytest.param(kind, marks=pytest.mark.wide) for kind in ("replaced", "plain"))]
)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def head(kind: str) -> nn.Module:
    """A head in plain PyTorch, the same replaced, or ours; with the same parameters after the same seed."""
    model = (modules if kind == "ours" else reference).OCRHead(12, 4, 8, 6).eval()
    if kind == "replaced":
        assert len(ocr_kernels.replace_ocr_modules(model).replaced) == 4
    return model


class Call(nn.Module):
    """A function as a module, which is what torch.export takes."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def our_ops(program: ExportedProgram) -> list[str]:
    return sorted(str(node.target) for node in program.graph.nodes if "ocr_kernels" in str(node.target))


def assert_agrees(found: Callable[..., Any], expected: nn.Module, sizes: tuple[tuple[int, ...], ...] = SIZES) -> None:
    with torch.no_grad():
        for size in sizes:
            feats = torch.randn(size)
            torch.testing.assert_close(list(found(feats)), list(expected(feats)))


# torch.compile


@pytest.mark.slow
@compiled_heads
def test_compiled_heads_train(kind: str) -> None:
    model = head(kind).double().train()
    feats = torch.randn(SIZES[0], dtype=torch.float64)
    for dropout in (m for m in model.modules() if isinstance(m, nn.Dropout2d)):
        dropout.p = 0.0
    expected = results(model, feats)
    model.compile(fullgraph=True)
    assert_same(results(model, feats), expected, 1e-10)


def assert_one_graph(call: Callable[..., Any], backend: str, marked: bool, draw: Callable[..., Any]) -> None:
    """Values and gradients of `call`, compiled once, at every size."""
    compiled = torch.compile(call, fullgraph=True, dynamic=None if marked else True, backend=backend)

    def evaluate(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> list[Tensor]:
        outputs = pytree.tree_leaves(function(*inputs))
        return [*outputs, *torch.autograd.grad(sum(out.square().sum() for out in outputs), inputs)]

    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, _, height, width in SIZES:
            inputs = draw(batch, height, width)
            for tensor in inputs if marked else ():
                torch._dynamo.mark_dynamic(tensor, (0, 2, 3) if tensor.dim() == 4 else 0)
            torch.testing.assert_close(evaluate(compiled, inputs), evaluate(call, inputs), rtol=1e-9, atol=1e-9)


@compiled_heads
@pytest.mark.parametrize("marked", [True, False], ids=["mark_dynamic", "dynamic=True"])
def test_heads_compile_once_for_every_size(kind: str, marked: bool) -> None:
    """Not with Inductor, which compiles a convolution on a CPU for one size."""
    assert_one_graph(
        head(kind).double(),
        "aot_eager",
        marked,
        lambda batch, *size: (torch.randn(batch, 12, *size, dtype=torch.float64, requires_grad=True),),
    )


@both_ops
@pytest.mark.parametrize("marked", [True, False], ids=["mark_dynamic", "dynamic=True"])
def test_functions_compile_once_for_every_size(op: Op, marked: bool) -> None:
    def draw(batch: int, *size: int) -> tuple[Tensor, ...]:
        options = {"channels": 13, "regions": 8, "dtype": torch.float64, "requires_grad": True}
        return op.inputs(batch=batch, spatial=size, **options)

    assert_one_graph(op.call, "inductor", marked, draw)


# torch.export


@heads
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "nonstrict"])
@pytest.mark.parametrize("dynamic_shapes", [None, DYNAMIC], ids=["static", "dynamic"])
def test_export(kind: str, strict: bool, dynamic_shapes: Any) -> None:
    """A replaced head is exported in plain operations, for anywhere; ours keeps the ops, for where this library is."""
    model = head(kind)
    program = torch.export.export(model, (torch.randn(SIZES[0]),), dynamic_shapes=dynamic_shapes, strict=strict)
    assert our_ops(program) == (OURS if kind == "ours" else [])
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for version in (program, torch.export.load(file), program.run_decompositions()):
        assert_agrees(version.module(), model, SIZES if dynamic_shapes else SIZES[:1])


@both_ops
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "nonstrict"])
def test_export_of_the_functions(op: Op, strict: bool) -> None:
    sizes = {0: Dim("batch", min=1), 2: Dim("height", min=2), 3: Dim("width", min=2)}
    shapes = (sizes, *((sizes,) if op is GATHER else ({0: sizes[0]}, {0: sizes[0]})))
    program = torch.export.export(
        Call(op.call), op.inputs(batch=2, spatial=(7, 9)), dynamic_shapes=(shapes,), strict=strict
    )
    assert our_ops(program) == [f"ocr_kernels.{op.name}.default"]
    for batch, spatial in ((2, (7, 9)), (1, (4, 20))):
        inputs = op.inputs(batch=batch, spatial=spatial)
        torch.testing.assert_close(program.module()(*inputs), op.call(*inputs))


@pytest.mark.parametrize("dynamic_shapes", [None, DYNAMIC], ids=["static", "dynamic"])
def test_an_exported_program_can_do_without_the_ops(dynamic_shapes: Any) -> None:
    model = head("ours")
    program = torch.export.export(model, (torch.randn(SIZES[0]),), dynamic_shapes=dynamic_shapes)
    plain = program.run_decompositions(ocr_kernels.decompositions())
    assert our_ops(plain) == []
    assert_agrees(plain.module(), model, SIZES if dynamic_shapes else SIZES[:1])


@both_ops
@all_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_decompositions_give_what_the_ops_give(op: Op, dtype: torch.dtype, layout: Layout) -> None:
    inputs = op.inputs(channels=4, regions=3, spatial=(2, 5), dtype=dtype, layout=layout)
    arguments = *inputs, 0.5, "reference"
    found = ocr_kernels.decompositions()[op.overload](*arguments)
    expected = op.overload(*arguments)
    torch.testing.assert_close(found, expected)
    assert [t.stride() for t in pytree.tree_leaves(found)] == [t.stride() for t in pytree.tree_leaves(expected)]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="AOTInductor needs a C++ compiler")
@pytest.mark.parametrize("kind", ["ours", pytest.param("replaced", marks=pytest.mark.wide)])
def test_aot_inductor(kind: str, tmp_path: Path) -> None:
    """With the ops in it, a package runs in a Python that has imported this library."""
    model = head(kind)
    program = torch.export.export(model, (torch.randn(SIZES[0]),), dynamic_shapes=DYNAMIC)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "head.pt2"))
    assert_agrees(torch._inductor.aoti_load_package(package), model)


# TorchScript


@heads
def test_trace(kind: str) -> None:
    model = head(kind)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, torch.randn(SIZES[0])), file)
    file.seek(0)
    traced = torch.jit.load(file)
    assert ("ocr_kernels::" in str(traced.inlined_graph)) == (kind == "ours")
    assert_agrees(traced, model)


@pytest.mark.parametrize("kind", [modules.OCRHead, modules.SpatialGather, modules.ObjectAttentionBlock])
def test_scripting_says_what_to_do(kind: type[torch.nn.Module]) -> None:
    module = kind(12, 4) if kind is not modules.SpatialGather else kind()
    with pytest.raises(RuntimeError, match=r"use torch\.jit\.trace, or script ocr_kernels\.reference"):
        torch.jit.script(module)


def test_the_first_call_of_a_process_may_be_traced() -> None:
    code = """
import torch, ocr_kernels
x = torch.randn(1, 3, 4)
print("ocr_kernels::spatial_gather" in str(torch.jit.trace(ocr_kernels.spatial_gather, (x, x)).graph))
"""
    assert run(code).strip() == "True"


# ONNX


def assert_runs_on_onnxruntime(model: bytes, expected: torch.nn.Module) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime runs what was exported")
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])

    def run(feats: Tensor) -> list[Tensor]:
        return [torch.from_numpy(out) for out in session.run(None, {session.get_inputs()[0].name: feats.numpy()})]

    assert_agrees(run, expected)


@heads
@pytest.mark.filterwarnings("ignore")
def test_onnx_of_before(kind: str) -> None:
    """The exporter that traces."""
    pytest.importorskip("onnx", reason="torch.onnx.export needs onnx")
    model, file = head(kind), io.BytesIO()
    axes = {"feats": {0: "b", 2: "h", 3: "w"}}
    torch.onnx.export(model, (torch.randn(SIZES[0]),), file, dynamo=False, input_names=["feats"], dynamic_axes=axes)
    assert_runs_on_onnxruntime(file.getvalue(), model)


@pytest.mark.parametrize("given", ["model", "exported program"])
@pytest.mark.parametrize("kind", ["replaced", "ours"])
def test_onnx(kind: str, given: str) -> None:
    """From a model at once; from an exported program, once ours are decomposed."""
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason=f"torch.onnx.export needs {name}")
    model, feats = head(kind), torch.randn(SIZES[0])
    if given == "model":
        program = torch.onnx.export(model, (feats,), dynamo=True, dynamic_shapes=DYNAMIC)
    else:
        exported = torch.export.export(model, (feats,), dynamic_shapes=DYNAMIC)
        program = torch.onnx.export(exported.run_decompositions(ocr_kernels.decompositions()), dynamo=True)
    graph = program.model_proto
    assert {node.domain for node in graph.graph.node} == {""}
    assert len(graph.functions) == 0
    assert_runs_on_onnxruntime(graph.SerializeToString(), model)
