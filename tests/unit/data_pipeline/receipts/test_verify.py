"""One flipped bit anywhere in a sealed folder is found and its file named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline import manifest as manifests
from data_pipeline.receipts.verify import check_proof, prove_file, verify_folder
from refractor_megatron.errors import DataError

KIND = manifests.Kind("thing", "make one", "refractor-thing", 2, ("a.bin", "b.json", "empty"))
BODY = {"counts": {"documents": 3, "rate": 1e-05, "loss": 2.5e300}, "name": "t\u00e4st", "digest": "ab" * 32}


def sealed(folder: Path) -> dict[str, Any]:
    folder.mkdir()
    (folder / "a.bin").write_bytes(bytes(range(256)) * 9)
    (folder / "b.json").write_text('{"x": 1}\n')
    (folder / "empty").touch()
    (folder / "beside.npy").write_bytes(b"beside")
    return manifests.seal(folder, BODY, KIND)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sealed") / "set"
    sealed(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "set"))


def test_whole_folder_has_no_findings(folder: Path) -> None:
    manifest = manifests.load(folder, KIND)
    assert verify_folder(folder) == []
    assert verify_folder(folder, root=manifest["merkle_root"]) == []
    manifests.verify(folder, manifest)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_one_flipped_bit_in_a_file_is_found_and_the_file_named(original: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["a.bin", "b.json", "beside.npy"]))
    path = original / name
    before = path.read_bytes()
    try:
        place, bit = data.draw(st.integers(0, len(before) - 1)), data.draw(st.integers(0, 7))
        path.write_bytes(before[:place] + bytes([before[place] ^ 1 << bit]) + before[place + 1 :])
        assert verify_folder(original) == [f"{path} does not match its sha256."]
    finally:
        path.write_bytes(before)
    assert verify_folder(original) == []


def test_a_bit_of_every_byte_of_the_manifest_counts(original: Path) -> None:
    """Each flip is found, and nothing but the manifest is blamed unless a name in it was changed."""
    path = original / "manifest.json"
    before = path.read_bytes()
    try:
        for place in range(len(before)):
            flipped = before[place] ^ 1 << (5 * place + place // 8) % 8
            path.write_bytes(before[:place] + bytes([flipped]) + before[place + 1 :])
            lines = verify_folder(original)
            assert lines and lines[0].startswith(str(path)), place
            others = [line for line in lines if not line.startswith(str(path))]
            assert all(line.endswith((" is missing.", " is not listed in the manifest.")) for line in others)
    finally:
        path.write_bytes(before)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_load_refuses_every_flipped_bit_that_changes_the_meaning(original: Path, data: st.DataObject) -> None:
    path = original / "manifest.json"
    before = path.read_bytes()
    place, bit = data.draw(st.integers(0, len(before) - 1)), data.draw(st.integers(0, 7))
    try:
        path.write_bytes(before[:place] + bytes([before[place] ^ 1 << bit]) + before[place + 1 :])
        try:
            same = json.loads(path.read_bytes()) == json.loads(before)
        except ValueError:
            same = False
        if not same:
            with pytest.raises(DataError):
                manifests.load(original, KIND)
    finally:
        path.write_bytes(before)


def test_missing_extra_and_cut_files_are_named(folder: Path) -> None:
    (folder / "a.bin").unlink()
    (folder / "b.json").write_text("")
    (folder / "more.bin").touch()
    (folder / "deep").mkdir()
    (folder / "deep" / "er.txt").touch()
    (folder / ".lock").touch()
    assert verify_folder(folder) == [
        f"{folder / 'a.bin'} is missing.",
        f"{folder / 'b.json'} has 0 bytes instead of 9.",
        f"{folder / 'deep' / 'er.txt'} is not listed in the manifest.",
        f"{folder / 'more.bin'} is not listed in the manifest.",
    ]


def test_sealed_folder_within_is_verified_with_it(folder: Path) -> None:
    sealed(folder / "retrieval-1")
    assert verify_folder(folder) == []
    (folder / "retrieval-1" / "beside.npy").write_bytes(b"besidf")
    assert verify_folder(folder) == [f"{folder / 'retrieval-1' / 'beside.npy'} does not match its sha256."]


def test_folder_that_was_sealed_again_passes_only_without_the_root_one_knows(folder: Path) -> None:
    known = manifests.load(folder, KIND)["merkle_root"]
    (folder / "a.bin").write_bytes(b"other")
    (folder / "manifest.json").unlink()
    manifest = manifests.seal(folder, BODY, KIND)
    assert verify_folder(folder) == []
    (line,) = verify_folder(folder, root=known)
    assert manifest["merkle_root"] in line and known in line and "another dataset or build" in line


def test_root_covers_body_names_sizes_and_hashes() -> None:
    manifest = {"version": 2, "files": {"a": {"bytes": 1, "sha256": "x"}, "b": {"bytes": 2, "sha256": "y"}}}
    roots = {manifests.root(manifest)}
    for change in (
        {"version": 3},
        {"more": 1},
        {"files": {"a": {"bytes": 1, "sha256": "x"}}},
        {"files": {"a": {"bytes": 1, "sha256": "x"}, "c": {"bytes": 2, "sha256": "y"}}},
        {"files": {"a": {"bytes": 1, "sha256": "x"}, "b": {"bytes": 3, "sha256": "y"}}},
        {"files": {"a": {"bytes": 1, "sha256": "y"}, "b": {"bytes": 2, "sha256": "x"}}},
    ):
        roots.add(manifests.root({**manifest, **change}))
    assert len(roots) == 7
    assert manifests.root({**manifest, "merkle_root": "anything"}) in roots


def test_folder_of_version_1_has_no_root_and_its_files_are_verified(folder: Path) -> None:
    manifest = manifests.load(folder, KIND)
    del manifest["merkle_root"]
    (folder / "manifest.json").write_bytes(manifests.serialised({**manifest, "version": 1}))
    assert manifests.load(folder, KIND)["version"] == 1
    assert verify_folder(folder) == []
    (folder / "empty").write_text("x")
    assert verify_folder(folder) == [f"{folder / 'empty'} has 1 bytes instead of 0."]


def test_manifest_without_its_root_is_no_older_one(folder: Path) -> None:
    manifest = manifests.load(folder, KIND)
    del manifest["merkle_root"]
    (folder / "manifest.json").write_bytes(manifests.serialised(manifest))
    assert verify_folder(folder) == [f"{folder / 'manifest.json'} has no Merkle root."]
    with pytest.raises(DataError, match="does not match its Merkle root"):
        manifests.load(folder, KIND)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "x/../../y", ""])
def test_manifest_cannot_point_outside(folder: Path, name: str) -> None:
    manifest = manifests.load(folder, KIND)
    manifest["files"][name] = {"bytes": 0, "sha256": "0" * 64}
    manifest["merkle_root"] = manifests.root(manifest)
    (folder / "manifest.json").write_bytes(manifests.serialised(manifest))
    assert verify_folder(folder) == [f"{folder / 'manifest.json'} is damaged: it is no manifest."]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "x", "version": 1, "files": {"a": 3}}', "[" * 10**5])
def test_what_is_no_manifest_is_said_to_be_damaged(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    assert verify_folder(folder) == [f"{folder / 'manifest.json'} is damaged: it is no manifest."]


def test_folder_that_was_never_sealed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no manifest.json: it is no dataset, or no whole one; name another\.$"):
        verify_folder(tmp_path)


def test_one_file_is_proved_by_the_root_alone(folder: Path) -> None:
    manifest = manifests.load(folder, KIND)
    for name in manifest["files"]:
        claim = json.loads(json.dumps(prove_file(manifest, name)))
        assert claim["leaf"] == {"name": name, **manifest["files"][name]}
        assert check_proof(claim, manifest["merkle_root"])
        assert not check_proof({**claim, "leaf": {**claim["leaf"], "bytes": 10**6}}, manifest["merkle_root"])
        assert not check_proof(claim, "0" * 64)
