"""A checkpoint is whole or not there."""

from pathlib import Path

import pytest

from refractor_megatron.checkpoint import manifest as m
from refractor_megatron.errors import CheckpointError


def checkpoint(root: Path, step: int) -> Path:
    folder = m.folder_of(root, step)
    folder.mkdir(parents=True)
    (folder / "a.distcp").write_bytes(bytes(range(256)) * 4)
    (folder / "b.distcp").write_bytes(b"tail")
    files = {p.name: m.file_record(p) for p in folder.iterdir()}
    m.write(folder, m.Manifest(step, "c", "f", "d", "r", "0", "0.16.1", {"tp": 1}, files))
    return folder


def test_round_trip_and_order(tmp_path: Path) -> None:
    folders = [checkpoint(tmp_path, s) for s in (20, 3, 100)]
    assert [m.verify(f).step for f in folders] == [20, 3, 100]
    assert m.latest_step(tmp_path) == 100
    m.prune(tmp_path, 2)
    assert [f.name for f in m.complete(tmp_path)] == ["step_00000020", "step_00000100"]


def test_half_written_is_never_listed_and_is_swept(tmp_path: Path) -> None:
    good = checkpoint(tmp_path, 10)
    torn = tmp_path / "step_00000020.tmp"
    torn.mkdir()
    (torn / "a.distcp").write_bytes(b"half")
    unnamed = tmp_path / "step_00000030"
    unnamed.mkdir()
    assert m.complete(tmp_path) == [good]
    m.sweep(tmp_path)
    assert not torn.exists() and m.verify(good).step == 10


@pytest.mark.parametrize("name", ["a.distcp", "b.distcp"])
@pytest.mark.parametrize("fault", ["truncate", "flip", "remove"])
def test_every_fault_is_named(tmp_path: Path, name: str, fault: str) -> None:
    folder = checkpoint(tmp_path, 5)
    path = folder / name
    content = path.read_bytes()
    if fault == "truncate":
        path.write_bytes(content[:-1])
    elif fault == "flip":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match=name) as caught:
        m.verify(folder)
    assert "delete" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", '{"schema_version": 1}', '{"schema_version": 99}'])
def test_damaged_manifest(tmp_path: Path, text: str) -> None:
    folder = checkpoint(tmp_path, 5)
    (folder / m.MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match="manifest.json"):
        m.read(folder)
