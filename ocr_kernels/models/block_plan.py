"""A module's step 4, from pixels and regions to z, as `ocr_block` computes it: found by what its forward computes.

The layers' names and types do not matter. A plan says what the folded weights are made of; they are made of the
module's present parameters and buffers, and made anew when those changed.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import itertools
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from ocr_kernels.core.calls import has_own_forward, taken_apart
from ocr_kernels.core.layout import DTYPES
from ocr_kernels.models.block_program import Call, Ref, aten, tensor_at
from ocr_kernels.models.block_trace import Map, Node, Own, Tracer, Unmatched
from ocr_kernels.models.block_weights import Beyond, BlockPlan, Layer
from ocr_kernels.models.classifier import matrix_of
from ocr_kernels.models.errors import Errors, errors, relative_error
from ocr_kernels.models.own_code import (
    BASE,
    containers_of,
    functions_of,
    globals_of,
    is_plain,
    is_value,
    items_of,
    kept,
    own_classes,
    present,
    read_by_forward,
)
from ocr_kernels.models.random_state import forked_rng

VERIFICATION_BOUND = 1e-4
"""Largest relative difference at which two float32 forwards with random weights count as equal."""

SIZES = (
    (2, (5, 3, 2), 4, False),
    (1, (11, 7, 3), 9, False),
    (3, (2, 2, 2), 1, False),
    (2, (4, 8, 1), 21, True),
    (1, (34, 31, 2), 5, False),
    (1, (71, 67, 1), 3, False),
)
"""Images, sides of theirs, regions, and whether gradients are on, at which two forwards are compared."""

MOST_MATRICES = 32
"""A module with more is a network around step 4, which is not tried."""

Forward = Callable[..., Any]


# The check


def verify(
    module: nn.Module,
    plan: BlockPlan,
    example: tuple[Tensor, Tensor] | None = None,
    *,
    classifier: nn.Module | None = None,
    compute: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
) -> Errors | str:
    """The plan's errors beside those of the module's own forward.

    Or why the plan is wrong: with random weights in float32 it is off, or with the real ones by more than the bound.
    Without `example` pixels and regions are random. With a classifier, whose op is that of the plan, logits are
    compared. Of a plan that does not fold, `compute` is what runs instead, and was compared with random weights.
    """
    try:
        with quiet([*module.parameters(), *module.buffers()]):
            off = "" if classifier is not None or compute is not None else _off_at_random(module, plan)
            return off or _errors(module, plan, example, classifier, compute)
    except Exception as error:
        return f"it fails on pixels and regions: {error}"


def _off_at_random(module: nn.Module, plan: BlockPlan) -> str:
    forward = type(module).forward
    generator = torch.Generator().manual_seed(0)
    trial = copied(module)
    for name, tensor in (*trial.named_parameters(), *trial.named_buffers()):
        if tensor.is_floating_point():
            fan = max(tensor[0].numel(), 1) if tensor.dim() > 1 else 1
            drawn = torch.randn(tensor.shape, generator=generator) * (2 / fan) ** 0.5
            tensor.copy_(0.5 + drawn.abs() if name.endswith("var") else drawn)
    for batch, sides, count, grad in SIZES:  # what depends on a size, or on whether gradients are on, shows
        feats, regions = plan.random_inputs(1, batch, sides, count)
        with torch.set_grad_enabled(grad):
            expected = forward(trial, feats.clone(), regions.clone())
        found = plan.weights(trial, torch.float32).compute(feats, regions, backend="reference")
        if not isinstance(expected, Tensor) or found.shape != expected.shape:
            return "its forward computes something else on other weights, or for other sizes"
        if not expected.is_contiguous():
            return "its result is not contiguous where its pixels are"
        error = relative_error(found, expected)
        if not error <= VERIFICATION_BOUND or not expected.isfinite().all():
            where = f"on random weights, {batch} images of {sides[: plan.dims - 2]} pixels, {count} regions"
            return f"its forward computes something else (off by {error:.1e} {where})"
    narrow = [t.bfloat16() for t in plan.random_inputs(1)]
    expected = forward(trial.bfloat16(), *(t.clone() for t in narrow))
    if expected.dtype != torch.bfloat16:
        return "its result has another dtype than its pixels"
    found = plan.weights(trial, torch.bfloat16).compute(narrow[0], narrow[1], backend="reference")
    error = relative_error(found, expected)
    return "" if error <= 0.25 else f"its forward computes something else in bfloat16 (off by {error:.1e})"


def _errors(
    module: nn.Module,
    plan: BlockPlan,
    example: tuple[Tensor, Tensor] | None,
    classifier: nn.Module | None,
    compute: Callable[[nn.Module, Tensor, Tensor], Tensor] | None,
) -> Errors | str:
    first = tensor_at(module, plan.first)
    trial = copied(module, keep=True)
    feats, regions = (tensor.detach().to(first) for tensor in example or plan.random_inputs(2))
    if not plan.takes(feats, regions, first):
        feats, regions = (tensor.to(first) for tensor in plan.random_inputs(2))
    with torch.device(first.device):
        after = nn.Identity() if classifier is None else copied(classifier, keep=True)
        if compute is not None:
            found = compute(trial, feats, regions)
        else:
            weights: Any = plan.weights(trial, first.dtype)
            if classifier is not None:
                layer = matrix_of(after)
                weights = None if layer is None else weights.with_classifier(*layer)
            if weights is None:
                return "its result does not go to a 1x1 convolution that is part of the op"
            found = weights.compute(feats, regions)

        def own(x: Tensor, f: Tensor) -> Tensor:
            out: Tensor = after(type(trial).forward(trial, x, f))
            return out

        def exact() -> Tensor:
            trial.double(), after.double()
            return own(feats.double(), regions.double())

        result = errors(found, own(feats.clone(), regions.clone()), exact)
    return result.why_not() or result


# Finding it


def plan_block(module: nn.Module, example: tuple[Tensor, Tensor] | None = None) -> BlockPlan | str:
    """How `module` computes step 4, or why it cannot be computed by `ocr_block`; empty if it does not compute step 4.

    A copy of it is run on small random pixels and regions, of the dimensions of `example` if there is one. The module
    itself stays as it is.
    """
    own = type(module).forward
    if not _takes_two(own) or not 2 <= len(_matrices(module)) <= MOST_MATRICES:
        return ""
    failure = ""
    try:
        with quiet([*module.parameters(), *module.buffers()]):
            trial = copied(module)
            _fill_in_statistics(trial)
            for inputs, transposed in _shapes(module, example):
                try:
                    tracer, out = _traced(trial, own, inputs, transposed)
                except Exception as error:
                    failure = f"it fails on pixels and regions: {error}" if example is not None else ""
                    continue
                seen = frozenset().union(*(_seen_in(tracer, each) for each in _tensors(out)))
                if "joined" not in seen:
                    continue
                why_not = _obstacle(module)
                if why_not:
                    return why_not
                try:
                    plan = _plan(module, tracer, out, inputs, transposed)
                    return dataclasses.replace(plan, casts=_is_cast(copied(module), own, inputs))
                except Unmatched as why:
                    return f"it {why}"
    except Exception as error:
        failure = f"it cannot be tried: {error}" if example is not None else ""
    return failure


def _is_cast(module: nn.Module, forward: Forward, inputs: tuple[Tensor, Tensor]) -> bool:
    """Whether autocast decides the dtype of the result."""
    try:
        with torch.autocast("cpu", torch.bfloat16):
            return bool(forward(module, *inputs).dtype == torch.bfloat16)
    except Exception:  # where it does not even run
        return False


def _takes_two(forward: Forward) -> bool:
    """Whether it can be called with pixels and regions."""
    try:
        inspect.signature(forward).bind(None, None, None)
    except (TypeError, ValueError):
        return False
    return True


def _obstacle(module: nn.Module) -> str:
    """What stands in the way whatever is computed."""
    if has_own_forward(module):
        return "its forward is the instance's own, not its class's"
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        return "its parameters are on the meta device"
    parts = set(module.modules())
    for name, part in module.named_modules():
        code = {n for base in own_classes(part) for f in functions_of(base) for n in f.__code__.co_names}
        for attribute, value in vars(part).items():
            is_read = attribute in (read_by_forward(type(part)) if attribute.startswith("_") else code)
            if is_read and attribute not in BASE and not _is_seen(value, parts):
                return f"it reads {name}{'.' * bool(name)}{attribute}, whose changes would not be seen"
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"{name} is a {type(tensor).__name__}"
    for name, part in module.named_modules():
        if part is not module and (part._forward_hooks or part._forward_pre_hooks):
            return f"{name} has a forward hook, which would not run"
        if part is not module and has_own_forward(part):
            return f"the forward of {name} is the instance's own, not its class's"
    return ""


def _is_seen(value: Any, parts: set[nn.Module]) -> bool:
    """Whether a change of an attribute, or in it, is noticed; `parts` are those of the module."""
    if isinstance(value, MethodType):
        value = value.__self__
    if isinstance(value, nn.Module):  # another's, or the whole network
        return value in parts
    if isinstance(value, weakref.ref):
        return False
    return is_value(value) or callable(value) or isinstance(value, (Tensor, torch.dtype, torch.device))


def _matrices(module: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in module.named_parameters() if t.dim() >= 2 and t.is_floating_point()}


def _shapes(module: nn.Module, example: tuple[Tensor, Tensor] | None) -> Iterator[tuple[tuple[Tensor, Tensor], bool]]:
    """Pixels and regions to try, and whether the regions are `[B, K, C]`."""
    matrices = _matrices(module).values()
    sizes = {size for weight in matrices for size in weight.shape}
    regions = next(k for k in itertools.count(4) if k not in sizes)
    if example is not None:
        feats, given = example
        if feats.dim() < 3 or given.dim() < 3:
            return
        regions = min(given.shape[2 if given.shape[1] == feats.shape[1] else 1], 256)
        channels, dims, region_dims = [feats.shape[1]], [feats.dim() - 2], [given.dim()]
    else:
        channels = list(dict.fromkeys(weight.shape[1] for weight in matrices))[:6]
        dims = sorted({weight.dim() - 2 for weight in matrices if weight.dim() > 2} | {2}, reverse=True)
        region_dims = [4, 3, 5]
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        sides = [(5, 3, 2), *[(17, 19, 16)] * any("Pool" in type(part).__name__ for part in module.modules())]
        for side, c, d, r, transposed in itertools.product(sides, channels, dims, region_dims, (False, True)):
            shape = (2, regions, c) if transposed else (2, c, regions)
            if example is not None and example[1].shape[2 if transposed else 1] != c:
                continue
            x = torch.randn((2, c, *side[:d]), generator=generator, dtype=torch.float32)
            f = torch.randn((*shape, *[1] * (r - 3)), generator=generator, dtype=torch.float32)
            yield (x, f), transposed


def copied(module: nn.Module, keep: bool = False) -> nn.Module:
    """A copy in float32 on the CPU, contiguous, or in its dtypes and formats where it is, in eval mode, without hooks.

    Weights that are channels last make results so, whatever the pixels are, which nobody asks a block for.
    """
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        values = torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor.detach()
        if not keep:
            values = values.cpu()
            values = values.float() if values.is_floating_point() else values
        values = values.clone(memory_format=torch.preserve_format if keep else torch.contiguous_format)
        memo[id(tensor)] = nn.Parameter(values, False) if isinstance(tensor, nn.Parameter) else values
    copied = copy.deepcopy(module, memo).eval()
    for part in copied.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return copied


def _is_of_batch(part: nn.Module) -> bool:
    """Whether a norm takes the statistics of the batch in eval mode, too."""
    return isinstance(part, _BatchNorm) and part.running_mean is None and part.running_var is None


def _fill_in_statistics(module: nn.Module) -> None:
    """Give norms statistics that run where they have none: the trace of what follows shows the layers as ever."""
    for part in filter(_is_of_batch, module.modules()):
        assert isinstance(part, _BatchNorm)
        part.running_mean, part.running_var = torch.zeros(part.num_features), torch.ones(part.num_features)


@contextlib.contextmanager
def quiet(tensors: list[Tensor]) -> Iterator[None]:
    """In here nothing that a run does is left behind, and nothing that was set outside matters."""
    default = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        stack.enter_context(forked_rng(tensors))
        stack.enter_context(taken_apart())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.device("cpu"))
        for device in {"cpu", *(t.device.type for t in tensors if not t.is_meta)}:
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


def _traced(module: nn.Module, forward: Forward, inputs: tuple[Tensor, Tensor], transposed: bool) -> tuple[Tracer, Any]:
    watch = Watch(module, [*module.parameters(), *module.buffers(), *inputs])
    foreign = {id(item) for container in watch.containers for item in items_of(container)}
    foreign |= {id(globals[name]) for globals, names in globals_of(module) for name in names}
    with sdpa_kernel(SDPBackend.MATH), Tracer(module, *inputs, transposed, foreign) as tracer:
        out = forward(module, *inputs)
    tracer.obstacle = tracer.obstacle or watch.left_behind()
    return tracer, out


class Watch:
    """What a run of a module may leave behind beside its result."""

    def __init__(self, module: nn.Module, tensors: list[Tensor]) -> None:
        parts = list(module.modules())
        self.owners: list[Any] = [*map(vars, parts), *map(vars, {base for part in parts for base in own_classes(part)})]
        self.owners += [owned for part in parts for owned in (part._parameters, part._buffers, part._modules)]
        self.attributes: list[dict[str, Any]] = list(map(dict, self.owners))
        self.containers: list[Any] = containers_of(module)
        self.contents: list[Any] = list(map(kept, self.containers))
        self.tensors = tensors
        self.versions: list[int] = [tensor._version for tensor in tensors]
        self.values: list[Tensor] = [tensor.detach().clone() for tensor in tensors]  # `.data` has no version

    def left_behind(self) -> str:
        """What it did since then; the message completes "it ..."."""
        for owner, attributes in zip(self.owners, self.attributes, strict=True):
            for name, value in owner.items():
                if name not in attributes or value is not attributes[name]:
                    return f"sets its attribute {name}"
        if not all(map(_is_same, self.containers, self.contents)):
            return "changes a list, a dict or another object"
        is_unchanged = [
            bool(((t == value) | (t != t)).all()) for t, value in zip(self.tensors, self.values, strict=True)
        ]
        if [tensor._version for tensor in self.tensors] != self.versions or not all(is_unchanged):
            return "changes its own tensors or its arguments in place"
        return ""


def _is_same(now: Any, before: Any) -> bool:
    """Whether a container holds what it held."""
    if not isinstance(now, (list, tuple, dict, deque)):
        return now is before or (isinstance(now, (int, float, str, set)) and bool(now == before))
    if len(now) != len(before) or (isinstance(now, dict) and list(now) != list(before)):
        return False
    return all(map(_is_same, items_of(now), items_of(before)))


def _tensors(out: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, Tensor)]


def _seen_in(tracer: Tracer, tensor: Tensor) -> frozenset[str]:
    what = tracer.known.get(id(tensor))
    return what.seen if isinstance(what, Map) else frozenset()


def _plan(module: nn.Module, tracer: Tracer, out: Any, inputs: tuple[Tensor, Tensor], transposed: bool) -> BlockPlan:
    if not isinstance(out, Tensor):
        raise Unmatched(f"returns a {type(out).__name__}")
    what = tracer.found(out)
    assert isinstance(what, Map)
    z = _checked(what.node)
    if tracer.obstacle:
        raise Unmatched(tracer.obstacle)
    feats = inputs[0]
    whole = (feats.shape[0], z.shape[1], *feats.shape[2:])
    if z.axes != "bcn" or out.shape != whole or not torch.equal(what.index.flatten(), torch.arange(out.numel())):
        raise Unmatched("returns something else than a map of the shape of its pixels")
    z, slope = _activated(z)
    fusing = tracer.linear(z)
    windowed = next((leaf for leaf in fusing.terms if leaf.kind == "windowed"), None)
    if windowed is not None:
        fusing = _joined_by(tracer, windowed, fusing)
    contexts = [leaf for leaf in fusing.terms if leaf.kind != "feats"]
    for leaf in contexts:
        _checked(leaf)
    if len(contexts) != 1 or len(fusing.terms) != 2:
        raise Unmatched("joins other maps than pixels and contexts")
    y = contexts[0]
    halves = {leaf: tracer.matrix(fusing, rows).ref for leaf, rows in fusing.terms.items()}
    context, up_slope = _activated(y if y.kind != "resized" else y.inputs[0])
    up: Any = None
    up_bias = None
    if context.kind != "context":
        linear = tracer.linear(context)
        context, rows = _only(linear)
        up, up_bias = tracer.matrix(linear, rows).ref, _ref(linear.bias)
    if context.kind != "context":
        raise Unmatched(_stray(context))
    weights, value = context.inputs
    scores, factor = weights.inputs[0], 1.0
    learned = []
    while scores.kind == "scaled":
        if isinstance(scores.factor, Own):
            learned.append(scores.factor)
        else:
            factor *= scores.factor
        scores = scores.inputs[0]
    query, key = scores.inputs
    for number in learned:
        key = Node("scaled", key.axes, key.shape, (key,), factor=number)
    pooled = query.shape[2] != z.shape[2]
    if pooled != (y.kind == "resized") or (pooled and y.shape[2] != z.shape[2]):
        raise Unmatched("resizes its contexts otherwise than to the size of its pixels")
    pixels = _layers(tracer, query, "pooled" if pooled else "feats")
    window = None if windowed is None else windowed.window
    if pooled and window is not None:
        raise Unmatched("pools its pixels, and joins them by a convolution that is not 1x1")
    beyond = _resizing(query, y) if pooled else None if window is None else Beyond(None, None, 1, window)
    if not all(isinstance(layer, Layer) for layer in pixels) or not 1 <= len(pixels) <= 2:
        raise Unmatched(f"puts the pixels through {len(pixels)} layers before it attends, instead of one or two")
    regions = tuple(_layers(tracer, key, "regions")), tuple(_layers(tracer, value, "regions"))
    (pixel_half,) = (ref for leaf, ref in halves.items() if leaf.kind == "feats")
    fuse = Layer(pixel_half, _ref(fusing.bias), slope)
    rho = Layer(up, up_bias, up_slope)
    program = tracer.program().pruned((tuple(pixels), *regions, rho, halves[y], fuse))
    matrices = _matrices(module)
    own = [path for _, path in program.sources if path in matrices]
    dtypes = {matrices[path].dtype for path in own}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        raise Unmatched("has weights of several dtypes, or of one that the op does not take")
    return BlockPlan(
        program=program,
        pixels=tuple(pixels),
        key=regions[0],
        value=regions[1],
        up=rho,
        context=halves[y],
        fusing=fuse,
        scale=factor,
        beyond=beyond,
        channels=feats.shape[1],
        dims=feats.dim(),
        region_dims=inputs[1].dim(),
        transposed=transposed,
        first=own[0],
        folds=not any(map(_is_of_batch, module.modules())),
        layers=tuple(
            (path, type(part).__qualname__, present(part), _settings(part)) for path, part in module.named_modules()
        ),
    )


def _joined_by(tracer: Tracer, windowed: Node, fusing: Node) -> Node:
    """What a convolution joins, with its weight, and what follows it, as what a matrix would take."""
    linear = tracer.linear(windowed.inputs[0])
    leaf, rows = _only(fusing)
    assert windowed.weight is not None
    if leaf is not windowed or linear.bias is not None or not all(isinstance(r, slice) for r in linear.terms.values()):
        raise Unmatched("joins maps by a convolution that is not 1x1, beside or after other layers")
    weight, bias = windowed.weight, windowed.bias
    if isinstance(rows, Own):
        size = list(weight.value.shape)
        weight = tracer.emit(aten.mm.default, rows, tracer.emit(aten.reshape.default, weight, [size[0], -1]))
        weight = tracer.emit(aten.reshape.default, weight, [-1, *size[1:]])
        bias = None if bias is None else tracer.emit(aten.mv.default, rows, bias)
    if fusing.bias is not None:
        bias = fusing.bias if bias is None else tracer.emit(aten.add.Tensor, fusing.bias, bias)
    terms: dict[Node, Own | slice] = {
        part: tracer.emit(aten.slice.Tensor, weight, 1, rows.start, rows.stop)
        for part, rows in linear.terms.items()
        if isinstance(rows, slice)
    }
    return dataclasses.replace(fusing, terms=terms, bias=bias)


def _resizing(query: Node, y: Node) -> Beyond:
    pooled = query
    while pooled.kind != "pooled":
        pooled = next(iter(pooled.inputs or pooled.terms))
    if pooled.inputs[0].kind != "feats" or pooled.call is None or y.call is None:
        raise Unmatched(_stray(pooled.inputs[0]))
    sizes = pooled.call.args[:2]  # of windows, and their steps
    return Beyond(pooled.call, y.call, max(itertools.chain(*sizes)), None)


def _settings(part: nn.Module) -> tuple[tuple[str, Any], ...]:
    """The attributes of a layer, and of its own classes, that its forward may read, but for tensors and callables."""
    own = own_classes(part)
    values = {name: value for name, value in vars(part).items() if not name.startswith("_")}
    if own:
        read = read_by_forward(type(part))
        values |= {name: inspect.getattr_static(part, name) for base in own for name in vars(base).keys() & read}
        values |= {name: vars(part)[name] for name in vars(part).keys() & read}
    return tuple(
        (name, kept(value))
        for name, value in values.items()
        if name not in BASE and (is_plain(value) or (own and is_value(value)))
    )


def _ref(own: Own | None) -> Ref | None:
    return None if own is None else own.ref


def _checked(node: Node) -> Node:
    if node.kind == "other":
        raise Unmatched(node.reason)
    return node


def _activated(node: Node) -> tuple[Node, float]:
    return (node.inputs[0], node.slope) if node.kind == "activation" else (node, 1.0)


def _only(linear: Node) -> tuple[Node, Own | slice]:
    if len(linear.terms) != 1:
        raise Unmatched("adds up maps inside phi, psi, delta or rho")
    return next(iter(linear.terms.items()))


def _stray(node: Node) -> str:
    return node.reason or f"has {node.kind} of {'pixels' if 'n' in node.axes else 'regions'} where step 4 has none"


def _layers(tracer: Tracer, node: Node, start: str) -> list[Any]:
    """The layers from feats or regions to `node`."""
    _checked(node)
    if node.kind == start:
        return []
    if node.kind == "activation":
        before = _layers(tracer, node.inputs[0], start)
        if before and isinstance(before[-1], Layer) and before[-1].slope == 1:
            return [*before[:-1], before[-1]._replace(slope=node.slope)]
        return [*before, Call(torch.ops.aten.leaky_relu.default, (node.slope,))]
    if node.kind == "function":
        assert node.call is not None
        return [*_layers(tracer, node.inputs[0], start), node.call]
    if node.kind in ("linear", "scaled"):
        linear = tracer.linear(node)
        leaf, rows = _only(linear)
        return [*_layers(tracer, leaf, start), Layer(tracer.matrix(linear, rows).ref, _ref(linear.bias), 1.0)]
    raise Unmatched(_stray(node))
