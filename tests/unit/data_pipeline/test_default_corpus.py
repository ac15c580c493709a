"""The default corpus against a stand-in apt: real .deb files, no network."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.documents import Document
from data_pipeline.shards import Located
from data_pipeline.sources import debian, fingerprint, open_sources, packages, python_dists
from data_pipeline.sources.base import Quarantined, Reading, Source
from data_pipeline.sources.fingerprint import Fingerprints
from data_pipeline.sources.units import read_unit
from refractor_megatron.errors import DataError

pytestmark = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb to make packages")

# Follows apt: `download` works in the current folder, and `--print-uris` is silent about files that are already there.
APT_GET = """#!/bin/sh
[ -e {root}/offline ] && {{ echo 'E: no network' >&2; exit 100; }}
[ -e {root}/full ] && {{ echo 'E: Write error - write (28: No space left on device)' >&2; exit 100; }}
uris=0; names=
for word; do
  case $word in
    --print-uris) uris=1;;
    update) exit 0;;
    python*|manpages*|git*) names="$names ${{word%%=*}}";;
  esac
done
for name in $names; do
  for file in {root}/repo/${{name}}_*.deb; do
    base=$(basename "$file")
    if [ $uris = 1 ]; then
      [ -e "$base" ] || echo "'http://x/$base' $base 1 SHA256:$(sha256sum < "$file" | cut -d' ' -f1)"
    else cp "$file" .; fi
  done
done
"""
FILES = {
    "manpages": {"usr/share/man/man7/ascii.7.gz": gzip.compress(b".TH ASCII 7\n.SH NAME\nascii \\- a set\n")},
    "manpages-dev": {"usr/share/man/man3/abs.3.gz": gzip.compress(b".TH ABS 3\n.SH NAME\nabs \\- a value\n")},
    "git-doc": {"usr/share/doc/git-doc/git.txt": b"git text\n", "usr/share/doc/git-doc/git.html": b"<p>not taken"},
    "python3.9-doc": {"usr/share/doc/python3.9/html/_sources/old.rst.txt": b"old\n"},
    "python3.11-doc": {"usr/share/doc/python3.11/html/_sources/new.rst.txt": b"new\n"},
}


def make_deb(root: Path, name: str) -> None:
    tree = root / "tree" / name
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        f"Package: {name}\nVersion: 1:2-3\nArchitecture: all\nMaintainer: T <t@example.org>\nDescription: test\n"
    )
    for path, data in FILES[name].items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(data)
    documentation = tree / "usr/share/doc" / name
    if name == "manpages-dev":
        documentation.parent.mkdir(parents=True, exist_ok=True)
        documentation.symlink_to("manpages")
    else:
        documentation.mkdir(parents=True, exist_ok=True)
        (documentation / "copyright").write_text("License: GPL-2\n")
    target = root / "repo" / f"{name}_1%3a2-3_all.deb"
    subprocess.run(["dpkg-deb", "--build", "-Znone", tree, target], check=True, capture_output=True)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("apt")
    (root / "repo").mkdir()
    (root / "bin").mkdir()
    for name in FILES:
        make_deb(root, name)
    (root / "bin" / "apt-get").write_text(APT_GET.format(root=root))
    (root / "bin" / "apt-cache").write_text(f"#!/bin/sh\nprintf '%s\\n' {' '.join(FILES)} unrelated\n")
    for script in (root / "bin").iterdir():
        script.chmod(0o755)
    return root


@pytest.fixture
def apt(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in apt first on PATH; a file `offline` or `full` in the returned folder makes it fail."""
    monkeypatch.setenv("PATH", f"{repository / 'bin'}:/usr/bin:/bin")
    names = ("manpages", "manpages-dev", "git-doc", r"python3\.\d+-doc")
    few = tuple(p for p in packages.DEBIAN_DOCS if p.pattern in names)
    two = tuple(replace(p, newest=2) if p.newest != 2 and "python" in p.pattern else p for p in few)
    monkeypatch.setitem(packages.CORPORA, "debian-docs", few)
    monkeypatch.setitem(packages.CORPORA, "debian-multilingual", two)
    for state in ("offline", "full"):
        (repository / state).unlink(missing_ok=True)
    return repository


def contents(sources: list[Source]) -> dict[str, list[bytes]]:
    return {s.name: [one.parts[0].data for one in documents(s)] for s in sources}


def documents(source: Source) -> list[Document]:
    found = [item for unit in source.units for item in read_unit(json.loads(json.dumps(unit)), Reading())]
    assert not [item for item in found if isinstance(item, Quarantined)]
    return [item.document for item in found if isinstance(item, Located)]


