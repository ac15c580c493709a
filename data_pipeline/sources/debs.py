"""Reading a fetched Debian package: ``dpkg-deb --fsys-tarfile`` streams its files, so nothing is unpacked to disk."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.sources.base import Bad, Item, Reading, Unit
from data_pipeline.sources.entries import entry_text
from data_pipeline.sources.extract import html_text, man_text
from data_pipeline.sources.fingerprint import unchanged
from data_pipeline.sources.mallard import mallard_text
from refractor_megatron.errors import DataError

_MEMBER_LIMIT = 64 << 20
_GZIP = 16 + zlib.MAX_WBITS


def members(path: Path) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Members of a package in their order, each with the archive to extract it from.

    Raises ``DataError`` where there is no dpkg-deb.
    """
    command = ["dpkg-deb", "--fsys-tarfile", str(path)]
    try:
        started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise DataError(f"dpkg-deb, which reads {path}, is not installed on this machine; install dpkg.") from error
    with started as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for member in archive:
                yield member, archive
        process.stdout.read()  # the archive's padding, so that dpkg-deb ends by itself


def read_deb(unit: Unit, reading: Reading) -> Iterator[Item]:
    """Every n-th wanted member of a package, from the k-th on, for ``slice`` [k, n]; its position is its place among
    the wanted ones.

    Raises ``DataError`` if the package is not the file that was planned, whose content was verified then.
    """
    path = Path(unit["place"]["root"]) / unit["deb"]
    try:
        intact = unchanged(path, unit["bytes"], unit["place"]["stamp"], unit["sha256"])
    except OSError as error:
        raise DataError(f"Cannot read {path} ({error.strerror}); run again to fetch it.") from error
    if not intact:
        raise DataError(f"{path} does not match its sha256; delete {path.parent} and run again.")
    first, step = unit["slice"]
    wanted = re.compile("|".join(fnmatch.translate(glob) for glob in unit["take"]))
    position = 0
    for member, archive in members(path):
        if not (member.isfile() and wanted.match(member.name)):
            continue
        position += 1
        if (position - 1) % step == first:
            yield from _read_member(member, archive, position, reading)


def _read_member(member: tarfile.TarInfo, archive: tarfile.TarFile, position: int, reading: Reading) -> Iterator[Item]:
    try:
        if member.size > _MEMBER_LIMIT:
            raise Bad("too-long", f"{member.name} of {member.size / 1e6:.0f} MB")
        stream = archive.extractfile(member)
        assert stream is not None
        text = _text(member.name, stream.read())
    except Bad as bad:
        yield bad.at(0, position)
        return
    yield from entry_text(text, 0, position, reading)


def _text(name: str, data: bytes) -> bytes:
    if name.endswith(".gz"):
        name, data = name[:-3], _gunzip(name, data)
    if name.endswith(".html"):
        return html_text(data)
    if name.endswith(".page"):
        return mallard_text(data)
    return man_text(data) if re.search(r"/man/(?:[^/]+/)?man\d\w*/", name) else data


def _gunzip(name: str, data: bytes) -> bytes:
    decompressor = zlib.decompressobj(_GZIP)
    try:
        text = decompressor.decompress(data, _MEMBER_LIMIT)
    except zlib.error as error:
        raise Bad("damaged-compression", f"{name}: {error}") from error
    if decompressor.unconsumed_tail:
        raise Bad("decompression-bomb", f"{name} grows beyond {_MEMBER_LIMIT / 1e6:.0f} MB")
    if not decompressor.eof:
        raise Bad("damaged-compression", f"{name} stops in the middle")
    return text
