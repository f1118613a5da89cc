"""The command line: what it prints, and how it fails."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh import PYTHONPATH, python

from ocr_kernels import __version__, check, info
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


def test_info_says_what_to_expect_of_the_library_for_gpus(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "library.so").touch()
    monkeypatch.setattr(info.libraries, "problem", lambda kind: None)
    monkeypatch.setattr(info.libraries, "library", lambda kind: tmp_path / "library.so")
    monkeypatch.setattr(info.libraries, "facts", lambda kind: {"version": "1"})
    assert main(["info"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "speed" in line]
    assert len(lines) == 1
    assert "cuda, speed" in lines[0]
    assert "slower than PyTorch's own" in lines[0]


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


def test_an_interrupt_ends_in_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "collect", interrupted)
    assert main(["info"]) == 130
    assert capsys.readouterr() == ("", "ocr-kernels: stopped\n")


def test_info_tells_of_a_library_that_is_not_there() -> None:
    result = python("-W", "ignore", "-m", "ocr_kernels", "info", "--json", OCR_KERNELS_LIBRARY="absent.so")
    report = json.loads(result.stdout)
    reason = "OCR_KERNELS_LIBRARY names a file that is not there: absent.so"
    assert report["backends"]["native"] == report["library"]["cpu"] == reason


def test_module_is_the_command() -> None:
    result = python("-m", "ocr_kernels", "--version")
    assert (result.returncode, result.stdout.strip()) == (0, f"ocr_kernels {__version__}")


@pytest.mark.parametrize("arguments", [
    [], ["abacus"], ["info", "--abacus"], ["info", "abacus"],
    ["check", "model.py:f", "--seconds", "-1"], ["bench", "--seconds", "nan"], ["tune", "--seconds", "inf"],
])  # fmt: skip
def test_unknown_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "ocr-kernels" in capsys.readouterr().err.splitlines()[-1]


MODEL = """
import torch
from torch import nn
from ocr_kernels.reference import OCRHead

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.head = OCRHead(8, 4, 16, key_channels=8)

    def forward(self, image):
        return {"logits": self.head(self.stem(image))}

def make_model():
    return Network()

def with_inputs():
    return Network(), torch.randn(2, 3, 8, 8)

def without_ocr():
    return nn.Conv2d(3, 8, 1), torch.randn(2, 3, 8, 8)

def fixed():
    return with_inputs()[0].requires_grad_(False), torch.randn(2, 3, 8, 8)

def with_a_tuple_of_inputs():
    network, images = with_inputs()
    return network, (images,)

def only_in_training():
    class Model(Network):
        def forward(self, image):
            if not self.training:
                raise RuntimeError("no inference\\nand a long story")
            return super().forward(image)
    return Model(), torch.randn(2, 3, 8, 8)

def only_in_eval_mode(error):
    class Model(Network):
        def forward(self, image):
            if self.training:
                raise error
            return super().forward(image)
    return lambda: (Model().eval(), torch.randn(2, 3, 8, 8))

wants_targets = only_in_eval_mode(TypeError("targets are missing"))
asserts = only_in_eval_mode(AssertionError())

def uncopied():
    class Model(Network):
        def __deepcopy__(self, memo):
            raise TypeError("it has no copies")
    return Model(), torch.randn(2, 3, 8, 8)

def number():
    return 3

def broken():
    raise LookupError("no weights")