def test_packages_become_text_with_versions_and_licences(apt: Path, tmp_path: Path) -> None:
    sources = open_sources(None, tmp_path, lambda line: None)
    assert contents(sources) == {
        "git-doc": [b"git text\n"],
        "manpages": [b"ASCII 7\n\nNAME\nascii - a set\n"],
        "manpages-dev": [b"ABS 3\n\nNAME\nabs - a value\n"],
        "python3.11-doc": [b"new\n"],
    }
    developer = next(source for source in sources if source.name == "manpages-dev")
    assert (developer.version, developer.licence) == ("1:2-3", "GPL-2")
    assert developer.licence_file == "usr/share/doc/manpages/copyright"
    deb = apt / "repo" / "manpages-dev_1%3a2-3_all.deb"
    assert developer.sha256 == hashlib.sha256(deb.read_bytes()).hexdigest()


def test_the_name_chooses_the_corpus_and_versions(apt: Path, tmp_path: Path) -> None:
    sources = open_sources(None, tmp_path, lambda line: None, name="debian-multilingual")
    assert [s.name for s in sources if s.name.startswith("python")] == ["python3.11-doc", "python3.9-doc"]
    assert contents(sources)["python3.9-doc"] == [b"old\n"]
    one = sources[0]
    deb = tmp_path / "debian" / one.files[0]["path"]
    assert one.files[0]["bytes"] == deb.stat().st_size and one.fetched and not one.mendable


def test_a_named_corpus_is_never_another_one(apt: Path, tmp_path: Path) -> None:
    (apt / "offline").touch()
    with pytest.raises(DataError, match=r"data\.name=debian-multilingual cannot be fetched.*--corpus"):
        open_sources(None, tmp_path, lambda line: None, name="debian-multilingual")


