"""Every public name has a docstring with an example, and the examples do what they say."""

from __future__ import annotations

import doctest
import inspect
from typing import Any

import pytest
import torch

import ocr_kernels
from ocr_kernels import modules, plotting, reference, testing

PUBLIC = {f"ocr_kernels.{name}": getattr(ocr_kernels, name) for name in ocr_kernels.__all__}
PUBLIC |= {f"modules.{name}": getattr(modules, name) for name in modules.__all__}
PUBLIC |= {f"plotting.{name}": getattr(plotting, name) for name in ("plot_region_maps", "plot_attention")}
PUBLIC |= {
    f"testing.{name}": thing
    for name, thing in vars(testing).items()
    if getattr(thing, "__module__", "") == testing.__name__ and not name.startswith("_")
}
PLACES = [vars(module) for module in (reference, plotting, testing, modules, ocr_kernels)]
NAMES: dict[str, Any] = {name: thing for place in PLACES for name, thing in place.items() if not name.startswith("_")}


@pytest.mark.parametrize("name", PUBLIC)
def test_example(name: str) -> None:
    if name.startswith("plotting."):
        pytest.importorskip("matplotlib", reason="draws")
    text = inspect.getdoc(PUBLIC[name]) or ""
    names = {**NAMES, "torch": torch, "modules": modules, "reference": reference}
    example = doctest.DocTestParser().get_doctest(text, names, name, None, None)
    assert example.examples, "no example"
    failures: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        runner.run(example, out=failures.append)
    assert not failures, "".join(failures)
