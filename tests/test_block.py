"""Step 4 in training as one op: what it computes, saves and refuses, and the module that is built on it."""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from module_results import CountOps
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ocr_kernels import available_backends, modules, record_maps, reference, use_backend
from ocr_kernels.block import Layer, Norm, ocr_block, passes
from ocr_kernels.block.norms import Settings
from ocr_kernels.testing import assert_parity, lay_out

B, C, D, V, Y, OUT, K = 2, 5, 4, 3, 6, 7, 3


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that there are several, and one that is not full."""
    monkeypatch.setattr(passes, "TILE", 44 * C)


@pytest.fixture
def backend(block_target: tuple[str, str]) -> Iterator[str]:
    """What runs in a test, whose tensors are on its device."""
    name, device = block_target
    with use_backend(name), torch.device(device):
        yield name


on_each_backend = pytest.mark.usefixtures("backend")


def tensors(dtype: torch.dtype = torch.float64, size: tuple[int, ...] = (3, 5)) -> list[Tensor]:
    """feats, key, value, four matrices and eight vectors."""
    shapes = [(B, C, *size), (B, D, K), (B, V, K), (D, C), (D, D), (Y, V), (OUT, Y + C)]
    shapes += [(n,) for n in (D, D, D, D, Y, Y, OUT, OUT)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def block(*args: Tensor, training: bool = True, layers: int = 2, slope: float = 0.1, **options: Any) -> Tensor:
    feats, key, value, first, second, up, fusing, *vectors = args

    def norm(i: int) -> Norm:
        mean = torch.full_like(vectors[i], 0.2, requires_grad=False)
        return Norm(vectors[i], vectors[i + 1], mean, mean + 1, training=training)

    pixel = [Layer(first, None, norm(0)), Layer(second, None, norm(2), slope)][:layers]
    return ocr_block(feats, key, value, pixel, Layer(up, None, norm(4)), Layer(fusing, None, norm(6)), **options)


# The op


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_z_may_be_modified_in_place(backend: str, layout: Any) -> None:
    """As by nn.ReLU(inplace=True), or a residual that is added: PyTorch refuses it for a view that an op returns."""
    feats, *rest = tensors()
    feats = lay_out(feats.detach(), layout).requires_grad_()
    z = block(feats, *rest)
    expected = torch.autograd.grad((2 * z + 1).square().sum(), (feats, *rest), retain_graph=True)
    found = torch.autograd.grad(z.mul_(2).add_(1).square().sum(), (feats, *rest))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("training", [True, False])
def test_gradients(backend: str, training: bool, layout: Any) -> None:
    feats, *rest = tensors()
    feats = lay_out(feats.detach(), layout).requires_grad_()
    function = functools.partial(block, training=training, mask=torch.rand(B, OUT, dtype=torch.float64))
    assert torch.autograd.gradcheck(function, (feats, *rest), fast_mode=backend != "reference")


def test_gradients_are_added_up_in_place(backend: str) -> None:
    """Those of feats that several layers read: autograd adds to what nothing else holds, a view's base neither."""
    feats, *rest = (tensor.detach() for tensor in tensors())
    feats.requires_grad_()
    both = block(feats, *rest).sum() + block(feats, *rest).sum()
    with torch.profiler.profile(record_shapes=True) as profile:
        torch.autograd.grad(both, feats)
    shape = list(feats.shape)
    added = [e.key for e in profile.key_averages(group_by_input_shape=True) if e.input_shapes[:2] == [shape, shape]]
    assert "aten::add_" in added
    assert "aten::add" not in added


@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives(backend: str, training: bool) -> None:
    function = functools.partial(block, training=training, slope=1.0)
    inputs = tensors(size=(2, 2))
    if backend != "reference":  # slow: some of them, since they have one definition
        inputs = [tensor if i in (0, 1, 6, 7) else tensor.detach() for i, tensor in enumerate(inputs)]
    assert torch.autograd.gradgradcheck(function, tuple(inputs), fast_mode=backend != "reference")


