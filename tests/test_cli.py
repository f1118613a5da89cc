"""The command line: what it prints, and how it fails."""

import json
import os
import subprocess
import sys

import pytest
from fresh import PYTHONPATH, python

from ocr_kernels import __version__, info
from ocr_kernels.cli import main


def test_info_names_every_backend_and_tells_why_one_cannot_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for name, state in info.collect()["backends"].items():
        assert name in printed
        assert ("available" if state is True else state) in printed


def test_info_as_json_is_what_collect_returns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == info.collect()


def test_info_shows_environment_variables_and_what_they_do() -> None:
    result = python("-m", "ocr_kernels", "info", "--json", OCR_KERNELS_BACKEND="reference", TRITON_INTERPRET="1")
    report = json.loads(result.stdout)
    assert report["environment"]["OCR_KERNELS_BACKEND"] == "reference"
    assert report["environment"]["TRITON_INTERPRET"] == "1"
    assert set(report["chosen"].values()) == {"reference"}


def test_info_survives_a_backend_that_does_not_exist() -> None:
    result = python("-m", "ocr_kernels", "info", "--json", OCR_KERNELS_BACKEND="abacus")
    assert result.returncode == 0, result.stderr
    assert "abacus" in json.loads(result.stdout)["chosen"]["cpu"]


def test_info_needs_torch_alone() -> None:
    blocked = ("numpy", "triton", "rich", "matplotlib", "PIL", "sklearn")
    result = python(
        "-c",
        f"import sys; sys.modules.update(dict.fromkeys({blocked}))\n"
        "from ocr_kernels.cli import main; sys.exit(main(['info', '--json']))",
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["versions"]["triton"] is None
    assert "does not import" in report["backends"]["triton"]


def test_a_pipe_that_is_closed_early_is_no_error() -> None:
    """As by `ocr-kernels info | head -1`."""
    command, pipe = [sys.executable, "-m", "ocr_kernels", "info"], subprocess.PIPE
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, env=os.environ | {"PYTHONPATH": PYTHONPATH}
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert (process.wait(), process.stderr.read()) == (0, "")


def test_module_is_the_command() -> None:
    result = python("-m", "ocr_kernels", "--version")
    assert (result.returncode, result.stdout.strip()) == (0, f"ocr_kernels {__version__}")


@pytest.mark.parametrize("arguments", [[], ["abacus"], ["info", "--abacus"], ["info", "abacus"]])
def test_unknown_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "ocr-kernels" in capsys.readouterr().err.splitlines()[-1]
