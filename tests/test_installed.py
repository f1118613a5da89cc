"""The `test` extra: with its packages alone every test is collected, and what is tested is what is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest
from fresh import TESTS
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import ocr_kernels


def required(requirement: str) -> set[str]:
    """The distributions that come with `requirement` of this project, those that they require included."""
    project = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())["project"]
    ours = {"": project["dependencies"], **project["optional-dependencies"]}
    found: set[tuple[str, str]] = set()
    waiting = [Requirement(requirement)]
    while waiting:
        wanted = waiting.pop()
        for extra in {"", *wanted.extras}:
            if (wanted.name, extra) not in found:
                found.add((wanted.name, extra))
                lines = ours[extra] if wanted.name == "ocr-kernels" else metadata.requires(wanted.name) or ()
                waiting += [
                    r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate({"extra": extra})
                ]
    return {name for name, _ in found} - {"ocr-kernels"}


@pytest.mark.slow
@pytest.mark.wide
def test_the_extra_alone_tests_what_is_installed(tmp_path: Path) -> None:
    try:
        distributions = [metadata.distribution(name) for name in required("ocr-kernels[test]")]
    except metadata.PackageNotFoundError as missing:
        pytest.skip(f"the `test` extra is not installed: {missing}")
    venv.create(tmp_path)
    (packages,) = tmp_path.glob("lib/python*/site-packages")
    for distribution in distributions:
        for name in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (packages / name).exists():
                (packages / name).symlink_to(Path(distribution.locate_file(name)).resolve())
    shutil.copytree(Path(ocr_kernels.__file__).parent, packages / "ocr_kernels")

    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "PYTHONPATH", "OCR_KERNELS_"))}
    result = subprocess.run(
        [tmp_path / "bin" / "python", "-m", "pytest", "-p", "no:cacheprovider", "-k", "sum_to_one or is_the_command"],
        cwd=TESTS.parent,
        env=clean,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"package: {packages / 'ocr_kernels'}\n" in result.stdout