@on_each_backend
@pytest.mark.parametrize("options", [{"layers": 1}, {"context_first": False}, {"scale": 0.3}, {"slope": 1.0}])
@pytest.mark.parametrize("size", [(3, 5), (15,), (3, 2, 2)])
def test_variants(options: dict[str, Any], size: tuple[int, ...]) -> None:
    args = tensors(size=size)
    used = args if options.get("layers", 2) == 2 else [a for i, a in enumerate(args) if i not in (4, 9, 10)]
    function = functools.partial(block, **options)
    found = function(*args)
    assert found.shape == (B, OUT, *size)
    grad = torch.randn_like(found)
    gradients = torch.autograd.grad(found, used, grad)
    with _by_definition():
        expected = function(*args)
        wanted = torch.autograd.grad(expected, used, grad)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients, wanted, rtol=1e-9, atol=1e-9)


@on_each_backend
@pytest.mark.parametrize("regions", [1, 2, 150, 1203])
def test_any_number_of_regions(regions: int) -> None:
    args = tensors()
    args[1], args[2] = (torch.randn(B, n, regions, dtype=torch.float64, requires_grad=True) for n in (D, V))
    found = block(*args)
    gradients = torch.autograd.grad(found.square().sum(), args[:3])
    with _by_definition():
        expected = block(*args)
        wanted = torch.autograd.grad(expected.square().sum(), args[:3])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients, wanted, rtol=1e-8, atol=1e-8)


def _by_definition() -> Any:
    """In here the op is computed as it is defined, and differentiated by PyTorch."""
    from ocr_kernels.block import functional, registration

    patch = pytest.MonkeyPatch.context()

    class Patched:
        def __enter__(self) -> None:
            self.patch = patch.__enter__()
            self.patch.setattr(functional, "ocr_block_op", registration._define)

        def __exit__(self, *args: Any) -> None:
            patch.__exit__(*args)

    return Patched()


@on_each_backend
@pytest.mark.parametrize("training", [True, False])
def test_vectors_of_any_strides(training: bool) -> None:
    """Norms' vectors, biases and the mask, as slices of others."""
    args = tensors()
    mask = torch.rand(OUT, 2 * B, dtype=torch.float64)[:, ::2].t()
    bias = torch.randn(D, 3, dtype=torch.float64)[:, 1]
    strided = args[:7] + [torch.stack((v, v), 1)[:, 1].detach().requires_grad_() for v in args[7:]]

    def run(args: list[Tensor], mask: Tensor, bias: Tensor) -> list[Tensor]:
        *others, gain, shift = args[:7] + args[13:]
        pixel = [Layer(others[3], bias), Layer(others[4], bias, slope=1.0)]
        norm = Norm(gain, shift, shift.detach() * 0, shift.detach() * 0 + 1, training)
        z = ocr_block(*others[:3], pixel, Layer(others[5]), Layer(others[6], None, norm), mask=mask)
        return [z, *torch.autograd.grad(z.square().sum(), [*others, gain, shift])]

    torch.testing.assert_close(run(strided, mask, bias), run(args, mask.contiguous(), bias.contiguous()))


@on_each_backend
def test_what_is_needed() -> None:
    """Gradients that are not needed are not there, and the others are the same."""
    args = tensors()
    grad = torch.randn(B, OUT, 3, 5, dtype=torch.float64)
    every = torch.autograd.grad(block(*args), args, grad)
    for wanted in ([0], [1], [2], [3], [4], [5], [6], [7, 8], [11], [13, 14], [1, 2, 6]):
        given = [arg.detach().requires_grad_(i in wanted) for i, arg in enumerate(args)]
        some = torch.autograd.grad(block(*given), [given[i] for i in wanted], grad)
        torch.testing.assert_close(some, tuple(every[i] for i in wanted), rtol=1e-12, atol=1e-12)


