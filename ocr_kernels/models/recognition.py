"""How the gather and the attention are recognised while rewritten copies of somebody else's methods run.

`rewriting` passes the calls that may matter through a `Recognition`. A product or a softmax that may belong to OCR is
not computed: it gives a `Deferred`, which remembers the call. Two endings are known,

    softmax over pixels of given scores [B, K, N], then a product with feats [B, N, C]         -> spatial_gather
    query [B, N, D] @ key [B, D, K], softmax over regions, then a product with value [B, K, C] -> pixel_region_attention

each with scalar factors and transpositions anywhere before the softmax, and with K < N: that is what tells regions
from pixels, and OCR from self-attention. A `Deferred` never leaves the rewritten code: whatever is not known here,
a function above all that could ask what it was given, gets the tensor, computed as it was written.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ocr_kernels.attention import pixel_region_attention
from ocr_kernels.core.backends import assume_constant_result, left_to_compiler
from ocr_kernels.core.calls import StandIn, is_plain_call
from ocr_kernels.core.layout import DTYPES
from ocr_kernels.gather import spatial_gather

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
Handler = Callable[["Recognition", Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
Copies = Mapping[FunctionType, FunctionType]
"""Functions, and their rewritten copies, which take a `Recognition` before everything else."""


@dataclasses.dataclass
class Log:
    """What one forward did: the computations that ran fused, and why others did not."""

    fused: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    softmaxes: int = 0  # that were recognised; each should have ended in one of `fused`

    def reasons(self) -> tuple[str, ...]:
        unfinished = self.softmaxes > len(self.fused)
        return tuple(dict.fromkeys([*self.notes, *[NO_PRODUCT] * unfinished]))


NO_PRODUCT = "the softmax is not followed by a product over its dimension"

Settings = tuple[bool, "torch.dtype | None"]
"""Gradients on or off, and the autocast dtype."""


class Origin:
    """What a chain of deferred calls started from: the tensors, their versions, the settings."""

    def __init__(self, tensors: tuple[Tensor, ...], settings: Settings) -> None:
        self.tensors = tensors
        self.versions: tuple[int, ...] = _versions(tensors)
        self.settings = settings

    def check_unchanged(self) -> None:
        if self.versions != _versions(self.tensors):
            raise RuntimeError(
                "attention scores that ocr_kernels had deferred were modified in place where it could not see it; "
                "leave this module as it is: replace_ocr_modules(..., filter=...)"
            )


class Deferred:
    """Stand-in for the result of a call that has not run: scores, their softmax, or an op's result.

    With R rows and S columns the scores are `scale * operands[0]`, `[B, R, S]`, or `scale * operands[0] @ operands[1]`,
    of `[B, R, D]` and `[B, D, S]`. A softmax runs over the columns. If `flipped`, this stands for their transpose,
    `[B, S, R]`. A result is the transpose of `operands[0]`, which the op gave. If `spatial`, the columns
    were given the dimensions of an image back. It has no tensor's storage and is none: whatever it cannot do itself,
    the computed tensor does.
    """

    call: Call | None
    value: Tensor | None
    # NumPy scalars leave the arithmetic to us, as they do to tensors
    __array_priority__: int = Tensor.__array_priority__

    def __init__(
        self,
        recognition: Recognition,
        call: Call,
        operands: tuple[Tensor, ...],
        scale: float,
        flipped: bool,
        softmaxed: bool = False,
        origin: Origin | None = None,
        is_result: bool = False,
        spatial: bool = False,
    ) -> None:
        self.recognition = recognition
        self.call = call
        self.operands: tuple[Tensor, ...] = operands
        self.scale = scale
        self.flipped = flipped
        self.softmaxed = softmaxed
        self.origin: Origin = origin or Origin(operands, _settings(operands[0]))
        self.is_result = is_result
        self.spatial = spatial
        self.value = None
        recognition.made.append(self)

    def compute(self) -> Tensor:
        """The tensor this stands for; from then on this is that tensor, also for what is recognised."""
        if self.call is not None:
            if not self.is_result:
                self.origin.check_unchanged()
            (func, args, kwargs), (grad, autocast) = self.call, self.origin.settings
            if self.origin.settings == _settings(self.operands[0]):
                self.value = func(*computed(args), **computed(kwargs))
            else:
                kind = self.operands[0].device.type
                with torch.set_grad_enabled(grad), torch.autocast(kind, autocast, enabled=autocast is not None):
                    self.value = func(*computed(args), **computed(kwargs))
            self.call, self.operands = None, ()
        assert self.value is not None
        return self.value

    def can_keep(self) -> bool:
        """Whether this is a formula of its operands, and of no tensor that was computed since."""
        made = [leaf for leaf in _leaves(self.call) if type(leaf) is Deferred]
        return not (self.is_result or self.spatial) and all(leaf.call is not None and leaf.can_keep() for leaf in made)

    def keep(self) -> None:
        """Copy what this has to read, so that it may be modified in place."""
        self.operands = tuple(operand.clone() for operand in self.operands)
        self.call = (self._formula, (), {})
        self.origin = Origin(self.operands, self.origin.settings)

    def _formula(self) -> Tensor:
        first, *rest = self.operands
        scores = (torch.matmul(first, rest[0]) if rest else first) * self.scale
        out = scores.softmax(2) if self.softmaxed else scores
        return out.transpose(1, 2) if self.flipped else out

    @property
    def shape(self) -> torch.Size:
        if self.call is None or self.spatial:
            return self.compute().shape
        batch, rows, columns = self.operands[0].shape[0], self.operands[0].shape[1], self.operands[-1].shape[2]
        return torch.Size((batch, columns, rows) if self.flipped else (batch, rows, columns))

    @property
    def mT(self) -> Any:
        return self.transpose(1, 2)

    @property
    def ndim(self) -> int:
        return self.dim()

    def dim(self) -> int:
        return self.compute().dim() if self.call is None or self.spatial else 3

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    @property
    def device(self) -> torch.device:
        return self.compute().device if self.call is None else self.operands[0].device

    @property
    def dtype(self) -> torch.dtype:
        if self.call is None or self.origin.settings[1] is not None:
            return self.compute().dtype
        return self.operands[0].dtype

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*computed(args), **computed(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name in Deferred.__annotations__:  # not there yet
            raise AttributeError(name)
        return getattr(self.compute(), name)


class Recognition:
    """What is known during one call of a replaced forward. Its methods are what rewritten code calls."""

    def __init__(self, copies: Copies, log: Log | None = None, *, beside_block: bool = False) -> None:
        self.copies = copies
        self.log = log
        self.beside_block = beside_block  # whether one op of the same model reads the pixels that are gathered, too
        self.made: list[Deferred] = []

    # What rewritten code calls

    def call(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """`function(*args, **kwargs)`"""
        handler = _handler_of(function)
        if handler is not None:
            result = handler(self, function, args, kwargs)
            if result is not None:
                return result
        else:
            copy, first = self._seen(function)
            if copy is not None:
                return copy(self, *first, *args, **kwargs)
        if self.made:
            args, kwargs = computed(args), computed(kwargs)
            if _may_modify(function, args, kwargs):
                self.before_change(*args, *kwargs.values())
        return function(*args, **kwargs)

    def method(self, owner: Any, name: str, /, *args: Any, **kwargs: Any) -> Any:
        """`owner.name(*args, **kwargs)`"""
        if type(owner) in (list, dict, set, str, tuple):
            return getattr(owner, name)(*computed(args), **computed(kwargs))
        if type(owner) is Tensor or type(owner) is nn.Parameter:
            function: Any = getattr(Tensor, name, None)
            handler = HANDLERS.get(function)
            result = None if handler is None else handler(self, function, (owner, *args), kwargs)
            if result is not None:
                return result
            if self.made:
                args, kwargs = computed(args), computed(kwargs)
                if name.endswith("_"):
                    self.before_change(owner)
            return getattr(owner, name)(*args, **kwargs)
        if type(owner) is Deferred:
            if name.endswith("_"):
                self.before_change(owner)
            return getattr(owner, name)(*args, **kwargs)
        return self.call(getattr(owner, name), *args, **kwargs)

    def above(self, owner: type, this: Any, name: str, /, *args: Any, **kwargs: Any) -> Any:
        """`super(owner, this).name(*args, **kwargs)`"""
        if torch.compiler.is_compiling():  # which cannot ask what `super` finds
            classes = type(this).__mro__
            above = classes[classes.index(owner) + 1 :]
            if above[0].__mro__ == above and isinstance(getattr(above[0], name), FunctionType):
                return self.call(getattr(above[0], name), this, *args, **kwargs)
        return self.call(getattr(super(owner, this), name), *args, **kwargs)

    def classify(self, classifier: nn.Module, block: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        """`classifier(block(*args, **kwargs))`"""
        stand_in = vars(block).get("forward")
        if isinstance(stand_in, StandIn) and is_plain_call(block):
            logits = stand_in.logits(classifier, args, kwargs)
            if logits is not None:
                return logits
        return classifier(block(*args, **kwargs))

    def mul(self, left: Any, right: Any) -> Any:
        """`left * right`"""
        return self._operate(_multiply, operator.mul, left, right)

    def div(self, left: Any, right: Any) -> Any:
        """`left / right`"""
        return self._operate(_divide, operator.truediv, left, right)

    def matmul(self, left: Any, right: Any) -> Any:
        """`left @ right`"""
        return self._operate(_product, operator.matmul, left, right)

    def _operate(self, handler: Handler, function: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
        if isinstance(left, _SCORES) or isinstance(right, _SCORES):
            result = handler(self, function, (left, right), {})
            if result is not None:
                return result
        return function(left, right)

    def before_change(self, *targets: Any) -> None:
        """Before tensors may be modified in place: compute, or copy, what still has to read them."""
        live = [deferred for deferred in self.made if deferred.call is not None]
        if not live:
            return
        tensors = [t for t in _leaves(targets) if isinstance(t, (Tensor, Deferred))]
        compiling, shared = torch.compiler.is_compiling(), any(type(t) is Deferred for t in tensors)
        for deferred in live:
            if compiling and not shared and deferred.can_keep():
                deferred.keep()  # nothing tells what shares memory; a copy that is not needed goes
            elif compiling or any(_depends(deferred, t) for t in tensors):
                deferred.compute()

    def compute_all(self) -> None:
        """Before and after a block in which PyTorch's modes, as gradients and autocast, may be others."""
        for deferred in self.made:
            deferred.compute()

    def settle(self, value: Any) -> Any:
        """`value` with every deferred computed; lists and dicts keep their identity."""
        if type(value) is Deferred:
            return value.compute()
        if not self.made:
            return value
        if type(value) in (list, dict):
            for key, item in list(enumerate(value) if isinstance(value, list) else value.items()):
                settled = self.settle(item)
                if torch.compiler.is_compiling() or settled is not item:
                    value[key] = settled
        elif isinstance(value, tuple):
            items = [self.settle(item) for item in value]
            if torch.compiler.is_compiling() or any(new is not old for new, old in zip(items, value, strict=True)):
                return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value

    # What handlers call

    def takes(self, x: Any) -> bool:
        """Whether `x` is a tensor that our ops take as `[B, rows, columns]`."""
        return _is_plain(x) and (self.beside_block or not left_to_compiler(x, is_of_images=False))

    def note(self, reason: str, *details: object) -> None:
        if self.log is not None:
            self.log.notes.append(reason.format(*details))

    def _seen(self, function: Any) -> tuple[FunctionType | None, tuple[Any, ...]]:
        """The rewritten copy of what `function` runs, and its first arguments."""
        if isinstance(function, nn.Module):
            if getattr(vars(function).get("forward"), "block", None) is not None:  # which is more than is seen here
                return None, ()
            copy = self.copies.get(type(function).forward)  # type: ignore[call-overload]
            return (copy, (function,)) if copy is not None and is_plain_call(function) else (None, ())
        if isinstance(function, FunctionType):
            return self.copies.get(function), ()
        if isinstance(function, MethodType):
            inner = function.__func__
            return (self.copies.get(inner) if isinstance(inner, FunctionType) else None), (function.__self__,)
        return None, ()

    def product(self, left: Any, right: Any, call: Call, flipped: bool = False, factor: float = 1.0) -> Any:
        """`left` `[B, R, D]` @ `right` `[B, D, S]`, transposed if `flipped`; None if it has to run as it is."""
        if type(left) is Deferred or type(right) is Deferred:
            if _is_live(left) and left.softmaxed:
                return self._fuse(left, left.flipped, _transpose(computed(right)), not flipped, factor)
            if _is_live(right) and right.softmaxed:
                return self._fuse(right, not right.flipped, computed(left), flipped, factor)
            left, a = _scaled_tensor(left)
            right, b = _scaled_tensor(right)
            factor = a * b * factor
        if not (self.takes(left) and self.takes(right)):
            return None
        query, key = left, right
        shape, other = query.shape, key.shape
        if _equal((shape[0], shape[2]), (other[0], other[1])) and not _equal(shape[1], other[2]) and _agree(query, key):
            return Deferred(self, call, (query, key), factor, flipped)
        return None

    def _fuse(self, weights: Deferred, over_rows: bool, values: Any, transpose: bool, factor: float) -> Any:
        """Weights `[B, R, S]` times `values` `[B, C, S]`, over S: `[B, C, R]` or its transpose; None as above."""
        if weights.call is None or factor != 1:  # the values were computed from them
            return None
        if over_rows:
            self.note("the product after the softmax does not run over the softmax's dimension")
            return None
        first, last = weights.operands[0], weights.operands[-1]
        if not self.takes(values):
            self._note_tensor("the product's other factor", values)
            return None
        shape, rows, columns = values.shape, first.shape, last.shape
        if (
            not _equal((shape[0], shape[2]), (rows[0], columns[2]))
            or _empty(shape, rows, columns)
            or weights.origin.settings != _settings(values)
            or not _agree(values, first)
        ):
            self.note("the product's factors differ in batch, dtype or device, or in the modes they were made in")
            return None
        is_gather = len(weights.operands) == 1
        if left_to_compiler(values, is_of_images=is_gather):
            return None
        weights.origin.check_unchanged()
        if is_gather:
            self.fused("gather")
            out = spatial_gather(values, first, weights.scale)
            out = out.mT.contiguous().mT if transpose else out  # random numbers are drawn in the order of memory
        else:
            self.fused("attention")
            out = pixel_region_attention(first.transpose(1, 2), last, values, weights.scale)
        return self.rows(out, weights.origin) if transpose else out.contiguous()

    def fused(self, computation: str) -> None:
        if self.log is not None:
            self.log.fused.append(computation)

    def rows(self, out: Tensor, origin: Origin | None = None) -> Deferred:
        """The transpose of what an op gave, which most often is transposed back."""
        return Deferred(self, (_rows, (out,), {}), (out,), 1.0, True, origin=origin, is_result=True)

    def softmax(self, x: Any, dim: Any, call: Call) -> Any:
        """The softmax of scores, deferred; None if it has to run as it is."""
        if type(dim) is not int:
            self.note("the softmax names no dimension")
            return None
        if _is_live(x) and not x.softmaxed and not x.is_result:
            operands, scale, flipped, origin = x.operands, x.scale, x.flipped, x.origin
        else:
            x = computed(x)
            if not self.takes(x):
                self._note_tensor("the softmax's input", x)
                return None
            operands, scale, flipped, origin = (x,), 1.0, False, None
        if dim not in (1, 2, -1, -2):
            self.note("the softmax is over dim {}, neither pixels nor regions", dim)
            return None
        if (dim in (2, -1)) == flipped:  # the softmax runs over what are the rows: let them be the columns
            operands, flipped = tuple(_transpose(operand) for operand in reversed(operands)), not flipped
        rows, columns = operands[0].shape[1], operands[-1].shape[2]
        given = len(operands) == 1
        if given and not _holds(rows < columns):
            self.note(
                "the softmax over dim {} of the scores {} is not over pixels, the longer one", dim, tuple(x.shape)
            )
            return None
        if not given and not _holds(columns < rows):
            self.note(
                "the softmax over dim {} of the product {} is not over regions, the shorter one", dim, tuple(x.shape)
            )
            return None
        if self.log is not None:
            self.log.softmaxes += 1
        return Deferred(self, call, operands, scale, flipped, True, origin)

    def _note_tensor(self, what: str, x: Any) -> None:
        if not isinstance(x, Tensor):
            self.note("{} is a {}", what, type(x).__name__)
        elif type(x) not in (Tensor, nn.Parameter):
            self.note("{} is a {}, a subclass of Tensor", what, type(x).__name__)
        elif x.dim() != 3:
            self.note("{} has {} dimensions instead of 3", what, x.dim())
        else:
            self.note("{} is {} on {}", what, x.dtype, x.device)


