"""The README's Python runs as it is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("block", [i for i, block in enumerate(BLOCKS) if "mmseg" not in block])
def test_readme_block(block: int) -> None:
    exec(BLOCKS[block], {})


def test_readme_has_python() -> None:
    assert len(BLOCKS) >= 6
