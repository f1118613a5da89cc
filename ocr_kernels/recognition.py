"""How the gather and the attention are recognised while somebody else's forward runs unchanged.

Inside `Recognition` a product or a softmax that may belong to OCR is not computed: it returns a `Deferred`, which
remembers the call. Two endings are known,

    softmax over pixels of given scores [B, K, N], then a product with feats [B, N, C]         -> spatial_gather
    query [B, N, D] @ key [B, D, K], softmax over regions, then a product with value [B, K, C] -> pixel_region_attention

each with scalar factors and transpositions anywhere before the softmax, and with K < N: that is what tells regions
from pixels, and OCR from self-attention. Any other use computes the deferred calls as they were written, so what
is not recognised gives what it always gave.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ocr_kernels.attention import pixel_region_attention
from ocr_kernels.core.backends import assume_constant_result, left_to_compiler
from ocr_kernels.core.layout import DTYPES
from ocr_kernels.gather import spatial_gather

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
Handler = Callable[["Recognition", Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@dataclasses.dataclass
class Log:
    """What one forward did: the computations that ran fused, and why others did not."""

    fused: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    softmaxes: int = 0  # that were recognised; each should have ended in one of `fused`


Settings = tuple[bool, "torch.dtype | None"]
"""Gradients on or off, and the autocast dtype."""


class Origin(NamedTuple):
    """What a chain of deferred calls started from: the tensors, their versions, the settings."""

    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]
    settings: Settings

    def check_unchanged(self) -> None:
        if self.versions != _versions(self.tensors):
            raise RuntimeError(
                "attention scores that ocr_kernels had deferred were modified in place where it could not see it; "
                "leave this module as it is: replace_ocr_modules(..., filter=...)"
            )


class Deferred:
    """Stand-in for the result of a call that has not run: scores, or their softmax.

    With R rows and S columns the scores are `scale * operands[0]`, `[B, R, S]`, or `scale * operands[0] @ operands[1]`,
    of `[B, R, D]` and `[B, D, S]`. A softmax runs over the columns. If `flipped`, this stands for their transpose,
    `[B, S, R]`. It has no tensor's storage and is none: whatever it cannot do itself, the computed tensor does.
    """

    __slots__ = ("__weakref__", "_call", "_flipped", "_mode", "_operands", "_origin", "_scale", "_softmaxed", "_value")
    __array_priority__ = Tensor.__array_priority__  # NumPy scalars leave the arithmetic to us, as they do to tensors

    def __init__(
        self,
        mode: Recognition,
        call: Call,
        operands: tuple[Tensor, ...],
        scale: float,
        flipped: bool,
        softmaxed: bool = False,
        origin: Origin | None = None,
    ) -> None:
        self._mode = mode
        self._call: Call | None = call
        self._operands = operands
        self._scale = scale
        self._flipped = flipped
        self._softmaxed = softmaxed
        self._origin = origin or Origin(operands, _versions(operands), _settings(operands[0]))
        self._value: Tensor | None = None
        mode.pending.append(self)

    def _compute(self) -> Tensor:
        """The tensor this stands for; from then on this is that tensor, also for what is recognised."""
        if self._call is not None:
            self._origin.check_unchanged()
            (func, args, kwargs), settings = self._call, self._origin.settings
            before, self._mode.suspended = self._mode.suspended, True
            try:
                if settings == _settings(self._operands[0]):
                    self._value = func(*computed(args), **computed(kwargs))
                else:
                    self._value = self._compute_as_of_then(settings)
            finally:
                self._mode.suspended = before
            self._call, self._operands = None, ()
        assert self._value is not None
        return self._value

    def _compute_as_of_then(self, settings: Settings) -> Tensor:
        assert self._call is not None
        func, args, kwargs = self._call
        grad, autocast = settings
        kind = self._operands[0].device.type
        with torch.set_grad_enabled(grad), torch.autocast(kind, autocast, enabled=autocast is not None):
            value: Tensor = func(*computed(args), **computed(kwargs))
        if grad and value.requires_grad and _in_custom_function():
            raise TypeError(
                "a custom autograd function was called with attention scores that ocr_kernels had deferred, and would "
                "lose their gradient; leave this module as it is: replace_ocr_modules(..., filter=...)"
            )
        return value

    @property
    def shape(self) -> torch.Size:
        if self._call is None:
            return self._compute().shape
        batch, rows, columns = self._operands[0].shape[0], self._operands[0].shape[1], self._operands[-1].shape[2]
        return torch.Size((batch, columns, rows) if self._flipped else (batch, rows, columns))

    @property
    def mT(self) -> Any:
        return self.transpose(1, 2)

    @property
    def ndim(self) -> int:
        return 3

    def dim(self) -> int:
        return 3

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    @property
    def device(self) -> torch.device:
        return self._compute().device if self._call is None else self._operands[0].device

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        live = next(filter(_is_live, args), None)
        if live is not None and not live._mode.suspended:
            handler = (_LAYOUT.get(func) if live is args[0] else None) or HANDLERS.get(func)
            result = handler and handler(live._mode, func, args, kwargs or {})
            if result is not None:
                return result
        return func(*computed(args), **computed(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name in Deferred.__slots__:  # not there yet
            raise AttributeError(name)
        return getattr(self._compute(), name)


class Recognition(TorchFunctionMode):
    """What is known while a swapped module's forward runs, and the mode that watches it. One call, one instance.

    Methods that were rewritten (`rewriting.py`) ask `current()` instead of being watched.
    """

    def __init__(self, log: Log | None = None) -> None:
        super().__init__()
        self.log = log
        self.pending: list[Deferred] = []
        self.results: list[Tensor] = []  # of the attention, whose strides are not the original's
        self.suspended = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = self.handle(func, args, kwargs or {})
        if result is not None:
            return result
        if self.pending and _mutates(func, kwargs):
            self.protect(args, kwargs or {})
        return func(*args, **kwargs) if kwargs else func(*args)

    def handle(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call gives that may belong to OCR; None where it has to run as it is."""
        try:
            handler = None if self.suspended else HANDLERS.get(func)
        except TypeError:  # something callable that cannot be hashed
            return None
        return None if handler is None else handler(self, func, args, kwargs)

    def note(self, reason: str, *details: object) -> None:
        if self.log is not None:
            self.log.notes.append(reason.format(*details))

    def protect(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a tensor is modified in place: compute what still has to read it."""
        target = kwargs["out"] if kwargs.get("out") is not None else args[0] if args else None
        if type(target) is Deferred:
            target = target._compute()
        if isinstance(target, Tensor) and not target.is_floating_point():
            return
        conservative = (
            not isinstance(target, Tensor)
            or torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()  # no public function tells
        )
        for deferred in self.pending:
            if deferred._call is not None and (conservative or _reads(deferred, target)):
                deferred._compute()

    def product(self, left: Any, right: Any, call: Call, flipped: bool = False) -> Any:
        """`left` `[B, R, D]` @ `right` `[B, D, S]`, transposed if `flipped`; None if it has to run as it is."""
        if _is_live(left) and left._softmaxed:
            return self.fuse(left, left._flipped, _transpose(computed(right)), not flipped)
        if _is_live(right) and right._softmaxed:
            return self.fuse(right, not right._flipped, computed(left), flipped)
        first, second = _scaled_tensor(left), _scaled_tensor(right)
        if first is None or second is None:
            return None
        (query, a), (key, b) = first, second
        settings = _settings(query)
        if (
            query.size(0) == key.size(0)
            and query.size(2) == key.size(1)
            and query.size(1) != key.size(2)
            and _agree(query, key, settings)
        ):
            return Deferred(self, call, (query, key), a * b, flipped)
        return None

    def fuse(self, weights: Deferred, over_rows: bool, values: Any, transpose: bool) -> Tensor | None:
        """Weights `[B, R, S]` times `values` `[B, C, S]`, over S: `[B, C, R]` or its transpose; None as above."""
        if weights._call is None:  # the values were computed from them
            return None
        if over_rows:
            self.note("the product after the softmax does not run over the softmax's dimension")
            return None
        settings, first, last = weights._origin.settings, weights._operands[0], weights._operands[-1]
        if not (
            _is_plain(values)
            and (values.size(0), values.size(2)) == (first.size(0), last.size(2))
            and first.numel() * last.numel() * values.numel() > 0
            and settings == _settings(values)
            and _agree(values, first, settings)
        ):
            return None
        weights._origin.check_unchanged()
        if len(weights._operands) == 1:
            return self.gather(values, first, weights._scale, transpose)
        return self.attend(first.transpose(1, 2), last, values, weights._scale, transpose)

    def gather(self, feats: Tensor, logits: Tensor, scale: float, transpose: bool) -> Tensor:
        if self.log is not None:
            self.log.fused.append("gather")
        out = spatial_gather(feats, logits, scale)
        # a copy, because the gather needs its result in the backward pass and this one may be modified
        return (out.transpose(1, 2) if transpose else out).clone(memory_format=torch.contiguous_format)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, transpose: bool) -> Tensor:
        if self.log is not None:
            self.log.fused.append("attention")
        out = pixel_region_attention(query, key, value, scale)
        out = out.transpose(1, 2) if transpose else out
        self.results.append(out)
        return out

    def weighted(self, scores: Any, scale: Any, values: Any) -> Tensor | None:
        """softmax(scale * `scores` `[B, K, N]`) @ `values` `[B, N, C]` at one go; None where it is no gather."""
        if (
            _is_plain(scores)
            and _is_plain(values)
            and _is_number(scale)
            and scores.size(0) == values.size(0)
            and scores.size(1) < scores.size(2) == values.size(1)
            and scores.numel() * values.numel() > 0
            and _agree(scores, values, _settings(scores))
            and not self.suspended
        ):
            return self.gather(values.transpose(1, 2), scores, scale, True)
        return None

    def attended(self, query: Any, key: Any, scale: Any, values: Any) -> Tensor | None:
        """softmax(scale * `query` `[B, N, D]` @ `key` `[B, D, K]`) @ `values` `[B, K, C]`; None where it is another."""
        if (
            _is_plain(query)
            and _is_plain(key)
            and _is_plain(values)
            and _is_number(scale)
            and query.size(0) == key.size(0) == values.size(0)
            and query.size(2) == key.size(1)
            and query.size(1) > key.size(2) == values.size(1)
            and query.numel() * key.numel() * values.numel() > 0
            and _agree(query, key, settings := _settings(query))
            and _agree(query, values, settings)
            and not self.suspended
        ):
            return self.attend(query.transpose(1, 2), key, values.transpose(1, 2), scale, True)
        return None

    def settle(self, output: Any) -> Any:
        """`output` with every deferred computed and the original's strides; containers keep their identity."""
        if isinstance(output, Tensor):
            return output.contiguous() if any(output is t for t in self.results) else output
        if type(output) is Deferred:
            return output._compute()
        if isinstance(output, (list, dict)):
            for key, item in list(enumerate(output) if isinstance(output, list) else output.items()):
                settled = self.settle(item)
                if settled is not item:
                    output[key] = settled
        elif isinstance(output, tuple):
            items = [self.settle(item) for item in output]
            if any(new is not old for new, old in zip(items, output, strict=True)):
                return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
        elif dataclasses.is_dataclass(output) and not isinstance(output, type):
            for field in dataclasses.fields(output):
                item = getattr(output, field.name)
                settled = self.settle(item)
                if settled is not item:
                    object.__setattr__(output, field.name, settled)
        return output

    def finish(self, module: torch.nn.Module) -> None:
        """Compute what outlives the forward: in a container that `module` keeps, or anywhere else."""
        if torch.compiler.is_compiling():
            return
        if self.log is not None and self.log.softmaxes > len(self.log.fused):
            self.note("the softmax is not followed by a product over its dimension")
        watched = [weakref.ref(deferred) for deferred in self.pending]
        self.pending = []
        for watch in watched:
            escaped = watch()
            if escaped is not None:
                escaped._compute()
                self.settle(vars(module))


class _Thread(threading.local):
    recognition: Recognition | None = None


class _Trace:
    """For torch.compile, which traces no thread-local attributes. Outside a trace it is never set."""

    def __init__(self) -> None:
        self.recognition: Recognition | None = None  # there from the start: its appearing would be compiled again


_thread, _trace = _Thread(), _Trace()


def current() -> Recognition | None:
    """The recognition that rewritten methods of this thread, or trace, take part in."""
    return _trace.recognition or _thread.recognition


def place_of_current() -> _Thread | _Trace:
    """What to set the attribute `recognition` of, for `current`."""
    return _trace if torch.compiler.is_compiling() else _thread


def running() -> Recognition | None:
    """The mode of the swapped module whose forward is running."""
    for index in range(torch._C._len_torch_function_stack()):  # no public function tells the modes that are on
        mode = torch._C._get_function_stack_at(index)
        if isinstance(mode, Recognition):
            return mode
    return None


def _is_live(x: Any) -> bool:
    return type(x) is Deferred and x._call is not None


def _is_plain(x: Any) -> bool:
    """Whether `x` is a tensor that our ops take as `[B, rows, columns]`."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.dim() == 3
        and x.dtype in DTYPES
        and x.layout is torch.strided
        and (x.is_cuda or x.is_cpu)
        and not left_to_compiler(x.device)
    )


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _settings(tensor: Tensor) -> Settings:
    """The modes that a deferred call would have run in: gradients on, and the autocast dtype."""
    autocast = None
    if torch._C._is_any_autocast_enabled():  # the public function wants a type of device that has autocast
        kind = tensor.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return torch.is_grad_enabled(), autocast


def _agree(first: Tensor, second: Tensor, settings: Settings) -> bool:
    """Whether a product takes both: on one device, and of one dtype once autocast has cast them."""
    cast = settings[1] is not None and torch.float64 not in (first.dtype, second.dtype)
    return first.get_device() == second.get_device() and (cast or first.dtype == second.dtype)


def _versions(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    if torch.compiler.is_compiling():
        return ()
    return tuple([0 if tensor.is_inference() else tensor._version for tensor in tensors])


def _transpose(x: Any) -> Any:
    return x.transpose(1, 2) if type(x) is Deferred or (isinstance(x, Tensor) and x.dim() == 3) else x


def _scaled_tensor(x: Any) -> tuple[Tensor, float] | None:
    """`x` as a tensor and a factor."""
    if _is_live(x) and len(x._operands) == 1 and not x._softmaxed:
        x._origin.check_unchanged()
        if x._origin.settings == _settings(x._operands[0]):
            return (_transpose(x._operands[0]) if x._flipped else x._operands[0]), x._scale
    x = computed(x)
    return (x, 1.0) if _is_plain(x) else None


def computed(x: Any) -> Any:
    """Arguments with every deferred computed."""
    if type(x) is Deferred:
        return x._compute()
    if type(x) in (tuple, list):
        return type(x)(computed(item) for item in x)
    if type(x) is dict:
        return {key: computed(item) for key, item in x.items()}
    return x


def _mutates(func: Callable[..., Any], kwargs: Mapping[str, Any] | None) -> bool:
    return _is_in_place(func) or (kwargs is not None and (bool(kwargs.get("inplace")) or kwargs.get("out") is not None))


@assume_constant_result
def _is_in_place(func: Callable[..., Any]) -> bool:
    known = _IN_PLACE.get(func)
    if known is None:
        name = getattr(func, "__name__", "").partition(".")[0]  # an OpOverload is called add_.Tensor
        known = (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE_METHODS
        _IN_PLACE[func] = known
    return known


def _reads(x: Any, target: Any) -> bool:
    """Whether `x` depends on the storage of `target`."""
    if isinstance(x, Tensor):
        # no public function compares the storages of fake tensors, too
        return torch._C._is_alias_of(x, target)  # type: ignore[attr-defined, no-any-return]
    if type(x) is Deferred:
        return _reads(x._value if x._call is None else (x._origin.tensors, x._call[1:]), target)
    if isinstance(x, (tuple, list)):
        return any(_reads(item, target) for item in x)
    return isinstance(x, dict) and any(_reads(item, target) for item in x.values())


def _in_custom_function() -> bool:
    """Whether a `torch.autograd.Function` is in its forward pass: it passes on what it does not know as a constant."""
    if torch.compiler.is_compiling():
        return False
    frame, running = sys._getframe(), set()
    while frame is not None:
        running.add(frame.f_code)
        frame = frame.f_back  # type: ignore[assignment]
    functions: list[Any] = [torch.autograd.Function]
    for function in functions:  # and theirs
        functions += function.__subclasses__()
    return any(getattr(inspect.unwrap(function.forward), "__code__", None) in running for function in functions)


# Handlers return None where the call has to run as it is.


def _multiply(mode: Recognition, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs or len(args) != 2:
        return None
    x, factor = args if _is_number(args[1]) else args[::-1]
    return _scale(mode, x, factor, (func, args, kwargs)) if _is_number(factor) else None


def _divide(mode: Recognition, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs or len(args) != 2 or not _is_number(args[1]) or args[1] == 0:
        return None
    return _scale(mode, args[0], 1 / args[1], (func, args, kwargs))


def _scale(mode: Recognition, x: Any, factor: float, call: Call) -> Deferred | None:
    if _is_live(x):
        if x._softmaxed or x._origin.settings != _settings(x._operands[0]):
            return None
        return Deferred(mode, call, x._operands, x._scale * factor, x._flipped, origin=x._origin)
    x = computed(x)
    return Deferred(mode, call, (x,), factor, False) if _is_plain(x) and x.shape[1] != x.shape[2] else None


def _softmax(mode: Recognition, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x: Any = args[0] if args else kwargs.get("input")
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    if len(args) > 2 or kwargs.get("dtype") is not None or kwargs.get("out") is not None or type(dim) is not int:
        mode.note("the softmax converts its dtype, or names no dimension")
        return None
    if _is_live(x) and not x._softmaxed and x._origin.settings == _settings(x._operands[0]):
        operands, scale, flipped, origin = x._operands, x._scale, x._flipped, x._origin
    else:
        x = computed(x)
        if not _is_plain(x):
            mode.note("the softmax's input is not [B, K, N] or [B, N, K]")
            return None
        operands, scale, flipped, origin = (x,), 1.0, False, None
    if dim not in (1, 2, -1, -2):
        mode.note("the softmax is over dim {}, neither pixels nor regions", dim)
        return None
    if (dim in (2, -1)) == flipped:  # the softmax runs over what are the rows: let them be the columns
        operands, flipped = tuple(_transpose(operand) for operand in reversed(operands)), not flipped
    rows, columns = operands[0].shape[1], operands[-1].shape[2]
    given = len(operands) == 1
    if given and rows >= columns:
        mode.note("the softmax over dim {} of the scores {} is not over pixels", dim, tuple(x.shape))
        return None
    if not given and columns >= rows:
        mode.note("the softmax over dim {} of the product {} is not over regions", dim, tuple(x.shape))
        return None
    if mode.log is not None:
        mode.log.softmaxes += 1
    return Deferred(mode, (func, args, kwargs), operands, scale, flipped, True, origin)


def _product(mode: Recognition, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return mode.product(*args, (func, args, kwargs)) if len(args) == 2 and not kwargs else None


def _einsum(mode: Recognition, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Two operands of three dimensions, the batch first and one summed: `bkn,bcn->bkc` and its relatives."""
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if kwargs or not isinstance(equation, str) or len(operands) != 2:
        return None
    terms, arrow, out = equation.replace(" ", "").partition("->")
    left, comma, right = terms.partition(",")
    summed = set(left) & set(right) - set(out)
    if not (arrow and comma and all(len(set(term)) == len(term) == 3 for term in (left, right, out))):
        return None
    if len(summed) != 1 or not left[0] == right[0] == out[0] or set(out) - {out[0]} != set(left) ^ set(right):
        return None
    first, second = operands
    if left[1] in summed:
        first, left = _transpose(first), left[0] + left[:0:-1]
    if right[2] in summed:
        second = _transpose(second)
    return mode.product(first, second, (func, args, kwargs), flipped=out[1] != left[1])


def _dropout(mode: Recognition, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    if not _is_live(x):
        return _view(mode, func, args, kwargs)
    if len(args) == 1 and (not kwargs.get("training", True) or kwargs.get("p", 0.5) == 0):
        return x
    mode.note("dropout is applied to the attention weights")
    return None


def _view(mode: Recognition, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What depends on strides, as the order of random numbers does, gets those of a product."""
    if any(args[0] is result for result in mode.results):
        return func(args[0].contiguous(), *args[1:], **kwargs)
    return None


def _sigmoid(mode: Recognition, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    mode.note("it is a sigmoid, not a softmax")


def _permute(mode: Recognition, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, *dims = args
    dims = list(dims[0]) if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    wanted = [dim % 3 if isinstance(dim, int) else dim for dim in dims]
    return _flip(x, (func, args, kwargs)) if wanted == [0, 2, 1] and not kwargs else None


def _swap(mode: Recognition, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    flips = len(args) == 3 and {args[1], args[2]} in ({1, 2}, {-1, -2}, {1, -1}, {2, -2}) and not kwargs
    return _flip(args[0], (func, args, kwargs)) if flips else None


def _flip(x: Deferred, call: Call, flips: bool = True) -> Deferred | None:
    if x._origin.settings != _settings(x._operands[0]):
        return None
    return Deferred(x._mode, call, x._operands, x._scale, x._flipped != flips, x._softmaxed, x._origin)


def _keep(mode: Recognition, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A copy or view of the same shape: `view`, `reshape`, `contiguous`."""
    x, *shape = args
    shape = list(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    return _flip(x, (func, args, kwargs), False) if not kwargs and (not shape or shape == list(x.shape)) else None


def _method(name: str, handler: Handler) -> Callable[..., Any]:
    """A method of `Deferred` that `handler` knows, and that is the tensor's otherwise."""
    func = getattr(Tensor, name)

    def method(self: Deferred, *args: Any, **kwargs: Any) -> Any:
        if self._call is not None:
            result = handler(self._mode, func, (self, *args), kwargs)
            if result is not None:
                return result
        return func(self._compute(), *computed(args), **computed(kwargs))

    return method


def _operator(name: str) -> Callable[..., Any]:
    """A method of `Deferred` that is the tensor's."""

    def method(self: Deferred, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._compute(), name)(*computed(args), **computed(kwargs))

    return method


_IN_PLACE: dict[Callable[..., Any], bool] = {}  # what `_is_in_place` found out
_IN_PLACE_METHODS = {"__set__", "__setitem__"} | {
    f"__i{name}__"
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
}
PRODUCT, SOFTMAX = _product, _softmax
HANDLERS: dict[Callable[..., Any], Handler] = {
    torch.einsum: _einsum,
    F.dropout: _dropout,
    F.softmax: _softmax,
    F.sigmoid: _sigmoid,
    operator.mul: _multiply,
    operator.truediv: _divide,
    operator.matmul: _product,
}
_LAYOUT: dict[Callable[..., Any], Handler] = {}  # only where the tensor is a Deferred
for _table, _handler, _names in (
    (HANDLERS, _multiply, "mul multiply __mul__ __rmul__"),
    (HANDLERS, _divide, "div divide true_divide __truediv__"),
    (HANDLERS, _softmax, "softmax"),
    (HANDLERS, _product, "matmul bmm __matmul__"),
    (HANDLERS, _view, "view_as as_strided stride is_contiguous"),
    (HANDLERS, _sigmoid, "sigmoid"),
    (_LAYOUT, _permute, "permute"),
    (_LAYOUT, _swap, "transpose swapaxes swapdims"),
    (_LAYOUT, _keep, "contiguous view reshape"),
):
    for _name in _names.split():
        for _owner in (torch, Tensor, torch.special):
            if hasattr(_owner, _name):
                _table[getattr(_owner, _name)] = _handler
        if _handler not in (_view, _sigmoid):
            setattr(Deferred, _name, _method(_name, _handler))
HANDLERS[Tensor.view] = _view

# Python looks operators up on the class, past __getattr__
_OPERATORS = {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"}
_OPERATORS |= {"__repr__", "__str__", "__format__", "__reduce_ex__"}
_OPERATORS |= {name for name in set(dir(Tensor)) - set(dir(object)) - set(vars(Deferred)) if name.startswith("__")}
for _name in _OPERATORS - {"__torch_dispatch__"}:
    if callable(getattr(Tensor, _name)):
        setattr(Deferred, _name, _operator(_name))
