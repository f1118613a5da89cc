"""Let a trained model's step 4, from pixels and regions to z, run as `ocr_head` in eval mode, report it, and undo it.

BatchNorm in eval mode is folded into the 1x1 convolutions. A folded module keeps its parameters, buffers, hooks and
`state_dict` keys: the instance's class becomes a subclass of the same name, whose forward is the module's own wherever
the folded one does not apply, in training above all.
"""

from __future__ import annotations

import copy
import copyreg
import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ocr_kernels import maps, replace
from ocr_kernels.head.functional import DTYPES, HeadWeights, ocr_head
from ocr_kernels.replace import Filter, LeftAlone

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)  # in eval mode
_NAMED_NORMS = (  # which compute the same in eval mode; named, since importing them is not ours to do
    "torchvision.ops.misc.FrozenBatchNorm2d",
    "detectron2.layers.batch_norm.FrozenBatchNorm2d",
    "mmengine.utils.dl_utils.parrots_wrapper.SyncBatchNorm",
)
_CONV_MODULE = "mmcv.cnn.bricks.conv_module.ConvModule"

_STRUCTURES = (  # phi, psi, delta, rho and g: HRNet's and openseg's names, mmsegmentation's
    ("object_context_block.f_pixel", "object_context_block.f_object", "object_context_block.f_down",
     "object_context_block.f_up", "conv_bn_dropout"),
    ("query_project", "key_project", "value_project", "out_project", "bottleneck"),
)  # fmt: skip
_DEPTHS = (2, 2, 1, 1, 1)  # how many convolutions each has

WIRING_BOUND = 1e-4
"""How far, relative to the largest output, the float32 outputs of two ways to compute the same may be apart."""


@dataclasses.dataclass(frozen=True)
class Folded:
    """A folded module, with its outputs' error against its own forward in float64, and that of its own in its dtype."""

    name: str
    module_class: str
    max_error: float
    eager_error: float
    relative_error: float


@dataclasses.dataclass(frozen=True)
class FoldingReport:
    """What `fold_ocr_modules` did; `print` it."""

    folded: tuple[Folded, ...]
    left_alone: tuple[LeftAlone, ...]

    def __str__(self) -> str:
        folded = [
            (r.name or "(model)", r.module_class, *map("{:.1e}".format, (r.max_error, r.eager_error, r.relative_error)))
            for r in self.folded
        ]
        left_alone = [(row.name or "(model)", row.module_class, row.reason) for row in self.left_alone]
        lines = [f"{len(folded)} folded, {len(left_alone)} left alone"]
        if folded:
            lines.append(replace._table(("folded", "class", "max error", "eager's own", "relative"), *folded))
        if left_alone:
            lines.append(replace._table(("left alone", "class", "because"), *left_alone))
        return "\n".join(lines)


