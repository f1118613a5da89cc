"""What the site takes from outside of docs: results, their pictures, and the examples' pages."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
OUTSIDE = (
    "benchmarks/RESULTS.md",
    "benchmarks/results/**/*.*",
    "examples/**/*.*",
    "tests/integration/*.*",
    "CHANGELOG.md",
    "constraints.txt",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for name, source in {"index.md": "README.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}.items():
        content = (ROOT / source).read_text().replace("](docs/", "](").replace("](README.md", "](index.md")
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Pages link to each other as the files of the repository do; the folder docs is the site's root."""
    return markdown.replace("](../", "](") if "/" not in page.file.src_uri else markdown
