"""Each tensor once: what is missing, superfluous, doubled or of another shape is refused by name."""

from __future__ import annotations

import pytest

from refractor_megatron.checkpoint.convert.ledger import Ledger
from refractor_megatron.errors import CheckpointError

SHAPES = {"a": (2, 3), "b": (4,)}


def ledger() -> Ledger:
    return Ledger("folder", {"x": (6,), "y": (4,), "maybe": (1,)}, SHAPES, frozenset({"maybe"}))


def test_a_whole_conversion_closes_and_prints() -> None:
    book = ledger()
    book.record(["x"], {"a": (2, 3)}, (6,))
    book.record(["y"], {"b": (4,)}, (4,))
    book.left["z"] = "optimizer state"
    book.close()
    text = book.text()
    assert "x  ->  a  [6]" in text and "optimizer state: 1 (z ...)" in text
    assert text.endswith("2 tensors read once, 2 written once")


def test_anything_else_is_refused() -> None:
    book = ledger()
    book.record(["x"], {"a": (2, 3)}, (6,))
    with pytest.raises(CheckpointError, match="tensor y was never read"):
        book.close()
    with pytest.raises(CheckpointError, match="tensor x was read twice"):
        book.record(["x"], {"b": (4,)}, (4,))
    with pytest.raises(CheckpointError, match="tensor a was written twice"):
        book.record(["y"], {"a": (2, 3)}, (4,))
    for sources, targets, message in (
        (["w"], {}, "tensor w was read and has no place"),
        (["maybe"], {"c": (1,)}, "tensor c was written and has no place"),
        ([], {"b": (5,)}, r"tensor b would be written with shape \[5\]"),
    ):
        with pytest.raises(CheckpointError, match=message):
            ledger().record(sources, targets, (1,))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"a": (2, 3)}, "tensor b is missing in folder"),
        ({"a": (3, 2), "b": (4,)}, r"tensor a of folder has shape \[3, 2\].*\[2, 3\]"),
        ({**SHAPES, "c": (1,), "d": (1,)}, "tensor c and 1 others of folder has no place"),
    ],
)
def test_what_the_source_holds(found: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ledger().check_found(found, SHAPES)
    ledger().check_found(SHAPES, SHAPES)