def fold_ocr_modules(model: nn.Module, *, filter: Filter | None = None, example_inputs: Any = None) -> FoldingReport:
    """Let every module of `model`, itself included, that is OCR's step 4 compute it by `ocr_head` in eval mode.

    That is `SpatialOCR`, ours, HRNet's or openseg's, and mmsegmentation's `ObjectAttentionBlock`. The layers are known
    by their types: 1x1 convolutions, BatchNorm that is nothing more, ReLU, dropout. What the forward does with them is
    established by running it on a copy with random weights. Then z of a copy with the real weights may be off by at
    most 4 times what the module's own forward is off in its dtype, against float64, plus 4 eps of the largest value.

    Folded weights are made anew when a parameter, a buffer or a layer was replaced or changed in place, and after
    `train()` and `eval()`; a program that is recorded, by `torch.compile` or as a CUDA graph, folds each time it runs.
    PyTorch does not count changes through `parameter.data` and by fused optimizers; they are seen after a forward pass
    with gradients, `train()`, `eval()` or the next call of this.

    The module's own forward runs in training, where grad mode is on and anything requires grad, on float64, in
    exports and `torch.func` transforms, inside `record_maps`, where a layer has a hook, and where it is called with
    other arguments than pixels and regions.

    Args:
        model: changed in place; repeating the call changes nothing more. `unfold_ocr_modules` undoes it.
        filter: `(module, name) -> bool`, whether a module may be folded.
        example_inputs: what `model` is called with: a tensor, a tuple of arguments or a dict of keyword arguments. A
            run in eval mode without gradients then finds the pixels and regions to check with; random ones otherwise.

    Returns:
        What was folded, its error, what looked like step 4 and was left alone, and why.

    Raises:
        TypeError: an argument is of the wrong type; nothing is changed.
    """
    replace._check_arguments(model, filter, example_inputs)
    candidates = {module: name for name, module in model.named_modules() if _paths(module)}
    examples = {} if example_inputs is None else _examples(model, candidates, example_inputs)
    folded, left_alone = [], []
    for module, name in candidates.items():
        reason: str | tuple[float, float, float] = "the filter says so"
        if _is_folded(module):
            _forget(module)
            reason = "it was folded before"
        elif filter is None or filter(module, name):
            reason = _checked(module, examples.get(module))
        if isinstance(reason, str):
            left_alone.append(LeftAlone(name, type(module).__qualname__, reason))
        else:
            folded.append((module, Folded(name, type(module).__qualname__, *reason)))
    for module, _ in folded:
        vars(module)[_CACHE] = _Cache()
        _become(module, _folded_class)
    return FoldingReport(tuple(row for _, row in folded), tuple(left_alone))


def unfold_ocr_modules(model: nn.Module) -> list[str]:
    """Give the folded modules of `model` their own classes back; the names of those that were folded.

    Raises:
        TypeError: `model` is no module.
    """
    replace._check_arguments(model, None, None)
    folded = [(name, module) for name, module in model.named_modules() if _is_folded(module)]
    for _, module in folded:
        _become(module, operator.attrgetter("_ocr_kernels_unfolded"))
        del vars(module)[_CACHE]
    return [name for name, _ in folded]


# The swap


class _Cache:
    """Where a folded module keeps its weights; a copy starts empty."""

    def __init__(self) -> None:
        self.snapshot: _Snapshot | None = None

    def __reduce__(self) -> Any:
        return _Cache, ()


_CACHE = "_ocr_kernels_cache"


def _is_folded(module: nn.Module) -> bool:
    return _CACHE in vars(module)


def _forget(module: nn.Module) -> None:
    vars(module)[_CACHE].snapshot = None


def _become(module: nn.Module, change: Callable[[Any], Any]) -> None:
    """Change the class of `module`, below what `replace_ocr_modules` made of it."""
    swapped = replace._restore(module)
    module.__class__ = change(type(module))
    if swapped:
        quiet = None if replace._is_direct(module) else replace._quiet_children(module)
        module.__class__ = replace._swapped_class(type(module), quiet)  # type: ignore[arg-type]


@functools.cache
def _folded_class(original: type[nn.Module]) -> type[nn.Module]:
    """A subclass with the same name, whose forward is the folded one where that applies."""
    names = tuple(inspect.signature(original.forward).parameters)[1:3]

    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inputs = (*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs))
        if len(inputs) == 2 == len(args) + len(kwargs):
            weights = _weights(self, *inputs)
            if weights is not None:
                return ocr_head(inputs[0], inputs[1].flatten(2), weights)
        return original.forward(self, *args, **kwargs)

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        _forget(self)
        return original.train(self, mode)

    return _metaclass(type(original))(  # type: ignore[arg-type, no-any-return]
        original.__name__,
        (original,),
        {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "_ocr_kernels_unfolded": original,
            "forward": forward,
            "train": train,
        },
    )


