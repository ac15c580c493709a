"""``refractor_manifest.json``: every field of a wrong kind is one sentence that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_megatron.checkpoint.convert import hf_manifest
from refractor_megatron.checkpoint.convert.hf_manifest import MANIFEST, HfManifest, read
from refractor_megatron.errors import CheckpointError

SHA = "0123456789abcdef" * 4


def whole() -> HfManifest:
    return HfManifest(
        weights="raw",
        source={
            "run": "pilot", "step": 7, "config_hash": "c", "fixed_hash": "f", "data_digest": "d",
            "retrieval_digest": None, "grid": {"tp": 1},
        },
        package_version="0.1",
        megatron_version="0.16",
        rules_hash="r",
        tokenizer_digest=None,
        versions=hf_manifest.versions(),
        tensors={"a.weight": {"sha256": SHA, "dtype": "float32", "shape": [2, 3]}},
        files={"a.json": {"bytes": 3, "sha256": SHA}, "a.safetensors": {"bytes": 30, "header_sha256": SHA}},
        fingerprint={
            "positions": [0, 5], "tokens": [1], "logits": [[0.5], [-1]], "scale": 1.0, "tolerance": 1e-4, "parity": 0.0,
        },
    )  # fmt: skip


def written(folder: Path, path: tuple[str, ...], value: Any) -> Path:
    """A manifest with ``value`` at ``path``; without what is there where the value is ``...``."""
    whole().write(folder)
    content = json.loads((folder / MANIFEST).read_text())
    at = content
    for key in path[:-1]:
        at = at[key]
    if value is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    (folder / MANIFEST).write_text(json.dumps(content))
    return folder


def test_read_gives_what_was_written(tmp_path: Path) -> None:
    assert read(tmp_path) is None
    whole().write(tmp_path)
    assert read(tmp_path) == whole()


PATHS: list[tuple[str, ...]] = [
    *((name,) for name in HfManifest.__dataclass_fields__),
    ("source", "step"),
    ("source", "data_digest"),
    ("versions", "router"),
    ("tensors", "a.weight"),
    *(("tensors", "a.weight", name) for name in ("sha256", "dtype", "shape")),
    ("files", "a.json"),
    *(("files", "a.json", name) for name in ("bytes", "sha256")),
    *(("files", "a.safetensors", name) for name in ("bytes", "header_sha256")),
    *(("fingerprint", name) for name in ("positions", "tokens", "logits", "tolerance")),
]
JUNK = st.one_of(st.booleans(), st.floats(max_value=-1), st.integers(max_value=-1), st.just({"x": {}}), st.just([{}]))


@settings(max_examples=200, deadline=None)
@given(path=st.sampled_from(PATHS), value=JUNK)
def test_a_wrong_kind_names_the_field(
    path: tuple[str, ...], value: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = written(tmp_path_factory.mktemp("m"), path, value)
    with pytest.raises(CheckpointError) as refused:
        read(folder)
    message = str(refused.value)
    assert f"{MANIFEST} is damaged ({path[0]}" in message and ", not " in message
    assert path[0] == "versions" or all(part in message for part in path)


@pytest.mark.parametrize(
    "path",
    [
        p
        for p in PATHS
        if p not in {("source", "data_digest"), ("versions", "router"), ("tensors", "a.weight"), ("files", "a.json")}
    ],
)
def test_a_missing_field_is_named(path: tuple[str, ...], tmp_path: Path) -> None:
    field = path[-1] if path[-1] != "header_sha256" else "sha256"
    with pytest.raises(CheckpointError, match=rf"{field} is missing"):
        read(written(tmp_path, path, ...))


CASES: dict[str, tuple[tuple[str, ...], Any, str]] = {
    "step of words": (("source", "step"), "abc", r'source.step is "abc", not a number'),
    "negative step": (("source", "step"), -5, r"source.step is -5"),
    "short digest": (("tensors", "a.weight", "sha256"), SHA[1:], "not a sha256"),
    "file elsewhere": (("files", "../x"), {"bytes": 1, "sha256": SHA}, r"files\[\.\./x\]"),
    "rows of other lengths": (("fingerprint", "logits"), [[0.5], [1, 2]], "a table of 2 by 1 numbers"),
    "no positions": (("fingerprint", "positions"), [], "fingerprint.positions"),
    "tolerance of anything": (("fingerprint", "tolerance"), float("inf"), "fingerprint.tolerance"),
    "unknown field": (("extra",), 1, "extra is 1, not a field"),
    "other schema": (("schema_version",), 2, "schema version 2, this version reads 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_wrong_values(name: str, tmp_path: Path) -> None:
    path, value, says = CASES[name]
    with pytest.raises(CheckpointError, match=says):
        read(written(tmp_path, path, value))


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"null", b"\xff\xfe", b'"x"'])
def test_no_manifest_at_all(text: bytes, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(text)
    with pytest.raises(CheckpointError, match="is damaged"):
        read(tmp_path)


def test_a_manifest_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read(tmp_path)
