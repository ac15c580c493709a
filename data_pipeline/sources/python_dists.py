"""Fallback corpus: the source and documentation text of the Python distributions in this environment."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from data_pipeline.documents import Document
from data_pipeline.sources.base import Reading, Source
from data_pipeline.sources.files import read_file

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
            sources.append(_source(dist.name, dist.version, *_licence(dist), {"record": digest}, files))
    return sources


def _source(
    name: str, version: str, licence: str, licence_file: str, identity: dict[str, str], files: list[Path]
) -> Source:
    return Source(name, version, licence, licence_file, dict(identity), functools.partial(_read, files))


def _read(files: list[Path], reading: Reading) -> Iterator[Document]:
    for path in files:
        if path.is_file():  # a distribution may list files that were removed
            yield from read_file(path, reading)


def _wanted(relative: Path) -> bool:
    folders = relative.parts[:-1]
    return relative.suffix in _SUFFIXES and not any(
        part in _SKIP_PARTS or part.endswith((".dist-info", ".egg-info")) for part in folders
    )


def _files_of(dist: metadata.Distribution) -> list[Path]:
    names = sorted(str(file) for file in dist.files or [])
    return [Path(str(dist.locate_file(name))) for name in names if _wanted(Path(name)) and not name.startswith("..")]


def _standard_library() -> Source:
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in _SKIP_PARTS)
        files += [Path(folder, name) for name in sorted(names) if _wanted(Path(folder, name).relative_to(root))]
    version = platform.python_version()
    return _source("python-stdlib", version, "PSF-2.0", "LICENSE", {"build": " ".join(platform.python_build())}, files)


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
