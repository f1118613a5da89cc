"""`make gpu`, emulated on a CPU: what a fault, a hang or too little time costs, and what the round says of it."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import time
import types
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_benchmarks import CPU, LAYERS, result, tiny

from benchmarks.gpu import __main__ as gpu_round
from benchmarks.gpu import journal, page, prepare, profile, runner, smoke, times
from benchmarks.gpu.__main__ import Stage
from benchmarks.gpu.journal import JOURNAL, LOG, Journal
from benchmarks.gpu.runner import Step
from ocr_kernels.bench import cases, measure
from ocr_kernels.bench.cases import CASES

# A step whose subjects are named after what happens to their process.
STEP = """
import os, signal, sys, time
from benchmarks.gpu import journal

def wrong():
    raise AssertionError("output is 1.0e+00 off")

def skipped():
    raise journal.Skipped("no library")

def lost():
    journal.device_error = lambda: "CUDA error: an illegal memory access was encountered"

WHAT = {
    "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "abort": os.abort,
    "hang": lambda: time.sleep(60),
    "slow": lambda: time.sleep(0.2),
    "wrong": wrong,
    "skipped": skipped,
    "lost": lost,
}
print("a line of", *sys.argv[1:])
if sys.argv[1] == "dead":
    os.abort()
journal.work({name: WHAT.get(name.split()[0], list) for name in sys.argv[1:]})
"""


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "fake_step.py").write_text(STEP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(runner, "GRACE_SECONDS", 0.5)
    return tmp_path


def step(name: str, *subjects: str, **options: Any) -> Step:
    return Step(name, ["fake_step", *subjects], **options)


def play(out: Path, *stages: Sequence[Step], seconds: float = 60) -> Journal:
    plan = [Stage(1, steps) for steps in stages]
    return gpu_round.play(plan, {"gpu": "NVIDIA H100", "commit": "abc", "seconds": seconds}, out, time.time())


def states(found: Journal, name: str) -> dict[str, str]:
    return {subject: line["state"] for subject, line in found.of(name).items()}


def test_each_fault_costs_its_subject(out: Path) -> None:
    names = ["first", "segfault", "abort", "lost", "after lost", "wrong", "skipped", "hang", "last"]
    found = play(out, [step("smoke", *names, limit=1)])
    expected = {"segfault": "crashed", "abort": "crashed", "lost": "crashed", "hang": "crashed"}
    expected |= {"wrong": "failed", "skipped": "skipped"}
    assert states(found, "smoke") == {name: expected.get(name, "passed") for name in names}
    lines = found.of("smoke")
    errors = {name: line["error"] for name, line in lines.items() if "error" in line}
    assert errors["segfault"].startswith("SIGSEGV")
    assert errors["hang"].startswith("not done after 1 s")
    assert errors["lost"] == "CUDA error: an illegal memory access was encountered"
    assert lines["lost"]["process"] != lines["after lost"]["process"] == lines["wrong"]["process"]
    log = (out / LOG).read_text()
    assert "Fatal Python error: Segmentation fault" in log
    assert "Timeout (0:00:01)!" in log  # with where it hung
    assert "smoke failed wrong (" in log
    assert found.unreached("smoke") == []


@pytest.mark.parametrize("odd", [0, 1])
def test_a_step_that_crashes_leaves_the_others_alone(out: Path, odd: int) -> None:
    """Every second step of the round ends before its first subject, or with its second."""
    stages = []
    kinds: dict[str, str] = {}
    for stage in gpu_round.stages("abc", "9.0"):
        steps = []
        for one in stage.steps:
            kinds[one.name] = ("fine", "dead", "fine", "segfault")[(len(kinds) + odd) % 4]
            subjects = ["dead"] if kinds[one.name] == "dead" else ["a", kinds[one.name], "b"]
            steps.append(replace(one, command=["fake_step", *subjects], processes=min(2, one.processes), tool=()))
        stages.append(steps)
    found = play(out, *stages)
    for name, kind in kinds.items():
        passed = {subject for subject, state in states(found, name).items() if state == "passed"}
        assert passed == {"fine": {"a", "fine", "b"}, "dead": set(), "segfault": {"a", "b"}}[kind]
        assert ("dead" in found.notes.get(name, "")) == (kind == "dead")
        assert name in found.seconds
    text = page.write(out)
    assert all(f"| {name} |" in text for name in kinds)
    assert text.count("SIGABRT") == list(kinds.values()).count("dead")
    assert text.count("SIGSEGV") == list(kinds.values()).count("segfault")


def test_a_step_whose_time_is_up_leaves_its_log_and_what_it_found(out: Path) -> None:
    start = time.time()
    steps = [step("times", "first", "hang", "never"), step("tests", *(f"slow {i}" for i in range(99)), processes=2)]
    found = play(out, steps, [step("peers", "one")], seconds=4)
    assert time.time() - start < 5
    assert states(found, "times") == {"first": "passed", "hang": "cut off"}
    assert found.unreached("times") == ["never"]
    slow = states(found, "tests")
    assert 2 <= len(slow) < 30
    assert set(slow.values()) == {"passed"}  # what was under way had a moment to end
    assert states(found, "peers") == {"one": "passed"}
    assert "times.0 | a line of first hang never" in (out / LOG).read_text()
    text = page.write(out)
    assert "| times | 1 |  |  | 1 |  | 1 |" in text
    assert "* times: 1, from never on" in text
    assert "time was up" in text


def test_unused_time_is_passed_on(out: Path) -> None:
    found = play(out, [step("smoke", "one")], [step("times", *(f"slow {i}" for i in range(8)))], seconds=4)
    assert states(found, "times") == {f"slow {i}": "passed" for i in range(8)}  # 1.6 s and a start
    assert found.seconds["smoke"] < 2


def test_a_step_without_its_tool_says_so(out: Path) -> None:
    found = play(out, [step("memcheck", "one", tool=("no-such-tool", "--option")), step("smoke", "one")])
    assert found.notes == {"memcheck": "no-such-tool is not on this machine"}
    assert states(found, "smoke") == {"one": "passed"}


TESTS = """
import os, pytest

