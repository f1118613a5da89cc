"""What a module computes from pixels and regions, read off the operations that one run of it does.

Every tensor of the run is either made of the module's own tensors alone, an entry of a `Program` that can be run again
on their present values, or a map: a `Node` of the formula, and for each element of the tensor the element of the
node's map that it is. Operations that only move elements move those indices, so how a map is laid out never matters.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ocr_kernels.models.block_program import Call, Program, Ref, Window, aten, channel_norm

# The formula


@dataclasses.dataclass(eq=False)
class Own:
    """A tensor that is made of the module's own: which result, and its value in this run."""

    ref: Ref
    value: Tensor
    constant: bool  # of numbers alone


@dataclasses.dataclass(eq=False)
class Node:
    """A map `[B, channels, pixels]` ("bcn"), `[B, channels, regions]` ("bck") or `[B, regions, pixels]` ("bkn").

    kind: feats, regions; linear (sum of matrices times `terms`, plus `bias`); activation (of `slope`); scaled (by
    `factor`); function (`call` of a map of regions); pooled and resized (by `call`, to another number of pixels);
    windowed (a convolution of more than one pixel, by `weight`); scores, weights, context; other, which `reason`
    describes.
    """

    kind: str
    axes: str
    shape: tuple[int, ...]
    inputs: tuple[Node, ...] = ()
    terms: dict[Node, Own | slice] = dataclasses.field(default_factory=dict)  # a slice: its rows of an identity
    bias: Own | None = None
    slope: float = 1.0
    factor: Own | float = 1.0
    call: Call | None = None
    weight: Own | None = None
    window: Window | None = None
    reason: str = ""


@dataclasses.dataclass(eq=False)
class Map:
    """A tensor of the run: which elements of a node's map it has (none of kind "other"), and on what it depends."""

    node: Node
    index: Tensor
    seen: frozenset[str] = frozenset()

    def coordinates(self) -> dict[str, Tensor]:
        return dict(zip(self.node.axes, torch.unravel_index(self.index, self.node.shape), strict=True))


def unmatched(reason: str, seen: frozenset[str]) -> Map:
    return Map(Node("other", "", (), reason=reason), torch.empty(0, dtype=torch.int64), seen)


class Unmatched(Exception):
    """An operation that has no place in step 4; the message completes "it ..."."""


def constant_along(coordinate: Tensor, dim: int) -> bool:
    return bool((coordinate == coordinate.narrow(dim, 0, 1)).all())


def varying_along(coordinate: Tensor, dim: int) -> Tensor | None:
    """The coordinate as a function of the index in `dim`, if it is one."""
    vector = coordinate.movedim(dim, -1).flatten(0, -2)
    return vector[0] if bool((vector == vector[0]).all()) else None


COPIES = {"clone", "alias", "detach", "lift_fresh", "contiguous", "to_copy"}
VIEWS = {"view", "unsafe_view", "reshape_alias", "reshape"}
MOVES = {
    "permute", "transpose", "t", "expand", "unsqueeze", "squeeze", "select", "slice", "split", "split_with_sizes",
    "unbind", "flip", "roll", "repeat", "unsafe_split",
}  # fmt: skip
MADE_LIKE = {"new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"}
FUNCTIONS = {
    "gelu", "silu", "mish", "hardswish", "hardsigmoid", "hardtanh", "elu", "celu", "selu", "sigmoid", "tanh",
    "softplus", "softshrink", "hardshrink", "exp", "log", "sqrt", "pow", "abs", "clamp", "prelu_kernel",
}  # fmt: skip
SOFTMAXES = {"_softmax", "_safe_softmax"}
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "pixel_region_attention"}


