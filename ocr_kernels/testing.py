"""Is a kernel right? Inputs, a float64 oracle, an error budget and assertions, for this library's tests and yours.

There is no hand-tuned tolerance. What a result may differ from the float64 oracle is measured on the plain PyTorch
reference, run on the same inputs in the same dtype::

    error(tested) <= factor * error(reference) + rounding floor

with the factors of `FACTORS` and the floor that rounding the exact result to the dtype costs by itself.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ocr_kernels.core.memory import new_memory

Layout = Literal["contiguous", "channels_last", "sliced", "transposed", "expanded", "strided"]
LAYOUTS: tuple[Layout, ...] = ("contiguous", "channels_last", "sliced", "transposed", "expanded", "strided")

FACTORS = {torch.float16: 1.0, torch.bfloat16: 1.25, torch.float32: 2.0, torch.float64: 2.0}
_WIDE = (torch.float32, torch.float64)  # what kernels and reference alike add up in


# Inputs


def gather_inputs(
    *,
    batch: int = 2,
    channels: int = 16,
    regions: int = 5,
    spatial: Sequence[int] = (9, 11),
    dtype: torch.dtype = torch.float32,
    logits_dtype: torch.dtype | None = None,
    layout: Layout = "contiguous",
    peak: float = 0.0,
    device: torch.device | str = "cpu",
    seed: int = 0,
    requires_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Seeded `feats` `[B, C, *S]` and `logits` `[B, K, *S]` for `spatial_gather`, both in `layout`.

    The numbers depend on the seed, the sizes and the dtypes alone, not on layout or device (except that `expanded`
    repeats some). feats have a mean of 0.5, since pixel representations come out of a ReLU; logits spread enough for
    a softmax far from uniform. `peak` is added to a pixel of each region, as trained networks have them: with 8 that
    pixel holds a large part of the weight, with 20 nearly all, with 1e4 all of it.

    Examples:
        >>> feats, logits = gather_inputs(regions=19, layout="channels_last", dtype=torch.bfloat16)
        >>> feats.shape, logits.shape
        (torch.Size([2, 16, 9, 11]), torch.Size([2, 19, 9, 11]))
    """
    generator = torch.Generator().manual_seed(seed)
    feats = 0.5 + _normal((batch, channels, *spatial), generator)
    logits = 2 * _normal((batch, regions, *spatial), generator)
    if peak and logits.numel():
        flat = logits.flatten(2)
        highest = torch.randint(flat.shape[2], (batch, regions, 1), generator=generator)
        flat.scatter_add_(2, highest, flat.new_full((batch, regions, 1), peak))
    return (
        lay_out(feats.to(device, dtype), layout).requires_grad_(requires_grad),
        lay_out(logits.to(device, logits_dtype or dtype), layout).requires_grad_(requires_grad),
    )


