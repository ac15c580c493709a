"""Packing against a naive twin, and what must hold of any packing: full sequences, every token once, few cuts."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.curriculum.deal import Corpus, deal
from data_pipeline.curriculum.routing import MOST_DRAWN, TooLittle, cut, sequences_of
from data_pipeline.pack.best_fit import Packing, best_fit, fill_gaps, fill_needed, pack, pack_with

Ints = npt.NDArray[np.int64]
MANY = st.lists(st.integers(1, 60), max_size=60)


def laid_out(lengths: list[int], store: int = 0) -> Ints:
    """Pieces of these lengths, back to back in ``store``."""
    ends = np.cumsum([0, *lengths])
    return np.array([[store, low, n] for low, n in zip(ends, lengths, strict=False)], dtype=np.int64).reshape(-1, 3)


def tokens(pieces: Ints) -> list[tuple[int, int]]:
    """(store, token) of every token, sorted."""
    return sorted((store, token) for store, low, n in pieces.tolist() for token in range(low, low + n))


def filled(packing: Packing) -> list[int]:
    """Tokens of each sequence."""
    borders = zip(packing.starts, packing.starts[1:], strict=False)
    return [int(packing.pieces[low:high, 2].sum()) for low, high in borders]


def naive_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Looks at every bin: the fullest that has room; among equals the one touched last."""
    room: list[int] = []
    touched: list[int] = []
    chosen = []
    for step, length in enumerate(lengths):
        fits = [b for b in range(len(room)) if room[b] >= length]
        if fits:
            best = min(fits, key=lambda b: (room[b], -touched[b]))
        else:
            best = len(room)
            room.append(capacity)
            touched.append(step)
        room[best] -= length
        touched[best] = step
        chosen.append(best)
    return chosen


@settings(max_examples=300)
@given(lengths=MANY, more=st.integers(0, 70))
def test_the_kernel_places_as_the_naive_twin(lengths: list[int], more: int) -> None:
    capacity = max(lengths, default=1) + more
    for order in (lengths, sorted(lengths, reverse=True)):
        assert best_fit(np.array(order, dtype=np.int64), capacity).tolist() == naive_best_fit(order, capacity)


@settings(max_examples=200)
@given(lengths=MANY, more=st.integers(0, 40), window=st.integers(1, 70))
def test_sequences_are_full_and_no_token_is_lost(lengths: list[int], more: int, window: int) -> None:
    capacity, pieces = max(lengths, default=1) + more, laid_out(lengths)
    packing = pack(pieces, capacity, "key", window)
    count = sum(lengths) // capacity
    assert filled(packing) == [capacity] * count
    assert int(packing.left[:, 2].sum()) == sum(lengths) - count * capacity < capacity
    assert tokens(np.concatenate([packing.pieces, packing.left])) == tokens(pieces)


@settings(max_examples=200)
@given(lengths=MANY, more=st.integers(0, 40))
def test_each_gap_cuts_one_document_at_most(lengths: list[int], more: int) -> None:
    """Documents in parts are counted, and there are no more of them than sequences that best fit left open."""
    capacity, pieces = max(lengths, default=1) + more, laid_out(lengths)
    packing = pack(pieces, capacity, "key")
    ends = np.cumsum(pieces[:, 2])
    parts = np.concatenate([packing.pieces, packing.left])
    document = np.searchsorted(ends, parts[:, 1], side="right")
    assert np.all(parts[:, 1] + parts[:, 2] <= ends[document])  # no piece spans two documents
    in_parts = sum(count > 1 for count in Counter(document.tolist()).values())
    assert in_parts == packing.cut
    whole = [int((parts[document == d, 2] == pieces[d, 2]).all()) for d in range(len(pieces))]
    open_sequences = sum(
        any(not whole[d] for d in document[low:high])
        for low, high in zip(packing.starts, packing.starts[1:], strict=False)
    )
    assert in_parts <= open_sequences


@settings(max_examples=150)
@given(whole=MANY, fillers=MANY, more=st.integers(0, 40))
def test_whole_documents_stay_whole(whole: list[int], fillers: list[int], more: int) -> None:
    """Only fillers are cut; what needs no more filler than there is, is all placed."""
    capacity = max([*whole, *fillers], default=1) + more
    kept, other = laid_out(whole, 1), laid_out(fillers)
    packing, out = pack_with(kept, other, capacity, "key")
    assert set(filled(packing)) <= {capacity}
    placed = packing.pieces[packing.pieces[:, 0] == 1]
    assert sorted(map(tuple, np.concatenate([placed, out]).tolist())) == sorted(map(tuple, kept.tolist()))
    assert tokens(np.concatenate([packing.pieces, packing.left, out])) == tokens(np.concatenate([kept, other]))
    if fill_needed(kept, capacity) <= sum(fillers):
        assert not len(out)
    assert np.all(packing.left[:, 0] == 0)