@functools.cache
def _metaclass(original: Any) -> Any:
    """The type of folded classes: pickled as what makes them, since no file has them."""
    metaclass = type(original.__name__, (original,), {})
    copyreg.pickle(metaclass, lambda folded: (_folded_class, (folded._ocr_kernels_unfolded,)))  # type: ignore[attr-defined]
    return metaclass


# The weights of a call


class _Snapshot:
    """Folded weights, and all that they were made from: a module's layers, parameters and buffers."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        plan = _plan(module)
        self.weights = None if isinstance(plan, str) else _fold(plan, dtype)
        self.convolved = None if isinstance(plan, str) else plan.convolved()
        self.dtype = dtype
        self.layers = list(module.modules())[1:]
        self.hooks = [hooks for layer in self.layers for hooks in (layer._forward_hooks, layer._forward_pre_hooks)]
        entries = [
            (owner, name, value)
            for part in module.modules()
            for owner in (part._modules, part._parameters, part._buffers)
            for name, value in owner.items()
        ]
        self.owners, self.names, self.values = zip(*entries, strict=True)
        self.tensors = [v for v in self.values if isinstance(v, Tensor) and v.is_floating_point()]
        self.countable = all(type(t) in (Tensor, nn.Parameter) and not t.is_inference() for t in self.tensors)
        if self.countable:  # PyTorch counts their changes
            self.versions = list(map(_version_of, self.tensors))
            self.storages = [tensor.detach() for tensor in self.tensors]  # kept, so that no other gets its address
            self.addresses = list(map(Tensor.data_ptr, self.tensors))

    def is_current(self, module: nn.Module, dtype: torch.dtype) -> bool:
        """Whether nothing changed: a few passes in C, since every call asks."""
        return (
            self.dtype == dtype
            and self.countable
            and self.owners[0] is module._modules  # a replica of DataParallel has the same cache
            and all(map(operator.is_, map(_get, self.owners, self.names), self.values))
            and list(map(_version_of, self.tensors)) == self.versions
            and list(map(Tensor.data_ptr, self.tensors)) == self.addresses
        )

    def is_eval(self) -> bool:
        """Whether every layer is in eval mode and nothing listens to it."""
        return not any(self.hooks) and not any(map(_training_of, self.layers))


_get = dict.get
_version_of = operator.attrgetter("_version")
_training_of = operator.attrgetter("training")


def _weights(module: nn.Module, feats: Any, regions: Any) -> HeadWeights | None:
    """The folded weights for a call with these pixels and regions; None where the module's own forward is to run."""
    if module.training or type(feats) is not Tensor or type(regions) is not Tensor or not _may_fold():
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in (feats, regions, *module.parameters())):
        if not torch.compiler.is_compiling():
            _forget(module)  # an optimizer's step may follow, and PyTorch does not count what fused ones change
        return None
    device = feats.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else feats.dtype
    if dtype not in DTYPES:
        return None
    if torch.compiler.is_compiling() or (feats.is_cuda and torch.cuda.is_current_stream_capturing()):
        plan = _plan(module)  # what is not part of the program would be stale when it runs again
        if isinstance(plan, str) or not _takes(plan.convolved(), feats, regions):
            return None
        return _fold(plan, dtype)
    # The mode of a swapped module would be asked about every attribute; nothing public leaves it out.
    with torch._C.DisableTorchFunction():
        snapshot = _snapshot(module, dtype)
        return snapshot.weights if snapshot.is_eval() and _takes(snapshot.convolved, feats, regions) else None


def _may_fold() -> bool:
    if torch.compiler.is_compiling():
        return not torch.compiler._is_exporting_flag  # is_exporting() is true under any torch.compile of PyTorch 2.11
    return not (  # no public function tells of the last three
        torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or (torch._C._len_torch_dispatch_stack() and any(map(_records, _get_current_dispatch_mode_stack())))
    )


def _records(mode: object) -> bool:
    return isinstance(mode, maps._Recorder)


