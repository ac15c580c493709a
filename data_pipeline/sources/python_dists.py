"""Fallback corpus: the source and documentation text of the Python distributions in this environment."""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from data_pipeline.sources.base import Item, Reading, Source, Unit, grouped
from data_pipeline.sources.entries import read_file

_SUFFIXES = (".py", ".rst", ".md", ".txt")
#: Test data, generated tables and licences would crowd out prose and code.
_SKIP_PARTS = frozenset(("test", "tests", "testing", "site-packages", "dist-packages", "__pycache__", "lib2to3"))
_LICENCE_CHARS = 40


def python_sources() -> list[Source]:
    """The standard library and every installed distribution with text files, by name."""
    sources = [_standard_library()]
    seen = set()
    for dist in sorted(metadata.distributions(), key=lambda one: (one.name or "").lower()):
        if not dist.name or dist.name.lower() in seen:
            continue
        seen.add(dist.name.lower())
        files, record = _files_of(dist), dist.read_text("RECORD")
        if files and record:  # without a record it is a source tree, whose content may change under the same version
            digest = hashlib.sha256(record.encode()).hexdigest()
            root = Path(str(dist.locate_file("")))
            sources.append(_source(dist.name, dist.version, *_licence(dist), {"record": digest}, root, files))
    return sources


def _source(
    name: str, version: str, licence: str, licence_file: str, identity: dict[str, str], root: Path, names: list[str]
) -> Source:
    present = [(one, size) for one in names if (size := _size(root / one)) is not None]
    files = tuple({"path": one, "sha256": "", "bytes": size} for one, size in present)
    units = tuple(
        {
            "kind": "python",
            "files": [{"file": number, "path": files[number]["path"]} for number in run],
            "identity": {"version": version, **identity},
            "megabytes": sum(present[number][1] for number in run) / 1e6,
            "place": {"root": str(root)},
        }
        for run in grouped([size for _, size in present])
    )
    return Source(name, version, licence, licence_file, dict(identity), units, files=files, mendable=False)


def _size(path: Path) -> int | None:
    """Bytes of a file; ``None`` if it is not there: a distribution may list files that were removed."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def read_python(unit: Unit, reading: Reading) -> Iterator[Item]:
    """Texts of a unit of a distribution's files."""
    root = Path(unit["place"]["root"])
    for entry in unit["files"]:
        yield from read_file(root / entry["path"], entry["file"], reading)


def _wanted(relative: Path) -> bool:
    folders = relative.parts[:-1]
    return relative.suffix in _SUFFIXES and not any(
        part in _SKIP_PARTS or part.endswith((".dist-info", ".egg-info")) for part in folders
    )


def _files_of(dist: metadata.Distribution) -> list[str]:
    names = sorted(str(file) for file in dist.files or [])
    return [name for name in names if _wanted(Path(name)) and not name.startswith("..")]


def _standard_library() -> Source:
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in _SKIP_PARTS)
        relative = (Path(folder, name).relative_to(root) for name in sorted(names))
        files += [path.as_posix() for path in relative if _wanted(path)]
    build = {"build": " ".join(platform.python_build())}
    return _source("python-stdlib", platform.python_version(), "PSF-2.0", "LICENSE", build, root, files)


def _licence(dist: metadata.Distribution) -> tuple[str, str]:
    """Short licence name and the licence file's name, as far as the metadata tells."""
    info = dist.metadata
    classifiers = [
        line.rpartition("::")[2].strip() for line in info.get_all("Classifier") or [] if "License ::" in line
    ]
    expression, prose = ("".join(info.get_all(key) or []).strip() for key in ("License-Expression", "License"))
    short = prose if len(prose) <= _LICENCE_CHARS and "\n" not in prose else ""
    stated = expression or short or "; ".join(classifiers) or "see licence file"
    files = info.get_all("License-File") or [""]
    return stated, files[0]
