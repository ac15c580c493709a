"""The file of a packed stage: read back as written, refused when damaged."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.pack.packed import Packed, read_packed, write_packed
from refractor_megatron.errors import DataError


def packed(**changes: Any) -> Packed:
    """Three sequences of ten tokens: two of domain 0, none of domain 1, one of domain 2."""
    whole = Packed(
        capacity=10,
        stores=np.array([100, 20]),
        sequences=np.array([2, 0, 1]),
        slots=np.array([60, 0, 40]),
        starts=np.array([0, 2, 3, 6]),
        pieces=np.array([[0, 0, 4], [0, 94, 6], [0, 30, 10], [1, 0, 1], [1, 15, 5], [0, 50, 4]]),
    )
    return dataclasses.replace(whole, **changes)


def pieces(row: int, column: int, value: int) -> dict[str, Any]:
    changed = packed().pieces.copy()
    changed[row, column] = value
    return {"pieces": changed}


def test_reads_back(tmp_path: Path) -> None:
    digest = write_packed(tmp_path / "a.pack", packed())
    assert digest == hashlib.sha256((tmp_path / "a.pack").read_bytes()).hexdigest()
    got, wrote = read_packed(tmp_path / "a.pack"), packed()
    assert got.capacity == 10 and len(got) == 3
    for name in ("stores", "sequences", "slots", "starts", "pieces"):
        assert np.array_equal(getattr(got, name), getattr(wrote, name)), name
    assert got.of(2).tolist() == [[1, 0, 1], [1, 15, 5], [0, 50, 4]]
    assert got.cu_seqlens(2).tolist() == [0, 1, 6, 10]
    assert got.domains.tolist() == [0, 0, 2]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda raw: raw[:-1], "is truncated"),
        (lambda raw: raw + b"\0" * 8, "is truncated"),
        (lambda raw: raw[:20], "is not a packed stage"),
        (lambda raw: b"Y" + raw[1:], "is not a packed stage"),
        (lambda raw: raw[:8] + b"\x09" + raw[9:], "version 9, this code reads 1"),
        (lambda raw: raw[:16] + b"\x0b" + raw[17:], "contradicts itself"),  # sequences of 11 tokens
        (lambda raw: None, "No such file"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Any, reason: str) -> None:
    path = tmp_path / "a.pack"
    write_packed(path, packed())
    changed = damage(path.read_bytes())
    path.unlink()
    if changed is not None:
        path.write_bytes(changed)
    with pytest.raises(DataError, match=rf"a\.pack.*{reason}"):
        read_packed(path)


@pytest.mark.parametrize(
    "changes",
    [
        pieces(0, 2, 5),  # a sequence of eleven
        pieces(0, 0, 2),  # no such store
        pieces(0, 0, -1),
        pieces(1, 1, 95),  # behind the end of its store
        pieces(3, 1, -1),
        {"pieces": np.array([[0, 0, 0], [0, 0, 10], [0, 30, 10], [1, 0, 1], [1, 15, 5], [0, 50, 4]])},
        {"starts": np.array([0, 3, 2, 6])},
        {"starts": np.array([0, 99, 3, 6])},
        {"starts": np.array([0, -5, 3, 6])},
        {"starts": np.array([1, 2, 3, 6])},
        {"starts": np.array([0, 2, 3, 5])},
        {"slots": np.array([60, 40, 0])},  # a domain without sequences is drawn
        {"slots": np.array([0, 0, 0])},
        {"slots": np.array([60, 0, -40])},
        {"sequences": np.array([3, -1, 1])},
        {"stores": np.array([99, 20])},
    ],
)
def test_contradictions_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_packed(tmp_path / "a.pack", packed(**changes))
    with pytest.raises(DataError, match=r"a\.pack contradicts itself"):
        read_packed(tmp_path / "a.pack")


def test_domains_must_cover_the_sequences(tmp_path: Path) -> None:
    path = tmp_path / "a.pack"
    write_packed(path, packed())
    raw = bytearray(path.read_bytes())
    raw[48 + 16] = 3  # sequences of domain 0: behind the header and two stores
    path.write_bytes(raw)
    with pytest.raises(DataError, match="contradicts itself"):
        read_packed(path)