def _snapshot(module: nn.Module, dtype: torch.dtype) -> _Snapshot:
    """That of the last call if it is current, a new one otherwise."""
    cache: _Cache = vars(module)[_CACHE]
    snapshot = cache.snapshot
    if snapshot is None or not snapshot.is_current(module, dtype):
        snapshot = _Snapshot(module, dtype)
        if not torch._C._len_torch_dispatch_stack():  # a mode's tensors may be no ordinary ones; nothing public tells
            if snapshot.weights is not None and snapshot.weights.bias.is_cuda:
                torch.cuda.current_stream().synchronize()  # once for each change: the next call may use another stream
            cache.snapshot = snapshot
    return snapshot


def _takes(convolved: tuple[Tensor, Tensor] | None, feats: Tensor, regions: Tensor) -> bool:
    """Whether the module's own forward would take pixels and regions like these."""
    if convolved is None:
        return False
    weight, object_weight = convolved
    shape, region_shape, dtype = feats.shape, regions.shape, feats.dtype
    return (
        len(shape) == weight.dim()
        and len(region_shape) == object_weight.dim()
        and shape[:2] == region_shape[:2]
        and shape[1] == weight.shape[1]
        and 0 not in shape
        and 0 not in region_shape
        and feats.device == regions.device == weight.device
        and (dtype == regions.dtype == weight.dtype or torch.is_autocast_enabled(feats.device.type))
    )


def _fold(plan: _Plan, dtype: torch.dtype) -> HeadWeights:
    with torch.no_grad():
        *layers, (fusing, bias) = (_folded(layer) for layer in plan)
        matrices = (tensor for weight, shift in layers for tensor in (weight.to(dtype).contiguous(), shift))
        context, pixels = (half.to(dtype).contiguous() for half in fusing.chunk(2, 1))
        return HeadWeights(*matrices, context, pixels, bias)  # type: ignore[call-arg,arg-type]


def _folded(layer: _Layer) -> tuple[Tensor, Tensor]:
    """Matrix and bias in float32."""
    weight, bias = layer.conv.weight.detach().flatten(1).float(), layer.conv.bias
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias.detach().float()
    for norm in layer.norms:
        factor = (norm.running_var.float() + norm.eps).rsqrt()
        if norm.weight is not None:
            factor = factor * norm.weight.float()
        bias = (bias - norm.running_mean.float()) * factor
        if norm.bias is not None:
            bias = bias + norm.bias.float()
        weight = weight * factor.unsqueeze(1)
    return weight, bias.contiguous()


# Which modules can be folded


class _Layer(NamedTuple):
    """A convolution and the BatchNorms after it; a ReLU follows."""

    conv: Any
    norms: tuple[Any, ...]


class _Plan(NamedTuple):
    """The layers of step 4, in the order of `HeadWeights`."""

    pixel_in: _Layer
    pixel_out: _Layer
    object_in: _Layer
    object_out: _Layer
    down: _Layer
    up: _Layer
    fusing: _Layer

    def convolved(self) -> tuple[Tensor, Tensor]:
        """The weights that pixels and regions meet first."""
        return self.pixel_in.conv.weight, self.object_in.conv.weight


def _paths(module: nn.Module) -> tuple[str, ...] | None:
    """The names of phi, psi, delta, rho and g, if `module` has children of all of them."""
    for paths in _STRUCTURES:
        if all(_child(module, path) is not None for path in paths):
            return paths
    return None


def _child(module: nn.Module, path: str) -> nn.Module | None:
    found: nn.Module | None = module
    for name in path.split("."):
        found = None if found is None else found._modules.get(name)
    return found


