"""A module's step 4 in training: which of its layers the pixels go through, for `ocr_block`."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ocr_kernels.block import ocr_block
from ocr_kernels.block.layers import CHANNEL_DROPOUTS, is_norm, is_pointwise, layer_of, mask_of
from ocr_kernels.core.calls import is_plain_call
from ocr_kernels.models.block_plan import Watch, copied, quiet
from ocr_kernels.models.block_program import Call, Ref
from ocr_kernels.models.block_weights import BlockPlan
from ocr_kernels.models.errors import relative_error
from ocr_kernels.models.random_state import random_states, undisturbed

BOUND = 1e-8
"""Largest relative difference at which two forwards in float64 count as equal."""


ROUNDED = 1e-4
"""The same where one of them computes some of it in float32, as a softmax of `scores.float()`."""


class Pair(NamedTuple):
    """The paths of a convolution, or a Linear, and of the norm after it; the slope of the activation."""

    convolution: str
    norm: str | None
    slope: float


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """How a module computes step 4 where gradients are wanted, or norms take the statistics of the batch."""

    pixels: tuple[Pair, ...]  # phi
    key: tuple[Pair, ...]  # psi
    value: tuple[Pair, ...]  # delta
    up: Pair | None
    fusing: Pair
    context_first: bool
    scale: float
    transposed: bool  # whether regions come as [B, K, C]
    dropout: str | None  # the path of what is done to z

    def compute(self, module: nn.Module, feats: Tensor, regions: Tensor) -> Tensor:
        """z of `module`, in the memory format of feats; statistics run as in its own forward."""
        columns = regions.flatten(2)
        columns = columns.transpose(1, 2) if self.transposed else columns  # [B, C, K]
        key, value = (_through(module, pairs, columns) for pairs in (self.key, self.value))
        *pixel, fusing = (_layer(module, pair) for pair in (*self.pixels, self.fusing))
        up = None if self.up is None else _layer(module, self.up)
        dropout = None if self.dropout is None else _at(module, self.dropout)
        mask = mask_of(dropout, feats, len(fusing.weight)) if isinstance(dropout, CHANNEL_DROPOUTS) else None
        options: Any = {"scale": self.scale, "context_first": self.context_first, "mask": mask}
        z = ocr_block(feats, key, value, pixel, up, fusing, **options)
        return F.dropout(z, dropout.p, dropout.training) if isinstance(dropout, nn.Dropout) else z

    def fits(self, module: nn.Module) -> bool:
        """Whether the layers are what the op takes, and calling them runs nothing else."""
        every = (*self.pixels, *self.key, *self.value, *([] if self.up is None else [self.up]), self.fusing)
        norms = [_at(module, pair.norm) for pair in every if pair.norm is not None]
        return all(map(is_norm, norms)) and all(is_plain_call(part) for part in list(module.modules())[1:])


def _at(module: nn.Module, path: str) -> Any:
    """`get_submodule`, in a tenth of its time."""
    return functools.reduce(lambda part, name: part._modules[name], path.split("."), module)  # type: ignore[arg-type, return-value]


def _layer(module: nn.Module, pair: Pair) -> Any:
    norm = None if pair.norm is None else _at(module, pair.norm)
    return layer_of(_at(module, pair.convolution), norm, pair.slope)


def _through(module: nn.Module, pairs: tuple[Pair, ...], columns: Tensor) -> Tensor:
    """`[B, channels, K]` of regions `[B, C, K]`; norms are called, as they are by the module itself."""
    for pair in pairs:
        layer = _at(module, pair.convolution)
        columns = F.conv1d(columns, layer.weight.flatten(1)[..., None], layer.bias)
        if pair.norm is not None:
            norm = _at(module, pair.norm)
            ones = isinstance(norm, nn.BatchNorm2d) + 2 * isinstance(norm, nn.BatchNorm3d)
            columns = norm(columns[(..., *[None] * ones)]).flatten(2)
        columns = F.leaky_relu(columns, pair.slope) if pair.slope != 1 else columns
    return columns


# Finding it


class _Local(nn.modules.batchnorm._BatchNorm):
    """A SyncBatchNorm while one process finds out what it computes: the others may do something else meanwhile."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


def plan_training(module: nn.Module, plan: BlockPlan) -> TrainingPlan | str:
    """How `module`, whose plan for inference is known, computes step 4 in training; or why the op cannot."""
    if plan.beyond is not None:
        convolves = plan.beyond.window is not None
        return "joins by a convolution that is not 1x1" if convolves else "pixels attend at a lower resolution"
    if any(isinstance(part, Call) for part in (*plan.key, *plan.value)):
        return "its regions go through more than layers, norms and slopes"
    dropouts = [
        path for path, part in module.named_modules() if type(part) in (nn.Dropout, *CHANNEL_DROPOUTS) and part.p > 0
    ]
    try:
        fusing = _pairs(module, plan, [plan.fusing.weight], plan.fusing.slope)
        ups = _pairs(module, plan, [plan.up.weight, plan.context], plan.up.slope, besides=fusing)
        if len(fusing) > 1 or len(ups) > 1 or (not ups and plan.up.slope != 1):
            return "contexts go through more than one layer, or none, before or after they are joined with pixels"
        found = TrainingPlan(
            pixels=_chain(module, plan, plan.pixels),
            key=_chain(module, plan, plan.key),
            value=_chain(module, plan, plan.value),
            up=ups[0] if ups else None,
            fusing=fusing[0],
            context_first=True,
            scale=plan.scale,
            transposed=plan.transposed,
            dropout=None,
        )
        if len(found.pixels) > 2:
            return "its pixels go through more than two layers before they attend"
        if not found.fits(module):
            return "a layer has a hook, or is none that the op has"
        of_pixels = {pair.norm for pair in (*found.pixels, *ups, *fusing)}
        for pair in (*found.key, *found.value):
            if pair.norm is not None and pair.norm in of_pixels:
                return f"{pair.norm} is a norm of pixels and of regions"
        reasons = []
        for context_first, dropout in itertools.product((True, False), (*dropouts, None)):
            candidate = dataclasses.replace(found, context_first=context_first, dropout=dropout)
            reasons.append(_off(module, plan, candidate))
            if not reasons[-1]:
                return candidate
        return reasons[0]
    except Exception as error:
        return str(error)


