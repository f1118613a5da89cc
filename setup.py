"""Everything is declared in pyproject.toml, save the compiled library, which is declared here.

The environment variable OCR_KERNELS_BUILD says what is built:

auto  what this machine can, and it says what was left out and why; the default
none  nothing
cpu   the kernels for CPUs, or it fails
cuda  those and the kernels for GPUs, or it fails

`auto` builds the kernels for GPUs where PyTorch is a CUDA build and nvcc is there: in CUDA_HOME, else on PATH. Like
PyTorch's own builds, TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX") says for which GPUs; it does not matter which are there.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

KERNELS = [f"csrc/{op}/cpu_kernels.cpp" for op in ("attention", "block", "gather")]  # compiled once per instruction set
OTHERS = ["csrc/cpu/registration.cpp"]  # compiled once
FOR_GPUS = ["csrc/attention/gpu.cu", "csrc/gather/gpu.cu", "csrc/gpu/registration.cpp"]  # a library of its own
STABLE_ABI = ("TORCH_TARGET_VERSION", "0x020b000000000000")  # PyTorch 2.11

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
INSTRUCTION_SETS = {"avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]}
CAPABILITIES = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]  # those of them that nvcc knows, and PTX of the last


class BuildFromNothing(build_py):
    """First removes what an earlier build left in the folder that a wheel is made of."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(os.path.join(self.build_lib, "ocr_kernels"), ignore_errors=True)
        super().run()