class CountLaunches(TorchDispatchMode):
    """How many kernels a GPU would start: ops, but for views and allocation, and Triton's, which do nothing here."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def launch(self, *tensors: Tensor) -> None:
        self.number += 1

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_view = any(out.alias_info and not out.alias_info.is_write for out in function._schema.returns)
        self.number += not (is_view or "empty" in function.name() or "view" in function.name())
        return function(*args, **(kwargs or {}))


def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a small operation takes as long on the host as a large one; the plain module has 37 and 32."""
    kernels = pytest.importorskip("ocr_kernels.block.triton")
    forward, backward = CountLaunches(), CountLaunches()
    feats, key, _, *others = (tensor.detach() for tensor in tensors())
    mask, contexts = feats.new_empty(0), torch.randn(B, Y, K, dtype=torch.float64)
    matrices, vectors = [*others[:2], others[3]], others[4:]
    settings = Settings(1.0, (0.0,) * 4, (1e-5,) * 4, ("",) * 4, True)
    for count in (forward, backward):
        with monkeypatch.context() as patch, count:
            patch.setattr("ocr_kernels.core.triton_launch.Launch.__call__", count.launch)
            if count is forward:
                z, *saved = kernels.forward(feats, key, *matrices, contexts, vectors, mask, settings)
            else:
                kernels.backward(z, feats, key, *matrices, contexts, vectors, mask, saved, settings, [True] * 14)
    assert forward.number <= 32
    assert backward.number <= 61


@on_each_backend
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_and_same_format(layout: Any) -> None:
    args = tensors(torch.float32)
    args[0] = lay_out(args[0].detach(), layout).requires_grad_()
    runs = []
    for _ in range(2):
        out = block(*args)
        runs.append([out, *torch.autograd.grad(out.sum(), args)])  # a gradient of stride 0
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert runs[0][0].is_contiguous(
        memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
    )
    assert runs[0][1].stride() == args[0].stride()


