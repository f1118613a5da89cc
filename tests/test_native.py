"""The compiled library: threads, processes, instruction sets, anything that may be drawn; and its absence."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from fresh import python, run
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import DTYPES, Op, all_dtypes, both_ops
from torch import Tensor

import ocr_kernels
from ocr_kernels.core import libraries
from ocr_kernels.core.libraries import problem
from ocr_kernels.testing import Layout, gather_inputs

built = pytest.mark.skipif(problem() is not None, reason=str(problem()))


def values_and_gradients(op: Op, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    out = op.on("native")(*inputs)
    return out, *torch.autograd.grad(out, inputs, torch.cos(out))


# Threads and processes


@built
@both_ops
@all_dtypes
@pytest.mark.parametrize("regions", [3, 40])
def test_number_of_threads_changes_no_bit(op: Op, dtype: torch.dtype, regions: int) -> None:
    inputs = op.inputs(channels=33, regions=regions, spatial=(61, 67), dtype=dtype, requires_grad=True)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(values_and_gradients(op, inputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@built
@both_ops
def test_several_python_threads_at_once(op: Op) -> None:
    cases = [op.inputs(channels=8 + i, regions=5, spatial=(40, 50), seed=i, requires_grad=True) for i in range(4)]
    expected = [values_and_gradients(op, inputs) for inputs in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(8):
            for found, alone in zip(pool.map(lambda x: values_and_gradients(op, x), cases), expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))


class Calls(torch.utils.data.Dataset):
    """Each item is a result of `op`."""

    def __init__(self, op: Op) -> None:
        self.op = op

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Tensor:
        return self.op.on("native")(*self.op.inputs(spatial=(40, 50), seed=i))


@built
@both_ops
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_after_fork(op: Op) -> None:
    """In the workers of a DataLoader, which run one thread each: with more, PyTorch's own operations hang as well."""
    items = Calls(op)
    expected = [items[i] for i in range(4)]  # the parent's threads are there before it forks
    loader = torch.utils.data.DataLoader(
        items, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    assert all(torch.equal(a, b) for a, b in zip(loader, expected, strict=True))


# Instruction sets

PARITY = """
import torch
from ops import ATTENTION, DTYPES, GATHER
from ocr_kernels.core import libraries
print(libraries.facts()["instruction_set"])
for op in (GATHER, ATTENTION):
    for dtype in DTYPES:
        for seed, (channels, regions, spatial) in enumerate(((1, 1, (1,)), (19, 19, (7, 9)), (70, 33, (131,)))):
            for layout in ("contiguous", "channels_last", "strided"):
                inputs = op.inputs(channels=channels, regions=regions, spatial=spatial, dtype=dtype, layout=layout,
                                   seed=seed, requires_grad=True)
                op.assert_parity("native", inputs)
from test_passes import CASES, TestEachPass
from ops import pairwise
for case in list(pairwise(**CASES))[::4]:
    for name in ("activate", "moments", "gradient", "through", "softmax", "softmax_backward"):
        getattr(TestEachPass(), "test_" + name)(case)
"""


ISAS = ["portable", "avx2", "avx512", "avx512bf16"]


@built
@pytest.mark.parametrize("name", ISAS)
def test_each_instruction_set(name: str) -> None:
    facts = libraries.facts()
    if name not in facts["instruction_sets"].split():
        pytest.skip(f"the library was built for {facts['instruction_sets']}")
    if ISAS.index(name) > ISAS.index(facts["instruction_set"]):
        pytest.skip(f"this processor has {facts['instruction_set']} at most")
    assert run(PARITY, OCR_KERNELS_ISA=name).strip() == name


@built
def test_an_unknown_instruction_set() -> None:
    """One warning, then the other backends."""
    caught, chosen, error = run(CALL_TWICE, OCR_KERNELS_ISA="bogus").splitlines()
    known = ", ".join(ISAS[: ISAS.index(libraries.facts()["instruction_set"]) + 1])
    reason = f"OCR_KERNELS_ISA must be one of {known} on this processor, but is bogus"
    assert caught == f"1 ocr_kernels: {reason}. Until then the other backends run"
    assert chosen == "reference"
    assert error == f"backend 'native' cannot run: {reason}"


# Anything at all


def lay_out(tensor: Tensor, order: Sequence[int], steps: Sequence[int]) -> Tensor:
    """The same values with dimensions in the memory order `order`, and gaps where a step is not 1."""
    storage = tensor.new_full([tensor.shape[d] * steps[d] for d in order], math.nan)
    view = storage[tuple(slice(None, None, steps[d]) for d in order)]
    view = view.permute([list(order).index(d) for d in range(tensor.dim())])
    return view.copy_(tensor)


@st.composite
def strides(draw: st.DrawFn, dims: int) -> tuple[Sequence[int], Sequence[int]]:
    steps = st.lists(st.sampled_from([1, 1, 1, 2, 3]), min_size=dims, max_size=dims)
    return draw(st.permutations(range(dims))), draw(steps)


@built
@both_ops
@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_anything(op: Op, data: st.DataObject) -> None:
    """Shapes, strides of inputs and of the incoming gradient, dtypes, scales and magnitudes."""
    spatial = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=3), label="spatial")
    inputs = op.inputs(
        batch=data.draw(st.integers(1, 3), label="batch"),
        channels=data.draw(st.integers(1, 70), label="channels"),
        regions=data.draw(st.integers(1, 70), label="regions"),
        spatial=tuple(spatial),
        dtype=data.draw(st.sampled_from(DTYPES), label="dtype"),
        seed=data.draw(st.integers(0, 2**31), label="seed"),
    )
    factor = data.draw(st.sampled_from([1e-3, 0.1, 1.0, 1.0, 4.0]), label="factor")
    inputs = [lay_out(t * factor, *data.draw(strides(t.dim()), label="strides")).requires_grad_() for t in inputs]
    scale = data.draw(st.sampled_from([0.0, 0.3, 1.0, -1.5]), label="scale")
    out = op.on("native")(*inputs, scale).detach()
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(out.dtype)
    grad_output = lay_out(grad, *data.draw(strides(out.dim()), label="strides of the gradient"))
    op.assert_parity("native", (*inputs, scale), grad_output=grad_output)