def _handler_of(function: Any) -> Handler | None:
    """What knows a function or a module that is called."""
    if isinstance(function, nn.Module):
        handler = _MODULES.get(type(function))
        return handler if handler is None or is_plain_call(function) else None
    try:
        return HANDLERS.get(function)
    except TypeError:  # something callable that cannot be hashed
        return None


def computed(x: Any) -> Any:
    """Arguments with every deferred computed."""
    if type(x) is Deferred:
        return x.compute()
    if type(x) is tuple:
        return tuple([computed(item) for item in x])
    if type(x) in (list, dict):  # which may be kept by whom they are given to: in place
        for key, item in list(enumerate(x) if type(x) is list else x.items()):
            value = computed(item)
            if value is not item:
                x[key] = value
    return x


def _rows(out: Tensor) -> Tensor:
    return out.transpose(1, 2).contiguous()


def _is_live(x: Any) -> bool:
    return type(x) is Deferred and x.call is not None and not x.spatial


def _is_plain(x: Any) -> bool:
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.dim() == 3
        and x.dtype in DTYPES
        and x.layout is torch.strided
        and (x.is_cuda or x.is_cpu)
    )


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _number(x: Any) -> float | None:
    """`x` as a number, if it is one, or a tensor of one that is not trained and is at hand."""
    if _is_number(x):
        return float(x)
    if type(x) is Tensor and x.dim() == 0 and x.is_cpu and x.is_floating_point() and not x.requires_grad:
        try:
            return None if torch.compiler.is_compiling() else x.item()
        except RuntimeError:  # it stands for others, in a transform or a trace
            return None
    return None


