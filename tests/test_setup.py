"""What is installed: pins, and what the wheel contains."""

import itertools
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import ocr_kernels

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_every_requirement_has_one_pin_that_satisfies_it(python: str) -> None:
    environment = {"python_version": python, "platform_system": "Linux"}
    pins: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate(environment):
                assert pin.name not in pins, f"two pins of {pin.name}"
                pins[pin.name] = str(pin.specifier).removeprefix("==")

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"].values()
    requirements = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *itertools.chain(*extras),
    ]
    wanted = [r for r in map(Requirement, requirements) if r.name != "ocr-kernels"]
    assert [r.name for r in wanted if not r.specifier.contains(pins.get(r.name, ""))] == []
    assert sorted({r.name for r in wanted}) == sorted(pins), "a pin that nothing requires"


def test_wheel_contains_the_package_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("ocr_kernels", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools import build_meta; build_meta.build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)

    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"ocr_kernels-{ocr_kernels.__version__}-")
    names = zipfile.ZipFile(wheel).namelist()
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ocr_kernels").rglob("*.py")}
    assert {"ocr_kernels/py.typed", *sources} == {name for name in names if ".dist-info/" not in name}
    assert any(name.endswith("/licenses/LICENSE") for name in names)
