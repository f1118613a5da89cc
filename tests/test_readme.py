"""The Python of the README and of the pages runs as it is written, and what they link to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = {
    f"{page.relative_to(ROOT)}-{i}": block
    for page in PAGES
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
}


@pytest.mark.parametrize("name", [name for name, block in BLOCKS.items() if "mmseg" not in block])
def test_code_of_a_page(name: str) -> None:
    exec(BLOCKS[name], {})


def test_pages_have_code() -> None:
    assert len(BLOCKS) >= 9


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page(page: Path) -> None:
    """To files, and to headings of them."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, link


OTHERS = ["RELEASING.md", "SECURITY.md", "examples/cpp/README.md", ".github/pull_request_template.md"]
COMMANDS = {"make": re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)}
COMMANDS |= {"ocr-kernels": ["bench", "check", "demo", "info", "tune"]}


@pytest.mark.parametrize("page", [*PAGES, *(ROOT / name for name in OTHERS)], ids=lambda page: page.name)
def test_commands_and_files_of_a_page(page: Path) -> None:
    """They are there; of files, those of the repository that a code span names, and no compiled ones."""
    blocks, spans = re.split(r"```", page.read_text())[1::2], re.findall(r"`([^`\n]+)`", page.read_text())
    lines = [line.partition("#")[0] for block in blocks for line in block.splitlines()]
    for line in [*lines, *spans]:
        for command, names in re.findall(r"(?:^|[ /;])(make|ocr-kernels)((?: [a-z][a-z-]*)+)", line):
            known = COMMANDS[command]
            given = names.split() if command == "make" else names.split()[:1]
            assert set(given) <= set(known), line
    for span in spans:
        if re.fullmatch(r"(tests|benchmarks|docs|examples|csrc|ocr_kernels)/[\w/.-]+", span) and span[-3:] != ".so":
            assert (ROOT / span).exists(), span


def test_the_readme_is_short() -> None:
    assert len(PAGES[0].read_text().splitlines()) <= 150
