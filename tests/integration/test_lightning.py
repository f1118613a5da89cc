"""The example of Lightning."""

from __future__ import annotations

from pathlib import Path

import pytest
from fresh import python

pytestmark = pytest.mark.integration
pytest.importorskip("lightning", reason="`make integration` installs it")

EXAMPLE = Path(__file__).parents[2] / "examples" / "lightning_training.py"


@pytest.mark.slow
def test_the_example_trains() -> None:
    result = python(str(EXAMPLE), "4", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    assert "4 replaced, 0 left alone" in result.stdout
    assert "4 steps, mean IoU" in result.stdout