def _plan(module: nn.Module) -> _Plan | str:
    """The layers, or why `module` cannot be folded."""
    paths = _paths(module)
    if paths is None:
        return "its children have other names"
    block = _child(module, paths[0].rpartition(".")[0]) if "." in paths[0] else module
    assert block is not None
    if getattr(block, "scale", 1) not in (1, None) or block._modules.get("query_downsample") is not None:
        return "it attends at a lower resolution (scale > 1)"
    for part in (module, block):
        if part._parameters or part._buffers:
            return "it has parameters or buffers beside its layers'"
    for name, part in module.named_modules():
        if part is not module and (part._forward_hooks or part._forward_pre_hooks):
            return f"{name} has a forward hook, which would not run"
        if part.training:
            return f"{name or 'it'} is in training mode"
        if "forward" in vars(part):
            return f"the forward of {name or 'it'} is the instance's own, not its class's"
    layers: list[_Layer] = []
    for path, depth in zip(paths, _DEPTHS, strict=True):
        found = _layers(path, _child(module, path))
        if isinstance(found, str):
            return found
        if len(found) != depth:
            return f"{path} has {len(found)} convolutions instead of {depth}"
        layers += found
    plan = _Plan(*layers)
    depth, channels = plan.pixel_in.conv.weight.shape[:2]
    sizes = [(depth, channels), (depth, depth)] * 2 + [(depth, channels), (channels, depth)]
    sizes.append((plan.fusing.conv.weight.shape[0], 2 * channels))
    if [tuple(layer.conv.weight.shape[:2]) for layer in plan] != sizes:
        return "the sizes of its convolutions are not those of phi, psi, delta, rho and g"
    if len({layer.conv.weight.dtype for layer in plan}) > 1 or plan.pixel_in.conv.weight.dtype not in DTYPES:
        return "the dtype of its convolutions is not float32, bfloat16 or float16 throughout"
    return plan


def _layers(path: str, module: Any) -> list[_Layer] | str:
    """The convolutions in a sequence of layers, or why there is more to it."""
    layers: list[_Layer] = []
    activated = True
    for part in _flat(module):
        name = _name(part)
        if type(part) in _IDENTITIES:
            continue
        if type(part) is nn.ReLU:
            activated = True
        elif type(part) in _CONVOLUTIONS:
            if not activated:
                return f"{path} has no ReLU between two convolutions"
            if part.weight[0, 0].numel() != 1 or part.groups != 1 or set(part.stride) != {1} or not _is_unpadded(part):
                return f"{path} has a convolution that is not 1x1 with stride 1, no padding and one group"
            if type(part.weight) is not nn.Parameter:
                return f"{path} has a weight of type {type(part.weight).__name__}"
            layers.append(_Layer(part, ()))
            activated = False
        elif type(part) in _NORMS or name in _NAMED_NORMS:
            if activated:
                return f"{path} has a {type(part).__name__} that does not follow a convolution"
            if part.running_mean is None:
                return f"{path} has a {type(part).__name__} without running statistics"
            layers[-1] = _Layer(layers[-1].conv, (*layers[-1].norms, part))
        else:
            return f"{path} has a {name}"
    return layers if activated else f"{path} does not end in a ReLU"


def _flat(module: Any) -> Iterator[Any]:
    """The layers that run one after the other."""
    parts: list[Any] | None = None
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        parts = list(module)
    elif _name(module) == _CONV_MODULE and module.order == ("conv", "norm", "act") and not module.with_explicit_padding:
        parts = [module._modules[name] for name in ("conv", module.norm_name, "activate") if name in module._modules]
    if parts is None:
        yield module
    else:
        for part in parts:
            yield from _flat(part)


def _is_unpadded(conv: Any) -> bool:
    return conv.padding in ("same", "valid") or set(conv.padding) == {0}


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


# The check


