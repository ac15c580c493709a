"""Default corpus: Debian (or Ubuntu) documentation packages, fetched by apt without root.

``apt-get download`` writes the .deb files into the cache; ``dpkg-deb --fsys-tarfile`` streams their files, so nothing
is installed or unpacked to disk. Versions and sha256 are fixed by a receipt on first use: later builds read the same
files, and need no network.
"""

from __future__ import annotations

import errno
import fnmatch
import functools
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipeline.documents import Document
from data_pipeline.output import exclusive, write_atomically
from data_pipeline.progress import Log
from data_pipeline.sources.base import Reading, Source
from data_pipeline.sources.extract import html_text, man_text
from data_pipeline.sources.files import read_text
from data_pipeline.sources.fingerprint import sha256_of
from data_pipeline.sources.licence import short_licence
from refractor_megatron.errors import DataError


@dataclass(frozen=True)
class Package:
    """``pattern``: regular expression of the name, newest version wins; ``take``: globs of the files to read."""

    pattern: str
    take: tuple[str, ...]


#: English prose with some code; together about 45 MB of text in 31 MB of packages.
PACKAGES = (
    Package("manpages", ("./usr/share/man/man*/*.gz",)),
    Package("manpages-dev", ("./usr/share/man/man*/*.gz",)),
    Package("debian-reference-en", ("*.en.html",)),
    Package("debian-policy", ("*/_sources/*.txt",)),
    Package("git-doc", ("*.txt",)),
    Package(r"python3\.\d+-doc", ("*/_sources/*.txt",)),
    Package(r"postgresql-doc-\d+", ("*/html/*.html",)),
    Package("python-django-doc", ("*/html/*.html",)),
    Package("libreoffice-help-en-us", ("*/text/*.html",)),
    Package("vim-doc", ("*.html",)),
)
_MEMBER_LIMIT = 64 << 20
_COMMAND_SECONDS = 240


class Unavailable(Exception):
    """Why no packages can be had here; the caller falls back to another corpus."""


@dataclass(frozen=True)
class Deb:
    """A fetched package; ``licence_file`` is the path of its copyright file inside the package."""

    package: str
    version: str
    file: str
    sha256: str
    licence: str
    licence_file: str


@dataclass(frozen=True)
class Offer:
    """A package as apt's lists describe it."""

    package: str
    version: str
    file: str
    algorithm: str
    digest: str

    def intact(self, cache: Path) -> bool:
        """The file is in ``cache`` with the promised content."""
        try:
            with (cache / self.file).open("rb") as stream:
                return hashlib.file_digest(stream, self.algorithm).hexdigest() == self.digest
        except FileNotFoundError:
            return False


def debian_sources(cache: Path, log: Log) -> list[Source]:
    """One source per package. Raises ``Unavailable`` if apt is missing or cannot fetch."""
    if shutil.which("dpkg-deb") is None:
        raise Unavailable("dpkg-deb is not installed")
    debs = _receipt(cache)
    if debs is None:
        with exclusive(cache, log):
            debs = _receipt(cache) or _fetch(cache, log)
    return [_source(deb, cache) for deb in debs]


def _receipt(cache: Path) -> list[Deb] | None:
    """The packages of an earlier build if all are still there."""
    try:
        debs = [Deb(**entry) for entry in json.loads((cache / "receipt.json").read_bytes())]
    except (OSError, ValueError, TypeError):
        return None
    return debs if debs and all((cache / deb.file).is_file() for deb in debs) else None


def _fetch(cache: Path, log: Log) -> list[Deb]:
    if shutil.which("apt-get") is None:
        raise Unavailable("apt-get is not installed")
    started = time.monotonic()
    try:
        debs = _download(cache, [])
    except Unavailable:
        log("data: refreshing apt's package lists in the cache folder (no root needed)")
        debs = _download(cache, _private_lists(cache))
    write_atomically(cache / "receipt.json", json.dumps([asdict(deb) for deb in debs], indent=1))
    size = sum((cache / deb.file).stat().st_size for deb in debs) / 1e6
    log(f"data: fetched {len(debs)} packages, {size:.1f} MB, in {time.monotonic() - started:.1f} s")
    return debs


def _private_lists(cache: Path) -> list[str]:
    """Options under which apt keeps all its state in ``cache``, after a fresh ``apt-get update`` there."""
    state, archives = cache / "apt" / "state", cache / "apt" / "cache"
    (state / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    (archives / "archives" / "partial").mkdir(parents=True, exist_ok=True)
    options = [f"Dir::State={state}", f"Dir::State::lists={state / 'lists'}", f"Dir::Cache={archives}"]
    options = [word for option in options for word in ("-o", option)]
    # A broken third-party list must not matter: what counts is whether the packages are known afterwards.
    _run(["apt-get", *options, "update"], cache, check=False)
    return options


def _run(command: list[str], folder: Path, check: bool = True) -> str:
    common = ["-qq", "-o", "Acquire::Retries=2", "-o", "Acquire::http::Timeout=20", "-o", "APT::Sandbox::User="]
    full = [command[0], *(common if command[0] == "apt-get" else []), *command[1:]]
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            full, cwd=folder, env=environment, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{command[0]} took longer than {_COMMAND_SECONDS} s") from error
    if "No space left on device" in done.stderr:  # the user's to mend, and no reason to choose other text
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    if check and done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("E:")] or done.stderr.splitlines()
        raise Unavailable(lines[0] if lines else f"{command[0]} failed with {done.returncode}")
    return done.stdout


