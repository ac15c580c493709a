"""The phase checklists: one file a phase, known boxes, and no tick without a link to what shows it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

INBOX = Path(__file__).resolve().parents[2] / "inbox"


@pytest.mark.parametrize("phase", range(8))
def test_items_have_a_known_box_and_ticks_have_a_link(phase: int) -> None:
    items = [line for line in (INBOX / f"phase_{phase}.md").read_text().splitlines() if line.startswith("- ")]
    assert len(items) >= 5
    for item in items:
        box = re.match(r"- \[( |~|x)\] \S", item)
        assert box, item
        assert box[1] != "x" or "](" in item, f"a tick without a link: {item}"