@pytest.fixture(scope="module")
def shared():
    return []

def test_passes(shared): print("not seen")
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_order(shared, dtype): pass
def test_crashes(shared): os.abort()
def test_fails(shared): assert [1] == shared
@pytest.mark.skip
def test_skipped(): pass
"""


def test_tests_are_shared_out_and_survive_a_crash(out: Path) -> None:
    (out / "test_parity.py").write_text(TESTS)
    (out / "test_broken.py").write_text("import no_such_module\n")
    command = [*gpu_round.PYTEST, "-m", "not gpu", str(out)]
    found = play(out, [Step("tests", command)])
    short = {subject.rpartition("::")[2]: line for subject, line in found.of("tests").items()}
    broken = next(line for subject, line in short.items() if "test_broken" in subject)
    assert broken["state"] == "failed"
    assert "no_such_module" in broken["error"]
    del short[broken["subject"]]
    assert {name: line["state"] for name, line in short.items()} == {
        "test_passes": "passed",
        "test_order[bfloat16]": "passed",
        "test_crashes": "crashed",
        "test_fails": "failed",
        "test_skipped": "skipped",
        "test_order[float64]": "passed",
    }
    assert list(short)[-1] == "test_order[float64]"
    assert short["test_fails"]["error"].startswith("E   assert [1] == []")
    assert "assert [1] == []" in (out / LOG).read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert gpu_round.main(["--out", str(tmp_path / "out")]) == 1
    assert capfd.readouterr().err == "No GPU round: no GPU is visible to PyTorch.\n"
    assert not (tmp_path / "out").exists()


def test_a_round_ends_with_its_page(
    out: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_round.signal, "signal", lambda *_: None)  # this process keeps its own
    monkeypatch.setattr(gpu_round, "find_gpu", lambda: {"name": "NVIDIA H100 80GB", "capability": "9.0"})
    monkeypatch.setattr(gpu_round, "stages", lambda *_: [Stage(1, [step("smoke", "one", "wrong")])])
    assert gpu_round.main(["--out", str(out / "results"), "--commit", "abc", "--seconds", "50"]) == 1
    printed = capfd.readouterr().out
    assert "# Round on NVIDIA H100 80GB\n\ncommit abc, 50.0 s at most" in printed
    assert "* smoke failed: wrong: output is 1.0e+00 off" in printed
    assert sorted(path.name for path in (out / "results").iterdir()) == ["report.md", JOURNAL, LOG]


def test_the_plan_can_be_run() -> None:
    plan = gpu_round.stages("abc", "9.0")
    assert sum(stage.seconds for stage in plan) == 540
    for one in (one for stage in plan for one in stage.steps):
        assert importlib.util.find_spec(one.command[0])
    gpu = torch.device("cuda")
    first, later = times.first(gpu), times.later(gpu)
    assert {str(job) for job in first} < {str(job) for job in later}
    assert len(set(map(str, later))) == len(later)
    in_training = 2 * len(times.NAMED)  # in both formats; of which no job is one of the first
    assert len(prepare.kernels()) == len(smoke.launches(gpu, ["triton"])) + len(first) + in_training


@pytest.fixture
def share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> journal.Share:
    """Of the step `times`, here."""
    (tmp_path / JOURNAL).touch()
    about = {"journal": str(tmp_path / JOURNAL), "step": "times", "process": "times.0", "end": time.time() + 60}
    monkeypatch.setenv(journal.VARIABLE, json.dumps({**about, "limit": 60}))
    quiet = {
        "enable": lambda *_: 0,
        "dump_traceback_later": lambda *_, **__: 0,
        "cancel_dump_traceback_later": lambda: 0,
    }
    monkeypatch.setattr(journal, "faulthandler", types.SimpleNamespace(**quiet))
    return journal.Share()


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The jobs of one case, tiny, on the CPU."""
    with tiny():
        monkeypatch.setattr(times, "DEVICE", CPU)
        monkeypatch.setattr(times, "NAMED", [CASES["lip"]])
        monkeypatch.setattr(times, "CASES", ["lip"])
        monkeypatch.setattr(times, "SUBJECTS", times.FIRST)
        monkeypatch.setattr(times, "PEERS", ["eager"])
        monkeypatch.setattr(times, "SECONDS", 0.001)
        times.limits.cache_clear()
        yield


