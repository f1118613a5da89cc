"""What is measured: shapes named after real networks, subjects, and the least that each must move and compute.

One `Workload` holds the inputs and the variants of a subject in a case; correctness, speed and memory are runs of it.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import ocr_kernels
from ocr_kernels import available_backends, modules, reference, replace_ocr_modules
from ocr_kernels.attention import reference as attention_reference
from ocr_kernels.core.backends import Backend
from ocr_kernels.gather import reference as gather_reference

Pass = Literal["forward", "backward", "forward+backward"]
PASSES: tuple[Pass, ...] = ("forward", "backward", "forward+backward")

EAGER, COMPILED, AUTOTUNED, SDPA = "eager", "compile", "max-autotune", "sdpa"
CHECKPOINTED = "checkpoint"  # eager, of which a training step keeps nothing and computes it again
TOGETHER = "ours+compile"
BACKBONE = "backbone"  # eager's, of which a network's time is the rest the head's
PEERS = (EAGER, COMPILED, AUTOTUNED, CHECKPOINTED, SDPA)
SDPA_BACKENDS: dict[str, Any] = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

Function = Callable[..., Any]  # of tensors; it returns a tensor or a list of them
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    name: str
    batch: int
    channels: int
    key_channels: int
    regions: int
    height: int
    width: int
    in_channels: int = 720  # of the backbone, which only the whole head sees; HRNet-W48's

    @property
    def pixels(self) -> int:
        return self.height * self.width

    def quick(self) -> Case:
        """One image with a sixteenth of the pixels."""
        return replace(self, batch=1, height=max(1, self.height // 4), width=max(1, self.width // 4))


NAMED = (
    Case("cityscapes-inference", 1, 512, 256, 19, 256, 512),
    Case("cityscapes-half", 1, 512, 256, 19, 128, 256),
    Case("cityscapes-training", 2, 512, 256, 19, 128, 256),
    Case("ade20k-inference", 1, 512, 256, 150, 128, 256),
    Case("ade20k", 4, 512, 256, 150, 130, 130),
    Case("coco-stuff", 4, 512, 256, 171, 130, 130),
    Case("pascal-context", 4, 512, 256, 59, 130, 130),
    Case("lip", 8, 512, 256, 20, 119, 119),
    Case("mmseg-r101-d8", 4, 512, 256, 19, 64, 128, in_channels=2048),
    Case("interactive", 8, 64, 32, 2, 96, 96, in_channels=270),
    Case("interactive-w18", 8, 128, 64, 2, 96, 96, in_channels=270),
    Case("4k-frame", 1, 512, 256, 19, 540, 960),
    Case("long-tail", 1, 512, 256, 1203, 128, 128),
)
SWEEPS = {  # cost against N and against K
    "pixels": tuple(Case(f"pixels-{2 * s * s}", 1, 512, 256, 19, s, 2 * s) for s in (32, 64, 128, 256, 512)),
    "regions": tuple(Case(f"regions-{k}", 1, 512, 256, k, 128, 128) for k in (2, 8, 19, 32, 64, 128, 256, 512, 1024)),
}
CASES = {case.name: case for case in (*NAMED, *SWEEPS["pixels"], *SWEEPS["regions"])}
QUICK_CASES = ("cityscapes-half", "ade20k")
QUICK_SUBJECTS = ("gather", "attention", "folded-module")
QUICK_PEERS = (EAGER, SDPA)  # a compiler takes minutes on a CPU
OPS = ("gather", "attention")  # the other subjects are modules
TINY = Case("tiny", 1, 16, 8, 4, 4, 4)  # for what a call costs the host


def sweep_of(name: str) -> str | None:
    return next((sweep for sweep, cases in SWEEPS.items() if name in (case.name for case in cases)), None)


@dataclass(frozen=True)
class Work:
    """The least that a pass over the data moves and computes."""

    numbers: int
    multiply_adds: int


@dataclass(frozen=True)
class Subject:
    """Something to measure: its shapes and its work as functions of the case, in plain PyTorch and as ours.

    A pass is one or more passes over the data, each of which needs the whole result of the one before.
    """

    name: str
    input_shapes: Callable[[Case], list[Shape]]
    output_shapes: Callable[[Case], list[Shape]]
    forward: Callable[[Case], list[Work]]
    backward_products: Callable[[Case], int]
    plain: Callable[[Case], Function]
    ours: Callable[[Case, Backend], Function]
    passes: tuple[Pass, ...] = PASSES
    cases: tuple[str, ...] | None = None  # None: all
    finish: Callable[[nn.Module], object] = lambda module: None  # what is done to ours once it has its weights
    parts: Callable[[Any], dict[str, Function]] = lambda eager: {}  # of eager, timed beside the variants
    automatic: bool = False  # ours chooses its backends itself, since not all have one for every op

    def work(self, case: Case, what: Pass) -> list[Work]:
        inputs, outputs = (sum(map(prod, shapes(case))) for shapes in (self.input_shapes, self.output_shapes))
        backward = [Work(2 * inputs + outputs, self.backward_products(case))]  # every input and gradient once
        return {"forward": [], "backward": backward, "forward+backward": backward}[what] + (
            [] if what == "backward" else self.forward(case)
        )

    def bytes(self, case: Case, what: Pass, dtype: torch.dtype) -> int:
        return sum(work.numbers for work in self.work(case, what)) * dtype.itemsize

    def flops(self, case: Case, what: Pass) -> int:
        return 2 * sum(work.multiply_adds for work in self.work(case, what))


def _pixels(case: Case, channels: int) -> Shape:
    return (case.batch, channels, case.height, case.width)


def _gather_work(case: Case) -> Work:
    n = case.batch * case.pixels
    numbers = n * (case.channels + case.regions) + case.batch * case.channels * case.regions
    return Work(numbers, n * case.regions * case.channels)


def _attention_work(case: Case) -> Work:
    n = case.batch * case.pixels
    numbers = 2 * n * case.key_channels + 2 * case.batch * case.key_channels * case.regions
    return Work(numbers, 2 * n * case.regions * case.key_channels)


def block_work(case: Case) -> list[Work]:
    """The gather needs all pixels before the rest can begin; the rest reads x and writes z."""
    n, c, d, k = case.batch * case.pixels, case.channels, case.key_channels, case.regions
    # what follows the attention has rank K for each pixel: W_up sum_k w_k v_k = sum_k w_k (W_up v_k)
    per_pixel = c * d + d * d + k * d + min(k * c, k * d + d * c) + 2 * c * c
    per_region = 3 * c * d + d * d
    return [_gather_work(case), Work(2 * n * c, n * per_pixel + case.batch * k * per_region)]


def _head_work(case: Case) -> list[Work]:
    """Convolutions that end with the gather, then what reads x and writes logits."""
    n, c, k, wide = case.batch * case.pixels, case.channels, case.regions, case.in_channels
    gather, block = block_work(case)
    convolutions = n * (9 * wide * c + wide * wide + wide * k)
    return [
        Work(n * (wide + c + k), convolutions + gather.multiply_adds),
        Work(n * (c + k), block.multiply_adds + n * c * k),
    ]


def _products(works: Sequence[Work]) -> int:
    return sum(work.multiply_adds for work in works)


class Block(nn.Module):
    """SpatialOCR with the gather before it: pixels and logits to augmented pixels."""

    def __init__(self, library: ModuleType, case: Case) -> None:
        super().__init__()
        self.gather = library.SpatialGather(case.regions)
        self.ocr = library.SpatialOCR(
            case.channels, case.key_channels, case.channels, dropout=0.0, norm_layer=batch_norm
        )

    def forward(self, feats: Tensor, logits: Tensor) -> Tensor:
        out: Tensor = self.ocr(feats, self.gather(feats, logits))
        return out


class Head(nn.Module):
    """The whole head: a backbone's features to auxiliary logits and logits."""

    def __init__(self, library: ModuleType, case: Case) -> None:
        super().__init__()
        self.head = library.OCRHead(
            case.in_channels, case.regions, case.channels, case.key_channels, dropout=0.0, norm_layer=batch_norm
        )

    def forward(self, feats: Tensor) -> list[Tensor]:
        out: list[Tensor] = self.head(feats)
        return out


