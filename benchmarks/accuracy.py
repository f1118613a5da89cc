"""Errors of the ops against float64, beside those of the plain formulas in the same dtypes.

    python -m benchmarks.accuracy [--backends reference native triton] [--json FILE]

As in trained networks, one pixel of each region stands out by a peak of 0, 8, 20 or 1e4 in the logits (for the
attention one region in the scores). Each error is relative in L2, the root mean square of some seeds; where a gradient
is exactly zero, as those of a softmax with one weight of 1 are, the error itself is given.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ocr_kernels import available_backends, pixel_region_attention, spatial_gather
from ocr_kernels.attention import reference as attention
from ocr_kernels.bench import measure
from ocr_kernels.core.backends import Backend
from ocr_kernels.gather import reference as gather
from ocr_kernels.testing import attention_inputs, gather_inputs

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PEAKS = (0.0, 8.0, 20.0, 1e4)
SIZES: dict[str, Any] = {"batch": 1, "channels": 64, "regions": 19, "spatial": (16, 16)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=(__doc__ or "").split("\n")[0])
    runnable = [name for name, state in available_backends("cpu").items() if state is True]
    parser.add_argument("--backends", nargs="+", default=runnable)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--commit", help="the commit to record; default: what git says")
    args = parser.parse_args(argv)
    rows = []
    for row in measured(args.backends, args.seeds):
        rows.append(row)
        errors = "  ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())
        print(f"{row['op']:10} {row['dtypes']:18} {row['peak']:7g}  {row['tensor']:9} {errors}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": measure.record(args.commit), "rows": rows}, indent=1) + "\n")
    print("\n" + "\n".join(table(rows, args.backends)))
    return 0


def measured(backends: Sequence[Backend], seeds: int) -> Iterator[dict[str, Any]]:
    draw: Callable[..., tuple[Tensor, ...]]
    names: tuple[str, ...]
    for dtype, logits_dtype, peak in itertools.product(DTYPES, DTYPES, PEAKS):
        draw = partial(gather_inputs, dtype=dtype, logits_dtype=logits_dtype, peak=peak, requires_grad=True, **SIZES)
        calls: dict[str, Any] = {name: partial(spatial_gather, backend=name) for name in backends}
        names = ("feats", "logits")
        yield from case("gather", (dtype, logits_dtype), peak, names, gather.spatial_gather, calls, draw, seeds)
    for dtype, peak in itertools.product(DTYPES, PEAKS):
        draw = partial(attention_inputs, dtype=dtype, peak=peak, requires_grad=True, **SIZES)
        calls = {name: partial(pixel_region_attention, backend=name) for name in backends}
        names = ("query", "key", "value")
        yield from case("attention", (dtype,), peak, names, attention.pixel_region_attention, calls, draw, seeds)


def case(
    op: str,
    dtypes: Sequence[torch.dtype],
    peak: float,
    names: Sequence[str],
    definition: Callable[..., Tensor],
    calls: Mapping[str, Callable[..., Tensor]],
    draw: Callable[..., tuple[Tensor, ...]],
    seeds: int,
) -> Iterator[dict[str, Any]]:
    """A row for the output and for each gradient."""
    tensors = ("output", *(f"d{name}" for name in names))
    squares = {name: [0.0] * len(tensors) for name in ("eager", *calls)}
    for seed in range(seeds):
        inputs = draw(seed=seed)
        shape = definition(*inputs).shape
        grad = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtypes[0])
        exact = differentiated(definition, [t.double() for t in inputs], grad.double())
        for name, call in {"eager": definition, **calls}.items():
            for i, (result, right) in enumerate(zip(differentiated(call, inputs, grad), exact, strict=True)):
                error = float((result.double() - right).norm()) / (float(right.norm()) or 1.0)
                squares[name][i] += error**2 / seeds
    for i, tensor in enumerate(tensors):
        errors = {name: square[i] ** 0.5 for name, square in squares.items()}
        yield {
            "op": op,
            "dtypes": "/".join(str(dtype).removeprefix("torch.") for dtype in dtypes),
            "peak": peak,
            "tensor": tensor,
            "errors": errors,
        }


def differentiated(call: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = call(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def table(rows: Sequence[dict[str, Any]], backends: Sequence[Backend]) -> Iterator[str]:
    """The largest error relative to eager's own, beyond rounding, over all peaks and dtypes of the other input."""
    yield f"| | feats or query | {' | '.join(backends)} |"
    yield "|---|---|" + "---|" * len(backends)
    for op, tensor in dict.fromkeys((row["op"], row["tensor"]) for row in rows):
        for dtype in ("float32", "bfloat16", "float16"):
            chosen = [r for r in rows if (r["op"], r["tensor"]) == (op, tensor) and r["dtypes"].split("/")[0] == dtype]
            ratios = (max(ratio(row, name) for row in chosen) for name in backends)
            yield f"| {op}, {tensor} | {dtype} | {' | '.join(f'{r:.2f}' for r in ratios)} |"


def ratio(row: dict[str, Any], backend: str) -> float:
    """How many times eager's error is what is left of a backend's after the rounding of its result."""
    dtypes = row["dtypes"].split("/")
    eps = torch.finfo(getattr(torch, dtypes[-1 if row["tensor"] == "dlogits" else 0])).eps
    left = max(0.0, row["errors"][backend] - eps / 2)
    if not left:
        return 0.0
    eager = row["errors"]["eager"]
    return left / eager if eager else float("inf")


if __name__ == "__main__":
    sys.exit(main())
