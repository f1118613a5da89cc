"""Pixels divided over two and four processes on gloo, by groups and by DTensors, against one process with all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fresh import python, run
from torch import distributed

from ocr_kernels import GatherState, spatial_gather

pytestmark = [
    pytest.mark.skipif(not distributed.is_available(), reason="this PyTorch has no torch.distributed"),
    pytest.mark.xdist_group("sharded"),
]
WORKER = Path(__file__).with_name("sharded_worker.py")


def outputs(size: int, store: Path, *how: str) -> list[str]:
    """What each of the processes prints."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    commands = [[sys.executable, str(WORKER), str(rank), str(size), str(store), *how] for rank in range(size)]
    processes = [subprocess.Popen(each, stdout=subprocess.PIPE, text=True, env=environment) for each in commands]
    try:
        return [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize(
    ("size", "how"), [(2, "cases"), (4, "cases"), pytest.param(2, "compiled", marks=pytest.mark.slow)]
)
def test_as_one_process(size: int, how: str, tmp_path: Path) -> None:
    """Every case of the worker, in every process."""
    texts = outputs(size, tmp_path / "store", how)
    found = [dict(line.split(": ", 1) for line in text.splitlines()) for text in texts]
    assert len(found[0]) >= (1 if how == "compiled" else 20)
    for rank, results in enumerate(found):
        wrong = {name: result.replace("\\n", "\n") for name, result in results.items() if result != "right"}
        assert not wrong, f"process {rank}: " + "\n".join(f"{name}: {result}" for name, result in wrong.items())
        assert results.keys() == found[0].keys(), rank


@pytest.mark.parametrize("how", ["ends", "sleeps"])
def test_process_that_is_missing(how: str, tmp_path: Path) -> None:
    """The others get an error: at once, or when the group's timeout is over."""
    assert outputs(2, tmp_path / "store", how)[0] == f"{how}: RuntimeError\n"


def test_example() -> None:
    """In one process; what it trains is compared with several in the worker."""
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    result = python(str(WORKER.parent.parent / "examples" / "sharded_head.py"), OMP_NUM_THREADS="1", **place)
    assert result.returncode == 0, result.stderr
    losses = [float(loss) for loss in result.stdout.split(", ")]
    assert len(losses) == 5
    assert losses == sorted(losses, reverse=True)


def test_part_without_weights() -> None:
    """It changes nothing, however small the weights of the other are."""
    feats, logits = torch.randn(1, 3, 4), torch.randn(1, 2, 4) - 2000
    logits[:, :, 2:] = -torch.inf
    state = GatherState()
    for part in (slice(2, 4), slice(0, 2), slice(4, 4)):
        state.update(feats[..., part], logits[..., part])
    torch.testing.assert_close(state.result(), spatial_gather(feats, logits))


def test_importing_loads_no_dtensors() -> None:
    assert run("import sys, ocr_kernels; print('torch.distributed.tensor' in sys.modules)").strip() == "False"