class Checkpointed(nn.Module):
    """A module whose training step keeps its inputs alone, and runs its forward pass again."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Any:
        return checkpoint(self.module, *inputs, use_reentrant=False)


class Network(nn.Module):
    """An HRNet of timm's with an OCR head: images `[B, 3, 4H, 4W]` to auxiliary logits and logits `[B, K, H, W]`."""

    def __init__(self, library: ModuleType, backbone: str, case: Case) -> None:
        super().__init__()
        branches = {"features_only": True, "feature_location": "", "out_indices": (1, 2, 3, 4)}
        self.backbone = importlib.import_module("timm").create_model(backbone, **branches)
        in_channels = sum(self.backbone.feature_info.channels())
        self.head = library.OCRHead(
            in_channels, case.regions, case.channels, case.key_channels, dropout=0.0, norm_layer=batch_norm
        )

    def features(self, image: Tensor) -> Tensor:
        """The four branches in the size of the largest, one after another."""
        first, *others = self.backbone(image)
        scaled = [F.interpolate(t, first.shape[2:], mode="bilinear", align_corners=True) for t in others]
        return torch.cat((first, *scaled), 1)

    def forward(self, image: Tensor) -> list[Tensor]:
        out: list[Tensor] = self.head(self.features(image))
        return out


@functools.cache
def _network_work(backbone: str, case: Case) -> list[Work]:
    """The backbone's convolutions, as PyTorch counts them, before what the head does."""
    with torch.device("meta"):
        network, image = Network(reference, backbone, case), torch.empty(_image(case))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        features = network.features(image)
    before, after = _head_work(replace(case, in_channels=features.shape[1]))
    return [
        Work(image.numel() + before.numbers - features.numel(), counter.get_total_flops() // 2 + before.multiply_adds),
        after,
    ]


def _image(case: Case) -> Shape:
    return case.batch, 3, 4 * case.height, 4 * case.width


# Momentum 0 keeps the running statistics as they are, however often each variant is called.
batch_norm = functools.partial(nn.BatchNorm2d, momentum=0.0)


def scaled_dot_product(query: Tensor, key: Tensor, value: Tensor, *, backend: Any) -> Tensor:
    """The attention by `scaled_dot_product_attention`, layout conversions there and back included.

    It wants `[B, 1, N, D]` with the channels next to each other, which is how channels-last pixels lie already.
    """
    q, k, v = (t.flatten(2).transpose(1, 2).unsqueeze(1).contiguous() for t in (query, key, value))
    with sdpa_kernel(backend):
        context = F.scaled_dot_product_attention(q, k, v)
    channels_last = query.is_contiguous(memory_format=torch.channels_last)
    out: Tensor = context.squeeze(1).transpose(1, 2).unflatten(2, query.shape[2:])
    if not channels_last:
        out = out.contiguous()
    return out


def _fold(module: nn.Module) -> None:
    report = replace_ocr_modules(module)
    if not any("block" in (row.computations or ()) for row in report.replaced):  # it would be timed all the same
        raise RuntimeError(f"not folded:\n{report}")


def _inference(subject: Subject, network: Callable[..., nn.Module]) -> Subject:
    """The same in inference alone, with the head folded."""
    return replace(
        subject,
        name=f"folded-{subject.name}",
        ours=lambda c, _: network(modules, c),
        passes=("forward",),
        finish=_fold,
        automatic=True,
    )


def _network(backbone: str) -> Subject:
    return Subject(
        backbone,
        lambda c: [_image(c)],
        lambda c: [_pixels(c, c.regions)] * 2,
        lambda c: _network_work(backbone, c),
        lambda c: 2 * _products(_network_work(backbone, c)),
        lambda c: Network(reference, backbone, c),
        lambda c, _: Network(modules, backbone, c),
        passes=("forward",),
        cases=("cityscapes-inference", "cityscapes-half"),
        finish=_fold,
        parts=lambda eager: {BACKBONE: eager.features},
        automatic=True,
    )


_LAYERS = (
    Subject(
        "gather",
        lambda c: [_pixels(c, c.channels), _pixels(c, c.regions)],
        lambda c: [(c.batch, c.channels, c.regions)],
        lambda c: [_gather_work(c)],
        lambda c: 2 * _gather_work(c).multiply_adds,  # dX and dP
        lambda c: gather_reference.spatial_gather,
        lambda c, backend: functools.partial(ocr_kernels.spatial_gather, backend=backend),
    ),
    Subject(
        "attention",
        lambda c: [_pixels(c, c.key_channels), *[(c.batch, c.key_channels, c.regions)] * 2],
        lambda c: [_pixels(c, c.key_channels)],
        lambda c: [_attention_work(c)],
        lambda c: 5 * _attention_work(c).multiply_adds // 2,  # the scores again, dV, dw, dQ, dK
        lambda c: attention_reference.pixel_region_attention,
        lambda c, backend: functools.partial(ocr_kernels.pixel_region_attention, backend=backend),
    ),
    Subject(
        "module",
        lambda c: [_pixels(c, c.channels), _pixels(c, c.regions)],
        lambda c: [_pixels(c, c.channels)],
        block_work,
        lambda c: 2 * _products(block_work(c)),
        lambda c: Block(reference, c),
        lambda c, _: Block(modules, c),
        automatic=True,
    ),
    Subject(
        "head",
        lambda c: [_pixels(c, c.in_channels)],
        lambda c: [_pixels(c, c.regions)] * 2,
        _head_work,
        lambda c: 2 * _products(_head_work(c)),
        lambda c: Head(reference, c),
        lambda c, _: Head(modules, c),
        automatic=True,
    ),
)
NETWORKS = ("hrnet_w18", "hrnet_w48")  # of timm, with a folded head
_FOLDED = _inference(_LAYERS[2], Block), _inference(_LAYERS[3], Head)
SUBJECTS = {subject.name: subject for subject in (*_LAYERS, *_FOLDED, *map(_network, NETWORKS))}


def our_backends(device: torch.device) -> list[Backend]:
    """The backends to time, the automatic choice first: kernels that run on `device`, or the reference without any."""
    usable = [name for name, state in available_backends(device.type).items() if state is True and name != "reference"]
    if device.type == "cpu":
        usable = [name for name in usable if name != "triton"]
    return [*usable] or ["reference"]


@dataclass(frozen=True)
class Workload:
    """A subject in a case: the inputs, the incoming gradients and the variants, all with the same weights."""

    subject: Subject
    case: Case
    dtype: torch.dtype
    device: torch.device
    memory_format: str = "contiguous"
    peers: tuple[str, ...] = (*PEERS, TOGETHER)

    def inputs(self) -> tuple[list[Tensor], list[Tensor]]:
        """The inputs, which require gradients, and the gradients of the outputs; the same at every call."""
        generator = torch.Generator(self.device).manual_seed(0)

        def draw(shape: Shape) -> Tensor:
            tensor = torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)
            return self._lay_out(tensor) if len(shape) == 4 else tensor

        inputs = [draw(shape).requires_grad_() for shape in self.subject.input_shapes(self.case)]
        return inputs, [draw(shape) for shape in self.subject.output_shapes(self.case)]

    def eager(self) -> Function:
        return self._ready(self.subject.plain(self.case))

    def backends(self) -> list[Backend]:
        """The names of ours among the variants; where it chooses by itself, the one of the two ops."""
        return our_backends(self.device)[: 1 if self.subject.automatic else None]

    def variants(self) -> dict[str, Function]:
        """The peers, then ours. SDPA's backends are there where PyTorch accepts the input."""
        functions: dict[str, Function] = {}
        if EAGER in self.peers:
            functions[EAGER] = self.eager()
        if COMPILED in self.peers:
            functions[COMPILED] = _compiled(self.eager())
        if AUTOTUNED in self.peers and self.device.type == "cuda":
            # Without CUDA graphs: they would copy the inputs, and what they save, launches, is not timed here.
            functions[AUTOTUNED] = _compiled(self.eager(), mode="max-autotune-no-cudagraphs")
        if CHECKPOINTED in self.peers and self.subject.name not in OPS and "backward" in self.subject.passes:
            functions[CHECKPOINTED] = Checkpointed(self.eager())  # type: ignore[arg-type]
        if SDPA in self.peers and self.subject.name == "attention":
            for name, kernel in SDPA_BACKENDS.items():
                if self._accepts(kernel):
                    functions[name] = functools.partial(scaled_dot_product, backend=kernel)
        for backend in self.backends():
            functions[backend] = self.ours(backend)
        if TOGETHER in self.peers and self.subject.automatic:
            functions[TOGETHER] = _compiled(self.ours(self.backends()[0]))
        return functions

    def ours(self, backend: Backend) -> Function:
        function = self._ready(self.subject.ours(self.case, backend))
        self.subject.finish(function)  # type: ignore[arg-type]
        return function

    def _accepts(self, backend: Any) -> bool:
        """Whether PyTorch runs this kernel of its attention, forward and backward, at these sizes."""
        small = replace(self.case, batch=1, height=8, width=8)
        inputs, (grad,) = replace(self, case=small).inputs()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # one for every reason why it does not
                torch.autograd.grad(scaled_dot_product(*inputs, backend=backend), inputs, grad)
        except RuntimeError:
            return False
        return True

    def _lay_out(self, tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=MEMORY_FORMATS[self.memory_format])

    def _ready(self, function: Function) -> Function:
        """A module with the weights that all variants have, where and as the inputs are."""
        if not isinstance(function, nn.Module):
            return function
        function.to(self.device, self.dtype)
        generator = torch.Generator(self.device).manual_seed(0)
        with torch.no_grad():
            for name, parameter in function.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
                elif name.endswith("bias"):
                    parameter.zero_()
                if parameter.dim() == 4:
                    parameter.data = self._lay_out(parameter)
        return function


def _compiled(function: Function, **options: Any) -> Function:
    if isinstance(function, nn.Module):
        function.compile(dynamic=False, **options)
        return function
    compiled: Function = torch.compile(function, dynamic=False, **options)
    return compiled
