"""What the processes of a round have done, in one file: a line when a subject begins, a line when it ends.

Any number of processes work through the subjects of a step, each taking the next that none has begun. A process that
dies costs the subject that it had begun, and the one that replaces it goes on with the next.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

JOURNAL, LOG = "round.jsonl", "round.log"  # files of a round
STATES = ("passed", "failed", "crashed", "cut off", "skipped")  # crashed: the process died; cut off: time was up
VARIABLE = "OCR_KERNELS_ROUND"  # tells a process its share, see `Share`

Line = dict[str, Any]


class Journal:
    """Lines of JSON that several processes append, and what those read so far say."""

    def __init__(self, path: Path, hear: Callable[[Line], object] = lambda line: None) -> None:
        self.path, self._hear = path, hear  # called with each line that is read
        self.about: Line = {}  # the round
        self.subjects: dict[str, list[str]] = {}  # of each step, in order
        self.notes: dict[str, str] = {}  # why a step, as a whole, did not do its work
        self.seconds: dict[str, float] = {}  # that a step took
        self.begun: dict[tuple[str, str], Line] = {}  # by step and subject
        self.ended: dict[tuple[str, str], Line] = {}
        self.processes: dict[str, Line | None] = {}  # what each one does now; None: nothing
        self.done: set[str] = set()  # processes that found no more to do
        self._offset = 0

    @contextlib.contextmanager
    def locked(self) -> Iterator[Callable[..., object]]:
        """No other process writes inside the block; it gets a function that does."""
        with self.path.open("ab", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield lambda **line: file.write((json.dumps(line) + "\n").encode())

    def write(self, **line: Any) -> None:
        with self.locked() as write:
            write(**line)

    def update(self) -> None:
        """Read what has been added."""
        with self.path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]
        self._offset += len(text)
        for line in text.splitlines():
            with contextlib.suppress(ValueError):  # a process died while it wrote
                self._read(json.loads(line))

    def _read(self, line: Line) -> None:
        self._hear(line)
        if "about" in line:
            self.about = line["about"]
            return
        step = line["step"]
        if "subjects" in line:
            self.subjects[step] = line["subjects"]
        elif "note" in line:
            self.notes[step] = line["note"]
        elif "done" in line:
            self.done.add(line["process"])
        elif "subject" not in line:
            self.seconds[step] = line["seconds"]
        else:
            ended, key = "state" in line, (step, line["subject"])
            (self.ended if ended else self.begun)[key] = line
            self.processes[line["process"]] = None if ended else line

    def of(self, step: str) -> dict[str, Line]:
        """How the subjects of a step ended, in the order in which they did."""
        return {subject: line for (name, subject), line in self.ended.items() if name == step}

    def results(self, step: str) -> dict[str, Any]:
        return {subject: line["result"] for subject, line in self.of(step).items() if "result" in line}

    def unreached(self, step: str) -> list[str]:
        return [subject for subject in self.subjects.get(step, []) if (step, subject) not in self.ended]


class Skipped(Exception):
    """Raised by a subject that cannot run here."""


class Failed(Exception):
    """Raised by a subject that failed and has a result all the same."""

    def __init__(self, reason: str, result: Any = None) -> None:
        super().__init__(reason)
        self.result = result


class Share:
    """A process's share of a step's subjects."""

    def __init__(self) -> None:
        about = json.loads(os.environ[VARIABLE])
        self.journal = Journal(Path(about["journal"]))
        self._who = {"step": about["step"], "process": about["process"]}
        self._end: float = about["end"]
        self._limit: float = about["limit"]
        self.errors = os.fdopen(os.dup(2), "w", closefd=False)  # where pytest captures sys.stderr, too
        faulthandler.enable(self.errors)

    def take(self, subjects: Sequence[str]) -> Iterator[str]:
        """The subjects that no process has begun, one after another, until the step's time is up."""
        for subject in subjects:
            if time.time() > self._end:
                break
            if self.begin(subject, subjects):
                yield subject
        self.journal.write(**self._who, done=True)

    def begin(self, subject: str, subjects: Sequence[str] = ()) -> bool:
        """Whether it is this process that works on a subject; of all `subjects`, if the journal is to list them."""
        step = self._who["step"]
        if (step, subject) in self.journal.begun:
            return False
        with self.journal.locked() as write:
            self.journal.update()
            if subjects and step not in self.journal.subjects:
                write(step=step, subjects=list(subjects))
            if (step, subject) in self.journal.begun:
                return False
            write(**self._who, subject=subject, time=time.time())
        faulthandler.dump_traceback_later(self._limit, file=self.errors)  # the round ends the process soon after
        return True

    def end(self, subject: str, state: str, **facts: Any) -> None:
        """Write down how a subject ended. A process that lost its device ends here: nothing more can run in it."""
        faulthandler.cancel_dump_traceback_later()
        lost = device_error()
        if lost is not None:
            error = facts.get("error") or lost
            state, facts["error"] = "crashed", error if lost in error else f"{error} ({lost})"
        self.journal.update()
        seconds = time.time() - self.journal.begun[self._who["step"], subject]["time"]
        line = {**self._who, "subject": subject, "state": state, "seconds": round(seconds, 3), **facts}
        self.journal.write(**{name: value for name, value in line.items() if value is not None})
        if lost is not None:
            sys.stdout.flush()
            os._exit(1)  # what would run at the end of the process needs the device as well


def work(subjects: Mapping[str, Callable[[], Any]], share: Share | None = None) -> None:
    """Call this process's share of the subjects; what they return or raise goes into the journal."""
    share = share or Share()
    for name in share.take(list(subjects)):
        try:
            share.end(name, "passed", result=subjects[name]())
        except Skipped as skipped:
            share.end(name, "skipped", error=str(skipped))
        except Exception as error:
            traceback.print_exc()
            reason = str(error) if isinstance(error, (Failed, AssertionError)) else f"{type(error).__name__}: {error}"
            share.end(name, "failed", error=reason[:2000], result=getattr(error, "result", None))


def device_error() -> str | None:
    """What every CUDA call of this process raises after a kernel's illegal access or failed assertion."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None