@on_each_backend
def test_statistics_run() -> None:
    args = tensors(torch.float32)
    plain = nn.BatchNorm2d(OUT, momentum=0.3)
    mean, var = torch.zeros(OUT), torch.ones(OUT)
    bias = torch.randn(OUT)
    none = [Layer(weight) for weight in args[3:6]]
    norm = Norm(plain.weight, plain.bias, mean, var, momentum=0.3)
    found = ocr_block(*args[:3], none[:2], none[2], Layer(args[6], bias, norm))
    raw = ocr_block(*args[:3], none[:2], none[2], Layer(args[6], bias, slope=1.0))
    torch.testing.assert_close(found, plain(raw).relu(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mean, plain.running_mean)
    torch.testing.assert_close(var, plain.running_var)


def test_a_bias_before_a_batch_norm_has_a_gradient_of_zero() -> None:
    args = tensors(torch.float32)
    bias = torch.randn(OUT, requires_grad=True)
    none = [Layer(weight) for weight in args[3:6]]
    out = ocr_block(*args[:3], none[:2], none[2], Layer(args[6], bias, Norm()))
    (grad,) = torch.autograd.grad(out.sum(), bias)
    assert torch.equal(grad, torch.zeros(OUT))


@on_each_backend
def test_transforms() -> None:
    args = [tensor.detach() for tensor in tensors()]
    each = [torch.stack([tensor, tensor + 0.1]) for tensor in args[:3]]
    found = torch.func.vmap(lambda *maps: block(*maps, *args[3:], training=False))(*each)
    expected = torch.stack([block(*(e[i] for e in each), *args[3:], training=False) for i in range(2)])
    torch.testing.assert_close(found, expected)
    gradient = torch.func.grad(lambda feats: block(feats, *args[1:], training=False).sum())(args[0])
    leaf = args[0].clone().requires_grad_()
    block(leaf, *args[1:], training=False).sum().backward()
    torch.testing.assert_close(gradient, leaf.grad)
    _, tangent = torch.func.jvp(
        lambda feats: block(feats, *args[1:], training=False), (args[0],), (torch.ones_like(args[0]),)
    )
    assert tangent.isfinite().all()


@on_each_backend
@pytest.mark.parametrize("size", [(0, 4), (3, 0)])
def test_no_pixels(size: tuple[int, int]) -> None:
    args = tensors(size=size)
    out = block(*args)
    assert out.shape == (B, OUT, *size)
    gradients = torch.autograd.grad(out.sum(), args)
    assert all(not gradient.any() for gradient in gradients)


@on_each_backend
def test_opcheck() -> None:
    from ocr_kernels.block.registration import ocr_block_op

    captured: list[Any] = []

    class Capture(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is ocr_block_op:
                captured.append(args)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Capture():
        block(*tensors(torch.float32))
    (args,) = captured
    args = [a.requires_grad_(i < 14) if isinstance(a, Tensor) else a for i, a in enumerate(args)]
    torch.library.opcheck(ocr_block_op, tuple(args))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"feats": torch.randn(B, C)}, ValueError, "feats must have shape"),
        ({"feats": torch.randn(B, C, 3, 5).int()}, TypeError, "feats must be float64"),
        ({"key": torch.randn(B, D, 0)}, ValueError, "key must have shape"),
        ({"key": torch.randn(B, D, K).double()}, TypeError, "key must have the dtype of feats"),
        ({"value": torch.randn(B, V, K + 1)}, ValueError, "value must have shape"),
        ({"pixel": []}, ValueError, "pixel must be of one Layer or two, but is of 0"),
        ({"pixel": None}, TypeError, "pixel must be a list or tuple of one Layer or two, but is NoneType"),
        ({"pixel": Layer(torch.zeros(3, 4))}, TypeError, "pixel must be a list .* but is Layer"),
        ({"pixel": [Layer(torch.randn(D, C + 1))]}, ValueError, r"pixel\[0\].weight must have shape \[4, 5\]"),
        ({"fusing": Layer(torch.randn(OUT, C))}, ValueError, r"fusing.weight must have shape \[7, 11\]"),
        ({"up": Layer(torch.randn(Y, V), torch.randn(V))}, ValueError, r"up.bias must have shape \[6\]"),
        ({"up": Layer(torch.randn(Y, V), slope="steep")}, TypeError, "up.slope must be a finite number"),
        ({"up": Layer(torch.randn(Y, V).requires_grad_(), slope=-1.0)}, ValueError, r"up.slope must be a number >= 0"),
        ({"up": Layer(torch.randn(Y, V), norm=Norm(), slope=-1.0)}, ValueError, r"up.slope must be a number >= 0"),
        ({"fusing": Layer(None)}, TypeError, "fusing.weight must be a tensor"),
        ({"output": "logits"}, ValueError, "output 'logits' needs a classifier"),
        ({"output": "z"}, ValueError, "output must be 'features', 'logits' or 'classes'"),
        ({"classifier": torch.randn(3, OUT)}, TypeError, "classifier must be a weight and a bias or None"),
        ({"classifier": (torch.randn(3, C), None)}, ValueError, r"classifier.weight must have shape \[3, 7\]"),
        ({"classifier": (torch.randn(3, OUT), torch.randn(2))}, ValueError, r"classifier.bias must have shape \[3\]"),
        ({"up": Layer(torch.randn(Y, V), norm=Norm(torch.randn(V)))}, ValueError, "up.norm.weight must have shape"),
        ({"mask": torch.rand(OUT)}, ValueError, "mask must have shape"),
        ({"mask": torch.rand(B, OUT).double()}, TypeError, "mask must be torch.float32"),
        ({"scale": "half"}, TypeError, "scale must be a number"),
        ({"backend": "cudnn"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {
        "feats": torch.randn(B, C, 3, 5),
        "key": torch.randn(B, D, K),
        "value": torch.randn(B, V, K),
        "pixel": [Layer(torch.randn(D, C))],
        "up": Layer(torch.randn(Y, V)),
        "fusing": Layer(torch.randn(OUT, Y + C)),
    }
    ocr_block(**good)
    with pytest.raises(error, match=message):
        ocr_block(**{**good, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"running_mean": torch.zeros(1).expand(OUT)}, ValueError, "running_mean must have memory for each channel"),
        ({"running_var": torch.ones(OUT).to_sparse()}, TypeError, "running_var must be dense"),
        ({"bias": torch.ones(OUT).to_sparse()}, TypeError, "norm.bias must be dense"),
        ({"num_batches_tracked": 3}, TypeError, "num_batches_tracked must be a tensor of one element or None, but is"),
        ({"num_batches_tracked": torch.zeros(2)}, TypeError, r"one element or None, but has shape \(2,\)"),
        ({"group": "all"}, TypeError, "fusing.norm.group must be a process group or None, but is str"),
    ],
)
def test_what_is_wrong_with_a_norm_changes_no_other(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    def norm(channels: int, **options: Any) -> Norm:
        known = {"running_mean": torch.zeros(channels), "running_var": torch.ones(channels)}
        return Norm(**{**known, "num_batches_tracked": torch.tensor(0), **options})

    pixel = Layer(torch.randn(D, C), norm=norm(D))
    args = torch.randn(B, C, 3, 5), torch.randn(B, D, K), torch.randn(B, V, K), [pixel], None
    with pytest.raises(error, match=message):
        ocr_block(*args, Layer(torch.randn(OUT, V + C), norm=norm(OUT, **change)))
    assert not pixel.norm.running_mean.any()
    assert pixel.norm.num_batches_tracked == 0


@on_each_backend
def test_a_region_that_no_pixel_uses_spoils_nothing() -> None:
    """Where rho's norm takes no statistics: what regions have in common is that of the pixels, not of the regions."""
    feats, key, value = torch.randn(1, C, 40), torch.randn(1, D, 19), torch.randn(1, V, 19)
    feats[:, 0] = 1
    key[:, 0, 0], value[:, :, 0] = -300, 1e4
    first, fusing = torch.eye(D, C), torch.randn(OUT, V + C)

    def z(dtype: torch.dtype, number: float = 1e4) -> Tensor:
        args = [each.to(dtype) for each in (feats, key, value.clone().index_fill_(2, torch.tensor([0]), number))]
        layers = Layer(first.to(dtype), slope=1.0), Layer(fusing.to(dtype), slope=1.0)
        return ocr_block(args[0].requires_grad_(), *args[1:], [layers[0]], None, layers[1]).detach()

    exact = z(torch.float64)
    assert ((z(torch.float32) - exact).norm() / exact.norm()).item() < 1e-6
    torch.testing.assert_close(z(torch.float64, 0.0), exact)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_few_regions_of_many_pixels(
    backend: Any, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their covariance is no single chain of sums."""
    if available_backends("cpu")[backend] is not True:
        pytest.skip("no compiled library")
    monkeypatch.setattr(passes, "TILE", 2**22)
    args = tensors(torch.float32, size=(400, 300))
    args[0] = args[0].detach().contiguous(memory_format=memory_format)

    def z(dtype: torch.dtype) -> Tensor:
        given = [arg.detach().to(dtype) for arg in args]
        return block(given[0].requires_grad_(), *given[1:], slope=1.0, backend=backend).detach()

    exact = z(torch.float64)
    assert ((z(torch.float32) - exact).norm() / exact.norm()).item() < 2e-6


def test_without_data() -> None:
    args = [each.detach().to("meta") for each in tensors(torch.float32)]
    assert block(*args, training=False).shape == (B, OUT, 3, 5)
    args[0].requires_grad_()
    assert block(*args).shape == (B, OUT, 3, 5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_classifier_whose_bias_has_another_dtype(memory_format: torch.memory_format) -> None:
    args = [each.detach().bfloat16() for each in tensors(torch.float32)]
    args[0] = args[0].contiguous(memory_format=memory_format).requires_grad_()
    classifier = torch.randn(4, OUT).bfloat16(), torch.randn(4)
    assert block(*args, classifier=classifier).dtype == torch.bfloat16


def test_one_pixel_has_no_variance() -> None:
    args = tensors(size=(1,))
    args = [arg[:1] if i < 3 else arg for i, arg in enumerate(args)]
    with pytest.raises(ValueError, match=r"pixel\[0\].norm takes the statistics of a batch that has one pixel"):
        block(*args)


# The module


CHANNELS, REGIONS = 16, 5
NORMS: dict[str, Any] = {
    "BatchNorm": nn.BatchNorm2d,
    "no norm": nn.Identity,
    "no affine": lambda channels: nn.BatchNorm2d(channels, affine=False, momentum=None),
    "nothing tracked": lambda channels: nn.BatchNorm2d(channels, track_running_stats=False),
    "SyncBatchNorm": nn.SyncBatchNorm,
    "eps": lambda channels: nn.BatchNorm2d(channels, eps=0.1, momentum=0.5),
}


def pair(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The module in plain PyTorch, and ours with the same parameters."""
    plain, ours = (library.SpatialOCR(CHANNELS, 8, 12, **options).to(dtype) for library in (reference, modules))
    for name, tensor in (*plain.named_parameters(), *plain.named_buffers()):
        if tensor.dim() == 1:
            tensor.data.uniform_(0.5 if name.endswith("var") else -0.5, 1.5)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


def inputs(dtype: torch.dtype = torch.float32, layout: Any = "contiguous", size: tuple[int, int] = (9, 7)) -> Any:
    feats = lay_out(torch.randn(B, CHANNELS, *size, dtype=dtype), layout).requires_grad_()
    return feats, torch.randn(B, CHANNELS, REGIONS, 1, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_half_precision_is_no_worse_than_eager(backend: str, training: bool, dtype: torch.dtype) -> None:
    """Of three modules the luck of single activations decides, whose medians are up to 1.4; of nine, the arithmetic."""
    ratios: list[float] = []
    for _ in range(9):
        plain, ours = (module.train(training) for module in pair(dtype, dropout=0.0))
        args, grad = inputs(dtype, size=(32, 24)), torch.randn(B, 12, 32, 24, dtype=dtype)
        exact = gradients(copy.deepcopy(plain).double(), [arg.double() for arg in args], grad.double())
        found, eager = gradients(ours, args, grad), gradients(plain, args, grad)
        ratios += [((a - c).norm() / (b - c).norm()).item() for a, b, c in zip(found, eager, exact, strict=True)]
    assert statistics.median(ratios) <= 1.05


def gradients(module: nn.Module, args: Any, grad: Tensor) -> list[Tensor]:
    """The output, and the gradients of all that pixels go through."""
    args = [arg.detach().requires_grad_() for arg in args]
    out = module(*args)
    wanted = [p for name, p in module.named_parameters() if "f_object" not in name and "f_down" not in name]
    return [out, *torch.autograd.grad(out, [args[0], *wanted], grad)]


@on_each_backend
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("norm", ["BatchNorm", "no norm"])
def test_what_is_not_finite_spoils_no_more_than_in_plain_layers(norm: str, value: float) -> None:
    """Of pixels and of regions, where no norm takes the statistics of a batch."""
    plain, ours = (module.eval() for module in pair(dropout=0.0, norm_layer=NORMS[norm]))
    for spoilt in range(2):
        args = inputs()
        args[spoilt].data[0, 0, 1] = value
        finite = []
        for module in (plain, ours):
            z = module(*args)
            gradients = torch.autograd.grad(z.sum(), [*args, *module.parameters()])
            finite.append([each.isfinite() for each in (z, *gradients)])
        torch.testing.assert_close(finite[1], finite[0])


@on_each_backend
def test_one_channel_of_keys() -> None:
    args = tensors()
    args = [arg[:1] if i < 3 else arg for i, arg in enumerate(args)]
    args[1], args[3], args[4] = args[1][:, :1], args[3][:1], args[4][:1, :1]
    args[7:11] = [arg[:1] for arg in args[7:11]]
    found = torch.autograd.grad(block(*args).square().sum(), args)
    with _by_definition():
        torch.testing.assert_close(found, torch.autograd.grad(block(*args).square().sum(), args), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_regions_that_are_nearly_alike(backend: str, training: bool) -> None:
    """As before a network is trained: what they have in common must not take the digits of the rest."""
    plain, ours = (module.train(training) for module in pair(norm_layer=nn.Identity, dropout=0.0))
    for module in (plain, ours):  # norms on the pixels' side alone
        module.object_context_block.f_up[1][0] = nn.BatchNorm2d(CHANNELS).train(training)
        module.conv_bn_dropout[1][0] = nn.BatchNorm2d(12).train(training)
    ratios = []
    size = (40, 40) if backend == "reference" else (12, 16)
    for _ in range(3):
        feats, regions = inputs(size=size)
        regions = (3 * regions[:, :, :1].abs() + 1e-4 * regions).detach()
        grad = torch.randn(B, 12, *size)
        results = []
        for module, dtype in ((ours, torch.float32), (plain, torch.float32), (copy.deepcopy(plain), torch.float64)):
            module, columns = module.to(dtype), regions.to(dtype).requires_grad_()
            attention = module.object_context_block
            layers = attention.f_pixel, attention.f_object, attention.f_down
            wanted = [columns, *(parameter for part in layers for parameter in part.parameters())]
            results.append(torch.autograd.grad(module(feats.detach().to(dtype), columns), wanted, grad.to(dtype)))
        ratios.append([((a - c).norm() / (b - c).norm()).item() for a, b, c in zip(*results, strict=True)])
    assert max(map(statistics.median, zip(*ratios, strict=True))) <= 1.2


def test_regions_of_an_untrained_head(backend: str) -> None:
    """In eval mode, where no norm takes them apart: gradients of the pixels' side are as exact as the plain head's."""
    ratios = []
    for seed in range(4):
        torch.manual_seed(seed)
        plain = reference.OCRHead(16, 19, mid_channels=32, key_channels=16, dropout=0.0).eval()
        ours = modules.OCRHead(16, 19, mid_channels=32, key_channels=16, dropout=0.0).eval()
        ours.load_state_dict(plain.state_dict())
        feats, grad = torch.randn(2, 16, 16, 12), torch.randn(2, 19, 16, 12)
        results = []
        for module, dtype in ((ours, torch.float32), (plain, torch.float32), (copy.deepcopy(plain), torch.float64)):
            module = module.to(dtype)
            wanted = list(module.ocr_distri_head.object_context_block.f_pixel.parameters())
            results.append(torch.autograd.grad(module(feats.to(dtype))[1], wanted, grad.to(dtype)))
        ratios += [((a - c).norm() / (b - c).norm()).item() for a, b, c in zip(*results, strict=True)]
    assert statistics.median(ratios) <= 1.2


def test_frozen_norms_in_training() -> None:
    plain, ours = pair(dropout=0.0)
    for module in (plain, ours):
        module.train()
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eval()
    before = copy.deepcopy(ours.state_dict())
    assert_parity(ours, plain, inputs(size=(32, 24)))
    ours(*inputs())
    torch.testing.assert_close(dict(ours.state_dict()), dict(before), rtol=0, atol=0)


def test_what_the_op_does_not_have_runs_as_before() -> None:
    group, gelu = (functools.partial(nn.GroupNorm, 2), nn.GELU)
    for options in ({"norm_layer": group}, {"act_layer": gelu}, {"scale": 2}):
        plain, ours = pair(dropout=0.0, **options)
        with CountOps() as ops:
            found = ours(*(args := inputs()))
        assert (ops.block, ops.attention) == (0, 1)
        torch.testing.assert_close(found, plain(*args), rtol=1e-4, atol=1e-5)


def test_hooks_are_called() -> None:
    plain, ours = pair(dropout=0.0)
    seen: list[Any] = []
    layer = ours.object_context_block.f_pixel[1][0]
    handle = layer.register_forward_hook(lambda *_: seen.append(1))
    args = inputs()
    torch.testing.assert_close(ours(*args), plain(*args), rtol=1e-4, atol=1e-5)
    assert seen
    handle.remove()
    with CountOps() as ops:
        ours(*args)
    assert ops.block == 1


def test_without_gradients_in_eval_mode_nothing_is_kept() -> None:
    _, ours = pair()
    with torch.no_grad(), CountOps() as ops:
        ours.eval()(*inputs())
    assert (ops.block, ops.inference, ops.attention) == (0, 1, 0)


def test_saved_for_backward() -> None:
    """At most h of phi's layers, the weights and one map of z's channels, beside the feats, which are alive."""
    _, ours = pair(dropout=0.1)
    feats, regions = inputs(size=(32, 32))
    pixels = B * 32 * 32
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ours(feats, regions)
    saved.pop(feats.untyped_storage().data_ptr())
    maps = 4 * pixels * (8 + 8 + REGIONS + 12)
    assert maps <= sum(saved.values()) <= maps + 64 * 1024
    assert max(saved.values()) == 4 * pixels * 12


@on_each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    plain, ours = pair(dropout=0.0)
    args = inputs(size=(32, 24))

    def under(module: nn.Module) -> Callable[..., Tensor]:
        def run(*args: Tensor) -> Tensor:
            with torch.autocast(args[0].device.type, dtype):
                return module(*args)

        return run

    found, expected = under(ours)(*args), under(plain)(*args)
    assert found.dtype == expected.dtype == dtype
    grad = torch.randn_like(found)
    exact = copy.deepcopy(plain).double()(*(arg.double() for arg in args))
    assert (found - exact).norm() <= 1.5 * (expected - exact).norm()
    for module, out in ((ours, found), (plain, expected)):
        out.backward(grad)
        assert all(parameter.grad.dtype == torch.float32 for parameter in module.parameters())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant: bool) -> None:
    plain, ours = pair(dropout=0.3)
    feats, regions = inputs()
    torch.manual_seed(3)
    expected = plain(feats, regions)
    torch.manual_seed(3)
    found = checkpoint(ours, feats, regions, use_reentrant=reentrant)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(found)
    gradients = [torch.autograd.grad(out, feats, grad)[0] for out in (expected,)]
    feats.grad = None
    found.backward(grad)
    torch.testing.assert_close(feats.grad, gradients[0], rtol=1e-3, atol=1e-5)


def test_compiled_whole() -> None:
    plain, ours = pair(dropout=0.0)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    args = inputs()
    found, expected = compiled(*args), plain(*args)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(found)
    wanted = list(args)
    torch.testing.assert_close(
        torch.autograd.grad(found, wanted, grad), torch.autograd.grad(expected, wanted, grad), rtol=1e-3, atol=1e-5
    )
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer, rtol=1e-4, atol=1e-5)


@on_each_backend
def test_compiled_for_any_size() -> None:
    plain, ours = pair(dropout=0.0)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((9, 7), (5, 11)):
        args = inputs(size=size)
        torch.testing.assert_close(compiled(*args), plain(*args), rtol=1e-4, atol=1e-5)


def test_training_reaches_the_same_weights() -> None:
    plain, ours = pair(torch.float64, dropout=0.0)
    args = inputs(torch.float64)
    for module in (plain, ours):
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        for _ in range(5):
            optimizer.zero_grad()
            module(*args).square().mean().backward()
            optimizer.step()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-8, atol=1e-10)


def test_maps_are_recorded() -> None:
    _, ours = pair(dropout=0.0)
    feats, regions = inputs()
    with record_maps() as maps:
        ours(feats, regions)
    (weights,) = maps.attention
    assert weights.shape == (B, REGIONS, 9, 7)
    torch.testing.assert_close(weights.sum(1), torch.ones(B, 9, 7))


def test_a_named_backend_runs_or_raises() -> None:
    _, ours = pair()
    with use_backend("reference"):
        ours(*inputs())


@pytest.mark.parametrize("training", [True, False])
def test_layers_of_modules(training: bool) -> None:
    """Made of a module's own, they give what it gives, and their norms count the batch."""
    plain, _ = pair(torch.float64, dropout=0)
    twin = copy.deepcopy(plain.train(training))
    feats, regions = inputs(torch.float64)
    attention: Any = plain.object_context_block
    key, value = (part(regions).flatten(2) for part in (attention.f_object, attention.f_down))
    parts = [*attention.f_pixel, *attention.f_up, *plain.conv_bn_dropout[:2]]
    *pixel, up, fusing = (
        Layer.of(convolution, *pair) for convolution, pair in zip(parts[::2], parts[1::2], strict=True)
    )
    torch.testing.assert_close(ocr_block(feats, key, value, pixel, up, fusing), twin(feats, regions))
    torch.testing.assert_close(plain.state_dict(), twin.state_dict())


@pytest.mark.parametrize(
    ("modules", "error", "message"),
    [
        ([nn.ReLU()], TypeError, "convolution must be"),
        ([nn.Conv2d(4, 4, 3)], ValueError, "convolution must have kernel, stride and groups of 1"),
        ([nn.ConvTranspose2d(4, 4, 1)], TypeError, "convolution must be a 1x1 convolution or a Linear"),
        ([nn.Conv2d(4, 4, 1, stride=2)], ValueError, "convolution must have"),
        ([nn.Linear(4, 4), nn.GroupNorm(2, 4)], TypeError, "norm must be a BatchNorm"),
        ([nn.Linear(4, 4), "batch"], TypeError, "norm must be a BatchNorm"),
        ([nn.Linear(4, 4), None, nn.GELU()], TypeError, "activation must be"),
        ([nn.Linear(4, 4), nn.Identity(), nn.LeakyReLU(-1.0)], ValueError, "activation must be"),
    ],
)
def test_layers_that_the_block_does_not_have(modules: list[Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Layer.of(*modules)