# The library's own checks stand behind those of the public call, for C++


@built
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ops, x: ops.spatial_gather(x[0], x), "feats must be"),
        (lambda ops, x: ops.spatial_gather(x, x[:1]), r"logits must have shape \[2, >= 1, 5\], but has \[1, 3, 5\]"),
        (lambda ops, x: ops.spatial_gather(x, x.view(2, 3, 5, 1)), r"logits must have shape \[2, >= 1, 5\]"),
        (lambda ops, x: ops.spatial_gather(x.int(), x), "feats must be float64, float32, bfloat16 or float16"),
        (lambda ops, x: ops.spatial_gather(x, x[:, :0]), r"logits must have shape .*but has \[2, 0, 5\]"),
        (lambda ops, x: ops.spatial_gather(x[:, :0], x), r"feats must have shape .*but has \[2, 0, 5\]"),
        (lambda ops, x: ops.pixel_region_attention(x, x.double(), x), "key must be float32 .*but is float64"),
        (lambda ops, x: ops.pixel_region_attention(x, x, x[..., 1:]), r"value must have shape \[2, >= 1, 5\]"),
        (lambda ops, x: ops.pixel_region_attention(x, x[..., :0], x[..., :0]), r"key must have shape \[2, 3, >= 1\]"),
        (lambda ops, x: ops.pixel_region_attention(x[:, :0], x[:, :0], x), "query must have shape"),
        (lambda ops, x: ops.attention_forward(x[0], x, x, x, 1.0), r"out must have shape \[2, 3, 5\]"),
        (lambda ops, x: ops.attention_backward(x, x, x[:1], x, x, x, x, 1.0), "dvalue must have shape"),
        (lambda ops, x: ops.gather_forward(x[..., :3], x, x, x, 1.0), r"stats must have shape \[2, 5, 3\]"),
        (lambda ops, x: ops.gather_backward(x[:1], None, x, x, x, x, 1.0), "grad must have shape"),
        (
            lambda ops, x: ops.gather_backward(None, None, x[..., :3], x, x, x, 1.0),
            r"stats must have shape \[2, 5, 3\]",
        ),
    ],
)
def test_wrong_arguments_are_refused(call, message: str) -> None:
    """By name, and nothing is written."""
    x = torch.zeros(2, 3, 5)
    with pytest.raises(RuntimeError, match=message):
        call(libraries.ops(), x)
    assert (x == 0).all()