def _holds(condition: Any) -> bool:
    """Whether a condition on sizes holds; where sizes are unknown to a compiler, only if it is sure."""
    if torch.compiler.is_compiling():
        return torch.fx.experimental.symbolic_shapes.guard_or_false(condition)
    return bool(condition)


def _equal(first: Any, second: Any) -> bool:
    """Whether sizes are equal, two or tuples of them; as `_holds`."""
    if not torch.compiler.is_compiling():
        return bool(first == second)
    pairs = zip(first, second, strict=True) if isinstance(first, tuple) else [(first, second)]
    return all(_holds(a == b) for a, b in pairs)


def _empty(*shapes: torch.Size) -> bool:
    if torch.compiler.is_compiling():
        return any(_equal(size, 0) for shape in shapes for size in shape)
    return any(0 in shape for shape in shapes)


def _settings(tensor: Tensor) -> Settings:
    """The modes that a deferred call would have run in: gradients on, and the autocast dtype."""
    kind = "cpu" if tensor.is_cpu else tensor.device.type
    return torch.is_grad_enabled(), torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _agree(first: Tensor, second: Tensor) -> bool:
    """Whether a product takes both: on one device, and of one dtype once autocast has cast them."""
    if first.get_device() != second.get_device():
        return False
    if first.dtype == second.dtype:
        return True
    return _settings(first)[1] is not None and torch.float64 not in (first.dtype, second.dtype)