def _examples(
    model: nn.Module, candidates: dict[nn.Module, str], example_inputs: Any
) -> dict[nn.Module, tuple[Tensor, ...]]:
    """The pixels and regions with which a run of `model` in eval mode calls each candidate first."""
    examples: dict[nn.Module, tuple[Tensor, ...]] = {}

    def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        examples.setdefault(module, replace._cloned((*args, *kwargs.values())))

    kwargs = example_inputs if isinstance(example_inputs, dict) else {}
    args = example_inputs if isinstance(example_inputs, tuple) else () if kwargs else (example_inputs,)
    args, kwargs = replace._cloned((args, kwargs))
    with torch.no_grad(), replace._forked_rng(model), replace._preserved(model):
        handles = [module.register_forward_pre_hook(remember, with_kwargs=True) for module in candidates]
        try:
            model.eval()(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
    return examples


def _checked(module: nn.Module, example: tuple[Tensor, ...] | None) -> tuple[float, float, float] | str:
    """The error, eager's own and the relative one; or why `module` is not folded."""
    if "forward" in vars(module) or isinstance(module, torch.fx.GraphModule):
        return "its forward is the instance's own, not its class's"
    tensors = [*module.parameters(), *module.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        return "its parameters are on the meta device"
    try:
        with torch.no_grad(), replace._forked_rng(module), torch.autocast(tensors[0].device.type, enabled=False):
            trial = copy.deepcopy(module).eval()
            plan = _plan(trial)
            if isinstance(plan, str):
                return plan
            return _wiring_differs(copy.deepcopy(trial)) or _errors(trial, plan, example)
    except Exception as error:
        return f"it fails on pixels and regions: {error}"


def _wiring_differs(module: nn.Module) -> str:
    """What is wrong with the formula on random weights, float32 on a CPU; empty if nothing is."""
    generator = torch.Generator().manual_seed(0)
    module = module.cpu().float()
    for tensor in module.parameters():
        fan = max(tensor[0].numel(), 1) if tensor.dim() > 1 else 1
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * (2 / fan) ** 0.5)
    plan = _plan(module)
    assert not isinstance(plan, str)
    for norm in (norm for layer in plan for norm in layer.norms):
        norm.running_mean.copy_(torch.randn(norm.running_mean.shape, generator=generator))
        norm.running_var.copy_(0.5 + torch.rand(norm.running_var.shape, generator=generator))
    inputs = _random_inputs(plan, generator)
    expected = module.forward(*inputs)
    if not isinstance(expected, Tensor):
        return f"it returns a {type(expected).__name__}"
    found = ocr_head(inputs[0], inputs[1].flatten(2), _fold(plan, torch.float32), backend="reference")
    if found.shape != expected.shape:
        return f"its forward computes something else: {tuple(expected.shape)} from {tuple(inputs[0].shape)}"
    _, relative = replace._error(found, expected)
    if not relative <= WIRING_BOUND:
        return f"its forward computes something else (off by {relative:.1e} on random weights)"
    return ""


def _errors(module: nn.Module, plan: _Plan, example: tuple[Tensor, ...] | None) -> tuple[float, float, float] | str:
    weight = plan.pixel_in.conv.weight
    if example is None or len(example) != 2 or not _takes(plan.convolved(), *example):
        example = _random_inputs(plan, torch.Generator().manual_seed(1))
    feats, regions = (tensor.detach().to(weight.device, weight.dtype) for tensor in example)
    found = ocr_head(feats, regions.flatten(2), _fold(plan, weight.dtype)).double()
    eager = module.forward(feats, regions).double()
    exact = module.double().forward(feats.double(), regions.double())
    error, eager_error = ((result - exact).abs().max().item() for result in (found, eager))
    largest = exact.abs().max().item()
    bound = 4 * eager_error + 4 * torch.finfo(weight.dtype).eps * largest
    if not error <= bound:
        return f"its error would be {error:.1e}, more than {bound:.1e}"
    return error, eager_error, error / (largest or 1.0)


def _random_inputs(plan: _Plan, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pixels and regions of the right channels and dimensions."""
    weight, object_weight = plan.pixel_in.conv.weight, plan.object_in.conv.weight
    feats = torch.randn((2, weight.shape[1], *(5, 3, 2)[: weight.dim() - 2]), generator=generator)
    regions = torch.randn((2, weight.shape[1], *(4, 1, 1)[: object_weight.dim() - 2]), generator=generator)
    return feats, regions