@built
@pytest.mark.parametrize("sizes", [*itertools.product((0, 2), (0, 3), (0, 4), (0, 3), (0, 5))])
def test_empty_tensors_are_refused_or_give_zeros(sizes: tuple[int, ...]) -> None:
    """Sums over no pixels are zeros, as Python's ops have them; no channels or regions are an error, by name."""
    batch, channels, regions, value_channels, pixels = sizes
    ops, dirty = libraries.ops(), partial(torch.full, fill_value=7.0)
    feats, logits = torch.randn(batch, channels, pixels), torch.randn(batch, regions, pixels)
    key, value = torch.randn(batch, channels, regions), torch.randn(batch, value_channels, regions)
    grad, context = torch.randn(batch, channels, regions), torch.randn(batch, value_channels, pixels)
    stats = torch.randn(batch, channels + 2, regions)
    calls = [
        (ops.gather_forward, [dirty(grad.shape), dirty(stats.shape)], (feats, logits), channels and regions),
        (
            ops.gather_backward,
            [dirty(feats.shape), dirty(logits.shape)],
            (grad, feats, logits, stats),
            channels and regions,
        ),
        (ops.attention_forward, [dirty(context.shape)], (feats, key, value), channels and regions and value_channels),
        (
            ops.attention_backward,
            [dirty(t.shape) for t in (feats, key, value)],
            (context, feats, key, value),
            channels and regions and value_channels,
        ),
    ]
    for call, results, inputs, allowed in calls:
        if not allowed:
            with pytest.raises(RuntimeError, match=r"(feats|logits|query|key|value) must have shape"):
                call(*results, *inputs, 1.0)
            assert all((t == 7).all() for t in results)
        else:
            call(*results, *inputs, 1.0)
            assert all((t != 7).all() for t in results)
            assert batch * pixels or all((t == 0).all() for t in results)


def huge(*shape: int) -> Tensor:
    return torch.zeros(1, 1, 1).expand(shape)


@built
@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer ends the process")
@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        ("gather_forward", [(1, 1, 2**61), (1, 3, 2**61), (1, 1, 1), (1, 2**61, 1)]),
        ("gather_forward", [(1, 2**60, 1), (1, 2**60 + 2, 1), (1, 2**60, 1), (1, 1, 1)]),
        ("gather_backward", [(1, 2**61, 1), (1, 1, 1), (1, 2**61, 1), (1, 2**61, 1), (1, 1, 1), (1, 2**61 + 2, 1)]),
        ("attention_forward", [(1, 1, 1), (1, 1, 1), (1, 1, 2**62), (1, 1, 2**62)]),
        ("attention_forward", [(1, 1, 1), (1, 2**59, 1), (1, 2**59, 1), (1, 1, 1)]),
        ("attention_forward", [(2**61, 1, 1)] * 4),
        ("attention_backward", [(1, 1, 1), (1, 1, 2**61), (1, 1, 2**61)] + [(1, 1, 1)] * 2 + [(1, 1, 2**61)] * 2),
    ],
)
def test_sizes_that_no_memory_holds(op: str, shapes: list[tuple[int, ...]]) -> None:
    """Their products do not fit in 64 bits."""
    with pytest.raises(MemoryError):
        getattr(libraries.ops(), op)(*(huge(*shape) for shape in shapes), 1.0)


# Sums


