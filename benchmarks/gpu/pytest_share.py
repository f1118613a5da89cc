"""A plugin of pytest: it runs this process's share of the tests, the most telling first."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from benchmarks.gpu.journal import Share

FIRST = ("test_gpu.py", "test_parity.py", "test_values.py", "test_head.py")  # then the others as they come
share = Share()  # before pytest captures what is printed
reports: list[pytest.TestReport] = []  # of the test that runs


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> tuple[bool, int, bool]:
        wide = item.get_closest_marker("wide") is not None
        rare = "float16" in item.name.replace("bfloat16", "") or "float64" in item.name
        return wide, FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST), rare

    items.sort(key=rank)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    name = f"collection of {report.nodeid}"
    if report.failed and share.begin(name):
        share.end(name, "failed", error=_tail(report))


def pytest_runtestloop(session: pytest.Session) -> bool:
    items = {item.nodeid: item for item in session.items}
    for name in share.take(list(items)):
        reports.clear()
        # without a next item everything is torn down, since no one knows which comes next here
        items[name].ihook.pytest_runtest_protocol(item=items[name], nextitem=None)
        failed = [report for report in reports if report.failed]
        skipped = [report for report in reports if report.skipped]
        for report in failed:
            print(report.longreprtext, file=share.errors, flush=True)
        error = _tail(failed[0]) if failed else None
        share.end(name, "failed" if failed else "skipped" if skipped else "passed", error=error)
        if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
            sys.modules["torch"].cuda.empty_cache()  # the other processes need the memory, too
    return True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    reports.append(report)


def _tail(report: Any) -> str:
    """The end of what pytest says of a failure."""
    errors = [line for line in report.longreprtext.splitlines() if line.startswith("E ")]
    return "\n".join(errors or report.longreprtext.splitlines()[-3:])[:500]