@pytest.mark.parametrize("which", ["first", "later"])
def test_results_come_out_as_those_of_the_benchmarks(
    which: str, on_a_cpu: None, share: journal.Share, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = measure.measure

    def lost(work: Any, *args: Any) -> Any:
        yield from right(work, *args)
        if (work.subject.name, work.memory_format) == ("attention", "channels_last"):
            raise measure.DeviceLost("triton failed: CUDA error")

    monkeypatch.setattr(measure, "measure", lost)
    monkeypatch.setattr("sys.argv", ["times", which])
    share.journal.write(about={"gpu": "NVIDIA H100", "commit": "abc", "seconds": 540, "steps": ["times"]})
    times.main()
    page.write(tmp_path)
    data = json.loads((tmp_path / "nvidia-h100.json").read_text())
    for memory_format in cases.MEMORY_FORMATS:
        lines = [line for line in data["results"] if line["memory_format"] == memory_format]
        expected = {(name, what) for name in times.FIRST for what in LAYERS[name].passes}
        assert {(line["subject"], line["pass"]) for line in lines} == expected
    assert data["failed"] == {"attention lip bfloat16 channels_last": "DeviceLost: triton failed: CUDA error"}
    assert data["limits"] == (
        {"bfloat16": {"bytes_per_second": 1e10, "flops_per_second": 1e11}} if which == "first" else {}
    )
    assert {"device", "quick", "host", "commit"} <= data.keys()
    assert data["missing"] == []


def test_what_is_compiled_and_profiled_runs(on_a_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("synchronize", "profiler.start", "profiler.stop"):
        monkeypatch.setattr(f"torch.cuda.{name}", functools.partial(calls.append, name))
    for job in times.first(CPU)[:3]:
        if job.workload.subject.name in cases.OPS:
            times.launch(job)
        profile.launch(str(job), "reference")
    assert calls == ["synchronize", "profiler.start", "synchronize", "profiler.stop"] * 3


def test_a_page_of_everything(share: journal.Share, tmp_path: Path) -> None:
    line = {**result(eager=2e-3, compile=4e-3, triton=1e-3), "floor": 5e-4}
    backward = {**result(eager=2e-3, triton=4e-3, native=2.5e-3), "floor": 5e-4}
    backward |= {"pass": "backward", "ours": ["triton", "native"]}
    wrong = {**result(eager=2.0), "memory_format": "channels_last", "problems": {"triton": "wrong: output 0"}}
    subjects = {f"test_parity.py::test_regions[{i}]": "failed" for i in range(30)} | {"test_x": "crashed"}
    write = share.journal.write
    write(about={"gpu": "NVIDIA H100", "commit": "abc", "seconds": 540, "steps": ["machine", "times", "tests"]})
    facts = {"commit": "abcdef", "versions": {"torch": "2.11.0", "triton": None}}
    limits = {"bytes_per_second": 3e12, "flops_per_second": 7.9e14}
    ends: list[tuple[str, str, str, dict[str, Any]]] = [
        ("machine", "machine", "passed", {"result": facts}),
        ("times", times.LIMITS, "passed", {"result": limits}),
        ("times", "attention tiny bfloat16", "passed", {"result": [line, backward, wrong]}),
        *(("tests", name, state, {"error": "E   assert"}) for name, state in subjects.items()),
        ("profile", "triton attention tiny", "passed", {"result": profile.parse(NCU)}),
    ]
    for of, subject, state, more in ends:
        write(step=of, process="1", subject=subject, state=state, seconds=1.0, **more)
    (tmp_path / LOG).write_text("memcheck.0 | ========= Invalid __global__ read of size 2 bytes\n" * 3)
    text = page.write(tmp_path)
    assert "commit abcdef, torch 2.11.0, 540 s at most" in text
    assert "A large copy ran at 3000 GB/s, a large product in bfloat16 at 790 TFLOP/s." in text
    assert "| attention | tiny | t 1000 us 50% 2.00x 4.00x | n 2500 us 20% 0.80x - | triton wrong |  |" in text
    assert "* tests crashed: test_x: E   assert\n* tests failed: test_parity.py::test_regions[0] (30 times): E" in text
    assert text.count("memcheck: Invalid __global__ read") == 1
    assert "| triton attention tiny | gather_kernel | 85.6 | 41.2% | 20% | 12.5% | long_scoreboard |" in text
    loses = "attention tiny contiguous backward: native loses 2000 us, slower than eager"
    assert f"* {loses}\n" in text
    assert len(text.splitlines()) < 60


def test_what_to_change_first_is_what_loses_most(share: journal.Share, tmp_path: Path) -> None:
    lines = [{**result(eager=2e-3, triton=time), "floor": 5e-4, "case": case} for case, time in
             (("lip", 6e-4), ("ade20k", 3e-3), ("interactive", 4e-4))]  # fmt: skip
    write = share.journal.write
    write(about={"gpu": "NVIDIA H100", "commit": "abc", "seconds": 540, "steps": ["times"]})
    for of, subject, found in (
        ("times", "attention", lines),
        ("profile", "triton attention ade20k bfloat16 contiguous", profile.parse(NCU)),
    ):
        write(step=of, process="1", subject=subject, state="passed", seconds=1.0, result=found)
    (tmp_path / LOG).touch()
    text = page.write(tmp_path).partition("## What to change first")[2].partition("##")[0]
    assert [line for line in text.splitlines() if line.startswith("*")] == [
        "* attention ade20k contiguous forward: triton loses 2500 us, slower than eager; "
        "gather_kernel takes 85.6 us and waits for long_scoreboard",
        "* attention lip contiguous forward: triton loses 100 us",
    ]


NCU = """==PROF== Profiling "gather_kernel" - 0: 0%....50%....100% - 12 passes
"ID","Process ID","Kernel Name","dram__throughput.avg.pct_of_peak_sustained_elapsed","gpu__time_duration.sum",\
"sm__throughput.avg.pct_of_peak_sustained_elapsed","sm__warps_active.avg.pct_of_peak_sustained_active",\
"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_selected_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_wait_per_issue_active.ratio"
"","","","%","ns","%","%","inst","inst","inst"
"0","77","gather_kernel","41.20","85,600","20.00","12.50","7.10","9.00","1.10"
"1","77","other_kernel","nan","n/a","","12.50","","",""
"""


def test_what_the_profiler_prints_is_read() -> None:
    first, other = profile.parse(NCU)
    assert first == {
        "kernel": "gather_kernel",
        "us": 85.6,
        "dram": 41.2,
        "sm": 20.0,
        "occupancy": 12.5,
        "stall": "long_scoreboard",
    }
    assert (other["kernel"], other["us"], other["stall"]) == ("other_kernel", None, None)
    assert profile.parse("==ERROR== The user does not have permission") == []


def test_the_slowest_are_profiled(share: journal.Share) -> None:
    def job(name: str, floor: float, **times: float) -> None:
        lines = [{**result(**times), "floor": floor}]
        share.journal.write(step="times", process="1", subject=name, state="passed", seconds=1.0, result=lines)

    job("gather lip bfloat16 contiguous", 1e-4, triton=2e-4)
    job("gather lip bfloat16 channels_last", 1e-4, triton=5e-4)
    job("gather ade20k bfloat16 contiguous", 1e-4, triton=4e-4)
    job("gather interactive bfloat16 contiguous", 1e-6, triton=1e-3)
    share.journal.update()
    assert profile.slowest(share.journal) == [
        ("gather lip bfloat16 channels_last", "triton"),
        ("gather ade20k bfloat16 contiguous", "triton"),
    ]


@pytest.mark.parametrize(
    "name", ["native gather", "native attention", "triton gather", "triton attention", "block", "training"]
)
def test_smoke_on_a_cpu(name: str) -> None:
    regions, least = ("K=1 ", "1x1") if "triton" in name else ("K=", "33x31")
    for subject, run in smoke.subjects(CPU, ["native", "triton"]).items():
        if subject.startswith(name) and regions in subject and least in subject and "K=300" not in subject:
            with contextlib.suppress(journal.Skipped):
                assert "output" in run()


def test_smoke_finds_faults() -> None:
    x = torch.randn(3, 4)
    assert smoke.check([x], lambda: [x.double()], 1e-5) == {"output": 0.0}
    for wrong in (1.001 * x, x * float("nan")):
        with pytest.raises(AssertionError, match=r"output is .* off, more than 1e-05"):
            smoke.check([wrong], lambda: [x.double()], 1e-5)


def test_compiling_does_not_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    jit = pytest.importorskip("triton.runtime.jit")
    calls: list[dict[str, Any]] = []
    compiled = types.SimpleNamespace(run=None)
    monkeypatch.setattr(jit.JITFunction, "run", lambda kernel, *args, **options: calls.append(options) or compiled)
    with prepare.compile_only():
        jit.JITFunction.run("kernel", 1, grid=(1,), warmup=False)
    assert calls == [{"grid": (1,), "warmup": True}]