class ForAnyPython(bdist_wheel):
    """The libraries are no modules of Python's: one wheel serves all Pythons, free-threaded ones too."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def configuration() -> dict[str, Any]:
    """The arguments of `setup` that the compiled library needs."""
    mode = os.environ.get("OCR_KERNELS_BUILD") or "auto"
    if mode not in ("auto", "none", "cpu", "cuda"):
        sys.exit(f"OCR_KERNELS_BUILD must be auto, none, cpu or cuda, but is {mode!r}")
    if mode == "none":
        return {}
    if find_spec("torch") is None:
        look_behind_isolation()
    problem = obstacle()
    if problem is not None:
        leave_out("compiled library", mode, problem)
        return {}
    gpus = None
    if mode != "cpu":
        try:
            gpus = gpu_compiler(asked_for=mode == "cuda")
        except RuntimeError as error:
            leave_out("kernels for GPUs", mode, error)
    return libraries(optional=mode == "auto", gpus=gpus)


def leave_out(what: str, mode: str, problem: object) -> None:
    """Say why something is not built, and exit where it was asked for."""
    if mode != "auto":
        sys.exit(f"OCR_KERNELS_BUILD={mode}: the {what} cannot be built: {problem}")
    print(f"ocr_kernels: the {what} will be left out: {problem}", file=sys.stderr)


def look_behind_isolation() -> None:
    """Find the PyTorch that pip hides from a build, where it is installed; what the build brings itself comes first."""
    places = site.getsitepackages()
    if sys.prefix == sys.base_prefix:  # no virtual environment
        places.append(site.getusersitepackages())
    sys.path += [place for place in places if place not in sys.path]
    found = find_spec("torch")
    if found is not None:
        print(f"ocr_kernels: building for the PyTorch in {found.submodule_search_locations[0]}", file=sys.stderr)


def obstacle() -> str | None:
    """Why the library cannot be built here; None where it can."""
    try:
        from torch.utils import cpp_extension
    except Exception as error:  # a broken installation raises anything
        return (
            f"PyTorch does not import ({type(error).__name__}: {error}); install it first. Other installers than pip "
            "may need --no-build-isolation to find it"
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

    csrc/cpu/isa.h counts on all four on x86-64. A compiler that lacks a flag makes a variant from the flags of the
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


def gpu_compiler(asked_for: bool) -> tuple[str, list[str]]:
    """nvcc, and what it is to compile for: sm_80 is machine code, compute_80 what a newer GPU's driver compiles itself.

    Raises:
        RuntimeError: why the kernels for GPUs are not built here.
    """
    import torch

    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [os.path.join(home, "bin")] if home else [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(places))
    if torch.version.cuda is None and not asked_for:
        anyway = "; OCR_KERNELS_BUILD=cuda builds them all the same" if nvcc else ""
        raise RuntimeError(f"this PyTorch is a {'ROCm' if torch.version.hip else 'CPU'} build{anyway}")
    if nvcc is None:
        place = f"in {places[0]}" if home else "on PATH"
        raise RuntimeError(f"there is no nvcc {place}; set CUDA_HOME, or install one")
    try:
        known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"nvcc does not run: {error}") from error
    ours = [capability for capability in CAPABILITIES if f"sm_{capability.replace('.', '')}" in known]
    architectures = []
    for wanted in (os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(ours) + "+PTX").replace(";", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", wanted)
        if match is None or f"sm_{match[1]}{match[2]}" not in known:
            raise RuntimeError(f"nvcc does not know {wanted!r} (TORCH_CUDA_ARCH_LIST), but {' '.join(known)}")
        number = "".join(match.group(1, 2, 3))
        architectures += [f"sm_{number}", f"compute_{number}"][: 2 if match[4] else 1]
    return nvcc, architectures


def libraries(optional: bool, gpus: tuple[str, list[str]] | None) -> dict[str, Any]:
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    variants = list(instruction_sets())
    version = re.search(r'__version__ = "(.+)"', Path("ocr_kernels/__init__.py").read_text(encoding="utf-8"))[1]
    names = " ".join(name for name, _, knows in variants if knows)
    windows = os.name == "nt"

    class Build(BuildExtension):
        """Compiles `KERNELS` once per instruction set, each with flags of its own, with ninja or without."""

        def run(self) -> None:
            package = os.path.dirname(self.get_ext_fullpath(cpu.name))  # of the checkout, if built in place
            for folder in (package, os.path.join(self.build_lib, "ocr_kernels")):
                for library in Path(folder).glob("libocr_kernels_*.so"):
                    library.unlink()  # an earlier build's, perhaps for another PyTorch
            super().run()

        def build_extension(self, extension: Extension) -> None:
            if extension is not cpu:
                self.build_for_gpus(extension)
                return
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

        def build_for_gpus(self, extension: Extension) -> None:
            """With nvcc alone, since BuildExtension compiles nothing for GPUs where PyTorch is a CPU build."""
            if not os.path.exists(self.get_ext_fullpath(cpu.name)):
                raise CompileError("it needs the library for CPUs, which is not there")
            nvcc, architectures = gpus
            jobs = os.environ.get("MAX_JOBS", "")
            jobs = max(1, int(jobs) if jobs.isdigit() else os.cpu_count() or 1)
            flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", f"--threads={max(1, jobs // 2)}"]  # two .cu files
            flags += ["-Xcompiler", "/MD" if windows else "-fPIC,-fvisibility=hidden"]
            flags += [f"-gencode=arch=compute_{a.split('_')[1]},code={a}" for a in architectures]
            defined = [*macros, ("USE_CUDA", "1"), ("OCR_CUDA_ARCHITECTURES", f'"{" ".join(architectures)}"')]
            flags += [f"-D{name}={value}" for name, value in defined]
            flags += [f"-I{path}" for path in cpp_extension.include_paths()]

            def compiled(source: str) -> str:
                target = os.path.join(self.build_temp, "cuda", source + ".o")
                os.makedirs(os.path.dirname(target), exist_ok=True)
                self.spawn([nvcc, *flags, "-c", source, "-o", target])
                return target

            with ThreadPoolExecutor(jobs) as pool:
                objects = list(pool.map(compiled, FOR_GPUS))
            # libtorch brings PyTorch's library for GPUs where there is one; a CPU build has none to link with.
            linked = ["-ltorch_cpu", "-ltorch_cuda"] if windows else ["-Xlinker=--no-as-needed,--exclude-libs,ALL"]
            linked += ["-ltorch", *(f"-L{path}" for path in cpp_extension.library_paths())]
            target = self.get_ext_fullpath(extension.name)
            self.spawn([nvcc, "-shared", "-cudart=static", *objects, *linked, "-o", target])

        def get_ext_filename(self, name: str) -> str:
            """No module of Python's: its name says nothing of one, on any system."""
            return os.path.join(*name.split(".")) + ".so"

    macros = [STABLE_ABI, ("OCR_KERNELS_VERSION", f'"{version}"')]
    cpu = CppExtension(
        "ocr_kernels.libocr_kernels_cpu",
        OTHERS,
        depends=[str(header) for header in sorted(Path("csrc").rglob("*.h"))],
        define_macros=[*macros, ("OCR_INSTRUCTION_SETS", f'"{names}"')],
        py_limited_api=True,  # it is not linked with PyTorch's library for Python
        optional=optional,
        extra_compile_args=[],
    )
    extensions = [cpu]
    if gpus:
        extensions.append(Extension("ocr_kernels.libocr_kernels_cuda", [], optional=optional))
    return {"ext_modules": extensions, "cmdclass": {"build_ext": Build, "bdist_wheel": ForAnyPython}}


configured = configuration()
configured.setdefault("cmdclass", {})["build_py"] = BuildFromNothing
setup(**configured)
