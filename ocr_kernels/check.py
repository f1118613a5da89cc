"""The command `ocr-kernels check`: what replacing the OCR modules of a user's own model brings on this machine."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ocr_kernels.bench.timing import Timing, duration
from ocr_kernels.models.replace import replace_ocr_modules
from ocr_kernels.testing import saved_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    made = "a function that returns the model, (model, x, y) or (model, (x, y)) with its inputs x and y"
    parser.add_argument("model", metavar="FILE.py:FUNCTION", help=made)
    parser.add_argument(
        "--input", type=shape, action="append", default=[], metavar="1x3x512x1024", help="of an input, random numbers"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of model and inputs (default: %(default)s)")
    parser.add_argument("--device", help="such as cuda:0 (default: cuda where there is one)")
    parser.add_argument("--seconds", type=duration, default=5.0, metavar="S", help="for each comparison of times")


def main(args: argparse.Namespace) -> int:
    """0 where something was replaced, 1 where nothing was, 2 where the model does not run."""
    try:
        return _check(args)
    except BrokenPipeError:
        raise
    except Exception as error:  # a user's code raises anything
        print(f"ocr-kernels check: {_described(error)}", file=sys.stderr)
        return 2


def _check(args: argparse.Namespace) -> int:
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, inputs = _load(args.model, args.input, device, DTYPES[args.dtype])
    with torch.no_grad():
        model(*inputs)
    after = copy.deepcopy(model)
    report = replace_ocr_modules(after, example_inputs=tuple(inputs))
    print(report)
    if not report:
        return 1
    print()
    for row in _rows({"before": model, "after": after}, inputs, args.seconds):
        print("{:30}{:>16}{:>16}{:>16}".format(*row).rstrip())
    print("± interquartile range; ~ no difference beyond it")
    return 0


def _described(error: Exception) -> str:
    """Its type and the first line of its message, if it has one."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def shape(text: str) -> list[int]:
    sizes = [int(size) for size in text.split("x")]  # argparse tells of a ValueError
    if not sizes or min(sizes) < 1:
        raise ValueError
    return sizes


def _load(
    place: str, shapes: Sequence[Sequence[int]], device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, list[Any]]:
    """The model that a function of a file makes, and inputs: its own, or random ones of the shapes."""
    file, colon, function = place.rpartition(":")
    path = Path(file)
    if not colon or not path.is_file():
        raise ValueError(f"{place} must be FILE.py:FUNCTION, with a file that is there")
    specification = importlib.util.spec_from_file_location(path.stem, path)
    if specification is None or specification.loader is None:
        raise ValueError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(specification)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.parent.resolve()))
    specification.loader.exec_module(module)
    made = getattr(module, function)()
    model, *inputs = made if isinstance(made, tuple) and made else (made,)
    if len(inputs) == 1 and isinstance(inputs[0], tuple):
        inputs = list(inputs[0])
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function} must return a torch.nn.Module, or it and inputs, not {type(model).__name__}")
    if shapes:
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    if not inputs:
        raise ValueError(f"{function} returns no inputs: give their shapes, --input 1x3x512x1024")
    moved = [x.to(device, dtype if x.is_floating_point() else None) if isinstance(x, Tensor) else x for x in inputs]
    return model.to(device, dtype), moved


def _rows(models: dict[str, nn.Module], inputs: Sequence[Any], seconds: float) -> Iterator[Sequence[str]]:
    """A table's lines: times of inference and of a training step, and what the latter keeps."""
    yield "", *models, "times less"

    def infer(model: nn.Module) -> None:
        with torch.inference_mode():
            model(*inputs)

    def train(model: nn.Module) -> None:
        outputs = list(_outputs(model, inputs))
        if not outputs:
            raise ValueError("no output has a derivative")
        torch.stack([out.float().mean() for out in outputs]).sum().backward()
        model.zero_grad()

    for model in models.values():
        model.eval()
    yield _compared("inference [ms]", models, infer, seconds)
    for model in models.values():
        model.train()
    try:
        yield _compared("forward and backward [ms]", models, train, seconds)
    except Exception as error:  # a batch norm of one value, or a forward that wants targets
        yield "forward and backward", _described(error), "", ""
        return
    kept = []
    for model in models.values():
        there = [*model.parameters(), *model.buffers(), *(x for x in inputs if isinstance(x, Tensor))]
        kept.append(saved_bytes(model, *inputs, exclude=there) / 2**20)
    yield "saved for backward [MiB]", *(f"{size:.1f}" for size in kept), f"{kept[0] / max(kept[1], 1e-9):.2f}"


def _outputs(model: nn.Module, inputs: Sequence[Any]) -> Iterator[Tensor]:
    """The tensors with a derivative in what the model returns."""
    todo: list[Any] = [model(*inputs)]
    while todo:
        out = todo.pop()
        if isinstance(out, Tensor):
            if out.requires_grad:
                yield out
        elif isinstance(out, (list, tuple)):
            todo += out
        elif isinstance(out, dict):
            todo += out.values()
        elif dataclasses.is_dataclass(out):
            todo += [getattr(out, field.name, None) for field in dataclasses.fields(out)]


def _compared(
    name: str, models: dict[str, nn.Module], call: Callable[[nn.Module], None], seconds: float
) -> Sequence[str]:
    """Median and interquartile range of calls that take turns, so that a change of the machine's speed meets both."""
    times: dict[str, list[float]] = {kind: [] for kind in models}
    end = 0.0
    while len(times["after"]) < 6 or time.perf_counter() < end:
        for kind, model in models.items():
            start = time.perf_counter()
            call(model)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[kind].append(time.perf_counter() - start)
        end = end or time.perf_counter() + seconds  # after the first round, which warms up
    before, after = (Timing.of(times[kind][1:]) for kind in ("before", "after"))
    sign = "" if before.differs(after) else "~"
    return name, str(before), str(after), f"{sign}{before.median / after.median:.2f}"
