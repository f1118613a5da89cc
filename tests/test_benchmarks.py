"""The benchmarks' own arithmetic, gate and command lines."""

import contextlib
import importlib.machinery
import importlib.util
import io
import itertools
import json
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh import python
from PIL import Image
from rich.console import Console

from benchmarks import accuracy, pages
from ocr_kernels import cli, replace_ocr_modules
from ocr_kernels.bench import cases, command, jobs, measure, plot, report
from ocr_kernels.bench.cases import BACKBONE, CASES, NETWORKS, OPS, SUBJECTS, Case, Pass, Subject, Workload
from ocr_kernels.bench.timing import Timing
from ocr_kernels.core import backends

LAYERS = {name: subject for name, subject in SUBJECTS.items() if name not in NETWORKS}  # the networks need timm
GATHER, ATTENTION, MODULE, HEAD, FOLDED_MODULE, FOLDED_HEAD = LAYERS.values()
TINY = Case("tiny", 1, 8, 4, 3, 6, 7, in_channels=12)
CPU = torch.device("cpu")


def workload(subject: Subject, **changes: Any) -> Workload:
    return replace(Workload(subject, TINY, torch.float32, CPU, peers=("eager",)), **changes)


@pytest.fixture
def tiny_cases() -> Iterator[None]:
    with tiny():
        yield


