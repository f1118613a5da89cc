"""Everything is declared in pyproject.toml, save the compiled library, which is declared here.

The environment variable OCR_KERNELS_BUILD says what is built:

auto  what this machine can, and it says what was left out and why; the default
none  nothing
cpu   the kernels for CPUs, or it fails
cuda  those and the kernels for GPUs, or it fails; there are none yet
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.errors import CompileError

KERNELS = ["csrc/attention/cpu_kernels.cpp", "csrc/gather/cpu_kernels.cpp"]  # compiled once per instruction set
OTHERS = ["csrc/registration.cpp", "csrc/attention/cpu.cpp", "csrc/gather/cpu.cpp"]  # compiled once
STABLE_ABI = ("TORCH_TARGET_VERSION", "0x020b000000000000")  # PyTorch 2.11

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
INSTRUCTION_SETS = {"avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]}


def configuration() -> dict[str, Any]:
    """The arguments of `setup` that the compiled library needs."""
    mode = os.environ.get("OCR_KERNELS_BUILD") or "auto"
    if mode not in ("auto", "none", "cpu", "cuda"):
        sys.exit(f"OCR_KERNELS_BUILD must be auto, none, cpu or cuda, but is {mode!r}")
    if mode == "cuda":
        sys.exit("OCR_KERNELS_BUILD=cuda: there are no compiled kernels for GPUs yet; use auto, none or cpu")
    if mode == "none":
        return {}
    problem = obstacle()
    if problem is None:
        return library(optional=mode == "auto")
    if mode == "cpu":
        sys.exit(f"OCR_KERNELS_BUILD=cpu: the compiled library cannot be built: {problem}")
    left_out(problem)
    return {}


def left_out(problem: str) -> None:
    print(f"ocr_kernels: the compiled library is left out: {problem}", file=sys.stderr)


def obstacle() -> str | None:
    """Why the library cannot be built here; None where it can."""
    try:
        from torch.utils import cpp_extension
    except Exception as error:  # a broken installation raises anything
        return (
            f"PyTorch does not import ({type(error).__name__}: {error}); where it is installed, "
            "pip install --no-build-isolation finds it"
        )
    if os.name == "nt":  # the compiler is found by setuptools later on
        return None
    flags = ["-std=c++17", *(f"-I{path}" for path in cpp_extension.include_paths())]
    error = compile_error("#include <torch/csrc/stable/library.h>\n", flags)
    return error and f"the C++ compiler does not compile PyTorch's headers: {error}"


def compile_error(source: str, flags: list[str]) -> str | None:
    """What the compiler says against `source`; None where it compiles."""
    from torch.utils.cpp_extension import get_cxx_compiler

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "probe.cpp")
        file.write_text(source)
        command = [*shlex.split(get_cxx_compiler()), *flags, "-c", str(file), "-o", str(file.with_suffix(".o"))]
        try:
            result = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            return f"{error}; set CXX, or install one"
    return (result.stderr.strip() or f"exit status {result.returncode}") if result.returncode else None


def instruction_sets() -> Iterator[tuple[str, list[str], bool]]:
    """The variants of the kernels: name, flags, and whether the compiler knows the instruction set.

    csrc/common/isa.h counts on all four on x86-64. A compiler that lacks a flag makes a variant from the flags of the
    one before.
    """
    yield "portable", [], True
    if os.name == "nt" or compile_error("#if !defined(__x86_64__) || !defined(__GNUC__)\n#error\n#endif\n", []):
        return
    known: list[str] = []
    for name, flags in INSTRUCTION_SETS.items():
        knows = compile_error("#include <immintrin.h>\n", flags) is None
        known = flags if knows else known
        yield name, known, knows


def library(optional: bool) -> dict[str, Any]:
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    variants = list(instruction_sets())
    version = re.search(r'__version__ = "(.+)"', Path("ocr_kernels/__init__.py").read_text(encoding="utf-8"))[1]
    names = " ".join(name for name, _, knows in variants if knows)
    windows = os.name == "nt"

    class Build(BuildExtension):
        """Compiles `KERNELS` once per instruction set, each with flags of its own, with ninja or without."""

        def build_extension(self, extension: Extension) -> None:
            if windows:
                options = ["/O2", "/std:c++17"]
            else:
                options = ["-std=c++17", "-fno-math-errno", "-ffp-contract=off", "-fvisibility=hidden"]
                options += ["-g", "-O1"] if self.debug else ["-g0", "-O3"]
            extension.extra_compile_args += options
            try:
                # In this order: of a function that several objects hold, the linker takes the first, so that what the
                # portable code calls is never one compiled for a newer processor.
                for name, flags, _ in variants:
                    extension.extra_objects += self.compiler.compile(
                        KERNELS,
                        output_dir=os.path.join(self.build_temp, name),
                        macros=[("OCR_ISA", name)],
                        extra_postargs=[*options, *flags],
                        depends=extension.depends,
                    )
                super().build_extension(extension)
            except RuntimeError as error:  # what ninja's failure becomes; setuptools lets this one pass if optional
                raise CompileError(str(error)) from error

        def get_ext_filename(self, name: str) -> str:
            """No module of Python's: its name says nothing of one, on any system."""
            return os.path.join(*name.split(".")) + ".so"

    extension = CppExtension(
        "ocr_kernels.libocr_kernels_cpu",
        OTHERS,
        depends=[str(header) for header in sorted(Path("csrc").rglob("*.h"))],
        define_macros=[
            STABLE_ABI,
            ("OCR_KERNELS_VERSION", f'"{version}"'),
            ("OCR_INSTRUCTION_SETS", f'"{names}"'),
        ],
        py_limited_api=True,
        optional=optional,
        extra_compile_args=[],
    )
    configured: dict[str, Any] = {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):  # wheels of free-threaded Pythons may not say abi3
        configured["options"] = {"bdist_wheel": {"py_limited_api": "cp310"}}
    return configured


setup(**configuration())
