"""The examples run as their first lines say."""

from __future__ import annotations

from pathlib import Path

import pytest
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


def test_parity_file() -> None:
    result = python("-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLES / "test_parity.py"))
    assert result.returncode == 0, result.stdout
    assert "3 passed" in result.stdout


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"onnx_runtime.py", "aot_inductor.py", "test_parity.py"}
