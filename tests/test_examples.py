"""The examples run as their first lines say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fresh import python

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.slow
@pytest.mark.parametrize(("script", "file"), [("onnx_runtime", "head.onnx"), ("aot_inductor", "head.pt2")])
def test_script(script: str, file: str, tmp_path: Path) -> None:
    if script == "onnx_runtime":
        pytest.importorskip("onnxruntime", reason="ONNX Runtime runs what was exported")
        pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")
    result = python(str(EXAMPLES / f"{script}.py"), str(tmp_path / file))
    assert result.returncode == 0, result.stderr
    assert "logits differ from PyTorch's by" in result.stdout
    error = float(result.stdout.split("by ")[1].split(" at most")[0])
    assert error < 1e-5


@pytest.mark.parametrize("script", ["onnx_runtime", "aot_inductor"])
def test_script_says_how_it_is_called(script: str) -> None:
    if script == "onnx_runtime":
        pytest.importorskip("onnxruntime", reason="it is imported first")
    result = python(str(EXAMPLES / f"{script}.py"))
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"usage: python examples/{script}.py head.")


def test_large_image_says_which_sizes_it_takes() -> None:
    result = python(str(EXAMPLES / "large_image.py"), "510")
    expected = "the pixels along a side must be a multiple of 4, the network's stride, but are 510\n"
    assert (result.returncode, result.stderr) == (1, expected)


@pytest.mark.slow
def test_large_image() -> None:
    result = python(str(EXAMPLES / "large_image.py"), "1400", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.split("in one piece: ")[1].split()[0]) < 1e-4
    assert float(result.stdout.split("on its own: ")[1]) > 1e-3


def test_parity_file() -> None:
    result = python("-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLES / "test_parity.py"))
    assert result.returncode == 0, result.stdout
    assert "3 passed" in result.stdout


@pytest.mark.slow
def test_training() -> None:
    pytest.importorskip("sklearn", reason="ships the digits")
    result = python(str(EXAMPLES / "hrnet_training.py"), "8", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    assert "4 replaced, 0 left alone" in result.stdout
    before, after = (float(line.split("loss ")[1].split(",")[0]) for line in result.stdout.splitlines()[-2:])
    assert before < 2.8  # an untrained network's is about 1.4 log(11) = 3.4
    assert after == pytest.approx(before, rel=0.05)


@pytest.mark.slow
def test_notebook(capsys: pytest.CaptureFixture[str]) -> None:
    """Its cells run in order, without Jupyter; no output of theirs is stored."""
    for package in ("matplotlib", "sklearn", "PIL"):
        pytest.importorskip(package, reason="the notebook needs it")
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)
    names: dict[str, object] = {}
    with torch.random.fork_rng():
        for cell in cells:
            exec("".join(cell["source"]), names)
    assert "4 replaced, 0 left alone" in capsys.readouterr().out
    losses = names["losses"]
    assert losses[-1] < losses[0] / 2


@pytest.mark.slow
def test_video_memory() -> None:
    """A memory is steadier than single frames, and a state knows a hidden class better than a moving average does."""
    result = python(str(EXAMPLES / "video_memory.py"), "150", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    lines = [line.rsplit(maxsplit=4) for line in result.stdout.splitlines()[1:]]
    jitter, hidden = ({line[0]: float(line[column]) for line in lines} for column in (1, 3))
    assert max(jitter["moving average, 0.8"], jitter["GatherState, 0.8"]) < jitter["of each frame"] / 2
    assert hidden["GatherState, 0.8"] < hidden["moving average, 0.8"] < hidden["of each frame"]


def test_every_example_is_run() -> None:
    here = {
        "onnx_runtime.py",
        "aot_inductor.py",
        "test_parity.py",
        "hrnet_training.py",
        "large_image.py",
        "quickstart.ipynb",
        "sharded_head.py",  # in test_sharded.py
        "video_memory.py",
    }
    in_integration = {"mmseg_ocrnet.py", "lightning_training.py"}
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")} == here | in_integration