def _chain(module: nn.Module, plan: BlockPlan, layers: tuple[Any, ...]) -> tuple[Pair, ...]:
    return tuple(pair for layer in layers for pair in _pairs(module, plan, [layer.weight], layer.slope))


def _pairs(
    module: nn.Module, plan: BlockPlan, weights: list[Ref | None], slope: float, besides: tuple[Pair, ...] = ()
) -> tuple[Pair, ...]:
    """The modules that matrices were folded of, in order, but for those of other pairs; the last has the slope."""
    program = plan.program.pruned(tuple(weights))
    owners = dict.fromkeys(path.rpartition(".")[0] for _, path in program.sources)
    if "" in owners:
        raise ValueError(f"{next(path for _, path in program.sources if '.' not in path)} takes part, in no layer")
    own = {path for pair in besides for path in (pair.convolution, pair.norm) if path is not None}
    if not own <= owners.keys():
        raise ValueError("it adds up projections of pixels and contexts")
    owners = dict.fromkeys(path for path in owners if path not in own)
    found: list[Pair] = []
    norm = None  # that was registered before its layer
    for path in owners:
        part = module.get_submodule(path)
        if is_pointwise(part) or type(part) is nn.Linear:
            found.append(Pair(path, norm, 1.0))
            norm = None
        elif is_norm(part) and found and found[-1].norm is None:
            found[-1] = found[-1]._replace(norm=path)
        elif is_norm(part) and norm is None:
            norm = path
        else:
            raise ValueError(f"{path}, a {type(part).__qualname__}, is no layer that the op has")
    if norm is not None:
        raise ValueError(f"{norm} is a norm without a layer")
    if slope < 0:
        raise ValueError("an activation has a negative slope")
    return (*found[:-1], found[-1]._replace(slope=slope)) if found else ()


def _off(module: nn.Module, plan: BlockPlan, candidate: TrainingPlan) -> str:
    """Why a plan is wrong: with random weights in float64, in the modes that it is for, it gives something else."""
    with quiet([*module.parameters(), *module.buffers()]):
        trial = copied(module).double()
        for part in trial.modules():
            if isinstance(part, nn.SyncBatchNorm):
                part.__class__ = _Local  # type: ignore[assignment]
        for tensor in (*trial.parameters(), *trial.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if tensor.dim() < 2 else torch.randn_like(tensor))
        for parameter in trial.parameters():
            parameter.requires_grad_()
        twin = copy.deepcopy(trial)
        for seed, mode in itertools.product(range(2), (True, False)):
            trial.train(mode), twin.train(mode)
            feats, regions = (tensor.double() for tensor in plan.random_inputs(seed, 2, (7, 5, 3), 4 + seed))
            runs = (type(trial).forward, trial), (candidate.compute, twin)
            calls = [functools.partial(_in_training, run, part, feats, regions, seed) for run, part in runs]
            watch = Watch(trial, list(trial.parameters()))
            with _Rounding() as rounding:  # type: ignore[no-untyped-call]
                (theirs, drawn), (ours, drawn_by_us) = undisturbed([], *calls)
            bound = ROUNDED if rounding.found else BOUND
            beside = watch.left_behind() or ("draws other random numbers" if drawn != drawn_by_us else "")
            if beside:
                return f"in training it {beside}"
            for expected, found in zip(theirs, ours, strict=True):
                error = relative_error(found, expected)
                if not (error <= bound and expected.isfinite().all()):
                    return f"its forward computes something else in training (off by {error:.1e})"
    return ""


class _Rounding(TorchDispatchMode):
    """Whether anything is computed in float32."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.found |= any(isinstance(t, Tensor) and t.dtype == torch.float32 for t in tree_leaves(out))
        return out


def _in_training(
    run: Callable[..., Any], module: nn.Module, feats: Tensor, regions: Tensor, seed: int
) -> tuple[list[Tensor], Any]:
    """A module's result, the gradients of its inputs, of all its parameters, its buffers, its result without gradients.

    And the random states after it. Gradients of parameters are one vector: some may be nothing but rounding, which is
    to be seen beside the others.
    """
    torch.default_generator.manual_seed(seed)  # of the CPU alone
    with torch.enable_grad():
        x, f = feats.clone().requires_grad_(), regions.clone().requires_grad_()
        out = run(module, x, f)
        wanted = [x, f, *module.parameters()]
        gradients = torch.autograd.grad(out.square().sum(), wanted, allow_unused=True)
    nothing = out.new_empty(0)  # where a gradient is not there
    dx, df, *others = (nothing if gradient is None else gradient for gradient in gradients)
    buffers = [buffer.clone() for buffer in module.buffers()]
    with torch.no_grad():
        alone = run(module, feats.clone(), regions.clone())
    return [out, dx, df, torch.cat([nothing, *map(torch.flatten, others)]), *buffers, alone], random_states()