@built
@pytest.mark.parametrize("sizes", [(2048, 3, 256), (3, 449, 256), (16, 1203, 128), (5, 2, 20000)])
@both_ops
def test_long_sums_do_not_pile_up_errors(op: Op, sizes: tuple[int, int, int]) -> None:
    """Channels, regions, pixels: in float32, twice eager's error at most."""
    channels, regions, pixels = sizes
    inputs = op.inputs(channels=channels, regions=regions, spatial=(pixels,), batch=1, requires_grad=True)
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    exact = op.definition(*exact_inputs)
    grad = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    exact_results = (exact.detach(), *torch.autograd.grad(exact, exact_inputs, grad.double()))

    def errors(function) -> list[float]:
        out = function(*inputs)
        results = (out, *torch.autograd.grad(out, inputs, grad))
        pairs = zip(results, exact_results, strict=True)
        return [float((result.detach() - exact).norm() / exact.norm()) for result, exact in pairs]

    for own, eager in zip(errors(op.on("native")), errors(op.definition), strict=True):
        assert own <= 2 * eager + torch.finfo(torch.float32).eps / 2


@built
@both_ops
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("peak", [0, 12])
def test_an_images_bits_do_not_depend_on_the_others(op: Op, layout: Layout, peak: float) -> None:
    sizes = {"batch": 4, "channels": 3, "regions": 40, "spatial": (160, 256)}
    inputs = op.inputs(**sizes, layout=layout, peak=peak, requires_grad=True)
    together = values_and_gradients(op, inputs)
    for image in range(4):
        alone = values_and_gradients(op, [t[image : image + 1].detach().requires_grad_() for t in inputs])
        assert all(torch.equal(a, b[image : image + 1]) for a, b in zip(alone, together, strict=True))


# Magnitudes


@built
@both_ops
@all_dtypes
def test_weights_do_not_overflow_what_they_weigh(op: Op, dtype: torch.dtype) -> None:
    """A mean of what is nearly the largest number is no larger."""
    largest = torch.finfo(dtype).max / 4
    if op.name == "spatial_gather":
        inputs = [torch.full((1, 3, 5000), largest, dtype=dtype), torch.zeros(1, 4, 5000, dtype=dtype)]
    else:
        inputs = [torch.zeros(1, 2, 7, dtype=dtype), torch.zeros(1, 2, 300, dtype=dtype)]
        inputs.append(torch.full((1, 3, 300), largest, dtype=dtype))
    out = op.on("native")(*inputs)
    torch.testing.assert_close(out, torch.full_like(out, largest))


@built
@all_dtypes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_one_pixel_with_all_the_weight_has_no_gradient(dtype: torch.dtype, layout: Layout) -> None:
    """Not what the rounding of two equal sums leaves, which a large scale makes infinite."""
    feats, logits = gather_inputs(channels=32, regions=11, spatial=(8, 12), dtype=dtype, layout=layout, peak=1e4)
    big = 1e30 if dtype in (torch.float32, torch.bfloat16, torch.float64) else 100.0
    feats, logits = (big * feats).requires_grad_(), logits.requires_grad_()
    out = ocr_kernels.spatial_gather(feats, logits, 1e20, backend="native")
    dfeats, dlogits = torch.autograd.grad(out, (feats, logits), torch.randn_like(out))
    assert (dlogits == 0).all()
    assert dfeats.isfinite().all()


@built
def test_subnormal_queries_beside_infinite_keys() -> None:
    """AVX512-BF16 takes subnormal numbers for 0, and 0 times infinity is NaN."""
    query = torch.full((1, 2, 40), 1e-39, dtype=torch.bfloat16)
    key = torch.tensor([[[-math.inf, 1.0], [1.0, 1.0]]], dtype=torch.bfloat16)
    value = torch.tensor([[[3.0, 5.0]]], dtype=torch.bfloat16)
    out = ocr_kernels.pixel_region_attention(query, key, value, backend="native")
    assert (out == 5).all()


@built
def test_what_cpp_calls() -> None:
    feats, logits = torch.randn(2, 6, 4, 5), torch.randn(2, 3, 4, 5)
    key, value = torch.randn(2, 6, 3), torch.randn(2, 7, 3)
    ops = torch.ops.ocr_kernels
    torch.testing.assert_close(
        libraries.ops().spatial_gather(feats, logits, 2.0), ops.spatial_gather(feats, logits, 2.0, "reference")[0]
    )
    torch.testing.assert_close(
        libraries.ops().pixel_region_attention(feats, key, value),
        ops.pixel_region_attention(feats, key, value, None, "reference"),
    )


# Its absence

