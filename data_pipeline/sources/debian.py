"""Default corpus: Debian (or Ubuntu) documentation packages, fetched by apt without root.

``apt-get download`` writes the .deb files into the cache; nothing is installed. Versions and sha256 are fixed by a
receipt on first use: later builds read the same files, and need no network.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from data_pipeline.output import exclusive, write_atomically
from data_pipeline.progress import Log
from data_pipeline.sources.base import Source
from data_pipeline.sources.debs import members
from data_pipeline.sources.fingerprint import Fingerprints, sha256_of
from data_pipeline.sources.licence import short_licence
from data_pipeline.sources.packages import Package
from refractor_megatron.errors import DataError

#: A package of more than this is divided into slices (bytes). Each slice streams the whole package: for the largest one
#: that takes 2.5 s, a third of the time that extracting its text does.
_SLICE_BYTES = 24 << 20
#: Text for each byte of a package, roughly; for progress only.
_GROWTH = 2.5
_COMMAND_SECONDS = 240
_WAY_OUT = "restore it, or delete the receipt to take the packages that apt offers now"


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
    bytes: int = 0
    fetched: str | None = None


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


def debian_sources(
    cache: Path, log: Log, packages: tuple[Package, ...], receipt: str, fingerprints: Fingerprints
) -> list[Source]:
    """One source per package; ``receipt``: file name in ``cache`` of what was chosen.

    Raises ``Unavailable`` if apt is missing or cannot fetch, ``DataError`` for a receipt that cannot be read, and for
    a package that is not, or is no longer to be had, as the receipt has it.
    """
    if shutil.which("dpkg-deb") is None:
        raise Unavailable("dpkg-deb is not installed")
    debs = _receipt(cache / receipt)
    if not _present(cache, debs):
        with exclusive(cache, log):
            debs = _receipt(cache / receipt)  # another build may have been first
            if not _present(cache, debs):
                debs = _fetch(cache, log, packages, receipt, debs)
    return [_source(deb, cache, packages, fingerprints) for deb in debs]


def _receipt(path: Path) -> list[Deb]:
    """The packages of an earlier build; none if there was none."""
    try:
        debs = [Deb(**entry) for entry in json.loads(path.read_bytes())]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"The receipt {path} cannot be read ({error}); {_WAY_OUT}.") from error
    if not debs:
        raise DataError(f"The receipt {path} names no packages; {_WAY_OUT}.")
    return debs


def _present(cache: Path, debs: list[Deb]) -> bool:
    return bool(debs) and all((cache / deb.file).is_file() for deb in debs)


def _fetch(cache: Path, log: Log, packages: tuple[Package, ...], receipt: str, promised: list[Deb]) -> list[Deb]:
    """Packages that apt offers, noted in ``receipt``; where that exists and lists ``promised``, those and no others."""
    if shutil.which("apt-get") is None:
        raise Unavailable("apt-get is not installed")
    started = time.monotonic()
    gone = [deb for deb in promised if not (cache / deb.file).is_file()]
    log("data: fetching the packages of the default corpus")
    try:
        debs = _download(cache, [], packages)
    except Unavailable:
        log("data: refreshing apt's package lists in the cache folder (no root needed)")
        debs = _download(cache, _private_lists(cache), packages)
    _came_back(cache / receipt, gone, debs)
    if not promised:
        write_atomically(cache / receipt, json.dumps([asdict(deb) for deb in debs], indent=1))
    size = sum((cache / deb.file).stat().st_size for deb in debs) / 1e6
    log(f"data: fetched {len(debs)} packages, {size:.1f} MB, in {time.monotonic() - started:.1f} s")
    return promised or debs


def _came_back(receipt: Path, gone: list[Deb], debs: list[Deb]) -> None:
    """Raises ``DataError`` if packages that had gone came back as others: the build would change its text unasked."""
    got = {deb.package: deb for deb in debs}
    for deb in gone:
        now = got.get(deb.package)
        if now is None or now.sha256 != deb.sha256:
            offer = "no package of this name" if now is None else f"another one, of version {now.version}"
            raise DataError(
                f"{receipt} lists {deb.package} {deb.version}, whose file {deb.file} is gone, and apt now offers "
                f"{offer}; {_WAY_OUT}."
            )


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


def _download(cache: Path, options: list[str], packages: tuple[Package, ...]) -> list[Deb]:
    known = _run(["apt-cache", *options, "pkgnames"], cache).split()
    found = [_newest(package, known) for package in packages]
    names = [name for some in found for name in some]
    if sum(map(bool, found)) < len(packages) // 2:
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


def _newest(package: Package, known: list[str]) -> list[str]:
    names = [name for name in known if re.fullmatch(package.pattern, name)]
    names.sort(key=lambda name: ([int(number) for number in re.findall(r"\d+", name)], name))
    return names[-package.newest :]


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
        for member, archive in members(cache / offer.file):
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
        path = cache / offer.file
        stat = path.stat()
        fetched = datetime.fromtimestamp(stat.st_ctime, UTC).isoformat(timespec="seconds")
        digest = sha256_of(path)
        debs.append(Deb(offer.package, offer.version, offer.file, digest, licence, file, stat.st_size, fetched))
    return debs


def _source(deb: Deb, cache: Path, packages: tuple[Package, ...], fingerprints: Fingerprints) -> Source:
    """A verified package; its tasks look only whether it has changed since."""
    take = next(package.take for package in packages if re.fullmatch(package.pattern, deb.package))
    path = cache / deb.file
    digest, stat = fingerprints.of(path)
    if digest != deb.sha256:
        raise DataError(f"{path} does not match its sha256; delete this file and run again.")
    size = stat.st_size
    slices = -(-size // _SLICE_BYTES)
    units = tuple(
        {
            "kind": "deb",
            "deb": deb.file,
            "sha256": deb.sha256,
            "bytes": size,
            "take": list(take),
            "slice": [number, slices],
            "megabytes": size * _GROWTH / slices / 1e6,
            "place": {"root": str(cache.absolute()), "stamp": stat.st_mtime_ns},
        }
        for number in range(slices)
    )
    return Source(
        deb.package,
        deb.version,
        deb.licence,
        deb.licence_file,
        {"package": deb.package, "version": deb.version, "sha256": deb.sha256},
        units,
        fetched=deb.fetched,
        files=({"path": deb.file, "sha256": deb.sha256, "bytes": size},),
        sha256=deb.sha256,
        mendable=False,
    )