"""


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "my_network.py").write_text(MODEL)
    return str(tmp_path / "my_network.py")


@pytest.mark.parametrize(
    "arguments",
    [
        ["make_model", "--input", "2x3x8x8"],
        ["with_inputs"],
        ["with_a_tuple_of_inputs"],
        ["with_inputs", "--dtype", "bfloat16"],
    ],
)
def test_check_compares_a_model_with_itself_replaced(
    model: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    function, *options = arguments
    assert main(["check", f"{model}:{function}", *options, "--seconds", "0"]) == 0
    report, table = capsys.readouterr().out.split("\n\n")
    assert report.startswith("4 replaced, 0 left alone")
    rows = {line[:30].strip(): line[30:].split() for line in table.splitlines()}
    assert rows[""] == ["before", "after", "times", "less"]
    *_, note = table.splitlines()
    assert note == "± interquartile range; ~ no difference beyond it"
    assert list(rows)[1:-1] == ["inference [ms]", "forward and backward [ms]", "saved for backward [MiB]"]
    before, after, ratio = map(float, rows["saved for backward [MiB]"])
    assert after <= before
    assert ratio > 1


@pytest.mark.parametrize(("seconds", "ratio"), [((0.011, 0.010), "~1.10"), ((0.020, 0.010), "2.00")])
def test_check_claims_no_difference_within_the_spread(
    monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, float], ratio: str
) -> None:
    """Calls that take turns, a tenth longer or shorter: ±20 %."""
    clock, noise = [0.0], itertools.cycle((0.9, 0.9, 1.0, 1.0, 1.1, 1.1))
    monkeypatch.setattr(check, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))

    def call(model: torch.nn.Module) -> None:
        clock[0] += seconds[model is after] * next(noise)

    before, after = torch.nn.Identity(), torch.nn.Identity()
    _, *cells = check._compared("time", {"before": before, "after": after}, call, 0.5)
    assert cells == [*(f"{1e3 * median:.0f} ±20%" for median in seconds), ratio]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("fixed", "ValueError: no output has a derivative"),
        ("wants_targets", "TypeError: targets are missing"),
        ("asserts", "AssertionError"),
    ],
)
def test_check_of_a_model_that_is_not_trained(
    model: str, function: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", f"{model}:{function}", "--seconds", "0"]) == 0
    printed = capsys.readouterr().out
    assert "saved for backward" not in printed
    (line,) = (line for line in printed.splitlines() if line.startswith("forward and backward"))
    assert line[30:].strip() == reason


def test_check_prints_where_an_encoding_lacks_a_character(model: str) -> None:
    result = python("-m", "ocr_kernels", "check", f"{model}:fixed", "--seconds", "0", PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr
    assert "\n? interquartile range" in result.stdout


def test_check_says_in_a_line_that_a_backend_does_not_exist(model: str) -> None:
    result = python("-m", "ocr_kernels", "check", f"{model}:with_inputs", OCR_KERNELS_BACKEND="bogus")
    (line,) = result.stderr.splitlines()
    assert line.startswith("ocr-kernels check: ValueError: backend must be one of")
    assert result.returncode == 2


@pytest.mark.parametrize("slots", [False, True])
def test_outputs_are_found_in_containers(slots: bool) -> None:
    @dataclasses.dataclass(slots=slots)
    class Output:
        logits: list[torch.Tensor]
        loss: torch.Tensor

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return {"a": Output([x, 2 * x], 3 * x), "b": (4 * x.detach(), "text", 5 * x)}

    found = check._outputs(Model(), [torch.ones((), requires_grad=True)])
    assert sorted(out.item() for out in found) == [1, 2, 3, 5]


@pytest.mark.parametrize(
    ("function", "code", "message"),
    [
        ("without_ocr", 1, ""),
        ("make_model", 2, "ValueError: make_model returns no inputs: give their shapes, --input 1x3x512x1024"),
        ("number", 2, "TypeError: number must return a torch.nn.Module, or it and inputs, not int"),
        ("broken", 2, "LookupError: no weights"),
        ("uncopied", 2, "TypeError: it has no copies"),
        ("only_in_training", 2, "RuntimeError: no inference"),
        ("missing", 2, "AttributeError: module 'my_network' has no attribute 'missing'"),
    ],
)
def test_check_says_in_a_line_what_is_wrong(
    model: str, function: str, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", f"{model}:{function}"]) == code
    assert capsys.readouterr().err == (f"ocr-kernels check: {message}\n" if message else "")


def test_check_of_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "nowhere.py:make_model"]) == 2
    assert "nowhere.py:make_model must be FILE.py:FUNCTION, with a file that is there" in capsys.readouterr().err
