"""Files that replace others whole, and stay after the power fails."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_pipeline.output import write_atomically


def test_content_is_on_disk_before_its_name_and_the_name_before_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sub" / "a.json"
    steps: list[tuple[Path, int | str]] = []
    sync, replace = os.fsync, Path.replace

    def fsync(handle: int) -> None:
        steps.append((Path(os.readlink(f"/proc/self/fd/{handle}")), os.fstat(handle).st_size))
        sync(handle)

    def rename(draft: Path, target: Path) -> Path:
        steps.append((draft, "renamed"))
        return replace(draft, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", rename)
    write_atomically(path, "é" * 100)
    draft, renamed, folder = steps
    assert draft == (renamed[0], 200) and renamed[1] == "renamed"
    assert folder[0] == path.parent and path.read_text(encoding="utf-8") == "é" * 100
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_the_old_content_and_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