def test_slices_of_a_package_are_the_whole(apt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = open_sources(None, tmp_path, lambda line: None)
    monkeypatch.setattr(debian, "_SLICE_BYTES", 4096)
    sliced = open_sources(None, tmp_path, lambda line: None)
    assert all(len(source.units) > 1 for source in sliced)
    for one, other in zip(whole, sliced, strict=True):
        assert sorted(d.key for d in documents(one)) == sorted(d.key for d in documents(other))


def test_second_use_needs_no_network(apt: Path, tmp_path: Path) -> None:
    first = open_sources(None, tmp_path, lambda line: None)
    (apt / "offline").touch()
    second = open_sources(None, tmp_path, lambda line: None)
    assert [source.identity for source in second] == [source.identity for source in first]
    assert contents(second) == contents(first)


def test_lost_receipt_is_made_again_from_the_same_files(apt: Path, tmp_path: Path) -> None:
    first = open_sources(None, tmp_path, lambda line: None)
    (tmp_path / "debian" / "receipt.json").unlink()
    assert [s.identity for s in open_sources(None, tmp_path, print)] == [s.identity for s in first]


def test_damaged_package_is_named(apt: Path, tmp_path: Path) -> None:
    sources = open_sources(None, tmp_path, lambda line: None)
    with next((tmp_path / "debian").glob("git-doc*.deb")).open("ab") as deb:
        deb.write(b"x")
    with pytest.raises(DataError, match=r"git-doc.*\.deb does not match its sha256"):
        contents(sources)


def test_damaged_package_is_named_before_anything_is_read(apt: Path, tmp_path: Path) -> None:
    open_sources(None, tmp_path, lambda line: None)
    (damaged,) = (tmp_path / "debian").glob("git-doc*.deb")
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(DataError, match=r"git-doc.*\.deb does not match its sha256; delete this file"):
        open_sources(None, tmp_path, lambda line: None)
    damaged.unlink()
    assert contents(open_sources(None, tmp_path, lambda line: None))["git-doc"] == [b"git text\n"]


def test_slices_do_not_hash_the_package_again(apt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "_SLICE_BYTES", 4096)
    sources = open_sources(None, tmp_path, lambda line: None)
    hashed: list[str] = []
    whole = fingerprint.sha256_of
    monkeypatch.setattr(fingerprint, "sha256_of", lambda path: hashed.append(path.name) or whole(path))
    contents(sources)
    assert sum(len(source.units) for source in sources) > len(sources) and hashed == []
    deb = tmp_path / "debian" / sources[0].files[0]["path"]
    os.utime(deb, ns=(1, 1))  # only touched: the same content, and that is looked at
    contents(sources)
    assert set(hashed) == {deb.name}


@pytest.mark.parametrize("receipt", ["", "[]", "{}", "7", '[{"package": "git-doc"}]', '[{"file'])
def test_a_receipt_that_cannot_be_read_is_named(apt: Path, tmp_path: Path, receipt: str) -> None:
    open_sources(None, tmp_path, lambda line: None)
    path = tmp_path / "debian" / "receipt.json"
    path.write_text(receipt)
    with pytest.raises(DataError, match=r"The receipt .*json (cannot be read|names no packages).*delete the receipt"):
        open_sources(None, tmp_path, lambda line: None)
    assert path.read_text() == receipt


def test_packages_that_are_still_there_stay_though_apt_has_others(apt: Path, tmp_path: Path) -> None:
    open_sources(None, tmp_path, lambda line: None)
    path = tmp_path / "debian" / "receipt.json"
    (gone, *others) = json.loads(path.read_bytes())
    kept = tmp_path / "debian" / "git-doc-older.deb"
    old = json.loads(path.read_bytes())[0] | {"file": kept.name, "version": "1:2-2"}
    (tmp_path / "debian" / gone["file"]).rename(kept)
    (tmp_path / "debian" / others[0]["file"]).unlink()
    path.write_text(json.dumps([old, *others]))
    sources = open_sources(None, tmp_path, lambda line: None)
    assert (sources[0].name, sources[0].version, sources[0].files[0]["path"]) == ("git-doc", "1:2-2", kept.name)
    assert json.loads(path.read_bytes()) == [old, *others]
    assert contents(sources)["git-doc"] == [b"git text\n"]


@pytest.mark.parametrize("change", [{"sha256": "0" * 64}, {"package": "git-book"}])
def test_lost_packages_do_not_come_back_as_others(apt: Path, tmp_path: Path, change: dict[str, str]) -> None:
    first = open_sources(None, tmp_path, lambda line: None)
    path, (deb,) = tmp_path / "debian" / "receipt.json", (tmp_path / "debian").glob("git-doc*.deb")
    deb.unlink()
    assert [s.identity for s in open_sources(None, tmp_path, print)] == [s.identity for s in first]
    (entry, *others) = json.loads(path.read_bytes())
    assert entry["package"] == "git-doc"
    deb.unlink()
    receipt = json.dumps([entry | change, *others])
    path.write_text(receipt)
    with pytest.raises(DataError, match=r"git-(doc|book) 1:2-3.*is gone, and apt now offers (another|no)"):
        open_sources(None, tmp_path, print)
    assert path.read_text() == receipt


def test_offline_falls_back_says_so_and_stays(apt: Path, tmp_path: Path) -> None:
    (apt / "offline").touch()
    said: list[str] = []
    first = open_sources(None, tmp_path, said.append)
    assert first[0].name == "python-stdlib"
    assert [line for line in said if "no Debian packages here (E: no network)" in line]
    (apt / "offline").unlink()
    assert open_sources(None, tmp_path, print)[0].name == "python-stdlib"


def test_full_disk_is_no_reason_for_other_text(apt: Path, tmp_path: Path) -> None:
    (apt / "full").touch()
    with pytest.raises(OSError, match="No space left") as caught:
        open_sources(None, tmp_path, lambda line: None)
    assert caught.value.filename.startswith(str(tmp_path / "debian"))
    assert not (tmp_path / "default-corpus.json").exists()


def test_debian_data_do_not_change_to_other_text(apt: Path, tmp_path: Path) -> None:
    open_sources(None, tmp_path, lambda line: None)
    shutil.rmtree(tmp_path / "debian")
    (apt / "offline").touch()
    with pytest.raises(DataError, match=r"cannot be fetched again.*default-corpus\.json"):
        open_sources(None, tmp_path, lambda line: None)


def test_no_apt_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(debian.Unavailable, match="dpkg-deb is not installed"):
        debian.debian_sources(tmp_path, print, packages.DEBIAN_DOCS, "receipt.json", Fingerprints(tmp_path))


def test_python_distributions_have_text_and_licences() -> None:
    sources = {source.name: source for source in python_dists.python_sources()}
    numpy = sources["numpy"]
    assert numpy.version and "BSD" in numpy.licence
    document = documents(numpy)[0]
    assert document.size > 0 and not document.framed
    assert numpy.files[0]["path"].startswith("numpy")
    assert "refractor-megatron" not in sources  # a source tree, not an installed release
    library = sources["python-stdlib"]
    assert library.licence == "PSF-2.0"
    assert any(b"class ArgumentParser" in one.parts[0].data for one in documents(library))