@contextlib.contextmanager
def tiny() -> Iterator[None]:
    """Every size tiny, nothing compiled, one backend: what the commands do with results is tested here."""
    small = {
        case.name: replace(TINY, name=case.name, regions=min(case.regions, 5), width=4 + i)
        for i, case in enumerate(CASES.values())
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, waiting for a second one takes longest
    with pytest.MonkeyPatch.context() as monkeypatch:
        for module in (command, jobs):
            monkeypatch.setattr(module, "CASES", small)
        monkeypatch.setattr(Case, "quick", lambda case: case)
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
        monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(backends, "_problems", {})  # what is found out without it is forgotten after it
        for module in (cases, command):
            monkeypatch.setattr(module, "our_backends", lambda _: ["reference"])
        monkeypatch.setattr(measure, "measure_limits", lambda *_: measure.Limits(1e10, 1e11))
        monkeypatch.setattr(measure, "host_times", lambda _: [])
        yield
    torch.set_num_threads(threads)
    torch.compiler.reset()


RUN = ["--device", "cpu", "--no-quick", "--seconds", "0.001", "--commit", "abc", "--json"]


@pytest.mark.parametrize(
    ("subject", "what", "megabytes", "gigaflops"),
    [
        (GATHER, "forward", 139, 2.5),
        (GATHER, "backward", 278, 5.1),
        (GATHER, "forward+backward", 139 + 278, 2.5 + 5.1),
        (ATTENTION, "forward", 134, 2.5),
        (ATTENTION, "backward", 201, 6.4),
        (ATTENTION, "forward+backward", 134 + 201, 2.5 + 6.4),
        (MODULE, "forward", 139 + 268, 2.5 + 193),
        (FOLDED_MODULE, "forward", 139 + 268, 2.5 + 193),
    ],
)
def test_floors_of_cityscapes_inference(subject: Subject, what: Pass, megabytes: float, gigaflops: float) -> None:
    case = CASES["cityscapes-inference"]
    assert subject.bytes(case, what, torch.bfloat16) / 1e6 == pytest.approx(megabytes, abs=1)
    assert subject.flops(case, what) / 1e9 == pytest.approx(gigaflops, abs=0.1 if gigaflops < 100 else 1)


def test_floor_is_the_slower_of_memory_and_arithmetic_in_each_pass_over_the_data() -> None:
    limits = measure.Limits(bytes_per_second=4.3e12, flops_per_second=790e12)
    case = CASES["cityscapes-inference"]
    times = [limits.floor(s.work(case, "forward"), torch.bfloat16) for s in (GATHER, ATTENTION, MODULE)]
    assert [t * 1e6 for t in times] == pytest.approx([32, 31, 32 + 244], abs=1)


@pytest.mark.parametrize("subject", LAYERS.values(), ids=list(LAYERS))
@pytest.mark.parametrize("memory_format", cases.MEMORY_FORMATS)
def test_inputs_fit_the_subject(subject: Subject, memory_format: str) -> None:
    work = workload(subject, memory_format=memory_format)
    inputs, grads = work.inputs()
    assert all(t.is_contiguous(memory_format=cases.MEMORY_FORMATS[memory_format]) for t in inputs if t.dim() == 4)
    outputs = measure.run("forward", work.eager(), (inputs, grads))
    assert [tuple(t.shape) for t in outputs] == subject.output_shapes(TINY)
    again = work.inputs()[0]
    assert all(torch.equal(a, b) for a, b in zip(inputs, again, strict=True))


@pytest.mark.parametrize("subject", LAYERS.values(), ids=list(LAYERS))
@pytest.mark.parametrize("what", ["forward", "forward+backward"])
def test_wrong_and_failing_variants_are_not_timed(subject: Subject, what: Pass) -> None:
    def altered(change: Callable[[Any], Any]) -> torch.nn.Module | Callable[..., Any]:
        function = work.eager()
        if isinstance(function, torch.nn.Module):
            function.register_forward_hook(lambda _, __, out: change(out))
            return function
        return lambda *inputs: change(function(*inputs))

    def wrong(out: Any) -> Any:
        return 1.001 * out if isinstance(out, torch.Tensor) else [1.001 * tensor for tensor in out]

    def failing(_: Any) -> Any:
        raise RuntimeError("no compiler\nand a long story")

    work = workload(subject)
    functions = {"right": work.eager(), "wrong": altered(wrong), "failing": altered(failing)}
    problems, first = measure.gate(work, functions, work.inputs(), what)
    assert problems.pop("failing") == "failed: RuntimeError: no compiler"
    assert problems.pop("wrong").startswith("wrong: ")
    assert problems == {}
    assert first.keys() == {"right", "wrong"}


def test_a_wrong_kernel_of_ours_is_not_timed_and_fails_the_run(
    tiny_cases: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = measure.ocr_kernels.gather.reference.forward

    def wrong(out: torch.Tensor, *args: Any) -> None:
        right(out, *args)
        out[0, 0, 0] += 0.1

    monkeypatch.setattr(measure.ocr_kernels.gather.reference, "forward", wrong)
    file = tmp_path / "a.json"
    arguments = [*RUN, str(file), "--cases", "lip", "--subjects", "gather", "--peers", "eager"]
    assert command.main(arguments) == 1
    results = json.loads(file.read_text())["results"]
    assert [list(result["times"]) for result in results] == [["eager"]] * 3
    assert "reference wrong: output 0: max error" in capsys.readouterr().out


class Backbone(torch.nn.Module):
    """What `timm.create_model` gives for an HRNet, with two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = torch.nn.ModuleList(torch.nn.Conv2d(3, 6, 3, stride, 1) for stride in (4, 8))
        self.feature_info = types.SimpleNamespace(channels=lambda: [6, 6])

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        return [branch(image) for branch in self.branches]


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("timm")
    module.__spec__ = importlib.machinery.ModuleSpec("timm", None)
    module.create_model = lambda name, **options: Backbone()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", module)
    cases._network_work.cache_clear()


def test_networks_are_folded_and_shared_out(
    timm: None, tiny_cases: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = workload(SUBJECTS["hrnet_w18"])
    ours, eager = (work.variants()[name].eval() for name in ("reference", "eager"))  # type: ignore[attr-defined]
    assert "head.ocr_distri_head" in [row.name for row in replace_ocr_modules(ours).left_alone]  # it was before
    image = work.inputs()[0][0]
    assert tuple(image.shape) == (1, 3, 24, 28)
    torch.testing.assert_close(ours(image), eager(image))
    backbone = 42 * 27 * 6 + 3 * 4 * 27 * 6
    assert work.subject.flops(TINY, "forward") == HEAD.flops(TINY, "forward") + 2 * backbone

    file = tmp_path / "a.json"
    arguments = [*RUN, str(file), "--subjects", "hrnet_w18", "--plot", str(tmp_path), "--peers", "eager", "--cases"]
    assert command.main([*arguments, "cityscapes-inference", "cityscapes-half", "lip"]) == 0
    results = json.loads(file.read_text())["results"]
    assert [(r["case"], r["pass"]) for r in results] == [(c, "forward") for c in work.subject.cases or ()]
    assert all(set(result["times"]) == {"eager", BACKBONE, "reference"} for result in results)
    (grid,) = report.networks(results)
    times = {name: timing["median"] for name, timing in results[0]["times"].items()}
    share = f"{1 - times[BACKBONE] / times['eager']:.0%}"
    assert grid.rows[0][:6] == ["hrnet_w18", "24x16", "fp32", "NCHW", report._number(times["eager"], 1e-3), share]
    assert "whole networks" in capsys.readouterr().out
    assert (tmp_path / "networks.png").exists()


def test_networks_are_not_offered_without_timm(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert command._parse(["--device", "cpu", "--no-quick"]).subjects == list(LAYERS)
    with pytest.raises(SystemExit):
        command._parse(["--subjects", "hrnet_w48"])
    assert "hrnet_w48 needs timm" in capsys.readouterr().err


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run wrote; beside it are its pictures and, as a text, what it printed."""
    path = tmp_path_factory.mktemp("results") / "machine.json"
    arguments = [*RUN, str(path), "--cases", "cityscapes-inference", "long-tail", "pixels", "regions"]
    with path.with_suffix(".txt").open("w") as text, contextlib.redirect_stdout(text), tiny():
        assert command.main([*arguments, "--plot", str(path.parent)]) == 0
    return path


def test_a_run_writes_prints_and_plots_its_results(file: Path) -> None:
    data = json.loads(file.read_text())
    assert (data["commit"], data["missing"], data["device"]) == ("abc", [], "cpu")
    assert {"backends", "devices", "versions", "date", "limits", "host", "load"} <= data.keys()
    assert str(Path.cwd()) not in file.read_text()
    first = [(r["subject"], r["pass"]) for r in data["results"] if r["case"] == "cityscapes-inference"]
    assert first == [(name, what) for name, subject in LAYERS.items() for what in subject.passes]
    attention = next(r for r in data["results"] if r["subject"] == "attention")
    assert {"eager", "compile", "sdpa-math", "reference"} <= attention["times"].keys()
    both = next(r for r in data["results"] if r["pass"] == "forward+backward")
    sizes = both["shape"]
    assert both["saved_bytes"]["eager"] == 4 * sizes["regions"] * sizes["height"] * sizes["width"]  # the weights
    assert all(both["peak_bytes"][name] >= both["saved_bytes"][name] for name in ("eager", "compile", "reference"))

    printed = file.with_suffix(".txt").read_text()
    assert max(map(len, printed.splitlines())) <= 120
    assert all(text in printed for text in ("long-tail", "slower than", "of floor", "lost", "Not reached: none"))
    drawn = {path.name for path in file.parent.glob("*.png")}
    assert drawn == {f"{n}.png" for n in (*(f"bars-{s}" for s in LAYERS), "roofline", "memory", "scaling")}
    for path in file.parent.glob("*.png"):
        with Image.open(path) as image:
            image.load()
            assert image.info[plot.SOURCE] == plot.digest(data)
            assert min(image.size) >= 300


def test_results_are_printed_and_compared(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--results", str(file)]) == 0
    assert "abc" in capsys.readouterr().out
    data = json.loads(file.read_text())
    for result in data["results"]:
        for timing in result["times"].values():
            timing["spread"] = 0.0
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(data))
    data["results"][0]["times"]["reference"]["median"] *= 2
    data["results"][1]["times"]["reference"]["median"] /= 2
    dropped = data["results"].pop()
    new.write_text(json.dumps(data))
    grid = report.comparison(json.loads(old.read_text()), data)
    assert [row[-2:] for row in grid.rows[:3]] == [["2.00", "slower"], ["0.50", "faster"], ["1.00", "same"]]
    assert grid.rows[-2][:2] == [dropped["subject"], dropped["case"]]
    assert grid.rows[-2][-1] == "only in one"
    assert grid.rows[-1][-2:] == ["1.00", "the machine"]
    assert command.main(["--compare", str(old), str(new)]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 120


def test_interruption_leaves_valid_results_and_says_what_is_missing(
    tiny_cases: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = measure.measure

    def interrupted(work: Workload, *args: Any) -> Iterator[dict[str, Any]]:
        if work.subject is ATTENTION:
            raise KeyboardInterrupt
        yield from right(work, *args)

    monkeypatch.setattr(measure, "measure", interrupted)
    path = tmp_path / "a.json"
    assert command.main([*RUN, str(path), "--cases", "lip", "--subjects", *OPS, "--peers", "eager"]) == 1
    data = json.loads(path.read_text())
    assert [result["subject"] for result in data["results"]] == ["gather"] * 3
    assert data["missing"] == ["attention lip float32 contiguous"]
    assert "Not reached: 1\n  attention lip" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_job_that_fails_does_not_end_the_run(
    tiny_cases: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: Any) -> Iterator[dict[str, Any]]:
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(measure, "measure", out_of_memory)
    path = tmp_path / "a.json"
    assert command.main([*RUN, str(path), "--cases", "lip", "--subjects", "gather"]) == 1
    failed = json.loads(path.read_text())["failed"]
    assert failed == {"gather lip float32 contiguous": "OutOfMemoryError: too large"}


def test_the_variable_that_chooses_a_backend_is_ignored(
    tiny_cases: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is called ours would be another's."""
    monkeypatch.setattr(backends, "_default", "abacus")  # as OCR_KERNELS_BACKEND sets it
    monkeypatch.setattr(backends, "_selected", "abacus")
    selected = []

    def measured(*_: Any) -> list[dict[str, Any]]:
        selected.append(backends._selected)
        return []

    monkeypatch.setattr(measure, "measure", measured)
    assert command.main([*RUN, str(tmp_path / "a.json"), "--cases", "lip", "--subjects", "module"]) == 0
    assert selected == [None]


def test_host_times_that_fail_do_not_end_the_run(
    tiny_cases: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Workload) -> list[dict[str, Any]]:
        raise RuntimeError("no compiler\nand a long story")

    monkeypatch.setattr(measure, "host_times", fail)
    path = tmp_path / "a.json"
    assert command.main([*RUN, str(path), "--cases", "lip", "--subjects", "gather", "--peers", "eager"]) == 1
    data = json.loads(path.read_text())
    assert data["failed"] == {"host times": "RuntimeError: no compiler"}
    assert (len(data["results"]), data["missing"], data["host"]) == (3, [], [])
    assert "Not measured: 1\n  host times: RuntimeError: no compiler\n" in capsys.readouterr().out


def test_host_times_that_fail_leave_the_threads_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured after them would run in one."""
    before, inside = torch.get_num_threads(), []

    def fail(*_: Any) -> None:
        inside.append(torch.get_num_threads())
        raise RuntimeError

    monkeypatch.setattr(measure, "run", fail)
    torch.set_num_threads(3)
    try:
        with pytest.raises(RuntimeError):
            measure.host_times(workload(GATHER))
        assert (inside, torch.get_num_threads()) == ([1], 3)
    finally:
        torch.set_num_threads(before)


def test_in_a_pipe_every_measurement_says_how_long_the_rest_takes(
    tiny_cases: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of three takes 10 s, the others 1 s each; and nothing is on stderr."""
    clock = iter((0.0, 10.0, 11.0, 12.0))
    monkeypatch.setattr(command, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(measure, "measure", lambda *_: ())
    arguments = ["--cases", "lip", "--subjects", "gather", "attention", "module", "--peers", "eager"]
    assert command.main([*RUN[:-1], *arguments]) == 0
    printed = capsys.readouterr()
    assert [line for line in printed.out.splitlines() if "to go" in line] == [
        "1/3 gather lip float32 contiguous, about 20 s to go",
        "2/3 attention lip float32 contiguous, about 6 s to go",
        "3/3 module lip float32 contiguous, about 0 s to go",
    ]
    assert printed.err == ""


def test_on_a_cpu_a_run_is_quick_unless_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    args = command._parse(["--device", "cpu"])
    assert (args.quick, args.dtype, args.subjects, args.peers) == (
        *(True, ["float32"], cases.QUICK_SUBJECTS, cases.QUICK_PEERS),
    )
    todo = jobs.jobs(CPU, args.dtype, args.memory_format, args.cases, args.subjects, args.peers, args.quick)
    assert {job.workload.case.name for job in todo} == set(cases.QUICK_CASES)
    assert len(todo) == len(cases.QUICK_CASES) * len(cases.QUICK_SUBJECTS)
    assert all(job.workload.case.pixels <= CASES[job.workload.case.name].pixels / 15 for job in todo)
    assert all(job.workload.case.batch == 1 for job in todo)

    some = command._parse(["--device", "cpu", "--cases", "lip", "--peers", "compile"])
    assert (some.quick, some.cases, some.peers, some.subjects) == (True, ["lip"], ["compile"], cases.QUICK_SUBJECTS)
    assert not command._parse(["--device", "cpu", "--no-quick"]).quick
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    whole = command._parse([])
    assert (whole.device, whole.quick, whole.dtype) == ("cuda", False, ["bfloat16"])
    assert set(cases.NAMED) == {CASES[name] for name in whole.cases} - {c for s in cases.SWEEPS.values() for c in s}


def test_a_lost_device_ends_the_run(
    tiny_cases: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = []

    def fault(*_: Any) -> None:
        lost.append(True)
        raise RuntimeError("CUDA error: misaligned address")

    def synchronize(_: torch.device) -> None:
        if lost:
            raise RuntimeError("CUDA error: misaligned address")

    monkeypatch.setattr(measure.ocr_kernels.gather.reference, "forward", fault)
    monkeypatch.setattr(measure, "synchronize", synchronize)
    path = tmp_path / "a.json"
    assert command.main([*RUN, str(path), "--cases", "lip", "--subjects", *OPS, "--peers", "eager"]) == 1
    data = json.loads(path.read_text())
    reason = "DeviceLost: reference failed: RuntimeError: CUDA error: misaligned address"
    assert data["failed"] == {"gather lip float32 contiguous": reason}
    assert data["missing"] == ["attention lip float32 contiguous"]
    assert "Nothing runs on cpu after gather lip float32 contiguous." in capsys.readouterr().out


def test_the_most_telling_jobs_come_first(tiny_cases: None) -> None:
    args = command._parse(["--device", "cpu", "--no-quick", "--memory-format", "contiguous", "channels_last"])
    options = args.dtype, args.memory_format, args.cases, args.subjects, args.peers
    found = jobs.jobs(torch.device("cuda"), *options)  # nothing runs
    names = [str(job) for job in found]
    assert names[:6] == [f"{subject} cityscapes-inference float32 contiguous" for subject in LAYERS]
    assert {job.workload.subject.name for job in found[6 : 6 + 2 * (len(cases.NAMED) - 1)]} == set(OPS)
    assert len(set(names)) == len(names)
    first_slow = next(i for i, name in enumerate(names) if "max-autotune" in name)
    assert all("contiguous" in name or "cityscapes-inference" in name for name in names[:first_slow])


def result(**times: float) -> dict[str, Any]:
    return {
        "case": "tiny",
        "subject": "attention",
        "pass": "forward",
        "dtype": "bfloat16",
        "memory_format": "contiguous",
        "ours": ["triton"],
        "floor": 0.5,
        "bytes": 1,
        "flops": 1,
        "times": {name.replace("_", "-"): {"median": m, "spread": 0.0} for name, m in times.items()},
        "problems": {},
    }


def test_ratios_shares_and_losses() -> None:
    fast = result(eager=2.0, compile=4.0, sdpa_math=3.0, sdpa_flash=0.5, triton=1.0)
    slow = {**result(eager=2.0, compile=4.0, triton=4.0), "case": "other"}
    later = result(max_autotune=3.0, triton=2.0)  # another round, in which the machine was half as fast
    (grid,) = report.summary([fast, slow, later])
    row = dict(zip(grid.header, grid.rows[0], strict=True))
    assert grid.rows[0] == [
        *("attention", "fwd", "2", "1.00x", "0.50x", "2.00x", "1.00x", "1.50x", "1.50x", "0.50x", "0.50x"),
        *("25%", "12%", "2"),
    ]
    assert row["lost"] == "2"
    assert report.losses([fast, slow, later]) == ["attention fwd other bf16 NCHW (0.50x eager)"]
    (grid,) = report.speed([fast, slow, later])
    assert [dict(zip(grid.header, row, strict=True))["slower than"] for row in grid.rows] == ["flash", "eager"]


@pytest.mark.parametrize(
    ("spread", "cell", "ratio"),
    [(0.04, "**10 ±4%**", "1.10x"), (0.06, "10 ±6%", "~1.10x"), (2.0, "10 ±200%", "~1.10x")],
)
def test_a_difference_within_the_spreads_is_no_win(spread: float, cell: str, ratio: str) -> None:
    """11 ms and 10 ms: the two touch at 4.76 % each."""
    line = result(eager=0.011, triton=0.010)
    line |= {"saved_bytes": {}, "peak_bytes": {}}
    line["times"] = {name: {**timing, "spread": spread} for name, timing in line["times"].items()}
    (grid,) = report.cases([line])
    row = dict(zip(grid.header, grid.rows[0], strict=True))
    assert (row["eager"], row["triton"]) == (f"11 ±{spread:.0%}", cell)
    (grid,) = report.speed([line])
    assert dict(zip(grid.header, grid.rows[0], strict=True))["eager"] == ratio
    line["times"]["eager"]["median"] = 0.0091
    assert report.losses([line]) == [f"attention fwd tiny bf16 NCHW ({'' if spread < 0.05 else '~'}0.91x eager)"]


def test_one_of_three_wins_over_both_or_not_at_all() -> None:
    times = [{"median": 1.0, "spread": 0.01}, {"median": 1.5, "spread": 0.01}, {"median": 1.6, "spread": 0.5}]
    assert report._fastest([None, *reversed(times[:2])]) is times[0]
    assert report._fastest(times) is None
    assert report._fastest([times[0], None]) is None  # nothing to win over
    assert report._fastest([]) is None


def test_a_timing_is_its_median_and_its_quartiles() -> None:
    timing = Timing.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (timing.median, timing.spread) == (3.0, pytest.approx(1.0))  # 1.5 to 4.5
    assert [str(Timing(seconds, 0.125)) for seconds in (12.3456e-3, 1.23456)] == ["12.3 ±12%", "1235 ±12%"]
    assert not timing.differs(Timing(5.9, 0.0))
    assert timing.differs(Timing(6.1, 0.0))
    assert Timing(6.1, 0.0).differs(timing)


def test_tables_with_every_column_fit(capsys: pytest.CaptureFixture[str]) -> None:
    full = result(eager=0.002, compile=0.004, max_autotune=0.003, sdpa_efficient=0.0012345, triton=0.12345)
    full |= {"case": "cityscapes-inference", "pass": "forward+backward", "bytes": 10**9, "flops": 10**12}
    sizes = dict.fromkeys(full["times"], 12345678901)
    full |= {"first_call": dict.fromkeys(sizes, 123.456), "peak_bytes": sizes, "saved_bytes": sizes}
    variants = [*cases.PEERS[:2], *cases.SDPA_BACKENDS, "triton", measure.EMPTY]
    line = {
        "subject": "attention",
        "pass": "forward+backward",
        "times": {name: {"median": 123.4e-6, "spread": 0.1} for name in variants},
    }
    for grid in report.tables({"results": [full], "host": [line]}):
        report.console().print(grid.table())
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 120
    assert "missed" in printed
    assert "max-autotune" in printed


def test_gpu_rounds_wait_for_the_host_and_rotate_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.time = time.perf_counter()

        def elapsed_time(self, later: "Event") -> float:
            return 1e3 * (later.time - self.time)

    sleeps: list[int] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", sleeps.append)
    used: dict[str, list[int]] = {"a": [], "b": []}

    def prepare(name: str) -> Callable[[int], Callable[[], object]]:
        return lambda argument: lambda: (used[name].append(argument), time.sleep(1e-4 * (1 + 4 * (name == "b"))))

    calls = {name: prepare(name) for name in used}
    times = measure.time_interleaved(calls, [0, 1, 2], torch.device("cuda"), 0.001, batch=3)
    assert times["b"].median > 2 * times["a"].median > 0
    assert sleeps[:2] == [0, 0]  # warming up, and finding out how long the host takes
    assert all(cycles >= 5e9 * 6e-4 * 3 for cycles in sleeps[2:])
    assert used["a"][:6] == [0, 2, 1] * 2
    assert len(used["a"]) == len(used["b"]) >= 5 + 3 * 3


def test_host_times_have_a_line_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    lines = measure.host_times(workload(GATHER), repeats=2, calls=2)
    assert [(line["subject"], line["pass"]) for line in lines] == [
        (op, what) for op in OPS for what in ("forward", "forward+backward")
    ]
    assert all({"eager", measure.EMPTY} <= line["times"].keys() for line in lines)


def test_pages_and_pictures_are_what_the_result_files_give() -> None:
    assert pages.stale() == []


def test_errors_in_the_design_are_those_of_the_result_file() -> None:
    """None of them beyond 1.5 times eager's own, as the README promises."""
    rows = json.loads((pages.RESULTS / "accuracy" / "amd-epyc.json").read_text())["rows"]
    backends = ["reference", "native", "triton"]
    assert "\n".join(accuracy.table(rows, backends)) in (pages.ROOT / "docs" / "design.md").read_text()
    mixed = [row for row in rows if set(row["dtypes"].split("/")) != {"float64"}]
    assert {row["peak"] for row in mixed} == set(accuracy.PEAKS)
    assert max(accuracy.ratio(row, name) for row in mixed for name in backends) <= 1.5


def test_readme_section_is_replaced(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "machine.json").write_text(file.read_text())
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    monkeypatch.setattr(pages, "README", tmp_path / "README.md")
    monkeypatch.setattr(pages, "PAGE", tmp_path / "RESULTS.md")
    pages.README.write_text(f"before\n{pages.BEGIN}\nold\n{pages.END}\nafter\n")
    assert pages.main(["--check"]) == 1
    assert pages.main([]) == 0
    text = pages.README.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "| format |" in text  # of runs that are not quick, and there are none
    assert "\nold\n" not in text
    page = pages.PAGE.read_text()
    assert "| gather | cityscapes-inference | fwd |" in page
    assert "machine-memory.png" in page
    assert pages.main(["--check"]) == 0
    data = json.loads((tmp_path / "machine.json").read_text())
    (tmp_path / "machine.json").write_text(json.dumps({**data, "date": "another"}))
    assert len(pages.stale()) > 1
    with pytest.raises(ValueError, match="needs the two lines"):
        pages.render("no markers")


@pytest.mark.parametrize("width", [80, 120])
def test_no_column_is_lost_where_lines_are_short(width: int) -> None:
    data = json.loads((pages.RESULTS / "amd-epyc-ops.json").read_text())
    for grid in report.tables(data):
        out = Console(width=width, file=io.StringIO(), highlight=False, markup=False)
        for part in grid.within(width):
            out.print(part.table())
        lines = out.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert max(map(len, lines)) <= width
        for cell in itertools.chain(grid.header, *grid.rows):
            assert any(cell in line for line in lines), cell


def test_the_users_command_hands_over(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["bench", "--help"])
    assert exit_.value.code == 0
    assert "usage: ocr-kernels bench" in capsys.readouterr().out
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["bench"]) == 2
    assert capsys.readouterr().err == "ocr-kernels bench: needs matplotlib, rich: pip install matplotlib rich\n"


@pytest.mark.parametrize("arguments", [["--dtype", "float8"], ["--cases", "abacus"]])
def test_wrong_arguments_are_refused_in_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(arguments, capsys)


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line that says why; nothing is measured."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(command, "_run", None)
        with pytest.raises(SystemExit) as exit_:
            command.main(arguments)
    assert exit_.value.code == 2
    return capsys.readouterr().err.splitlines()[-1].split("error: ")[1]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read"),
        ("no JSON", "is no JSON"),
        ("\N{SNOWMAN}".encode("utf-16"), "is no JSON"),
        ("{}", "has no results of ocr-kernels bench"),
        ("[]", "has no results of ocr-kernels bench"),
    ],
)
def test_files_of_something_else_are_refused(
    file: Path, content: str | bytes | None, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.json"
    if content is not None:
        other.write_bytes(content if isinstance(content, bytes) else content.encode())
    for arguments in (["--results", str(other)], ["--compare", str(file), str(other)]):
        assert refusal(arguments, capsys).startswith(f"argument {arguments[0]}: {other} {problem}")


def test_places_that_cannot_be_written_to_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for arguments, problem in (
        (["--json", f"{tmp_path}"], f"--json: {tmp_path} is a folder"),
        (["--json", f"{tmp_path}/file/a.json"], f"--json: {tmp_path}/file cannot be written to (Not a directory)"),
        (["--json", f"{tmp_path}/none/a.json"], f"--json: {tmp_path}/none cannot be written to (No such file"),
        (["--plot", f"{tmp_path}/file"], f"--plot: {tmp_path}/file cannot be written to (File exists)"),
        (["--plot", f"{tmp_path}/file/plots"], f"--plot: {tmp_path}/file/plots cannot be written to (Not a dir"),
    ):
        assert refusal(["--device", "cpu", *arguments], capsys).startswith(problem)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_results_are_printed_where_an_encoding_lacks_a_character(file: Path) -> None:
    result = python("-m", "ocr_kernels", "bench", "--results", str(file), PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr
    assert "? is the interquartile range" in result.stdout
