"""The block in two processes on gloo: SyncBatchNorm, DDP and FSDP2, against one process with the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from distributed_worker import CASES
from torch import distributed

pytestmark = [
    pytest.mark.skipif(not distributed.is_available(), reason="this PyTorch has no torch.distributed"),
    pytest.mark.xdist_group("distributed"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each process says of each case."""
    worker, file = Path(__file__).with_name("distributed_worker.py"), tmp_path_factory.mktemp("gloo") / "store"
    command = [sys.executable, str(worker)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    processes = [
        subprocess.Popen([*command, str(rank), str(file)], stdout=subprocess.PIPE, text=True, env=environment)
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [dict(line.split(": ", 1) for line in output.splitlines() if ": " in line) for output in outputs]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_as_one_process(results: list[dict[str, str]], case: str, rank: int) -> None:
    assert results[rank].get(case) == "right", results[rank].get(case, "the process ended").replace("\\n", "\n")
