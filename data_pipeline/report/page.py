"""The page about a dataset: one HTML file that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from data_pipeline.output import mendable_errors, write_atomically
from data_pipeline.report import sections_flow, sections_pairs, sections_stages, sections_text
from data_pipeline.report.contents import Contents
from data_pipeline.report.html import count, esc, percent, short
from data_pipeline.report.style import CSS
from refractor_megatron.errors import OutputError

#: Anchor, heading and content of each section; those without content are left out.
SECTIONS: tuple[tuple[str, str, Callable[[Contents], str]], ...] = (
    ("funnel", "From reading to training", sections_flow.funnel),
    ("quarantine", "Not readable", sections_flow.quarantine),
    ("sources", "Sources", sections_text.sources),
    ("languages", "Languages", sections_text.languages),
    ("lengths", "Lengths", sections_text.lengths),
    ("signals", "Signals", sections_text.signals),
    ("filters", "Filters", sections_text.filters),
    ("duplicates", "Duplicates", sections_pairs.duplicates),
    ("edits", "Edits", sections_text.edits),
    ("stages", "Stages", sections_stages.stages),
    ("mix", "Mix", sections_stages.mix),
    ("tasks", "Made tasks", sections_stages.tasks),
    ("records", "Token records", sections_stages.records),
    ("build", "Build", sections_flow.parameters),
)


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Writes the page about the dataset ``folder`` to ``out``, by default beside it, and returns its path.

    Raises ``DataError`` for a folder that is no whole dataset, ``OutputError`` where ``out`` lies within it, which its
    seal forbids, or cannot be written.
    """
    content = Contents.load(folder)
    path = folder.resolve().with_name(f"{folder.resolve().name}.html") if out is None else out
    if folder.resolve() in path.resolve().parents:
        raise OutputError(f"{path} lies in the dataset, whose files are sealed; choose a place outside with --out.")
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give a file with --out, for example {path / 'report.html'}.")
    page = render(content)
    with mendable_errors(path):
        write_atomically(path, page)
    return path


def render(data: Contents) -> str:
    """The page as text."""
    found = [(anchor, title, body) for anchor, title, draw in SECTIONS if (body := draw(data))]
    links = "".join(f'<a href="#{anchor}">{esc(title)}</a>' for anchor, title, _ in found)
    body = "\n".join(f'<section id="{anchor}"><h2>{esc(title)}</h2>{text}</section>' for anchor, title, text in found)
    root = data.manifest.get("merkle_root")
    marks = [f"digest {data.manifest['digest'][:12]}", *([f"Merkle root {root[:16]}"] if root else [])]
    marks.append(f"tokenizer of {count(data.manifest['tokenizer']['vocab_size'])} ids")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{esc(data.name)}: dataset report</title>
<style>{CSS}</style>
</head>
<body>
<main>
<header>
<p class="kicker">REFRACTOR dataset report</p>
<h1>{esc(data.name)}</h1>
<p class="lead">{_lead(data)}</p>
<p class="identity">{esc(" · ".join(marks))}</p>
</header>
{_tiles(data)}
<nav aria-label="Sections">{links}</nav>
{body}
</main>
</body>
</html>
"""


def _lead(data: Contents) -> str:
    train = data.manifest["splits"]["train"]
    used = sum(1 for row in data.sources if row["documents"])
    sources = f"{used} source{'s' * (used != 1)}"
    said = f"{short(train['tokens'])} training tokens in {count(train['documents'])} documents of {sources}"
    if data.stages:
        lengths = [count(stage["length"]) for stage in data.stages]
        said += f", packed for {'stages' if len(lengths) > 1 else 'a stage'} of {_and(lengths)} tokens"
    return f"{said}."


def _and(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _tiles(data: Contents) -> str:
    splits = data.manifest["splits"]
    train, heldout = splits["train"], splits["heldout"]
    tiles = [
        (
            "training tokens",
            short(train["tokens"]),
            f"{train['bytes'] / 1e6:,.1f} MB, {train['bytes'] / train['tokens']:.2f} bytes a token",
        ),
        ("held-out tokens", short(heldout["tokens"]), f"{count(heldout['documents'])} documents"),
    ]
    if data.ledger:
        first, last = data.ledger[0]["in"], data.ledger[-1]["kept"]
        tiles.append(
            ("kept of what was read", percent(last / max(1, first)), f"{count(last)} of {count(first)} documents")
        )
        step = next((one for one in data.ledger if one["name"] == "dedup"), None)
        if step is not None and step["in"]:
            gone = sum(step["dropped"].values())
            tiles.append(("duplicates", percent(gone / step["in"]), f"{count(gone)} of {count(step['in'])} documents"))
    cells = "".join(
        f'<div class="tile"><span>{esc(a)}</span><strong>{esc(b)}</strong><span>{esc(c)}</span></div>'
        for a, b, c in tiles
    )
    return f'<div class="tiles">{cells}</div>'
