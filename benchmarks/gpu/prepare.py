"""What a round does before it launches anything: compiled libraries, Triton's kernels, facts about the machine."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

from benchmarks.gpu.journal import Failed, work
from benchmarks.gpu.runner import LIBRARY, ROOT


def build() -> list[str]:
    """The compiled libraries, for the GPUs of TORCH_CUDA_ARCH_LIST; their names."""
    folder = LIBRARY.parent
    for path in folder.glob("*.so"):  # an earlier round's
        path.unlink()
    command = [sys.executable, "setup.py", "build_ext", f"--build-lib={folder.parent}"]
    command.append(f"--build-temp={folder.parent / 'objects'}")
    status = subprocess.run(command, cwd=ROOT, env={**os.environ, "OCR_KERNELS_BUILD": "cuda"}).returncode
    names = sorted(path.name for path in folder.glob("*.so"))
    if status != 0:
        raise Failed(f"exit status {status}", names)
    return names


def machine(commit: str | None) -> dict[str, Any]:
    from ocr_kernels.bench import measure

    return measure.record(commit)


def kernels() -> dict[str, Callable[[], object]]:
    """Triton's kernels, into its cache: those of the smoke step, then those that are timed first."""
    import torch

    from benchmarks.gpu import smoke, times
    from ocr_kernels.bench.cases import NAMED, OPS
    from ocr_kernels.testing import LAYOUTS

    device = torch.device("cuda")
    runs: dict[str, Callable[[], object]] = dict(smoke.launches(device, ("triton",)))
    for job in times.first(device):
        if job.workload.subject.name in OPS:  # a module is folded by trying it out
            runs[str(job)] = partial(times.launch, job)
    for case, layout in product(NAMED, LAYOUTS[:2]):
        size = smoke.Size(torch.bfloat16, case.regions, case.batch, (case.height, case.width), layout)
        for launch in (smoke.launch_block, smoke.launch_training):
            name = f"{launch.__name__.removeprefix('launch_')} {case.name} {layout}"
            runs[name] = partial(launch, size, device, case.channels, case.key_channels)
    return {name: partial(compiled, run) for name, run in runs.items()}


def compiled(run: Callable[[], object]) -> None:
    with compile_only():
        run()


@contextmanager
def compile_only() -> Iterator[None]:
    """Inside, Triton's kernels are compiled and loaded, and nothing is launched."""
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def load(kernel: Any, *args: Any, **options: Any) -> None:
        launch(kernel, *args, **{**options, "warmup": True}).run  # noqa: B018  # its launcher is compiled as well

    with mock.patch.object(JITFunction, "run", load):
        yield


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("libraries", "kernels", "machine"))
    parser.add_argument("--commit")
    args = parser.parse_args()
    if args.what == "kernels":
        work(kernels())
    else:
        work({args.what: build if args.what == "libraries" else partial(machine, args.commit)})