def attention_inputs(
    *,
    batch: int = 2,
    channels: int = 16,
    value_channels: int | None = None,
    regions: int = 5,
    spatial: Sequence[int] = (9, 11),
    dtype: torch.dtype = torch.float32,
    layout: Layout = "contiguous",
    peak: float = 0.0,
    device: torch.device | str = "cpu",
    seed: int = 0,
    requires_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Seeded `query` `[B, D, *S]` in `layout`, `key` `[B, D, K]` and `value` `[B, Dv, K]` for `pixel_region_attention`.

    `value_channels` is Dv, by default D = `channels`. The scores have a standard deviation of 2; `peak` is added to
    those of the first region, by way of the first channel.

    Examples:
        >>> [tuple(tensor.shape) for tensor in attention_inputs(regions=19)]
        [(2, 16, 9, 11), (2, 16, 19), (2, 16, 19)]
    """
    generator = torch.Generator().manual_seed(seed)
    query = _normal((batch, channels, *spatial), generator)
    key = 2 * _normal((batch, channels, regions), generator)
    value = 0.5 + _normal((batch, channels if value_channels is None else value_channels, regions), generator)
    if peak:
        query[:, 0], key[:, 0, :1] = channels**0.25, channels**0.25 * peak  # their product is divided by the root of D
    return (
        lay_out(query.to(device, dtype), layout).requires_grad_(requires_grad),
        key.to(device, dtype).requires_grad_(requires_grad),
        value.to(device, dtype).requires_grad_(requires_grad),
    )


def lay_out(tensor: Tensor, layout: Layout) -> Tensor:
    """The values of `tensor` `[B, C, *S]` in another memory layout, with NaN wherever a kernel must not read.

    * `contiguous` and `channels_last`: `[B, C, *S]` and `[B, *S, C]` in memory.
    * `transposed`: the last two dimensions swapped in memory.
    * `sliced`: a crop, in every dimension, of a larger tensor.
    * `strided`: every second pixel, in every spatial dimension, of a larger tensor.
    * `expanded`: the first column repeated over the last dimension with stride 0; with a single spatial
      dimension the first image repeated over the batch. Only here do the values change.

    Examples:
        >>> lay_out(torch.zeros(2, 3, 4, 5), "channels_last").stride()
        (60, 1, 15, 3)
    """
    batch, channels, *spatial = tensor.shape
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "channels_last":
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded":
        return tensor.narrow(-1 if len(spatial) > 1 else 0, 0, 1).contiguous().expand_as(tensor)
    if layout == "sliced":
        sizes = (batch + 1, channels + 1, *(size + 3 for size in spatial))
        window = (slice(1, None), slice(1, None), *(slice(1, -2) for _ in spatial))
    elif layout == "strided":
        sizes = (batch, channels, *(2 * size for size in spatial))
        window = (slice(None), slice(None), *(slice(None, None, 2) for _ in spatial))
    else:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, but is {layout!r}")
    larger = tensor.new_full(sizes, float("nan"))
    larger[window] = tensor
    return larger[window]


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)


# Parity


def oracle(function: Callable[..., Any], *inputs: Any) -> Any:
    """`function` on the inputs upcast to float64; a module is copied and upcast as well.

    Give it a plain definition, such as `ocr_kernels.gather.reference.spatial_gather`.

    Examples:
        >>> from ocr_kernels.gather.reference import spatial_gather as definition
        >>> oracle(definition, *gather_inputs()).dtype
        torch.float64
    """
    wide = [_map(value, Tensor.double) for value in (function, *inputs)]
    return wide[0](*wide[1:])


@dataclass(frozen=True)
class Measurement:
    """One measured error of one tensor against the float64 oracle, and what it may be.

    Examples:
        >>> from ocr_kernels.gather.reference import spatial_gather as definition
        >>> worst = max(measure_parity(spatial_gather, definition, gather_inputs()), key=lambda each: each.error)
        >>> worst.passed
        True
    """

    tensor: str  # "output", "gradient of logits", "gradient of conv.weight", "buffer bn.running_mean"
    measure: str  # "misplaced NaN or inf" (a count), "max error", "mean error", "relative L2 error", "bias"
    error: float
    reference: float  # the same measure of the eager reference in the same dtype
    bound: float
    dtype: torch.dtype

    @property
    def passed(self) -> bool:
        return self.error <= self.bound

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        relation = "<=" if self.passed else "exceeds"
        return (
            f"{self.tensor}: {self.measure} {self.error:.3g} {relation} {self.bound:.3g}"
            f" ({dtype} reference's own: {self.reference:.3g})"
        )


def judge(
    tensor: str, actual: Tensor, references: Sequence[tuple[Tensor, Tensor, float]], *, factor: float | None = None
) -> list[Measurement]:
    """Measure `actual` and hold it against the error budget: max, mean, relative L2 error, and bias.

    The bias, the mean of the signed error, shows a small systematic error below the rounding noise. The floor of the
    max error is eps * max|oracle|. A mean takes eps/2 of the mean: rounding to nearest moves an element by at most
    eps/2 of itself, so that no right result needs more, and an error of 1%, hardly above bfloat16's eps, must be
    seen. Non-finite elements must be where the oracle, rounded to the dtype, has them; a reference that overflowed is
    measured where it is finite.

    Args:
        tensor: what to call it.
        actual: the tested result, of any floating dtype and shape.
        references: `(reference, oracle, weight)` of one or more runs, all of the shape of `actual`; the largest
            weighted error counts. `actual` is judged against the first oracle.
        factor: how many times the reference's error is allowed; by default that of `FACTORS` for the dtype.

    Examples:
        >>> exact = torch.rand(100, dtype=torch.float64)
        >>> all(each.passed for each in judge("output", exact.float(), [(exact.float(), exact, 1.0)]))
        True
    """
    if actual.numel() == 0:
        return []
    factor = FACTORS[actual.dtype] if factor is None else factor
    finfo = torch.finfo(actual.dtype)
    exact = references[0][1].double()
    rounded = exact.to(actual.dtype)
    same = (actual == rounded) | (actual.isnan() & rounded.isnan()) | (actual.isfinite() & rounded.isfinite())

    error, size = _errors(actual, exact), _errors(exact.abs())
    allowed = [{k: weight * v for k, v in _errors(r, o).items()} for r, o, weight in references]

    result = [Measurement(tensor, "misplaced NaN or inf", float((~same).sum()), 0.0, 0.0, actual.dtype)]
    for measure in error:
        spacing = finfo.eps if measure == "max error" else finfo.eps / 2
        floor = spacing * size[measure] + finfo.eps * finfo.tiny  # the latter is the spacing of subnormal numbers
        largest = max(errors[measure] for errors in allowed)
        reference = allowed[0][measure] or largest
        if measure == "bias":  # a mean over n errors is never surer than their size / sqrt(n)
            largest = max(largest, max(errors["relative L2 error"] for errors in allowed) / actual.numel() ** 0.5)
        if actual.dtype in _WIDE:  # luck, see `measure_parity`, and the more of it the fewer numbers there are
            largest *= 1 + 3 / (len(references) * actual.numel()) ** 0.5
        bound = factor * largest + floor
        unit = size[measure] if measure == "relative L2 error" and size[measure] > 0 else 1.0
        result.append(Measurement(tensor, measure, error[measure] / unit, reference / unit, bound / unit, actual.dtype))
    return result


def _errors(result: Tensor, exact: Tensor | None = None) -> dict[str, float]:
    """The four measures of `result - exact` over the elements where both are finite, the L2 as root mean square."""
    exact = torch.zeros_like(result) if exact is None else exact
    difference = result.detach().double() - exact.detach().double()
    difference = difference[result.isfinite() & exact.to(result.dtype).isfinite()]
    if difference.numel() == 0:
        difference = difference.new_zeros(1)
    return {
        "max error": float(difference.abs().max()),
        "mean error": float(difference.abs().mean()),
        "relative L2 error": float(difference.square().mean().sqrt()),
        "bias": float(difference.mean().abs()),
    }


def assert_parity(
    actual: Callable[..., Any], reference: Callable[..., Any], inputs: Sequence[Any], *, name: str = "", **options: Any
) -> list[Measurement]:
    """Assert that `actual` computes what `reference` does, values and gradients, within the error budget.

    `name` begins the failure message, by default it is that of `actual`; everything else, and what is returned, is
    `measure_parity`'s.

    Raises:
        AssertionError: an error exceeds its bound, or a shape, a dtype or the presence of a gradient differs. The
            message names the tensor, the measure, the error, the bound and the reference's own error.

    Examples:
        >>> from ocr_kernels.gather.reference import spatial_gather as definition
        >>> measurements = assert_parity(spatial_gather, definition, gather_inputs(requires_grad=True))
    """
    measurements = measure_parity(actual, reference, inputs, **options)
    failures = [str(measurement) for measurement in measurements if not measurement.passed]
    if failures:
        raise AssertionError("\n  ".join((f"{name or _name(actual)} differs from the reference", *failures)))
    return measurements


def measure_parity(
    actual: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    oracle: Callable[..., Any] | None = None,
    grad_output: Tensor | Sequence[Tensor] | None = None,
    factors: Mapping[torch.dtype, float] | None = None,
) -> list[Measurement]:
    """Measure and `judge` what `actual` computes: outputs, gradients of inputs and of parameters, buffers.

    A float32 or float64 kernel adds up in the dtype of its inputs, as the reference does; which of the two comes
    closer is luck in the order of the sums. There the reference's error is the largest of four: its own, and
    three on inputs moved by up to four eps, which is about what adding up a hundred terms one by one costs. float16
    and bfloat16 are judged by its own alone. No arithmetic is better than float64, so a float64 reference is
    measured in float32 and its error scaled by the ratio of the two eps.

    Args:
        actual: the tested function, or module, of `inputs`; it returns a tensor or a sequence of tensors.
        reference: the eager definition. With two modules, the gradients of all parameters and all floating
            buffers after the call are compared by name too. Modules are copied, never changed.
        inputs: positional arguments; the gradients of those tensors that require grad are compared. Their
            layouts are kept, and `.grad` is left alone.
        oracle: what runs on float64 inputs; by default `reference`.
        grad_output: the incoming gradient, or one for each output; by default random, in dtype and layout of
            `actual`'s output.
        factors: instead of `FACTORS`.

    Raises:
        AssertionError: a shape, a dtype or the presence of a gradient differs.

    Every run starts from the same random state, so that dropout agrees where it draws alike in both dtypes.

    Examples:
        >>> from ocr_kernels.attention.reference import pixel_region_attention as definition
        >>> measurements = measure_parity(pixel_region_attention, definition, attention_inputs())
        >>> {each.tensor for each in measurements}
        {'output'}
    """
    labels = _input_names(reference, len(inputs))
    tested, incoming = _run(actual, inputs, labels, None if grad_output is None else _as_tuple(grad_output))

    def run(function: Callable[..., Any], *changes: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        values = [function, *inputs, *incoming]
        for change in changes:
            values = [_map(value, change) for value in values]
        return _run(values[0], values[1 : len(inputs) + 1], labels, tuple(values[len(inputs) + 1 :]))[0]

    definition = reference if oracle is None else oracle
    plain, exact = run(reference), run(definition, Tensor.double)
    for tensor in plain | tested:
        dtypes = [str(results[tensor].dtype) if tensor in results else "none" for results in (plain, tested)]
        if dtypes[0] != dtypes[1]:
            raise AssertionError(f"{tensor}: the reference has {dtypes[0]}, {_name(actual)} has {dtypes[1]}")
    used = {result.dtype for result in plain.values()}
    repeats: dict[torch.dtype, list[Any]] = {dtype: [] for dtype in FACTORS}
    if torch.float32 in used:
        repeats[torch.float32] = [(run(reference, _Jitter(seed)), exact, 1.0) for seed in range(3)]
    if torch.float64 in used:
        # twice the ratio of the eps: a vector of float64 holds half as many sums, so each adds up twice as many terms
        ratio = 2 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        narrow_exact = run(definition, _narrow, Tensor.double)
        repeats[torch.float64] = [(run(reference, _narrow, _Jitter(seed)), narrow_exact, ratio) for seed in range(3)]

    measurements: list[Measurement] = []
    for tensor, result in tested.items():
        runs = [(plain, exact, 1.0), *repeats[result.dtype]]
        measurements += judge(
            tensor,
            result,
            [(inexact[tensor], oracle_run[tensor], weight) for inexact, oracle_run, weight in runs],
            factor=(factors or FACTORS).get(result.dtype),
        )
    return measurements


def _run(
    function: Callable[..., Any], inputs: Sequence[Any], labels: Sequence[str], grads: tuple[Tensor, ...] | None
) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """Outputs, gradients and buffers that there are, by name, and the incoming gradients used (drawn if None)."""
    function, *arguments = (_map(value, Tensor.detach) for value in (function, *inputs))
    cuda = {value.device.index for value in arguments if isinstance(value, Tensor) and value.is_cuda}
    with torch.random.fork_rng(cuda):
        torch.manual_seed(0)
        outputs = _as_tuple(function(*arguments))
    names = ["output"] if len(outputs) == 1 else [f"output {i}" for i in range(len(outputs))]
    results = {name: out.detach() for name, out in zip(names, outputs, strict=True)}
    if grads is None:
        grads = tuple(_random_like(out, seed) for seed, out in enumerate(outputs))
    shapes, expected = ([tuple(t.shape) for t in tensors] for tensors in (outputs, grads))
    if shapes != expected:
        raise AssertionError(f"{_name(function)} must return outputs of shapes {expected}, but they are {shapes}")

    leaves = {label: v for label, v in zip(labels, arguments, strict=True) if isinstance(v, Tensor)}
    if isinstance(function, nn.Module):
        leaves |= function.named_parameters()
    leaves = {label: leaf for label, leaf in leaves.items() if leaf.requires_grad}
    pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if out.requires_grad]
    if leaves and pairs:
        outs, incoming = zip(*pairs, strict=True)
        gradients = torch.autograd.grad(outs, tuple(leaves.values()), incoming, allow_unused=True)
        named = zip(leaves, gradients, strict=True)
        results |= {f"gradient of {label}": gradient for label, gradient in named if gradient is not None}
    if isinstance(function, nn.Module):
        results |= {f"buffer {label}": b for label, b in function.named_buffers() if b.is_floating_point()}
    return results, grads


def _random_like(out: Tensor, seed: int) -> Tensor:
    grad = torch.empty_like(out)  # keeps the strides
    return grad.copy_(_normal(out.shape, torch.Generator().manual_seed(seed)))


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A tensor detached, or a module copied, with `change` applied to what is floating; anything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return change(value.detach()).requires_grad_(value.requires_grad)
    if isinstance(value, nn.Module):
        value = deepcopy(value)
        for tensor in (*value.parameters(), *value.buffers()):
            if tensor.is_floating_point():
                tensor.data = change(tensor.data)
    return value


def _narrow(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float64 else tensor


class _Jitter:
    """Moves every element by up to four eps of itself, each call otherwise, instances of the same seed alike."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, tensor: Tensor) -> Tensor:
        noise = 8 * torch.rand(tensor.shape, generator=self._generator, dtype=torch.float64) - 4
        return (tensor.double() * (1 + torch.finfo(tensor.dtype).eps * noise.to(tensor.device))).to(tensor.dtype)


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _input_names(function: Callable[..., Any], count: int) -> list[str]:
    parameters = inspect.signature(function.forward if isinstance(function, nn.Module) else function).parameters
    names = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [names[i] if i < len(names) else f"input {i}" for i in range(count)]


# Derivatives, memory


def gradcheck(function: Callable[..., Any], inputs: Sequence[Any], *, fast: bool = False) -> None:
    """Check the derivatives by those inputs that require grad against finite differences, in float64.

    Raises:
        RuntimeError: they differ (`GradcheckError`), or two backward passes differ in a single bit.

    Examples:
        >>> gradcheck(spatial_gather, gather_inputs(spatial=(2, 3), requires_grad=True))
    """
    torch.autograd.gradcheck(function, _leaves(inputs), eps=1e-6, atol=1e-7, rtol=1e-5, nondet_tol=0.0, fast_mode=fast)


def gradgradcheck(function: Callable[..., Any], inputs: Sequence[Any], *, fast: bool = False) -> None:
    """Check second derivatives in the same way.

    Examples:
        >>> gradgradcheck(spatial_gather, gather_inputs(spatial=(2, 3), requires_grad=True), fast=True)
    """
    torch.autograd.gradgradcheck(
        function, _leaves(inputs), eps=1e-6, atol=1e-7, rtol=1e-5, nondet_tol=0.0, fast_mode=fast
    )


def _leaves(inputs: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(_map(value, Tensor.double) for value in inputs)


def saved_bytes(function: Callable[..., Any], *inputs: Any, exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that `function(*inputs)` keeps for its backward pass, each storage counted once and in full.

    `exclude` names tensors whose storages are there anyway: the inputs, a module's parameters.

    Examples:
        >>> query, key, value = inputs = attention_inputs(requires_grad=True)
        >>> saved_bytes(pixel_region_attention, *inputs, exclude=inputs)
        0
    """
    saved: dict[int, Tensor] = {}  # holds the tensors, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*inputs)
    known = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    return sum(tensor.untyped_storage().nbytes() for address, tensor in saved.items() if address not in known)


def peak_bytes(function: Callable[..., Any], *inputs: Any) -> int:
    """Bytes that `function(*inputs)` allocates at most at a time, its results not counted.

    It is what PyTorch's allocators hand out; what kernels allocate themselves, as the compiled library's do for partial
    sums and tiles, is not seen.

    Examples:
        >>> peak_bytes(torch.softmax, torch.randn(4, 1000), 1)
        0
    """
    on_gpu = any(isinstance(value, Tensor) and value.is_cuda for value in inputs)
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = function(*inputs)
        torch.cuda.synchronize()
        largest = torch.cuda.max_memory_allocated() - before
    else:
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with new_memory(), torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
            results = function(*inputs)
        kineto = profile.profiler.kineto_results if profile.profiler else None
        changes = [event.nbytes() for event in (kineto.events() if kineto else ()) if event.name() == "[memory]"]
        largest = max(itertools.accumulate(changes), default=0)
    tensors = [results] if isinstance(results, Tensor) else results
    known = {value.untyped_storage().data_ptr() for value in inputs if isinstance(value, Tensor)}
    owned = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor)}
    return max(0, int(largest) - sum(size for address, size in owned.items() if address not in known))


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside the block every `torch.empty` is filled with NaN, so that an element nobody wrote is seen.

    Examples:
        >>> with poisoned_memory():
        ...     bool(torch.empty(3).isnan().all())
        True
    """
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
