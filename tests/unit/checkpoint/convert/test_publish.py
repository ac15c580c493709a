"""A staged folder: what is refused before any work, and what the file system does meanwhile."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from refractor_megatron.checkpoint.convert import publish
from refractor_megatron.checkpoint.convert.publish import staged
from refractor_megatron.errors import ConfigError, OutputError


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def write(target: Path) -> None:
    with staged(target, 1) as folder:
        (folder / "file").write_text("content")


@pytest.mark.parametrize("target", ["new", "a/b/new", "./new", "../beside/new", "there"])
def test_a_relative_place_is_as_good_as_any(place: Path, target: str) -> None:
    (place / "there").mkdir()
    write(Path(target))
    assert (place / target / "file").read_text() == "content"
    assert not list(place.rglob(".*")), "neither lock nor hidden folder stays"


def link_to_folder(place: Path) -> Path:
    (place / "real").mkdir()
    (place / "link").symlink_to(place / "real")
    return Path("link")


def link_to_nothing(place: Path) -> Path:
    (place / "link").symlink_to(place / "nowhere")
    return Path("link")


def below_link_to_nothing(place: Path) -> Path:
    return link_to_nothing(place) / "new"


def hidden_link(place: Path) -> Path:
    """What is written first would empty the folder that the link leads to."""
    (place / "real").mkdir()
    (place / "real" / "precious").write_text("")
    (place / ".new.tmp").symlink_to(place / "real")
    return Path("new")


def hidden_file(place: Path) -> Path:
    (place / ".new.tmp").write_text("")
    return Path("new")


def a_file(place: Path) -> Path:
    (place / "file").write_text("")
    return Path("file")


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "working folder": (lambda place: Path("."), "work is the folder that you are in"),
    "working folder, up and down": (lambda place: Path("../work"), "is the folder that you are in"),
    "above": (lambda place: Path(".."), "is not empty"),
    "root": (lambda place: Path("/"), "/ is "),
    "mount point": (lambda place: Path("/proc"), "/proc is "),
    "link": (link_to_folder, "link is a link"),
    "link to nothing": (link_to_nothing, "link is a link"),
    "below a link to nothing": (below_link_to_nothing, "link is no folder"),
    "hidden link": (hidden_link, r"\.new\.tmp is a link"),
    "hidden file": (hidden_file, r"\.new\.tmp.* is a file"),
    "file": (a_file, "file is not empty, it is a file"),
    "below a file": (lambda place: a_file(place) / "x", "is a file or lies below one"),
    "deep below a file": (lambda place: a_file(place) / "x" / "y", "is a file or lies below one"),
    "name too long": (lambda place: Path("n" * 254), "cannot be written"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_any_work(place: Path, name: str) -> None:
    make, says = REFUSED[name]
    target = make(place)
    before = sorted(place.rglob("*"))
    with pytest.raises(OutputError, match=says), staged(target, 1):
        pytest.fail("work was begun")
    assert sorted(place.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a file system of its own")
def test_an_empty_mount_point_is_refused(place: Path) -> None:
    (place / "mounted").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(place / "mounted")], capture_output=True).returncode:
        pytest.skip("mount is not allowed here")
    try:
        with pytest.raises(OutputError, match="mounted is a mount point"), staged(Path("mounted"), 1):
            pytest.fail("work was begun")
        write(Path("mounted/within"))
    finally:
        subprocess.run(["umount", str(place / "mounted")], check=True)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("deep", ["new", "a/new"])
def test_a_place_that_cannot_be_written(place: Path, monkeypatch: pytest.MonkeyPatch, deep: str, code: int) -> None:
    def refuse(path: Path, *more: object, **options: object) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError, match="new cannot be written.*choose another --out"), staged(Path(deep), 1):
        pytest.fail("work was begun")
    assert not list(place.iterdir())


def test_a_target_that_someone_fills_meanwhile(place: Path) -> None:
    with pytest.raises(OutputError, match="late is not empty, someone else"), staged(Path("late"), 1):
        (place / "late").mkdir()
        (place / "late" / "theirs").write_text("")
    assert sorted(path.name for path in place.rglob("*")) == ["late", "theirs"]


def test_a_sibling_in_the_same_new_parent_does_not_hide_the_error(place: Path) -> None:
    with pytest.raises(ConfigError, match="the real error"), staged(Path("new/a"), 1):
        (place / "new" / ".b.tmp").mkdir()
        raise ConfigError("the real error")
    assert sorted(path.name for path in place.rglob("*")) == [".b.tmp", "new"]


def test_new_parents_go_when_they_cannot_all_be_made(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Path.mkdir

    def refuse(path: Path, *more: int, **options: bool) -> None:
        if path.name == "b":
            raise PermissionError(errno.EACCES, "denied", str(path))
        whole(path, *more, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError, match=r"cannot be written \(denied\)"), staged(Path("a/b/c"), 1):
        pytest.fail("work was begun")
    assert not list(place.iterdir())


def test_an_error_of_the_source_is_not_blamed_on_the_target(place: Path) -> None:
    with pytest.raises(FileNotFoundError), staged(Path("new"), 1):
        (place / "nowhere").read_text()
    assert not list(place.iterdir()) and not publish.is_disk_full(FileNotFoundError())