CALL_TWICE = """
import warnings, torch, ocr_kernels
x = torch.randn(1, 2, 3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        ocr_kernels.spatial_gather(x, x)
        ocr_kernels.pixel_region_attention(x, x, x)
print(len(caught), *(w.message for w in caught))
print(ocr_kernels.core.backends.resolve_backend(x.device))
try:
    ocr_kernels.spatial_gather(x, x, backend="native")
except RuntimeError as error:
    print(error)
"""


def test_no_library() -> None:
    caught, chosen, error = run(CALL_TWICE, OCR_KERNELS_LIBRARY="absent.so").splitlines()
    assert caught == "1 ocr_kernels: OCR_KERNELS_LIBRARY names a file that is not there: absent.so"
    assert chosen == "reference"
    assert error == "backend 'native' cannot run: OCR_KERNELS_LIBRARY names a file that is not there: absent.so"


@pytest.mark.parametrize(
    ("file", "command"), [("setup.py", "pip install -e .` builds"), ("other.py", "pip install .` f")]
)
def test_what_builds_the_library_where_the_package_lies(
    file: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is installed beside an imported checkout would not be found."""
    (tmp_path / file).touch()
    monkeypatch.setattr(libraries, "__file__", str(tmp_path / "ocr_kernels" / "core" / "libraries.py"))
    monkeypatch.delenv("OCR_KERNELS_LIBRARY", raising=False)
    assert f"`OCR_KERNELS_BUILD=cpu {command}" in str(libraries.problem())


@pytest.mark.parametrize("kind", ["a symbol that PyTorch lacks", "no library at all"])
def test_a_library_of_another_abi(kind: str, tmp_path: Path) -> None:
    """One warning, then the other backends."""
    library = tmp_path / "libother.so"
    if kind == "no library at all":
        library.write_text("bytes of another system")
    else:
        if shutil.which("c++") is None:
            pytest.skip("needs a C++ compiler")
        source = tmp_path / "other.cpp"
        source.write_text('extern "C" int torch_of_the_year_3000();\nint call() { return torch_of_the_year_3000(); }\n')
        environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
        command = ["c++", "-shared", "-fPIC", str(source), "-o", str(library)]
        subprocess.run(command, env=environment, check=True)
    caught, chosen, error = run(CALL_TWICE, OCR_KERNELS_LIBRARY=str(library)).splitlines()
    assert caught.startswith("1 ocr_kernels: the compiled library was built for another PyTorch or another system (")
    assert caught.endswith("Until then the other backends run")
    assert chosen == "reference"
    assert error.startswith("backend 'native' cannot run: the compiled library was built for another PyTorch")


SAYS = """
import torch, ocr_kernels
from ocr_kernels.core import libraries
if {missing}:
    libraries.problem = lambda device_type="cpu": "there is none"
feats, logits = torch.randn(1, 4, 3, 3), torch.randn(1, 2, 3, 3)
with ocr_kernels.use_backend("reference"):
    ocr_kernels.spatial_gather(feats, logits)
print(ocr_kernels.available_backends()["native"], flush=True)
for _ in range(2):
    ocr_kernels.spatial_gather(feats, logits)
"""


@pytest.mark.parametrize("missing", [True, pytest.param(False, marks=built)])
def test_that_the_kernels_were_left_out_is_said_once(missing: bool) -> None:
    result = python("-c", SAYS.format(missing=missing))
    assert result.returncode == 0, result.stderr
    expected = "ocr_kernels: running on plain PyTorch, backend 'reference', on cpu. native: there is none\n"
    assert result.stderr == (expected if missing else "")


def test_importing_does_not_load_it() -> None:
    code = "import torch, ocr_kernels; print(ocr_kernels.core.libraries._load.cache_info().misses)"
    assert run(code).strip() == "0"


# The library for GPUs

NO_TRITON = "import sys; sys.modules['triton'] = None\n"
A_GPU = NO_TRITON + "import torch; torch.cuda.is_available = lambda: True\n"
CHOOSE = """
import os, warnings, torch, ocr_kernels
from ocr_kernels.core.backends import resolve_backend
loaded, load = [], torch.ops.load_library
torch.ops.load_library = lambda path: (loaded.append(os.path.basename(path)), load(path))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(*{resolve_backend(torch.device("cuda")) for _ in range(2)}, ocr_kernels.available_backends()["native"])
    ocr_kernels.core.libraries.problem("cuda")
print(len(caught), *(w.message for w in caught))
print(*loaded)
try:
    resolve_backend(torch.device("cuda"), "native")
except RuntimeError as error:
    print(error)
"""


def choose_for_a_gpu(folder: Path, before: str) -> list[str]:
    (folder / "libocr_kernels_cpu.so").symlink_to(libraries.library())
    return run(before + CHOOSE, OCR_KERNELS_LIBRARY=str(folder / "libocr_kernels_cpu.so")).splitlines()


@built
def test_no_library_for_gpus(tmp_path: Path) -> None:
    chosen, caught, loaded, error = choose_for_a_gpu(tmp_path, A_GPU)
    assert (chosen, caught, loaded) == ("reference True", "0", "libocr_kernels_cpu.so")
    assert error.startswith(
        "backend 'native' cannot run on a cuda tensor: this installation contains no compiled library for GPUs ("
    )
    assert "OCR_KERNELS_BUILD=cuda pip install " in error


@built
def test_a_library_for_gpus_of_another_abi(tmp_path: Path) -> None:
    """One warning, then the other backends."""
    (tmp_path / "libocr_kernels_cuda.so").write_text("bytes of another system")
    chosen, caught, loaded, error = choose_for_a_gpu(tmp_path, A_GPU)
    assert (chosen, loaded) == ("reference True", "libocr_kernels_cpu.so libocr_kernels_cuda.so")
    assert caught.startswith("1 ocr_kernels: the compiled library for GPUs was built for another PyTorch or another ")
    assert error.startswith("backend 'native' cannot run on a cuda tensor: the compiled library for GPUs was built for")


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_library_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "libocr_kernels_cuda.so").write_text("bytes of another system")
    before = NO_TRITON + "from ocr_kernels import info; info.collect()"
    chosen, caught, loaded, error = choose_for_a_gpu(tmp_path, before)
    assert (chosen, caught, loaded) == ("reference True", "0", "")
    assert error == "backend 'native' cannot run on a cuda tensor: no GPU is visible to PyTorch"


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((7, 5), "sm_75 sm_80 compute_80", True),
        ((7, 0), "sm_70 sm_80 compute_70", False),
        ((8, 9), "sm_75 sm_80", True),
        ((8, 0), "sm_75 sm_86", False),
        ((9, 0), "sm_80 sm_120 compute_120", False),
        ((12, 1), "sm_80 compute_90", True),
        ((9, 0), "sm_90a", True),
        ((10, 0), "sm_90a compute_90a", False),
    ],
)
def test_gpus_that_the_library_was_not_built_for(
    capability: tuple[int, int], architectures: str, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries, "facts", lambda _: {"architectures": architectures})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA Abacus")
    reason = libraries._other_gpu()
    assert (reason is None) == runs
    assert runs or f"NVIDIA Abacus has capability {capability[0]}.{capability[1]}" in str(reason)


@built
def test_facts_of_a_library_for_gpus_that_cannot_be_loaded(tmp_path: Path) -> None:
    """Its architectures are shown all the same, and why it is not in use."""
    (tmp_path / "libocr_kernels_cpu.so").symlink_to(libraries.library())
    (tmp_path / "libocr_kernels_cuda.so").write_bytes(b"\x7fELF\0version=1\ncompiler=nvcc 13.0\narchitectures=sm_90\0!")
    code = "from ocr_kernels import info\nfrom ocr_kernels.core import libraries\n"
    code += "print(libraries.facts('cuda')); print(info.collect()['library']['cuda'])"
    facts, shown = run(code, OCR_KERNELS_LIBRARY=str(tmp_path / "libocr_kernels_cpu.so")).splitlines()
    assert facts == "{'version': '1', 'compiler': 'nvcc 13.0', 'architectures': 'sm_90'}"
    assert "'architectures': 'sm_90', 'speed': " in shown
    assert "'not in use': " in shown


def test_rocm_has_no_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert libraries._no_gpu() == "its kernels are for NVIDIA GPUs, and this PyTorch is a ROCm build"
