"""What this machine can run, and why not the rest."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import ocr_kernels
from ocr_kernels.block.registration import implemented
from ocr_kernels.core import libraries, memory, tuned
from ocr_kernels.core.backends import BACKENDS, Backend, available_backends, resolve_backend

ENVIRONMENT = (
    "OCR_KERNELS_BACKEND",
    "OCR_KERNELS_ISA",
    memory.VARIABLE,
    "OCR_KERNELS_LIBRARY",
    tuned.VARIABLE,
    "TRITON_INTERPRET",
)

SPEED = (  # of the library for GPUs: by the bytes that it moves, see docs/design.md
    "not measured; expect the attention's backward pass of up to 64 regions to be slower than PyTorch's own"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> int:
    report = collect()
    print(json.dumps(report, indent=2) if args.json else _format(report))
    return 0


def collect() -> dict[str, Any]:
    """Backends, those chosen on each device, the compiled libraries, versions, devices, environment; all of it JSON."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else range(0)
    return {
        "backends": available_backends(),
        "chosen": {
            kind + suffix: _chosen(kind, backends)
            for kind in ("cpu", "cuda")[: 2 if gpus else 1]
            for suffix, backends in (("", BACKENDS), (", ocr_block", implemented(kind)))
        },
        "library": {kind: _library(kind) for kind in ("cpu", "cuda")},
        "versions": {
            "ocr_kernels": ocr_kernels.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "cuda": torch.version.cuda or torch.version.hip,
            "driver": _driver() if gpus else None,
        },
        "devices": [_cpu(), *(_gpu(index) for index in gpus)],
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
    }


def _chosen(device_type: str, implemented: Sequence[Backend]) -> str:
    try:
        return resolve_backend(torch.device(device_type), None, implemented)
    except (ValueError, RuntimeError) as error:  # OCR_KERNELS_BACKEND names one that cannot run
        return f"none: {error}"


def _library(device_type: str) -> dict[str, str] | str:
    """What is known of a compiled library, and why it is not in use."""
    problem, file = libraries.problem(device_type), libraries.library(device_type)
    if problem is not None and (device_type == "cpu" or not file.is_file()):
        return problem
    facts = {"file": str(file), **libraries.facts(device_type)}
    if device_type == "cuda":
        facts["speed"] = SPEED
    return {**facts, **({"not in use": problem} if problem else {})}


def _version(package: str) -> str | None:
    try:
        return str(importlib.import_module(package).__version__)
    except Exception:  # a broken installation raises anything; `backends` tells what
        return None


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu() -> dict[str, Any]:
    try:
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    except OSError:  # not Linux
        models = []
    name = models[0].split(":", 1)[1].strip() if models else platform.processor() or platform.machine()
    return {"device": "cpu", "name": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "device": f"cuda:{index}",
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "tuned_tiles": tuned.state(tuned.file(properties.name), properties.name),
        "l2_cache": properties.L2_cache_size,
        # what one block may have after asking for it; AMD's devices have one limit
        "shared_memory_per_block": getattr(
            properties, "shared_memory_per_block_optin", properties.shared_memory_per_block
        ),
    }


def _format(report: dict[str, Any]) -> str:
    backends = {name: "available" if state is True else state for name, state in report["backends"].items()}
    versions = {name: version or "none" for name, version in report["versions"].items()}
    environment = {name: "not set" if value is None else value for name, value in report["environment"].items()}
    devices = {device["device"]: _describe(device) for device in report["devices"]}
    chosen = {f"on {kind}": backend for kind, backend in report["chosen"].items()}
    library: dict[str, str] = {}
    for kind, found in report["library"].items():
        facts = {kind: found} if isinstance(found, str) else {f"{kind}, {name}": fact for name, fact in found.items()}
        library |= {name.replace("_", " "): fact for name, fact in facts.items()}
    sections = {
        "Backends": backends,
        "Chosen backend": chosen,
        "Compiled library": library,
        "Versions": versions,
        "Devices": devices,
        "Environment": environment,
    }
    width = max(len(name) for rows in sections.values() for name in rows) + 2
    blocks = ("\n".join([title, *(f"  {k:{width}}{v}" for k, v in rows.items())]) for title, rows in sections.items())
    return "\n\n".join(blocks)


def _describe(device: dict[str, Any]) -> str:
    if device["device"] == "cpu":
        return f"{device['name']}, {device['cores']} cores, {device['threads']} threads"
    return (
        f"{device['name']}, capability {device['capability']}, {device['memory'] / 2**30:.0f} GiB, "
        f"{device['multiprocessors']} multiprocessors, {device['l2_cache'] / 2**20:.0f} MiB L2, "
        f"{device['shared_memory_per_block'] / 2**10:.0f} KiB shared memory per block, "
        f"tuned tiles: {device['tuned_tiles']}"
    )
