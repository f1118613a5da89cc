"""The gather of pixels that come in parts: tiles of an image, frames of a clip, the shards of several processes."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from ocr_kernels.core import collectives
from ocr_kernels.core.arguments import (
    check_device,
    check_same_dtype,
    check_tensors,
    split_scale,
)
from ocr_kernels.core.backends import Backend, resolve_backend
from ocr_kernels.core.derivatives import is_in_transform
from ocr_kernels.core.registration import autocast, is_autocast_on
from ocr_kernels.gather.registration import check_feats_and_logits, spatial_gather_backward_op, spatial_gather_op


class Sums(NamedTuple):
    """What pixels come to, in float64: with weights exp(scale * M_ki - m_k), sums of x and of 1."""

    maximum: Tensor  # m, [B, K]: the largest scale * M_ki of all parts, or somewhat less; a constant
    of_feats: Tensor  # [B, C, K]
    of_ones: Tensor  # [B, K]

    def relative_to(self, maximum: Tensor) -> Sums:
        factor = (self.maximum - maximum).exp().masked_fill(self.maximum == -math.inf, 0)  # NaN where both are
        return Sums(maximum, self.of_feats * factor.unsqueeze(1), self.of_ones * factor)

    def faded(self, factor: float) -> Sums:
        """With weights times a factor, which m takes where the sums would become too small or too large."""
        ones = self.of_ones.detach() * factor
        fits = (ones > 1e-100) & (ones < 1e100)
        maximum = torch.where(fits, self.maximum, self.maximum + math.log(factor))
        by = torch.where(fits, factor, torch.ones_like(ones))
        return Sums(maximum, self.of_feats * by.unsqueeze(1), self.of_ones * by)

    def rows(self) -> Tensor:
        """Both sums, `[B, C + 1, K]`."""
        return torch.cat((self.of_feats, self.of_ones.unsqueeze(1)), 1)

    def plus(self, other: Sums) -> Sums:
        maximum = torch.maximum(self.maximum, other.maximum)
        a, b = self.relative_to(maximum), other.relative_to(maximum)
        return Sums(maximum, a.of_feats + b.of_feats, a.of_ones + b.of_ones)


class GatherState:
    """The spatial gather (Eq. 4) of pixels that are never in memory together, exactly that of all of them.

        f_k = sum_t sum_{i in t} exp(scale * M_ki - m_k) x_i / sum_t sum_{i in t} exp(scale * M_ki - m_k)

    over parts t of the pixels. A part is gathered by the op and its backend; the sums over parts are float64, so that
    a result is as accurate as that of one part, however many there were. The same parts in the same order give the
    same bits.

    Parts that were added with gradients on are differentiated through the result, to any order, in reverse mode;
    autograd holds them all until then. Where they do not fit in memory either, `share` differentiates one part at a
    time.

    Args:
        scale: factor on the logits; a tensor of one element is trained like any other factor.
        backend: as of `spatial_gather`.

    Examples:
        >>> feats, logits = torch.randn(2, 64, 32, 48), torch.randn(2, 19, 32, 48)
        >>> state = GatherState()
        >>> for rows in (slice(0, 10), slice(10, 32)):
        ...     state.update(feats[:, :, rows], logits[:, :, rows])
        >>> torch.allclose(state.result(), spatial_gather(feats, logits), atol=1e-6)
        True
    """

    def __init__(self, scale: float | Tensor = 1.0, *, backend: Backend | None = None) -> None:
        self.scale = scale
        self.backend: Backend | None = backend
        self._sums: Sums | None = None
        self._like: Tensor | None = None  # has the dtype and the device of the feats, and no elements
        self._pixels: int = 0

    def update(self, feats: Tensor, logits: Tensor) -> None:
        """Add pixels `[B, C, *S]` with their logits `[B, K, *S]`; B, C, K, dtype and device stay what they were first.

        Under autocast `feats` is cast to the autocast dtype, and `logits` are taken as they are.

        Raises:
            TypeError: an argument is no tensor, or of another dtype, or `scale` is no number.
            ValueError: shapes or devices do not match, each other or those of the parts before.
            RuntimeError: the backend asked for cannot run here.
        """
        sums, like = self._sums_of(feats, logits)
        self._sums = sums if self._sums is None else self._sums.plus(sums)
        self._like = like
        self._pixels += math.prod(feats.shape[2:])

    def result(self) -> Tensor:
        """f of all pixels so far, `[B, C, K]`, contiguous, in the dtype of the feats.

        Raises:
            RuntimeError: there was no part.
        """
        sums, like = self._known()
        return (sums.of_feats / self._total(sums.of_ones)).to(like.dtype).contiguous()

    def share(self, feats: Tensor, logits: Tensor) -> Tensor:
        """What one part of this state's pixels adds to f, `[B, C, K]`, in the dtype of the feats.

        The shares of all parts add up to f, and the gradient of a share, its first derivative alone, is that of f with
        respect to its part. So training takes the memory of one part at a time: a pass without gradients for f, the
        loss of each part with f as an input whose gradient adds up, and a pass that hands this gradient on to each.
        The part must be what it was when it was added; after a `fade` it counts as one that was added since.

        Raises:
            TypeError, ValueError, RuntimeError: as `update`, and if there was no part.

        Examples:
            >>> feats, logits = torch.randn(1, 8, 4, 6), torch.randn(1, 3, 4, 6)
            >>> halves = [(feats[..., half], logits[..., half]) for half in (slice(0, 3), slice(3, 6))]
            >>> state = GatherState()
            >>> with torch.no_grad():
            ...     for half in halves:
            ...         state.update(*half)
            >>> f = state.result().requires_grad_()
            >>> f.square().sum().backward()  # the losses of all parts
            >>> for half in halves:
            ...     x, m = (tensor.clone().requires_grad_() for tensor in half)
            ...     state.share(x, m).backward(f.grad)
        """
        known, like = self._known()
        maximum, of_feats, of_ones = (sums.detach().clone() for sums in known)  # clones are no inference tensors
        total = self._total(of_ones)
        part = self._sums_of(feats, logits)[0].relative_to(maximum)
        weighted = part.of_ones.unsqueeze(1) * (of_feats / total)
        return ((part.of_feats - weighted + weighted.detach()) / total).to(like.dtype)

    def fade(self, factor: float) -> None:
        """Let the pixels so far weigh `factor` times what they did: a memory of a stream that forgets.

        Raises:
            TypeError: `factor` is no number.
            ValueError: it is not positive and finite.
            RuntimeError: there was no part.
        """
        if not isinstance(factor, Real):
            raise TypeError(f"factor must be a number, but is {type(factor).__name__}")
        try:
            value = float(factor)
        except OverflowError:  # of an integer
            value = math.inf
        if not 0 < value < math.inf:
            raise ValueError(f"factor must be positive and finite, but is {factor}")
        self._sums = self._known()[0].faded(value)

    @staticmethod
    def merge(*states: GatherState) -> GatherState:
        """The state of the pixels of all `states`, which stay as they are; scale and backend are those of the first.

        Raises:
            TypeError: one is no GatherState, or the dtypes of their feats differ.
            ValueError: there is none, or their B, C, K, devices or scales differ.
            RuntimeError: one of them has had no part.
        """
        if not states:
            raise ValueError("states must be one or more, but there is none")
        for state in states:
            if not isinstance(state, GatherState):
                raise TypeError(f"states must be GatherStates, but one is {type(state).__name__}")
        scales = [state.scale for state in states]
        if not all(scale is scales[0] for scale in scales) and len(values := _values(scales)) > 1:
            raise ValueError(f"states must have one scale, but have {sorted(values)}")
        merged = GatherState(states[0].scale, backend=states[0].backend)
        for state in states:
            sums, like = state._known()
            merged._check_like("states", like, sums.of_feats.shape)
            merged._sums = sums if merged._sums is None else merged._sums.plus(sums)
            merged._like = like
            merged._pixels += state._pixels
        return merged

    def all_reduce(self, group: distributed.ProcessGroup | None = None) -> GatherState:
        """The state of the pixels of all processes of `group`, which all call it; this one stays as it is.

        Each process has pixels of the same images, some perhaps none: those call `update` with `[B, C, 0]`. B K maxima
        and B (C + 1) K sums are reduced, all float64, however many pixels there are, and in the backward pass the
        gradients of the sums.

        Where no process has pixels, f is NaN.

        Each process has the loss of its own pixels, and the gradients are those of the sum of these losses.

        Args:
            group: the processes; `None` for all.

        Raises:
            RuntimeError: torch.distributed is not initialised, or there was no part; the other processes then wait
                until the group's timeout.
            TypeError: `group` is no process group.

        Examples:
            >>> store = torch.distributed.HashStore()
            >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
            >>> state = GatherState()
            >>> state.update(torch.randn(1, 8, 4, 6), torch.randn(1, 3, 4, 6))  # the rows of this process
            >>> state.all_reduce().result().shape
            torch.Size([1, 8, 3])
            >>> torch.distributed.destroy_process_group()
        """
        sums, like = self._known()
        everywhere = GatherState(self.scale, backend=self.backend)
        maximum = collectives.maximum(sums.maximum, group)
        rows = collectives.total(sums.relative_to(maximum).rows(), group)
        everywhere._sums = Sums(maximum, rows[:, :-1], rows[:, -1])
        everywhere._like = like
        everywhere._pixels = max(self._pixels, 1)  # somewhere there are some
        return everywhere

    def _known(self) -> tuple[Sums, Tensor]:
        if self._sums is None or self._like is None:
            raise RuntimeError("a GatherState has no result before its first part: call update")
        return self._sums, self._like

    def _total(self, of_ones: Tensor) -> Tensor:
        """What sums `[B, C, K]` are divided by: 0 where all logits are -inf, but f of no pixels is 0."""
        return of_ones.unsqueeze(1) if self._pixels else torch.ones_like(of_ones).unsqueeze(1)

    def _check_like(self, name: str, like: Tensor, shape: tuple[int, ...]) -> None:
        """Whether tensors are those of another part of the same pixels."""
        if self._sums is not None and self._like is not None:
            expected = tuple(self._sums.of_feats.shape)
            if tuple(shape) != expected:
                raise ValueError(f"{name} must have B, C, K {expected} as the parts before, but have {tuple(shape)}")
            check_same_dtype(name, like, "the parts before", self._like)
            check_device(name, like, "the parts before", self._like)

    def _sums_of(self, feats: Tensor, logits: Tensor) -> tuple[Sums, Tensor]:
        check_tensors(feats=feats, logits=logits)
        feats = as_the_op_casts(feats)
        check_feats_and_logits(feats, logits)
        like = feats.detach().new_empty(0)
        self._check_like("feats and logits", like, (*feats.shape[:2], logits.shape[1]))
        logits, scale = split_scale(self.scale, logits)
        return sums_of(feats, logits, scale, resolve_backend(feats.device, self.backend)), like


def _values(scales: list[Any]) -> set[float]:
    """Those that are known, not those of transforms and fakes, in the least precise dtype of a tensor among them."""
    values = [float(scale) for scale in scales if isinstance(scale, Real)]
    if torch.compiler.is_compiling() or is_in_transform():
        return set(values)
    tensors = [s.detach() for s in scales if type(s) in (Tensor, nn.Parameter) and s.device.type != "meta"]
    if tensors:
        least = min((tensor.dtype for tensor in tensors), key=lambda dtype: dtype.itemsize)
        values = torch.tensor([*values, *map(float, tensors)], dtype=least, device="cpu").tolist()
    return set(values)


def as_the_op_casts(feats: Tensor) -> Tensor:
    """In the autocast dtype, where there is one."""
    kind = feats.device.type
    return autocast(feats, kind) if is_autocast_on(kind) else feats


def sums_of(feats: Tensor, logits: Tensor, scale: float, backend: Backend) -> Sums:
    """The sums of one part."""
    regions, log_total, stats = _Part.apply(feats, logits, scale, backend)  # type: ignore[no-untyped-call]
    maximum, total = stats[:, -2].double().masked_fill(log_total.detach() == -math.inf, -math.inf), log_total.exp()
    return Sums(maximum, regions.double() * total.unsqueeze(1), total)


class _Part(torch.autograd.Function):
    """Regions `[B, C, K]` of a part, 0 where all logits are -inf, the logarithms of its sums of weights, and the stats.

    Weights are relative to the largest, which may be so large that no logarithm of the sum would tell how many there
    are. What it saves is what the op saves.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(feats: Tensor, logits: Tensor, scale: float, backend: Backend) -> tuple[Tensor, Tensor, Tensor]:
        _, stats = spatial_gather_op(feats, logits, scale, backend)
        maximum, total = stats[:, -2], stats[:, -1]
        none = total == 0
        log_total = total.double().log()
        regions = stats[:, :-2].masked_fill(none.unsqueeze(1), 0)
        rest = maximum.masked_fill(none, 0), total.masked_fill(none, 1)  # weights of exp(-inf) / 1
        return regions, log_total, torch.cat((regions, *(row.unsqueeze(1) for row in rest)), dim=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        feats, logits, ctx.scale, ctx.backend = inputs
        ctx.save_for_backward(feats, logits, output[2])
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, log_grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        feats, logits, stats = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # for a second derivative, which is NaN through softmaxes of -inf alone
            flat = logits.flatten(2)
            absent = (ctx.scale * flat.to(stats.dtype) == -math.inf).all(2, keepdim=True)
            logits = flat.masked_fill(absent, 0).view(logits.shape)
        found: list[Tensor | None] = [None, None]
        if grad is not None:
            grad = grad.to(feats.dtype)
            both = spatial_gather_backward_op(grad, feats, logits, stats, ctx.scale, *needs, ctx.backend)
            found = [gradient if need else None for gradient, need in zip(both, needs, strict=True)]
        if log_grad is not None and needs[1]:
            scores = ctx.scale * logits.flatten(2).to(stats.dtype)
            none = scores.detach() == -math.inf
            weights = scores.softmax(2).masked_fill(none, 0)  # NaN where all are -inf
            gradient = (ctx.scale * weights * log_grad.unsqueeze(2).to(stats.dtype)).view(logits.shape)
            found[1] = (gradient if found[1] is None else found[1] + gradient).to(logits.dtype)
        return *found, None, None
