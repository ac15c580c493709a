"""The tools import each other as scripts do: by their folder."""

from __future__ import annotations

import pytest

from tests.corpus import ROOT


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes ``import tiers`` and the like work."""
    monkeypatch.syspath_prepend(ROOT / "tools")