def _versions(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    if torch.compiler.is_compiling():
        return ()
    try:
        return tuple(map(_version_of, tensors))
    except RuntimeError:  # of inference tensors, which have none
        return ()


_version_of = operator.attrgetter("_version")


def _transpose(x: Any) -> Any:
    return x.transpose(1, 2) if type(x) is Deferred or (isinstance(x, Tensor) and x.dim() == 3) else x


def _scaled_tensor(x: Any) -> tuple[Any, float]:
    """`x` as a tensor and a factor."""
    if _is_live(x) and len(x.operands) == 1 and not x.softmaxed and not x.is_result:
        x.origin.check_unchanged()
        return (_transpose(x.operands[0]) if x.flipped else x.operands[0]), x.scale
    return computed(x), 1.0


def _leaves(x: Any) -> Iterator[Any]:
    if isinstance(x, (tuple, list)):
        for item in x:
            yield from _leaves(item)
    elif isinstance(x, dict):
        yield from _leaves(list(x.values()))
    else:
        yield x


def _depends(deferred: Deferred, target: Any) -> bool:
    """Whether a deferred call reads the storage of `target`, a tensor or what stands for one."""
    if type(target) is Deferred:
        if target.call is not None:
            return deferred is target or deferred.origin is target.origin
        target = target.value
    leaves = [*deferred.origin.tensors, *_leaves(deferred.call)]
    tensors = (leaf.value if type(leaf) is Deferred else leaf for leaf in leaves)
    return any(_shares_memory(tensor, target) for tensor in tensors if isinstance(tensor, Tensor))


def _shares_memory(first: Tensor, second: Tensor) -> bool:
    try:
        return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    except RuntimeError:  # of a transform or a trace
        return True


_ALLOCATING = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
)