def _download(cache: Path, options: list[str]) -> list[Deb]:
    known = _run(["apt-cache", *options, "pkgnames"], cache).split()
    names = [name for package in PACKAGES if (name := _newest(package.pattern, known))]
    if len(names) < len(PACKAGES) // 2:
        raise Unavailable("apt's package lists do not have the documentation packages")
    with tempfile.TemporaryDirectory(dir=cache) as empty:  # apt says nothing about files that are already in its folder
        uris = _run(["apt-get", *options, "download", "--print-uris", *names], Path(empty)).splitlines()
    offers = [_parse_uri(line) for line in uris]
    if len(offers) != len(names):
        raise Unavailable(f"apt-get names {len(offers)} files for {len(names)} packages")
    missing = [offer for offer in offers if not offer.intact(cache)]
    if missing:
        _run(["apt-get", *options, "download", *(f"{offer.package}={offer.version}" for offer in missing)], cache)
    for offer in missing:
        if not offer.intact(cache):
            raise Unavailable(f"{offer.file} did not arrive intact")
    return _with_licences(sorted(offers, key=lambda offer: offer.package), cache)


def _newest(pattern: str, known: list[str]) -> str | None:
    names = [name for name in known if re.fullmatch(pattern, name)]
    return max(names, key=lambda name: [int(number) for number in re.findall(r"\d+", name)], default=None)


def _parse_uri(line: str) -> Offer:
    """``'URI' NAME_VERSION_ARCH.deb SIZE ALGORITHM:HEX`` as printed by ``apt-get download --print-uris``."""
    match = re.fullmatch(r"'[^']*' (([^_ ]+)_([^_ ]+)_[^_ ]+\.deb) \d+ (SHA256|SHA512):([0-9a-f]+)", line.strip())
    if match is None:
        raise Unavailable(f"apt-get printed an unexpected line: {line[:100]}")
    file, package, version, algorithm, digest = match.groups()
    return Offer(package, version.replace("%3a", ":"), file, algorithm.lower(), digest)


def _with_licences(offers: list[Offer], cache: Path) -> list[Deb]:
    """Licences from the copyright files; a package may use another's by a symbolic link of its doc folder."""
    texts: dict[str, str] = {}
    links: dict[str, str] = {}
    for offer in offers:
        folder = f"./usr/share/doc/{offer.package}"
        for member, archive in _members(cache / offer.file):
            if member.issym() and member.name == folder:
                links[offer.package] = Path(member.linkname).name
            elif member.isfile() and member.name == f"{folder}/copyright":
                stream = archive.extractfile(member)
                assert stream is not None
                texts[offer.package] = stream.read().decode(errors="replace")
                break
    debs = []
    for offer in offers:
        owner = links.get(offer.package, offer.package)
        licence, file = short_licence(texts.get(owner, "")), f"usr/share/doc/{owner}/copyright"
        digest = sha256_of(cache / offer.file)
        debs.append(Deb(offer.package, offer.version, offer.file, digest, licence, file))
    return debs


def _source(deb: Deb, cache: Path) -> Source:
    read = functools.partial(_read, deb, cache)
    identity = {"package": deb.package, "version": deb.version, "sha256": deb.sha256}
    return Source(deb.package, deb.version, deb.licence, deb.licence_file, identity, read, deb.sha256)


def _members(path: Path) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for member in archive:
                yield member, archive
        process.stdout.read()  # the archive's padding, so that dpkg-deb ends by itself


def _read(deb: Deb, cache: Path, reading: Reading) -> Iterator[Document]:
    path = cache / deb.file
    if sha256_of(path) != deb.sha256:
        raise DataError(f"{path} does not match its sha256; delete {cache} and run again.")
    take = next(package.take for package in PACKAGES if re.fullmatch(package.pattern, deb.package))
    for member, archive in _members(path):
        if (
            member.isfile()
            and member.size <= _MEMBER_LIMIT
            and any(fnmatch.fnmatch(member.name, glob) for glob in take)
        ):
            stream = archive.extractfile(member)
            assert stream is not None
            yield from read_text(io.BytesIO(_text(member.name, stream.read())), reading)


def _text(name: str, data: bytes) -> bytes:
    if name.endswith(".gz"):
        name, data = name[:-3], gzip.decompress(data)
    if name.endswith(".html"):
        return html_text(data)
    return man_text(data) if re.search(r"/man/man\d\w*/", name) else data
