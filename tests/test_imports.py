"""What importing needs, and which way the dependencies run."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from fresh import run

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ocr_kernels"

BLOCKED = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def test_compiles_where_CI_is_set() -> None:
    """Where it is, Inductor refuses ops that it does not know and for which PyTorch has a decomposition."""
    code = """
import torch
from ocr_kernels import pixel_region_attention, spatial_gather
x = torch.randn(1, 2, 3)
block = lambda x: (spatial_gather(x, x), pixel_region_attention(x, x, x))
torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x))
"""
    run(code, CI="1", TORCHINDUCTOR_FORCE_DISABLE_CACHES="1")


def test_works_with_torch_alone() -> None:
    """No Triton, no compiled library, no NumPy, nothing of the extras."""
    names = ["triton", "numpy", "rich", "matplotlib", "sklearn", "PIL", "pytest", "hypothesis"]
    out = run(
        BLOCKED.format(names=names)
        + """
import torch, ocr_kernels, ocr_kernels.modules, ocr_kernels.testing, ocr_kernels.cli
x = torch.randn(1, 2, 3, requires_grad=True)
ocr_kernels.spatial_gather(x, x).sum().backward()
ocr_kernels.pixel_region_attention(x, x.detach(), x.detach()).sum().backward()
print(ocr_kernels.available_backends()["triton"])
try:
    ocr_kernels.spatial_gather(x, x, backend="triton")
except RuntimeError as error:
    print(error)
"""
    )
    reason, error = out.splitlines()
    assert reason.startswith("Triton does not import (ModuleNotFoundError: No module named 'triton')")
    assert error == f"backend 'triton' cannot run: {reason}"


def test_importing_loads_neither_triton_nor_the_extras() -> None:
    out = run(
        "import sys, torch; before = set(sys.modules); import ocr_kernels;"
        "print(sorted({n.partition('.')[0] for n in set(sys.modules) - before}))"
    )
    assert not {"triton", "rich", "matplotlib", "sklearn", "PIL", "pytest"} & set(ast.literal_eval(out))
    assert "triton" not in run("import sys, ocr_kernels; print([n for n in sys.modules if 'core.triton' in n])")


def test_ops_exist_after_importing() -> None:
    assert run("import torch, ocr_kernels; print(torch.ops.ocr_kernels.spatial_gather.default)").startswith(
        "ocr_kernels.spatial_gather"
    )


@pytest.mark.parametrize(("value", "expected"), [("reference", "ok"), ("native", "cannot run"), ("fast", "one of")])
def test_environment_variable_chooses(value: str, expected: str) -> None:
    """A wrong value does not stop the import; the first call says what is wrong."""
    out = run(
        """
import torch, ocr_kernels
x = torch.randn(1, 2, 3)
try:
    ocr_kernels.spatial_gather(x, x)
    print("ok")
except (RuntimeError, ValueError) as error:
    print(error)
""",
        OCR_KERNELS_BACKEND=value,
        OCR_KERNELS_LIBRARY="absent.so",
    )
    assert expected in out


def test_triton_refuses_cpu_tensors_without_the_interpreter() -> None:
    out = run(
        """
import torch, ocr_kernels
ocr_kernels.core.backends._triton_problem = lambda: None  # as on a machine with a GPU
try:
    ocr_kernels.spatial_gather(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), backend="triton")
except RuntimeError as error:
    print(error)
"""
    )
    assert out.startswith("backend 'triton' cannot run on a cpu tensor: it needs a GPU tensor")


OPS = ("gather", "attention", "block")


def levels() -> list[set[str]]:
    """The files as docs/design.md lists them, a group for each level; a file imports those of the groups before it."""
    text = (ROOT / "docs" / "design.md").read_text().partition("\n## Levels\n")[2].split("```")[1]
    groups = ([line.split()[0] for line in group.splitlines()] for group in text.strip().split("\n\n"))
    return [{file.replace("OP", op, 1) for file in group for op in OPS} for group in groups]


def imports(path: Path) -> set[str]:
    """The modules of this package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [n for n in inside if is_module(n)] or [node.module]
        else:
            continue
        found |= {n.removeprefix("ocr_kernels").removeprefix(".") for n in names if n.split(".")[0] == "ocr_kernels"}
    return found


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return name.startswith("ocr_kernels.") and (path.with_suffix(".py").exists() or path.is_dir())


LEVELS = {file: level for level, files in enumerate(levels()) for file in files if (PACKAGE / file).exists()}


def file_of(name: str) -> str:
    path = PACKAGE / name.replace(".", "/")
    return f"{name.replace('.', '/')}/__init__.py".lstrip("/") if path.is_dir() else f"{name.replace('.', '/')}.py"


FILES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES)
def test_dependencies_run_one_way(file: str) -> None:
    for imported in imports(PACKAGE / file):
        assert LEVELS[file_of(imported)] < LEVELS[file], f"{file} imports {imported}"


def outside(path: Path) -> set[str]:
    """The top-level packages that a file imports, anywhere in it, those by name too, without Python's own."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return {name.partition(".")[0] for name in found} - sys.stdlib_module_names


def test_nothing_of_the_checkout_is_imported() -> None:
    """A wheel has the package alone: no benchmarks, no tests."""
    others = {"torch", "triton", "numpy", "matplotlib", "rich", "PIL", "sklearn", "timm", "mmengine"}
    assert {file: found for file in FILES if (found := outside(PACKAGE / file) - others - {"ocr_kernels"})} == {}
    assert set().union(*(outside(PACKAGE / file) for file in FILES)) == others | {"ocr_kernels"}


def test_design_lists_files_that_exist() -> None:
    missing = {file for file in set().union(*levels()) - set(LEVELS) if not file.startswith(OPS)}
    assert not missing


@pytest.mark.parametrize("op", OPS)
def test_each_op_is_the_same_files(op: str) -> None:
    files = {path.name for path in (PACKAGE / op).glob("*.py")}
    kernels = {"native.py", "triton.py", "tiles.py"}
    if op == "gather":
        kernels |= {"state.py"}
    elif op == "block":
        kernels |= {"layers.py", "norms.py", "passes.py", "triton_inference.py", "triton_norms.py"}
    assert files == {"__init__.py", "functional.py", "registration.py", "reference.py", "sharding.py"} | kernels
