"""The page on masks shows what the commands print and draw."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from refractor_megatron.cli import main
from tests.corpus import ROOT

PAGE = (ROOT / "specification" / "masks.md").read_text()
SESSIONS = re.findall(r"```console\n\$ refractor (.*)\n((?:.*\n)*?)```", PAGE)


@pytest.mark.parametrize(("command", "shown"), SESSIONS, ids=[command for command, _ in SESSIONS])
def test_sessions_are_what_the_command_prints(
    command: str, shown: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    code = main(command.split())
    out, error = capsys.readouterr()
    assert out + error == shown
    assert code == (2 if "leaking" in command else 0)


def test_the_page_has_its_sessions() -> None:
    assert len(SESSIONS) == 3


def test_the_picture_is_what_the_command_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same size and, but for the smoothing of letters, the same pixels."""
    from matplotlib.image import imread

    found = re.search(r"`refractor (masks draw .*)`", PAGE)
    assert found is not None
    monkeypatch.chdir(ROOT)
    assert main([*found.group(1).split(), "--out", str(tmp_path / "m.png")]) == 0
    committed, drawn = (imread(path) for path in (ROOT / "specification/images/mask_example.png", tmp_path / "m.png"))
    assert committed.shape == drawn.shape
    assert (np.abs(committed - drawn).max(axis=2) > 0.05).mean() < 0.01
