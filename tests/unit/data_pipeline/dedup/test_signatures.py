"""A signature file refuses to be compared with what it is not like."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.dedup.signatures import Recipe, read_signatures, write_signatures
from refractor_megatron.errors import DataError

RECIPE = Recipe(ngram=5, num_hashes=8, seed=1)
SIGNATURES = np.arange(24, dtype=np.uint32).reshape(3, 8)


def test_round_trip(tmp_path: Path) -> None:
    write_signatures(tmp_path, SIGNATURES, RECIPE)
    assert np.array_equal(read_signatures(tmp_path, RECIPE, 3), SIGNATURES)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ngram", 4),
        ("num_hashes", 16),
        ("seed", 2),
        ("scheme", "affine64"),
        ("hash", "xxh3"),
        ("normaliser", "words/0"),
    ],
)
def test_another_recipe_is_refused_by_name(tmp_path: Path, name: str, value: object) -> None:
    write_signatures(tmp_path, SIGNATURES, RECIPE)
    with pytest.raises(DataError) as caught:
        read_signatures(tmp_path, replace(RECIPE, **{name: value}), 3)
    message = str(caught.value)
    assert name in message and repr(value) in message and repr(getattr(RECIPE, name)) in message
    assert "signatures.json" in message


def test_other_documents_are_refused(tmp_path: Path) -> None:
    write_signatures(tmp_path, SIGNATURES, RECIPE)
    with pytest.raises(DataError, match="documents = 3 where 4"):
        read_signatures(tmp_path, RECIPE, 4)


@pytest.mark.parametrize("name", ["signatures.npy", "signatures.json"])
def test_missing_and_cut_short(tmp_path: Path, name: str) -> None:
    write_signatures(tmp_path, SIGNATURES, RECIPE)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) - 9])
    with pytest.raises(DataError, match="build again"):
        read_signatures(tmp_path, RECIPE, 3)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match="build again"):
        read_signatures(tmp_path, RECIPE, 3)


def test_array_of_another_shape_than_stated(tmp_path: Path) -> None:
    write_signatures(tmp_path, SIGNATURES, RECIPE)
    np.save(tmp_path / "signatures.npy", SIGNATURES[:2])
    with pytest.raises(DataError, match=r"\[2, 8\]"):
        read_signatures(tmp_path, RECIPE, 3)


def test_header_that_is_no_object(tmp_path: Path) -> None:
    write_signatures(tmp_path, SIGNATURES, RECIPE)
    (tmp_path / "signatures.json").write_text(json.dumps([1]))
    with pytest.raises(DataError, match="build again"):
        read_signatures(tmp_path, RECIPE, 3)
