"""Links in the documents resolve; outbox entries rest on evidence that is in the repository."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.corpus import ROOT

SKIPPED = {".venv", ".git", "data", "runs", "build", "node_modules"}
DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not SKIPPED & set(path.relative_to(ROOT).parts) and "shared" not in path.parts
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def relative_links(document: Path) -> list[str]:
    """Targets of the document's links and pictures, without those to other sites and to its own headings."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    return [target for target in LINK.findall(text) if not re.match(r"[a-z]+:|#", target)]


def test_documents_are_found() -> None:
    names = {str(path.relative_to(ROOT)) for path in DOCUMENTS}
    assert {"README.md", "specification/REFRACTOR_SPEC.md", "inbox/phase_5.md", "outbox/README.md"} <= names


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_resolves(document: Path) -> None:
    broken = [target for target in relative_links(document) if not (document.parent / target.split("#")[0]).exists()]
    assert not broken


def test_outbox_entries_name_their_command_and_link_to_evidence() -> None:
    for entry in DOCUMENTS:
        if entry.is_relative_to(ROOT / "outbox") and entry.name != "README.md":
            command = re.search(r"(bash (launch|tests)/|python3? (tools|launch)/|refractor )", entry.read_text())
            assert command, f"{entry}: no committed command"
            assert relative_links(entry), f"{entry}: no link to evidence"


def test_outbox_index_links_to_every_entry() -> None:
    index = {(ROOT / "outbox" / target).resolve() for target in relative_links(ROOT / "outbox" / "README.md")}
    entries = {path.resolve() for path in (ROOT / "outbox").rglob("*.md") if path.name != "README.md"}
    assert entries <= index
