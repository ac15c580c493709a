from __future__ import annotations

import random

import pytest

from data_pipeline.documents import Document, Part, plain
from data_pipeline.selection import Chosen, Selector, split_heldout, water_level
from refractor_megatron.errors import DataError


def fill(offers: list[tuple[int, Document]], cap: int = 10**9, seed: int = 0) -> Selector:
    selector = Selector(cap, seed)
    for source, document in offers:
        selector.add(source, document)
    return selector


def offers(count: int, size: int = 100) -> list[tuple[int, Document]]:
    return [(i % 3, plain(f"{i:05} ".encode() * (size // 6))) for i in range(count)]


def keys(chosen: list[Chosen]) -> list[bytes]:
    return [one.document.key for one in chosen]


@pytest.mark.parametrize(
    ("sizes", "cap", "level"),
    [([], 10, 0), ([5], 10, 5), ([5], 3, 3), ([10, 10], 10, 5), ([1, 100, 100], 21, 10), ([3, 3, 3], 100, 3)],
)
def test_water_level(sizes: list[int], cap: int, level: int) -> None:
    assert water_level(sizes, cap) == level


def test_order_does_not_depend_on_arrival() -> None:
    many = offers(200)
    shuffled = random.Random(1).sample(many, len(many))
    assert keys(fill(many).finish()) == keys(fill(shuffled).finish())
    assert keys(fill(many).finish()) != keys(fill(many, seed=1).finish())


def test_cap_holds_is_spread_over_sources_and_forgets_nothing_it_needs() -> None:
    """Trimming on the way gives what a selection over the whole corpus gives."""
    many = offers(3000)
    capped = fill(many, cap=30_000).finish()
    whole = fill(many).finish()
    size = {source: sum(one.document.size for one in capped if one.source == source) for source in range(3)}
    assert 29_900 < sum(size.values()) <= 30_000
    assert max(size.values()) - min(size.values()) <= 100
    for source in range(3):
        mine = keys([one for one in capped if one.source == source])
        assert mine == keys([one for one in whole if one.source == source])[: len(mine)]


def test_many_sources_of_large_documents_fill_the_cap() -> None:
    """A hundred sources whose every document is above the fair share still give what fits."""
    many = [(i % 100, plain(b"%05d" % i * 200)) for i in range(300)]
    chosen = fill(many, cap=10_500).finish()
    assert len(chosen) == 10
    assert len({one.source for one in chosen}) == 10


def test_memory_stays_near_the_cap() -> None:
    selector = Selector(10_000, 0)
    for source, document in offers(3000):
        selector.add(source, document)
        assert selector._held <= 20_000 + 4 * document.size


def test_duplicates_and_blanks_are_counted() -> None:
    blank = [plain(b""), plain(b" \n\t"), Document((Part(b" "),), framed=True)]
    selector = fill([*offers(10), (0, plain(b"00000 " * 16)), *((1, one) for one in blank)])
    assert len(selector.finish()) == 10
    assert (selector.counts["duplicate"], selector.counts["blank"]) == (1, 3)


def test_roles_make_documents_different() -> None:
    texts = [Document((Part(b"x", role=role),), framed=True) for role in range(3)] + [plain(b"x")]
    assert len({text.key for text in texts}) == 4


@pytest.mark.parametrize("fraction", [1e-9, 0.02, 0.5, 1 - 1e-9])
def test_split_is_disjoint_complete_and_never_empty(fraction: float) -> None:
    chosen = fill(offers(50)).finish()
    train, heldout = split_heldout(chosen, fraction, 0)
    assert train and heldout
    assert sorted(keys(train) + keys(heldout)) == sorted(keys(chosen))


def test_side_depends_on_the_document_alone() -> None:
    small, large = fill(offers(300)).finish(), fill(offers(900)).finish()
    held_small = set(keys(split_heldout(small, 0.2, 0)[1]))
    held_large = set(keys(split_heldout(large, 0.2, 0)[1]))
    assert held_small == held_large & set(keys(small))
    assert abs(len(held_large) - 180) < 60


def test_single_document_is_cut_at_line_ends() -> None:
    book = b"".join(b"line %d of the book\n" % i for i in range(400))
    selector = fill([(0, plain(book))])
    chosen = selector.finish()
    assert len(chosen) >= 20
    assert all(one.document.parts[0].data.endswith(b"\n") for one in chosen)
    assert sum(one.document.size for one in chosen) == len(book)
    assert selector.counts["cut"] == len(chosen) - 1


@pytest.mark.parametrize(
    ("found", "cap", "reason"),
    [
        ([], 100, "0 usable documents"),
        ([plain(b" "), plain(b"")], 100, r"0 usable documents \(2 blank"),
        ([plain(b"tiny")], 100, "1 usable documents"),
        ([Document((Part(b"only talk"),), framed=True)], 100, "1 usable documents"),
        ([plain(b"long text " * 9), plain(b"more text " * 9)], 50, r"data\.max_mb .* leaves 0 usable documents of 2"),
    ],
)
def test_too_little_is_refused(found: list[Document], cap: int, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        fill([(0, one) for one in found], cap=cap).finish()
