"""Real text for tests without a download: this project's own sources and documents."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def write_corpus(folder: Path) -> Path:
    """Copy the project's Python and Markdown files into ``folder`` as .txt; about half a megabyte."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = [
        *ROOT.glob("refractor_megatron/**/*.py"),
        *ROOT.glob("data_pipeline/**/*.py"),
        *ROOT.glob("tests/**/*.py"),
    ]
    for path in [*sources, *ROOT.glob("specification/*.md")]:
        name = "_".join(path.relative_to(ROOT).with_suffix(".txt").parts)
        (folder / name).write_bytes(path.read_bytes())
    return folder
