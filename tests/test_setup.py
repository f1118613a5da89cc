"""What is installed: pins, what the wheel contains, what is built, and the example that uses it from C++."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import ocr_kernels
from ocr_kernels.core.libraries import library, problem

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


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what is needed to build, with nothing built in it."""
    pytest.importorskip("setuptools", minversion="77")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("benchmarks", "csrc", "ocr_kernels", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return tmp_path


def build_wheel(checkout: Path, before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """What `pip wheel --no-build-isolation` does."""
    build = f"{before}\nfrom setuptools import build_meta; build_meta.build_wheel('.')"
    environment = os.environ | environment
    return subprocess.run([sys.executable, "-c", build], cwd=checkout, env=environment, capture_output=True, text=True)


needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which(os.environ.get("CXX", "c++")) is None,
    reason="needs Linux and a C++ compiler",
)

PURE = f"ocr_kernels-{ocr_kernels.__version__}-py3-none-any.whl"


def test_wheel_contains_the_package_and_nothing_else(checkout: Path) -> None:
    result = build_wheel(checkout, OCR_KERNELS_BUILD="none")
    assert result.returncode == 0, result.stderr
    (wheel,) = checkout.glob("*.whl")
    assert wheel.name == PURE
    names = zipfile.ZipFile(wheel).namelist()
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ocr_kernels").rglob("*.py")}
    assert {"ocr_kernels/py.typed", *sources} == {name for name in names if ".dist-info/" not in name}
    assert any(name.endswith("/licenses/LICENSE") for name in names)


ABSENT = {"CXX": "absent-compiler"}


@pytest.mark.parametrize(
    ("mode", "environment", "message"),
    [
        ("abacus", {}, "OCR_KERNELS_BUILD must be auto, none, cpu or cuda, but is 'abacus'"),
        ("cpu", ABSENT, "OCR_KERNELS_BUILD=cpu: the compiled library cannot be built"),
        ("cuda", ABSENT, "OCR_KERNELS_BUILD=cuda: the compiled library cannot be built"),
        pytest.param(
            "cuda",
            {"CUDA_HOME": "absent"},
            "OCR_KERNELS_BUILD=cuda: the kernels for GPUs cannot be built: there is no nvcc in absent",
            marks=needs_compiler,
        ),
    ],
)
def test_what_was_asked_for_is_built_or_fails(
    checkout: Path, mode: str, environment: dict[str, str], message: str
) -> None:
    result = build_wheel(checkout, OCR_KERNELS_BUILD=mode, **environment)
    assert result.returncode != 0
    assert message in result.stderr
    assert not list(checkout.glob("*.whl"))


@pytest.mark.parametrize("missing", ["compiler", "PyTorch"])
def test_installing_needs_neither_compiler_nor_pytorch(checkout: Path, missing: str) -> None:
    """It says what is left out and why."""
    if missing == "compiler":
        result = build_wheel(checkout, CXX="absent-compiler")
        reason = "No such file or directory: 'absent-compiler'"
    else:
        (checkout / "hidden" / "torch").mkdir(parents=True)
        (checkout / "hidden" / "torch" / "__init__.py").write_text("raise ImportError('no torch here')")
        result = build_wheel(checkout, PYTHONPATH=str(checkout / "hidden"))
        reason = "PyTorch does not import (ImportError: no torch here)"
    assert result.returncode == 0, result.stderr
    assert "ocr_kernels: the compiled library will be left out: " in result.stderr
    assert reason in result.stderr
    assert [wheel.name for wheel in checkout.glob("*.whl")] == [PURE]


def test_pytorch_that_pip_hides_is_found(checkout: Path) -> None:
    """A build of pip's sees nothing of site-packages but what it requires itself."""
    installed, required = checkout / "installed", checkout / "required"
    (installed / "torch").mkdir(parents=True)
    (installed / "torch" / "__init__.py").write_text("raise ImportError('found, and broken')")
    required.mkdir()
    packages = Path(pytest.importorskip("setuptools").__file__).parent.parent
    for part in packages.glob("setuptools*"):
        (required / part.name).symlink_to(part)
    hide = f"""
import site, sys
sys.path = [{str(required)!r}, *(place for place in sys.path if not place.endswith("-packages"))]
site.getsitepackages = lambda: [{str(installed)!r}]
"""
    result = build_wheel(checkout, hide)
    assert result.returncode == 0, result.stderr
    assert f"ocr_kernels: building for the PyTorch in {installed / 'torch'}\n" in result.stderr
    assert "PyTorch does not import (ImportError: found, and broken)" in result.stderr


def test_a_compiler_that_fails_later_leaves_the_library_out(checkout: Path) -> None:
    (checkout / "csrc" / "cpu" / "registration.cpp").write_text("#error\n")
    for source in checkout.glob("csrc/*/cpu_kernels.cpp"):
        source.write_text("")
    result = build_wheel(checkout)
    assert result.returncode == 0, result.stderr
    assert not libraries(checkout)
    assert build_wheel(checkout, OCR_KERNELS_BUILD="cpu").returncode != 0


@pytest.fixture
def nvcc(checkout: Path) -> Path:
    """It knows one GPU, compiles nothing, and is told on if it runs; and there is little for other compilers to do."""
    for source in checkout.glob("csrc/**/*.cpp"):
        source.write_text("")
    file = checkout / "cuda" / "bin" / "nvcc"
    file.parent.mkdir(parents=True)
    file.write_text(f"#!/bin/sh\necho $* >>{checkout}/ran\n[ $1 = --list-gpu-code ] && echo sm_80\n")
    file.chmod(0o755)
    return file


def libraries(checkout: Path) -> list[str]:
    (wheel,) = checkout.glob("*.whl")
    return [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


@needs_compiler
@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch is a CUDA build")
def test_a_cpu_build_of_pytorch_needs_no_kernels_for_gpus(checkout: Path, nvcc: Path) -> None:
    result = build_wheel(checkout, CUDA_HOME=str(nvcc.parent.parent))
    assert result.returncode == 0, result.stderr
    reason = "this PyTorch is a CPU build; OCR_KERNELS_BUILD=cuda builds them all the same"
    assert f"ocr_kernels: the kernels for GPUs will be left out: {reason}\n" in result.stderr
    assert libraries(checkout) == ["ocr_kernels/libocr_kernels_cpu.so"]
    assert not (checkout / "ran").exists()


@needs_compiler
def test_an_nvcc_that_fails_later_leaves_the_kernels_for_gpus_out(checkout: Path, nvcc: Path) -> None:
    environment = {"CUDA_HOME": str(nvcc.parent.parent), "TORCH_CUDA_ARCH_LIST": ""}
    result = build_wheel(checkout, "import torch; torch.version.cuda = '13.0'", **environment)
    assert result.returncode == 0, result.stderr
    assert "ocr_kernels.libocr_kernels_cuda" in result.stdout + result.stderr
    assert libraries(checkout) == ["ocr_kernels/libocr_kernels_cpu.so"]
    for code in ("sm_80", "compute_80"):
        assert f"-gencode=arch=compute_80,code={code} " in (checkout / "ran").read_text()
    assert build_wheel(checkout, OCR_KERNELS_BUILD="cuda", **environment).returncode != 0


@needs_compiler
def test_an_earlier_builds_outputs_reach_no_wheel(checkout: Path, nvcc: Path) -> None:
    """A library for GPUs, of a compiler that pretends, then one for CPUs alone, then none, in one checkout."""
    nvcc.write_text(
        "#!/bin/sh\n[ $1 = --list-gpu-code ] && echo sm_80\n"
        "while [ $# -gt 1 ]; do [ $1 = -o ] && echo pretended >$2; shift; done; exit 0\n"
    )
    (checkout / "ocr_kernels" / "moved.py").write_text("")
    built = []
    for mode in ("cuda", "cpu", "none"):
        result = build_wheel(checkout, OCR_KERNELS_BUILD=mode, CUDA_HOME=str(nvcc.parent.parent), MAX_JOBS="2")
        assert result.returncode == 0, result.stderr
        (wheel,) = checkout.glob("*.whl")
        names = zipfile.ZipFile(wheel).namelist()
        built.append([name for name in names if name.endswith((".so", "moved.py"))])
        (checkout / "ocr_kernels" / "moved.py").unlink(missing_ok=True)
        wheel.unlink()
    cpu, cuda = "ocr_kernels/libocr_kernels_cpu.so", "ocr_kernels/libocr_kernels_cuda.so"
    assert [sorted(names) for names in built] == [[cpu, cuda, "ocr_kernels/moved.py"], [cpu], []]


@needs_compiler
def test_an_earlier_builds_libraries_do_not_stay_in_the_checkout(checkout: Path, nvcc: Path) -> None:
    (checkout / "ocr_kernels" / "libocr_kernels_cuda.so").touch()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(
        command, cwd=checkout, env=os.environ | {"OCR_KERNELS_BUILD": "cpu"}, check=True, capture_output=True
    )
    assert [path.name for path in (checkout / "ocr_kernels").glob("*.so")] == ["libocr_kernels_cpu.so"]


@needs_compiler
@pytest.mark.parametrize("wanted", ["9.0", "8.0;Hopper", "8"])
def test_unknown_gpus_are_refused(checkout: Path, nvcc: Path, wanted: str) -> None:
    environment = {"CUDA_HOME": str(nvcc.parent.parent), "TORCH_CUDA_ARCH_LIST": wanted}
    result = build_wheel(checkout, OCR_KERNELS_BUILD="cuda", **environment)
    assert result.returncode != 0
    assert f"nvcc does not know {wanted.split(';')[-1]!r} (TORCH_CUDA_ARCH_LIST), but sm_80" in result.stderr


@needs_compiler
@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_kernels_for_gpus_are_built_without_one(checkout: Path) -> None:
    """With any PyTorch; they are a library of their own in the same wheel."""
    result = build_wheel(checkout, OCR_KERNELS_BUILD="cuda", TORCH_CUDA_ARCH_LIST="9.0+PTX")
    assert result.returncode == 0, result.stderr
    names = ["ocr_kernels/libocr_kernels_cpu.so", "ocr_kernels/libocr_kernels_cuda.so"]
    assert sorted(libraries(checkout)) == names
    (wheel,) = checkout.glob("*-py3-none-linux_*.whl")
    assert b"sm_90 compute_90" in zipfile.ZipFile(wheel).read(names[1])


@needs_compiler
@pytest.mark.slow
@pytest.mark.wide
def test_wheel_in_an_empty_environment(checkout: Path) -> None:
    """One wheel for all Pythons, with the library in it; it runs where there is PyTorch and no checkout."""
    result = build_wheel(checkout, OCR_KERNELS_BUILD="cpu")
    assert result.returncode == 0, result.stderr
    (wheel,) = checkout.glob("*.whl")
    assert wheel.name.startswith(f"ocr_kernels-{ocr_kernels.__version__}-py3-none-linux_")
    assert libraries(checkout) == ["ocr_kernels/libocr_kernels_cpu.so"]
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.startswith(("csrc", "tests"))]

    ours = "PYTHONPATH", "OCR_KERNELS_LIBRARY", "TRITON_INTERPRET"
    clean = {k: v for k, v in os.environ.items() if k not in ours}
    environment = checkout / "environment"
    venv.create(environment)
    (packages,) = environment.glob("lib/python*/site-packages")
    install = [sys.executable, "-m", "pip", "--python", str(environment), "install", "--no-deps", str(wheel)]
    subprocess.run(install, env=clean, check=True, capture_output=True)
    (packages / "torch.pth").write_text(str(Path(torch.__file__).parent.parent))  # after what is installed there

    def printed(*arguments: str) -> str:
        run = [environment / "bin" / "python", *arguments]
        return subprocess.run(run, cwd=environment, env=clean, check=True, capture_output=True, text=True).stdout

    assert printed(str(ROOT / "tests" / "smoke.py")).split() == [
        str(packages / "ocr_kernels" / name) for name in ("__init__.py", "libocr_kernels_cpu.so")
    ]
    bench = "-m ocr_kernels bench --device cpu --cases interactive-w18 --subjects gather --peers eager --json a.json"
    assert "Failed or wrong: none" in printed(*bench.split())
    results = json.loads((environment / "a.json").read_text())
    assert (results["commit"], [line["ours"] for line in results["results"]]) == ("unknown", [["native"]] * 3)


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(problem() is not None, reason=str(problem()))
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs CMake")
def test_cpp_example(tmp_path: Path) -> None:
    for command in (
        ["cmake", "-S", ROOT / "examples/cpp", "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"],
        ["cmake", "--build", tmp_path],
        [tmp_path / "example", library()],
    ):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == "regions [2, 64, 19], context [2, 32, 16, 32]: as the formulas have them\n"