def _may_modify(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call may modify an argument in place, for all that is known."""
    while type(function) is nn.Sequential and len(function) and is_plain_call(function):
        function = function[0]
    if isinstance(function, nn.Module):
        is_of_torch = type(function).__module__.startswith("torch.nn.modules.")  # a class of its own may do more
        return not (is_of_torch and isinstance(function, _ALLOCATING) and is_plain_call(function))
    asked = kwargs.get("out") is not None or kwargs.get("inplace") or any(arg is True for arg in args)
    return bool(asked) or not isinstance(function, (FunctionType, BuiltinFunctionType, type)) or not _is_pure(function)


@assume_constant_result
def _is_pure(function: Any) -> bool:
    """Whether a function of Python's or PyTorch's modifies nothing unless it is asked to by an argument."""
    home = getattr(function, "__module__", None)
    known = isinstance(function, BuiltinFunctionType) or home == "torch.nn.functional"
    known = known or (isinstance(function, type) and home == "builtins")
    return known and not function.__name__.endswith("_")


# Handlers return None where the call has to run as it is.


def _multiply(mode: Recognition, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs or len(args) != 2:
        return None
    for x, factor in (args, args[::-1]):
        number = _number(factor)
        if number is not None:
            return _scale(mode, x, number, (func, args, kwargs))
    if any(_is_live(arg) for arg in args):
        mode.note("the scores are multiplied by what is no number")
    return None


def _divide(mode: Recognition, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    divisor = _number(args[1]) if len(args) == 2 and not kwargs else None
    if not divisor:
        if args and _is_live(args[0]):
            mode.note("the scores are divided by what is no number")
        return None
    return _scale(mode, args[0], 1 / divisor, (func, args, kwargs))


def _scale(mode: Recognition, x: Any, factor: float, call: Call) -> Deferred | None:
    if _is_live(x):
        if x.softmaxed or x.is_result:
            return None
        return Deferred(mode, call, x.operands, x.scale * factor, x.flipped, origin=x.origin)
    x = computed(x)
    return Deferred(mode, call, (x,), factor, False) if mode.takes(x) else None


def _softmax(mode: Recognition, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x: Any = args[0] if args else kwargs.get("input")
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    if len(args) > 2 or kwargs.get("dtype") is not None or kwargs.get("out") is not None:
        mode.note("the softmax converts its dtype")
        return None
    return mode.softmax(x, dim, (func, args, kwargs))


def _softmax_module(mode: Recognition, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return mode.softmax(args[0], func.dim, (func, args, kwargs)) if len(args) == 1 and not kwargs else None


def _product(mode: Recognition, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return mode.product(*args, (func, args, kwargs)) if len(args) == 2 and not kwargs else None


def _added_product(mode: Recognition, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`baddbmm` with `beta=0`, which is `alpha` times a product."""
    numbers = {"beta": kwargs.get("beta", 1), "alpha": kwargs.get("alpha", 1)}
    if len(args) != 3 or any(name not in numbers for name in kwargs):
        return None
    if numbers["beta"] != 0 or not _is_number(numbers["alpha"]):
        return None
    return mode.product(args[1], args[2], (func, args, kwargs), factor=numbers["alpha"])


def _dot_product_attention(
    mode: Recognition,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Query `[..., N, D]`, key `[..., K, D]`, value `[..., K, C]`: heads are images of a larger batch."""
    query, key, value = (computed(x) for x in (*args[:3], *(kwargs.get(n) for n in ("query", "key", "value")))[:3])
    scale = kwargs.get("scale")
    if len(args) > 3 or kwargs.get("attn_mask") is not None or kwargs.get("is_causal") or kwargs.get("enable_gqa"):
        mode.note("the attention has a mask, or groups of queries")
        return None
    if kwargs.get("dropout_p", 0) != 0 or not (scale is None or _is_number(scale)):
        mode.note("the attention drops weights, or scales them by what is no number")
        return None
    if not all(type(x) is Tensor and x.dim() == query.dim() >= 3 for x in (query, key, value)):
        return None
    batch = query.shape[:-2]
    q, k, v = (x if x.dim() == 3 else x.flatten(0, -3) for x in (query, key, value))
    if not all(_equal(x.shape[:-2], batch) and mode.takes(y) and _agree(q, y) for x, y in ((key, k), (value, v))):
        return None
    if not mode.takes(q) or _empty(q.shape, k.shape, v.shape):
        return None
    if not _holds(k.size(1) < q.size(1)):
        mode.note("the attention {} of {} is not from pixels to regions", tuple(q.shape), tuple(k.shape))
        return None
    if left_to_compiler(q, is_of_images=False):
        return None
    scale = q.shape[2] ** -0.5 if scale is None else scale
    mode.fused("attention")
    out = pixel_region_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale)
    return mode.rows(out) if query.dim() == 3 else _rows(out).unflatten(0, batch)


def _einsum(mode: Recognition, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Two operands of three dimensions, the batch first and one summed: `bkn,bcn->bkc` and its relatives."""
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if kwargs or not isinstance(equation, str) or len(operands) != 2:
        return None
    terms, arrow, out = equation.replace(" ", "").partition("->")
    left, comma, right = terms.partition(",")
    if not (arrow and comma) or any(len(set(term)) != len(term) for term in (left, right, out)):
        return None
    first, second = operands
    if len(left) > 3 or len(right) > 3:  # pixels that are summed over together: bkhw,bchw->bkc
        pixels = next((left[i:] for i in range(1, len(left)) if left[i:] in right and not set(left[i:]) & set(out)), "")
        if not (left.endswith(pixels) and right.endswith(pixels) and len(left) == len(right) == 2 + len(pixels) > 3):
            return None
        first, second = (_flattened(x, len(pixels)) for x in (first, second))
        left, right = (term[:2] + pixels[:1] for term in (left, right))
    summed = set(left) & set(right) - set(out)
    if not len(left) == len(right) == len(out) == 3:
        return None
    if len(summed) != 1 or not left[0] == right[0] == out[0] or set(out) - {out[0]} != set(left) ^ set(right):
        return None
    if left[1] in summed:
        first, left = _transpose(first), left[0] + left[:0:-1]
    if right[2] in summed:
        second = _transpose(second)
    return mode.product(first, second, (func, args, kwargs), flipped=out[1] != left[1])


def _flattened(x: Any, dims: int) -> Any:
    """`x` with its last dimensions as one."""
    if type(x) is Deferred and x.call is not None and x.spatial:
        return Deferred(
            x.recognition, (torch.flatten, (x, 2), {}), x.operands, x.scale, x.flipped, x.softmaxed, x.origin
        )
    x = computed(x)
    return x.flatten(-dims) if isinstance(x, Tensor) and x.dim() == 2 + dims else x


def _dropout(mode: Recognition, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = dict(zip(("input", "p", "training", "inplace"), args, strict=False)) | kwargs
    return _undropped(mode, given.get("input"), given.get("training", True) and given.get("p", 0.5) != 0)


def _dropout_module(mode: Recognition, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _undropped(mode, args[0], func.training and func.p != 0) if len(args) == 1 and not kwargs else None


def _undropped(mode: Recognition, x: Any, drops: bool) -> Any:
    if _is_live(x) and drops and x.softmaxed:
        mode.note("dropout is applied to the attention weights")
    return x if _is_live(x) and not drops else None


def _identity_module(mode: Recognition, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if len(args) == 1 and not kwargs else None


def _change_modes(mode: Recognition, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    mode.compute_all()


def _sigmoid(mode: Recognition, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args and _is_live(args[0]):
        mode.note("it is a sigmoid, not a softmax")


def _permute(mode: Recognition, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, *dims = args
    dims = list(dims[0]) if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    wanted = [dim % 3 if isinstance(dim, int) else dim for dim in dims]
    return _flip(x, (func, args, kwargs)) if _is_live(x) and wanted == [0, 2, 1] and not kwargs else None


def _swap(mode: Recognition, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    flips = len(args) == 3 and {args[1], args[2]} in ({1, 2}, {-1, -2}, {1, -1}, {2, -2}) and not kwargs
    return _flip(args[0], (func, args, kwargs)) if flips and _is_live(args[0]) else None


def _flip(x: Deferred, call: Call, flips: bool = True) -> Any:
    if x.is_result:
        if not flips:
            return None
        out = x.operands[0]
        x.value, x.call, x.operands = out.transpose(1, 2), None, ()  # whose memory it shares from now on
        return out
    return Deferred(x.recognition, call, x.operands, x.scale, x.flipped != flips, x.softmaxed, x.origin)


def _keep(mode: Recognition, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A copy or view of the same shape: `view`, `reshape`, `contiguous`, `squeeze`."""
    x, *shape = args
    if not _is_live(x) or kwargs or x.is_result:
        return None
    shape = list(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    old, rest = list(x.shape), shape[2:]
    if not shape or shape == old or (shape[:2] == old[:2] and rest == [-1]):
        return _flip(x, (func, args, kwargs), False)
    if x.softmaxed and not x.flipped and len(shape) > 3 and shape[:2] == old[:2] and math.prod(rest) == old[2]:
        call = func, args, kwargs
        return Deferred(mode, call, x.operands, x.scale, x.flipped, x.softmaxed, x.origin, spatial=True)
    return None


def _squeeze(mode: Recognition, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, *dims = args
    if not _is_live(x) or kwargs or x.is_result:
        return None
    sizes = [x.shape[d] for d in dims] if dims and all(isinstance(d, int) for d in dims) else list(x.shape)
    return None if any(_equal(size, 1) for size in sizes) else _flip(x, (func, args, kwargs), False)


def _method(name: str, handler: Handler) -> Callable[..., Any]:
    """A method of `Deferred` that `handler` knows, and that is the tensor's otherwise."""
    func = getattr(Tensor, name)

    def method(self: Deferred, *args: Any, **kwargs: Any) -> Any:
        if self.call is not None:
            result = handler(self.recognition, func, (self, *args), kwargs)
            if result is not None:
                return result
        return func(self.compute(), *computed(args), **computed(kwargs))

    return method


def _operator(name: str) -> Callable[..., Any]:
    """A method of `Deferred` that is the tensor's."""

    def method(self: Deferred, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.compute(), name)(*computed(args), **computed(kwargs))

    return method


_SCORES = Tensor, Deferred
HANDLERS: dict[Any, Handler] = {
    torch.einsum: _einsum,
    F.dropout: _dropout,
    F.softmax: _softmax,
    F.sigmoid: _sigmoid,
    F.scaled_dot_product_attention: _dot_product_attention,
    torch.set_grad_enabled: _change_modes,
    operator.mul: _multiply,
    operator.truediv: _divide,
    operator.matmul: _product,
}
for _handler, _names in (
    (_multiply, "mul multiply __mul__ __rmul__"),
    (_divide, "div divide true_divide __truediv__"),
    (_softmax, "softmax"),
    (_product, "matmul bmm __matmul__"),
    (_added_product, "baddbmm"),
    (_sigmoid, "sigmoid"),
    (_permute, "permute"),
    (_swap, "transpose swapaxes swapdims"),
    (_keep, "contiguous view reshape"),
    (_squeeze, "squeeze"),
):
    for _name in _names.split():
        for _owner in (torch, Tensor, torch.special):
            if hasattr(_owner, _name):
                HANDLERS[getattr(_owner, _name)] = _handler
        if hasattr(Tensor, _name) and _handler is not _added_product:
            setattr(Deferred, _name, _method(_name, _handler))
_MODULES: dict[type[nn.Module], Handler] = {
    nn.Softmax: _softmax_module,
    nn.Dropout: _dropout_module,
    nn.Dropout1d: _dropout_module,
    nn.Dropout2d: _dropout_module,
    nn.Dropout3d: _dropout_module,
    nn.Identity: _identity_module,
}
# Python looks operators up on the class, past __getattr__
_OPERATORS = {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"}
_OPERATORS |= {"__repr__", "__str__", "__format__", "__reduce_ex__"}
_OPERATORS |= {name for name in set(dir(Tensor)) - set(dir(object)) - set(vars(Deferred)) if name.startswith("__")}
for _name in _OPERATORS - {"__torch_dispatch__"}:
    if callable(getattr(Tensor, _name)):
        setattr(Deferred, _name, _operator(_name))