@given(gaps=st.lists(st.integers(0, 30), max_size=20), fillers=MANY)
def test_gaps_are_filled_in_order(gaps: list[int], fillers: list[int]) -> None:
    if sum(gaps) > sum(fillers):
        return
    parts, gap, left, _ = fill_gaps(np.array(gaps, dtype=np.int64), laid_out(fillers))
    assert np.bincount(gap, weights=parts[:, 2], minlength=len(gaps)).astype(int).tolist() == gaps
    together = np.concatenate([parts, left])
    assert np.array_equal(together[:, 1], np.cumsum(together[:, 2]) - together[:, 2])  # end to end, as they were


@given(lengths=MANY, capacity=st.integers(1, 70))
def test_cutting_loses_nothing(lengths: list[int], capacity: int) -> None:
    pieces = laid_out(lengths)
    parts = cut(pieces, capacity)
    assert tokens(parts) == tokens(pieces)
    assert parts[:, 2].max(initial=1) <= capacity
    assert len(parts) == sum(-(-n // capacity) for n in lengths)


@st.composite
def corpora(draw: st.DrawFn) -> tuple[Corpus, list[int]]:
    """Documents of up to three domains, some not trained on, with tasks for some stages."""
    stages = sorted(draw(st.sets(st.integers(3, 60), min_size=1, max_size=4)))
    longest = stages[-1] + 1
    lengths = draw(st.lists(st.integers(1, 2 * longest), min_size=1, max_size=80))
    domains = draw(st.lists(st.integers(-1, 2), min_size=len(lengths), max_size=len(lengths)))
    starts = np.cumsum([0, *lengths]).astype(np.int64)
    made: dict[int, list[Ints]] = {}
    low = 0
    for stage in stages:
        kinds = [draw(st.lists(st.integers(1, stage + 1), max_size=4)) for _ in range(2)]
        made[stage] = [laid_out(kind, 1) for kind in kinds]
        for pieces in made[stage]:
            pieces[:, 1] += low
            low += int(pieces[:, 2].sum())
    return Corpus(starts, np.array(domains, dtype=np.int64), 3, made), stages


@settings(max_examples=200)
@given(drawn=corpora(), share=st.sampled_from([0.0, 0.35, 0.7]))
def test_no_token_is_in_two_stages(drawn: tuple[Corpus, list[int]], share: float) -> None:
    corpus, lengths = drawn
    stages, left_out = deal(corpus, lengths, share, 2, "key")
    assert sorted([*(s.length for s in stages), *(one.length for one in left_out)]) == lengths
    seen = np.concatenate([p.pieces for stage in stages for p in stage.packings])
    together = tokens(seen)
    assert len(set(together)) == len(together)
    # of each domain, less than one sequence of the first stage is left over
    trained = int(np.diff(corpus.starts)[corpus.domains >= 0].sum())
    used = sum(token[0] == 0 for token in together)
    assert trained - used == stages[0].passed <= corpus.count * stages[0].length
    for stage in stages:
        assert set().union(*(filled(p) for p in stage.packings)) <= {stage.length + 1}
        for domain, packing in enumerate(stage.packings[: corpus.count]):
            assert np.all(corpus.domain_of(packing.pieces) == domain)


@settings(max_examples=200)
@given(drawn=corpora(), share=st.sampled_from([0.0, 0.35, 0.7]))
def test_text_reaches_the_stage_that_holds_it_or_goes_down(drawn: tuple[Corpus, list[int]], share: float) -> None:
    """No stage but the first is without the long text that was asked of it."""
    corpus, lengths = drawn
    stages, left_out = deal(corpus, lengths, share, 2, "key")
    for stage in stages[1:]:
        text = np.concatenate([p.pieces for p in stage.packings[: corpus.count]])
        assert len(text) and int(text[text[:, 2] > stage.below, 2].sum()) > 0
    for one in left_out:
        assert one.reason.tokens < one.reason.needs


@given(
    long=st.lists(st.integers(0, 900), min_size=1, max_size=6),
    short=st.integers(0, 3000),
    capacity=st.integers(20, 200),
    share=st.sampled_from([0.0, 0.2, 0.35, 0.6]),
)
def test_a_stage_is_as_long_as_it_is_asked_to_be(long: list[int], short: int, capacity: int, share: float) -> None:
    """Short text is at most its share and one sequence for rounding; a stage without long text is refused."""
    have = np.array(long, dtype=np.int64)
    rest = np.full(len(long), short, dtype=np.int64)
    count = sequences_of(have, rest, capacity, share)
    if isinstance(count, TooLittle):
        return
    assert have.sum() >= (1 - share) * capacity
    assert np.all(count * capacity <= have + rest)
    most = min(have.sum() * share / (1 - share), MOST_DRAWN * rest.sum())
    assert count.sum() * capacity <= have.sum() + most + 1
    assert np.all(count >= have // capacity)  # all the long text that fills sequences of its own