class Tracer(TorchDispatchMode):
    """Follows the operations of a run."""

    def __init__(self, module: nn.Module, feats: Tensor, regions: Tensor, transposed: bool, foreign: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.foreign = foreign  # objects that are not made in the run
        self.calls: list[Call] = []
        self.paths: list[str] = []
        self.known: dict[int, Own | Map] = {}
        self.kept: list[Tensor] = []  # so that no other gets its id
        self.obstacle: str = ""  # what of the run is not seen in its result
        own: dict[int, tuple[str, Tensor]] = {}
        for name, part in module.named_modules():
            for names in (part._parameters, part._buffers, vars(part)):
                for attribute, tensor in names.items():
                    if isinstance(tensor, Tensor):
                        own.setdefault(id(tensor), (f"{name}.{attribute}".lstrip("."), tensor))
        for path, tensor in own.values():
            self._remember(tensor, Own(Ref(len(self.paths)), tensor.detach(), False))
            self.paths.append(path)
        node = Node("feats", "bcn", feats.flatten(2).shape)
        self._remember(feats, Map(node, torch.arange(feats.numel()).view(feats.shape), frozenset({"feats"})))
        shape = regions.flatten(2).shape
        index = torch.arange(regions.numel())
        if transposed:
            shape = shape[:1] + shape[:0:-1]
            index = index.view(shape).mT
        node = Node("regions", "bck", shape)
        self._remember(regions, Map(node, index.reshape(regions.shape), frozenset({"regions"})))

    def program(self) -> Program:
        first = len(self.paths)
        return Program(tuple(enumerate(self.paths)), tuple(enumerate(self.calls, first)), first + len(self.calls))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.obstacle = self.obstacle or "draws random numbers"
        out = func(*args, **(kwargs or {}))
        self._record(func, args, kwargs or {}, out)
        return out

    def found(self, tensor: Tensor) -> Own | Map:
        """What a tensor is."""
        if id(tensor) not in self.known:
            if tensor.numel() == 1 and id(tensor) not in self.foreign and type(tensor) is Tensor:  # made of a number
                self._remember(tensor, self.number(tensor.item(), tensor))
            else:
                reason = "uses a tensor that is neither its own nor made in its forward"
                self._remember(tensor, unmatched(reason, frozenset()))
        return self.known[id(tensor)]

    def emit(self, function: Any, *args: Any, **kwargs: Any) -> Own:
        """One more call of the program."""
        own = [arg for arg in pytree.tree_leaves((args, kwargs)) if isinstance(arg, Own)]

        def referred(tree: Any) -> Any:
            return pytree.tree_map(lambda leaf: leaf.ref if isinstance(leaf, Own) else leaf, tree)

        def valued(tree: Any) -> Any:
            return pytree.tree_map(lambda leaf: leaf.value if isinstance(leaf, Own) else leaf, tree)

        self.calls.append(Call(function, tuple(referred(args)), tuple(referred(kwargs).items())))
        ref = Ref(len(self.paths) + len(self.calls) - 1)
        return Own(ref, function(*valued(args), **valued(kwargs)), all(each.constant for each in own))

    def number(self, value: Any, like: Tensor) -> Own:
        """A tensor of one number."""
        return self.emit(aten.full.default, list(like.shape), value, dtype=like.dtype, device=torch.device("cpu"))

    def _remember(self, tensor: Tensor, what: Own | Map) -> None:
        self.known[id(tensor)] = what
        self.kept.append(tensor)

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        name = func.overloadpacket.__name__
        inputs = [self.found(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        maps = [each for each in inputs if isinstance(each, Map)]
        in_place = func._schema.is_mutable
        if not outputs:
            if not all(isinstance(each, Own) and each.constant for each in inputs):
                self.obstacle = f"reads values ({name.strip('_')})"
            return
        if not maps and not in_place and torch.Tag.nondeterministic_seeded not in func.tags and "empty" not in name:
            tree = pytree.tree_map_only(Tensor, self.found, (args, kwargs))
            made = self.emit(func, *tree[0], **tree[1])
            for i, tensor in enumerate(outputs):
                ref = made.ref if isinstance(out, Tensor) else Ref(made.ref.at, i)
                self._remember(tensor, Own(ref, tensor.detach(), made.constant))
            return
        seen = _seen(name, maps)
        results: Sequence[Own | Map]
        try:
            results = self._matched(func, name, args, kwargs, maps, outputs)
        except Unmatched as why:
            results = [unmatched(str(why), seen)] * len(outputs)
        except Exception:  # with arguments that are not foreseen here
            results = [unmatched(f"computes {name.strip('_')}", seen)] * len(outputs)
        for tensor, result in zip(outputs, results, strict=False):
            if isinstance(result, Map):
                result = dataclasses.replace(result, seen=seen)
                if in_place:
                    self._replace(tensor, result)
            self._remember(tensor, result)

    def _replace(self, changed: Tensor, by: Map) -> None:
        """`changed` was changed in place, and with it all that shares its memory."""
        storage = changed.untyped_storage().data_ptr()
        before = self.known[id(changed)]
        for tensor in self.kept:
            what = self.known[id(tensor)]
            if tensor is changed or tensor.untyped_storage().data_ptr() != storage:
                continue
            alike = isinstance(before, Map) and isinstance(what, Map) and before.node is what.node
            if isinstance(what, Map) and alike and changed.numel() == math.prod(what.node.shape) == by.index.numel():
                self.known[id(tensor)] = Map(by.node, what.index, by.seen)
            else:
                seen = by.seen | (what.seen if isinstance(what, Map) else frozenset())
                self.known[id(tensor)] = unmatched(by.node.reason or "changes a part of a tensor in place", seen)

    def _matched(
        self, func: Any, name: str, args: Any, kwargs: Any, maps: list[Map], outputs: list[Tensor]
    ) -> Sequence[Own | Map]:
        """What the outputs are."""
        if not maps:
            raise Unmatched("draws random numbers or changes its own tensors")
        for each in maps:
            if each.node.kind == "other":
                raise Unmatched(each.node.reason)
        if func._schema.is_mutable and name.strip("_") in VIEWS | MOVES:
            raise Unmatched(f"changes the shape of a tensor in place ({name})")
        (x, *rest), kwargs = pytree.tree_map_only(Tensor, self.found, (args, kwargs))
        name = name.strip("_")
        if name in MADE_LIKE and outputs[0].unique().numel() == 1:
            value = outputs[0].flatten()[0].item()
            return [self.number(value, outputs[0])]
        if name in COPIES:
            return [x]
        if name in VIEWS and x.index.numel() == outputs[0].numel():
            return [Map(x.node, x.index.reshape(outputs[0].shape))]
        if name in MOVES and isinstance(x, Map):
            moved = func(x.index, *rest, **kwargs)
            return [Map(x.node, index) for index in pytree.tree_leaves(moved)]
        if "pool" in name or "upsample" in name:
            same = outputs[0].shape == args[0].shape and torch.equal(outputs[0], args[0])
            return [x if same else self._resized(x, name, rest, outputs[0])]
        handler = getattr(self, f"_on_{name}", None)
        if handler is not None:
            return [handler(x, *rest, **kwargs)]
        if name in FUNCTIONS:
            return [self._function(x, func, rest, kwargs, name)]
        raise Unmatched(f"computes {name}")

    def _resized(self, x: Any, name: str, rest: list[Any], out: Tensor) -> Map:
        """Pixels pooled, or contexts resized to the size of the pixels, which is not among the call's arguments."""
        index = torch.arange(out.numel()).view(out.shape)
        if not isinstance(x, Map) or x.node.axes != "bcn" or not _is_laid_out(x):
            raise Unmatched("pools or resizes something else than a map of pixels")
        if "adaptive" in name:
            raise Unmatched("pools its pixels to a fixed size")
        kind, function = "pooled", getattr(aten, name.removesuffix("_with_indices")).default
        if "upsample" in name:
            kind, (_, *rest) = "resized", rest
            if any(isinstance(factor, float) for factor in rest):
                raise Unmatched("resizes its contexts by a factor, not to the size of its pixels")
        node = Node(kind, "bcn", out.flatten(2).shape, (x.node,), call=Call(function, tuple(rest)))
        return Map(node, index)

    # Layers

    def linear(self, x: Node) -> Node:
        """`x` as a sum of matrices times other maps."""
        if x.kind == "linear":
            return x
        if x.kind == "scaled":
            inner = self.linear(x.inputs[0])
            terms: dict[Node, Own | slice] = {
                node: self.emit(aten.mul.Tensor, self.matrix(inner, rows), x.factor)
                for node, rows in inner.terms.items()
            }
            bias = None if inner.bias is None else self.emit(aten.mul.Tensor, inner.bias, x.factor)
            return dataclasses.replace(inner, terms=terms, bias=bias)
        return Node("linear", x.axes, x.shape, terms={x: slice(0, x.shape[1])})

    def matrix(self, x: Node, rows: Own | slice) -> Own:
        if isinstance(rows, Own):
            return rows
        width = rows.stop - rows.start
        eye = self.emit(aten.eye.default, width, dtype=torch.float32, device=torch.device("cpu"))
        if width == x.shape[1]:
            return eye
        return self.emit(aten.constant_pad_nd.default, eye, [0, 0, rows.start, x.shape[1] - rows.stop])

    def _layer(self, x: Map, dim: int, weight: Own, bias: Own | None) -> Map:
        """weight [O, I] times x, whose channels lie in `dim`."""
        others = self._channels(x, dim)
        inner = self.linear(x.node)
        count = weight.value.shape[0]
        terms: dict[Node, Own | slice] = {}
        for node, rows in inner.terms.items():
            if isinstance(rows, slice):
                whole = rows == slice(0, weight.value.shape[1])
                terms[node] = weight if whole else self.emit(aten.slice.Tensor, weight, 1, rows.start, rows.stop)
            else:
                terms[node] = self.emit(aten.mm.default, weight, rows)
        if inner.bias is not None:
            moved = self.emit(aten.mv.default, weight, inner.bias)
            bias = moved if bias is None else self.emit(aten.add.Tensor, moved, bias)
        node = Node("linear", inner.axes, (inner.shape[0], count, inner.shape[2]), terms=terms, bias=bias)
        channel = torch.arange(count).view([-1 if d == dim else 1 for d in range(x.index.dim())])
        return Map(node, (others["b"] * count + channel) * node.shape[2] + others[node.axes[2]])

    def _channels(self, x: Map, dim: int) -> dict[str, Tensor]:
        """The other coordinates, where channels lie in `dim`, all of them in order."""
        coordinates = x.coordinates()
        if "c" not in coordinates:
            raise Unmatched("applies a layer to scores or weights")
        channel = varying_along(coordinates["c"], dim)
        others = {name: value for name, value in coordinates.items() if name != "c"}
        if (
            channel is None
            or not torch.equal(channel, torch.arange(x.node.shape[1]))
            or not all(constant_along(value, dim) for value in others.values())
        ):
            raise Unmatched("applies a layer to something else than all channels of a map")
        return {name: value.narrow(dim, 0, 1) for name, value in others.items()}

    def _affine(self, x: Map, scale: Own | None, shift: Own | None) -> Map:
        """scale * x + shift, for vectors of channels."""
        inner = self.linear(x.node)
        terms, bias = inner.terms, inner.bias
        if scale is not None:
            column = self.emit(aten.unsqueeze.default, scale, 1)
            terms = {n: self.emit(aten.mul.Tensor, self.matrix(inner, w), column) for n, w in terms.items()}
            bias = None if bias is None else self.emit(aten.mul.Tensor, bias, scale)
        if shift is not None:
            bias = shift if bias is None else self.emit(aten.add.Tensor, bias, shift)
        return Map(dataclasses.replace(inner, terms=terms, bias=bias), x.index)

    def _by_channel(self, own: Own, x: Map) -> Own:
        """`own` as a vector of x's channels, if it broadcasts to x like one."""
        channel = x.coordinates().get("c")
        if channel is None:
            raise Unmatched("adds to the scores or weights, or multiplies them by, a tensor of its own")
        index = torch.arange(own.value.numel()).view(own.value.shape).broadcast_to(channel.shape).flatten()
        first = torch.zeros(x.node.shape[1], dtype=torch.int64).scatter_(0, channel.flatten(), index)
        if not torch.equal(first[channel.flatten()], index):
            raise Unmatched("adds or multiplies by a tensor of its own that is no vector of channels")
        flat = self.emit(aten.reshape.default, own, [-1])
        if torch.equal(first, torch.arange(own.value.numel())):
            return flat
        if own.value.numel() == 1:
            return self.emit(aten.expand.default, flat, [x.node.shape[1]])
        raise Unmatched("adds or multiplies by a tensor of its own that is no vector of channels")

    def _on_convolution(
        self, x: Any, w: Any, b: Any, stride: Any, pad: Any, dilation: Any, turned: bool, _: Any, groups: int
    ) -> Map:
        if not isinstance(x, Map) or not isinstance(w, Own) or isinstance(b, Map):
            raise Unmatched("convolves with what is no weight of its own")
        if turned or groups != 1 or {*stride} != {1}:
            raise Unmatched("has a convolution with a stride, or with groups")
        if w.value[0, 0].numel() != 1 or {*pad} != {0}:
            return self._windowed(x, w, b, Window(tuple(pad), tuple(dilation)))
        return self._layer(x, 1, self.emit(aten.reshape.default, w, list(w.value.shape[:2])), b)

    def _windowed(self, x: Map, w: Own, b: Own | None, window: Window) -> Map:
        sizes = w.value.shape[2:]
        same = all(2 * p == d * (k - 1) for p, d, k in zip(*window, sizes, strict=True))
        if not same or x.node.axes != "bcn" or not _is_laid_out(x):
            raise Unmatched("has a convolution that does not give a pixel for each pixel")
        shape = (x.node.shape[0], len(w.value), x.node.shape[2])
        reason = "has a convolution that is not 1x1, and does not take pixels joined with contexts"
        node = Node("windowed", "bcn", shape, (x.node,), weight=w, bias=b, window=window, reason=reason)
        return Map(node, torch.arange(math.prod(shape)).view(*shape[:2], *x.index.shape[2:]))

    def _on_native_batch_norm(
        self, x: Any, w: Any, b: Any, mean: Any, var: Any, training: bool, _: Any, eps: float
    ) -> Map:
        if training or not isinstance(mean, Own) or not isinstance(var, Own):
            raise Unmatched("has a norm without running statistics")
        self._channels(x, 1)
        scale = self.emit(aten.rsqrt.default, self.emit(aten.add.Scalar, var, eps))
        scale = scale if w is None else self.emit(aten.mul.Tensor, scale, w)
        shift = self.emit(aten.neg.default, self.emit(aten.mul.Tensor, mean, scale))
        return self._affine(x, scale, shift if b is None else self.emit(aten.add.Tensor, shift, b))

    def _on_relu(self, x: Map) -> Map:
        return self._on_leaky_relu(x, 0.0)

    def _on_leaky_relu(self, x: Map, slope: float = 0.01) -> Map:
        return Map(Node("activation", x.node.axes, x.node.shape, (x.node,), slope=float(slope)), x.index)

    def _on_threshold(self, x: Map, threshold: float, value: float) -> Map:
        if threshold or value:
            raise Unmatched("computes threshold")
        return self._on_relu(x)

    def _on_clamp_min(self, x: Map, least: float) -> Map:
        return self._on_threshold(x, least, least)

    def _function(self, x: Any, func: Any, rest: Any, kwargs: Any, name: str) -> Map:
        if not isinstance(x, Map) or any(isinstance(leaf, Map) for leaf in pytree.tree_leaves(rest)):
            raise Unmatched(f"computes {name}")
        if x.node.axes != "bck" or any(isinstance(leaf, Own) for leaf in pytree.tree_leaves(rest)):
            raise Unmatched(
                f"takes a {name}, not a softmax"
                if name == "sigmoid"
                else f"has the activation {name.removesuffix('_kernel')}"
            )
        return self._called(x, Call(func, tuple(rest), tuple(kwargs.items())))

    def _called(self, x: Map, call: Call) -> Map:
        return Map(Node("function", x.node.axes, x.node.shape, (x.node,), call=call), x.index)

    def _on_native_group_norm(self, x: Map, w: Any, b: Any, _: int, __: int, ___: int, groups: int, eps: float) -> Map:
        self._channels(x, 1)
        if x.node.axes != "bck":
            raise Unmatched("has a GroupNorm on the pixels")
        return self._called(x, Call(F.group_norm, (groups, w and w.ref, b and b.ref, eps)))

    def _on_native_layer_norm(self, x: Map, shape: list[int], w: Any, b: Any, eps: float) -> Map:
        if len(shape) != 1 or x.node.axes != "bck":
            raise Unmatched("has a LayerNorm on the pixels")
        self._channels(x, x.index.dim() - 1)
        return self._called(x, Call(channel_norm, (shape, w and w.ref, b and b.ref, eps)))

    # Sums

    def _on_mul(self, x: Any, y: Any) -> Map:
        if not isinstance(x, Map):
            x, y = y, x
        if isinstance(y, Map):
            raise Unmatched("multiplies two maps")
        if isinstance(y, Own) and y.value.numel() == 1:
            y = y.value.item() if y.constant else self.emit(aten.reshape.default, y, [])
        elif isinstance(y, Own):
            return self._affine(x, self._by_channel(y, x), None)
        return Map(Node("scaled", x.node.axes, x.node.shape, (x.node,), factor=y), x.index)

    def _on_div(self, x: Any, y: Any, **kwargs: Any) -> Map:
        if not isinstance(x, Map) or kwargs:
            raise Unmatched("divides by a map")
        if isinstance(y, Own) and y.constant and y.value.numel() == 1:
            y = y.value.item()  # whose reciprocal float32 would round
        return self._on_mul(x, self.emit(aten.reciprocal.default, y) if isinstance(y, Own) else 1 / y)

    def _on_neg(self, x: Map) -> Map:
        return self._on_mul(x, -1.0)

    def _on_sub(self, x: Any, y: Any, alpha: float = 1) -> Map:
        return self._on_add(x, y, alpha=-alpha)

    def _on_add(self, x: Any, y: Any, alpha: float = 1) -> Map:
        if not isinstance(x, Map) and alpha == 1:
            x, y = y, x
        if not isinstance(x, Map) or not isinstance(y, (Map, Own)):
            raise Unmatched("adds a number")
        if alpha != 1:
            y = self.emit(aten.mul.Tensor, y, alpha) if isinstance(y, Own) else self._on_mul(y, alpha)
        if isinstance(y, Own):
            return self._affine(x, None, self._by_channel(y, x))
        return self._joined([x.node, y.node], [0, 0], x.node.shape[1], torch.equal(x.index, y.index), x.index)

    def _on_cat(self, tensors: list[Any], dim: int = 0) -> Map:
        if not all(isinstance(each, Map) for each in tensors):
            raise Unmatched("joins a map with a tensor of its own")
        dim %= tensors[0].index.dim()
        every = [self._channels(each, dim) for each in tensors]
        starts = [0]
        for each in tensors:
            starts.append(starts[-1] + each.node.shape[1])
        alike = all(all(torch.equal(o[a], every[0][a]) for a in o) for o in every)
        channel = torch.arange(starts[-1]).view([-1 if d == dim else 1 for d in range(tensors[0].index.dim())])
        pixels = tensors[0].node.shape[2]
        index = (every[0]["b"] * starts[-1] + channel) * pixels + every[0][tensors[0].node.axes[2]]
        return self._joined([each.node for each in tensors], starts[:-1], starts[-1], alike, index)

    def _joined(self, nodes: list[Node], starts: list[int], width: int, alike: bool, index: Any) -> Map:
        """The sum of maps that lie from `starts` on among `width` channels."""
        first = nodes[0]
        if not alike or any((n.axes, n.shape[::2]) != (first.axes, first.shape[::2]) for n in nodes):
            raise Unmatched("adds or joins maps that do not lie alike")
        if first.axes == "bkn":
            raise Unmatched("adds or joins scores or weights")
        joined = Node("linear", first.axes, (first.shape[0], width, first.shape[2]))
        for node, start in zip(nodes, starts, strict=True):
            linear = self.linear(node)
            pad = [start, width - start - node.shape[1]]
            for leaf, rows in linear.terms.items():
                moved: Own | slice
                if isinstance(rows, slice):
                    moved = slice(rows.start + start, rows.stop + start)
                else:
                    moved = self.emit(aten.constant_pad_nd.default, rows, [0, 0, *pad]) if any(pad) else rows
                if leaf in joined.terms:
                    other = self.matrix(joined, joined.terms[leaf])
                    moved = self.emit(aten.add.Tensor, other, self.matrix(joined, moved))
                joined.terms[leaf] = moved
            if linear.bias is not None:
                bias = self.emit(aten.constant_pad_nd.default, linear.bias, pad) if any(pad) else linear.bias
                joined.bias = bias if joined.bias is None else self.emit(aten.add.Tensor, joined.bias, bias)
        return Map(joined, index)

    # Products and the softmax

    def _on_softmax(self, x: Map, dim: int, *_: Any) -> Map:
        coordinates = x.coordinates()
        scores = _unscaled(x.node)[0]
        if scores.kind != "scores":
            raise Unmatched("takes a softmax of something else than products of pixels and regions")
        region = varying_along(coordinates["k"], dim)
        if region is None or not torch.equal(region.sort()[0], torch.arange(x.node.shape[1])):
            raise Unmatched("takes its softmax over pixels, not over regions")
        if not constant_along(coordinates["b"], dim) or not constant_along(coordinates["n"], dim):
            raise Unmatched("takes its softmax over more than the regions")
        return Map(Node("weights", "bkn", x.node.shape, (x.node,)), x.index)

    _on_safe_softmax = _on_softmax

    def _on_addmm(self, bias: Any, a: Any, b: Any, beta: float = 1, alpha: float = 1) -> Map:
        product = self._on_mm(a, b)
        if alpha != 1:
            product = self._on_mul(product, alpha)
        if beta == 1:
            return self._on_add(product, bias)
        if beta:
            raise Unmatched("adds a multiple of a tensor to a product")
        return product

    _on_baddbmm = _on_addmm

    def _on_mm(self, a: Any, b: Any) -> Map:
        batches = (a.value if isinstance(a, Own) else a.index).dim() - 2
        if isinstance(b, Own):
            return self._layer(a, batches + 1, self._weight(b, batches, turned=True), None)
        if isinstance(a, Own):
            return self._layer(b, batches, self._weight(a, batches, turned=False), None)
        return self._product(a, b)

    _on_bmm = _on_mm

    def _weight(self, own: Own, batches: int, turned: bool) -> Own:
        if batches:
            if not bool((own.value == own.value[:1]).all()):
                raise Unmatched("multiplies by another matrix for each image")
            own = self.emit(aten.select.int, own, 0, 0)
        return self.emit(aten.t.default, own) if turned else own

    def _product(self, a: Map, b: Map) -> Map:
        """Of `[.., M, R]` and `[.., R, P]`: scores, summed over channels, or contexts, summed over regions."""
        names, size = [], 0
        both = []
        for each, dim in ((a, -1), (b, -2)):
            coordinates = each.coordinates()
            summed = [
                n for n, c in coordinates.items() if varying_along(c, dim) is not None and not constant_along(c, dim)
            ]
            if len(summed) != 1 or not all(constant_along(c, dim) for n, c in coordinates.items() if n not in summed):
                raise Unmatched("multiplies maps otherwise than by channels or regions (several heads?)")
            (name,) = summed
            names.append((name, varying_along(coordinates[name], dim)))
            size = each.node.shape[each.node.axes.index(name)]
            both.append({n: c.narrow(dim, 0, 1) for n, c in coordinates.items() if n != name})
        (name, order), (other, other_order) = names
        if (
            name != other
            or order is None
            or other_order is None
            or not torch.equal(order, other_order)
            or not torch.equal(order.sort()[0], torch.arange(size))
        ):
            raise Unmatched("multiplies maps otherwise than by all channels or regions (several heads?)")
        left, right = both
        shape = torch.broadcast_shapes(left["b"].shape, right["b"].shape)
        if not torch.equal(left["b"].expand(shape), right["b"].expand(shape)):
            raise Unmatched("multiplies maps of different images")
        (first, factor), (second, other_factor) = _unscaled(a.node), _unscaled(b.node)
        kinds = {first.axes: (first, a), second.axes: (second, b)}
        rest = {**left, **right}
        if name == "c" and kinds.keys() == {"bcn", "bck"}:
            query, key = kinds["bcn"][0], kinds["bck"][0]
            node = Node("scores", "bkn", (query.shape[0], key.shape[2], query.shape[2]), (query, key))
        elif name == "k" and kinds.keys() == {"bkn", "bck"} and kinds["bkn"][0].kind == "weights":
            weights, value = kinds["bkn"][0], kinds["bck"][0]
            node = Node("context", "bcn", (value.shape[0], value.shape[1], weights.shape[2]), (weights, value))
        else:
            raise Unmatched("multiplies other maps than pixels and regions, or weights and regions")
        index = torch.zeros((), dtype=torch.int64)
        for axis, length in zip(node.axes, node.shape, strict=True):
            index = index * length + rest[axis]
        index = index.expand(shape)
        for number in (*factor, *other_factor):
            node = Node("scaled", node.axes, node.shape, (node,), factor=number)
        return Map(node, index)

    def _on_pixel_region_attention(self, query: Map, key: Map, value: Map, scale: float | None, _: str) -> Map:
        index = query.index.flatten(2).mT
        scale = index.shape[2] ** -0.5 if scale is None else scale
        weights = self._on_softmax(self._on_mul(self._product(Map(query.node, index), key), scale), 2)
        context = self._product(weights, Map(value.node, value.index.mT))
        return Map(context.node, context.index.mT.unflatten(2, query.index.shape[2:]))


def _is_laid_out(x: Map) -> bool:
    """Whether a tensor has the channels of a map in dimension 1, and its pixels, in order, after it."""
    return x.index.dim() > 2 and torch.equal(x.index.flatten(), torch.arange(math.prod(x.node.shape)))


def _unscaled(node: Node) -> tuple[Node, list[Own | float]]:
    factors = []
    while node.kind == "scaled":
        factors.append(node.factor)
        node = node.inputs[0]
    return node, factors


def _seen(name: str, maps: list[Map]) -> frozenset[str]:
    """Of what a result depends: feats, regions, their softmax, the attention, and pixels joined with that."""
    seen = frozenset().union(*(each.seen for each in maps))
    if (name in SOFTMAXES or name == "pixel_region_attention") and {"feats", "regions"} <= seen:
        seen |= {"softmax"}
    if name in PRODUCTS and "softmax" in seen:
        seen |= {"attention"}
    joined = name in ("cat", "copy_") or (name in ("add", "add_") and all(each.node.kind != "feats" for each in maps))
    if joined and any("attention" in each.seen for each in maps) and any("attention" not in m.seen for m in maps):
        seen |= {"joined"}
    return seen
