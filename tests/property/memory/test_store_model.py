"""Random puts, gets, compressions and rewinds against a dictionary of single tokens with a list for recency."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from refractor_megatron.memory.chunks import ChunkStore, RangeMissing

C, LAYERS, IDS, D = 4, 2, 9, 16
TOKEN_BYTES = 2 * D * 4

puts = st.tuples(st.just("put"), st.integers(0, LAYERS - 1), st.integers(0, IDS - 1), st.integers(1, C))
gets = st.tuples(st.just("get"), st.integers(0, LAYERS - 1), st.integers(0, IDS * C - 1), st.integers(1, 12))
drops = st.tuples(st.sampled_from(["after", "before"]), st.integers(0, IDS * C))
squeezes = st.tuples(st.just("compress"), st.integers(0, 3))
OPERATIONS = st.lists(st.one_of(puts, puts, gets, gets, drops, squeezes), min_size=15, max_size=60)


@dataclass
class Model:
    """What a store must hold: tokens by (layer, position), chunks by recency, oldest first."""

    tokens: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    recency: list[int] = field(default_factory=list)

    def used(self, chunk: int) -> None:
        self.recency = [i for i in self.recency if i != chunk] + [chunk]

    def held(self) -> set[int]:
        return {position // C for _, position in self.tokens}

    def lose(self, keep: object) -> None:
        assert callable(keep)
        self.tokens = {key: token for key, token in self.tokens.items() if keep(*key)}

    def evict(self, budget: int, chunk: int, pin_first: bool) -> None:
        while len(self.tokens) * TOKEN_BYTES > budget:
            safe = {chunk, max(self.held())} | ({0} if pin_first else set())
            oldest = next(i for i in self.recency if i in self.held() and i not in safe)
            self.lose(lambda _, position, gone=oldest: position // C != gone)


def check_get(store: ChunkStore, model: Model, layer: int, start: int, stop: int) -> None:
    wanted = [(layer, p) for p in range(start, stop)]
    missing = [p for key, p in zip(wanted, range(start, stop), strict=True) if key not in model.tokens]
    assert store.has(layer, start, stop) is (not missing)
    if missing:
        with pytest.raises(RangeMissing) as caught:
            store.get(layer, start, stop)
        run = next((p for p in range(missing[0], stop) if (layer, p) in model.tokens), stop)
        assert (caught.value.layer, caught.value.start, caught.value.stop) == (layer, missing[0], run)
        return
    keys, values = store.get(layer, start, stop)
    expected = torch.stack([model.tokens[key] for key in wanted])
    assert torch.equal(keys[0, 0], expected) and torch.equal(values[0, 0], -expected)
    for chunk in range(start // C, (stop - 1) // C + 1):
        model.used(chunk)


def play(store: ChunkStore, operations: list[tuple[object, ...]], budget: int | None, pin_first: bool) -> None:
    model, draw = Model(), torch.Generator().manual_seed(0)
    for name, *numbers in operations:
        if name == "put":
            layer, chunk, n = numbers
            x = torch.randn(1, 1, n, D, generator=draw)
            model.lose(lambda at, p, layer=layer, chunk=chunk: (at, p // C) != (layer, chunk))
            model.tokens |= {(layer, chunk * C + i): x[0, 0, i] for i in range(n)}
            model.used(chunk)
            if budget is not None:
                model.evict(budget, chunk, pin_first)
            store.put(layer, chunk, x, -x)
        elif name == "get":
            layer, start, n = numbers
            check_get(store, model, layer, start, start + n)
        elif name == "compress":
            store.compress(hot=numbers[0])
        else:
            at = numbers[0]
            if name == "after":
                model.lose(lambda _, p, at=at: p < at)
                store.drop(after=at)
            else:
                ends = {
                    (la, i): max(p for m, p in model.tokens if (m, p // C) == (la, i)) + 1
                    for la, p in model.tokens
                    for i in [p // C]
                }
                model.lose(lambda la, p, at=at, ends=ends: ends[la, p // C] > at)
                store.drop(before=at)
        assert set(store.statistics().ages) == model.held()
        assert store.nbytes == sum(e.nbytes for c in store._chunks.values() for e in c.layers.values())
        assert budget is None or store.nbytes <= budget
    for layer in range(LAYERS):
        for position in range(IDS * C):
            assert store.has(layer, position, position + 1) is ((layer, position) in model.tokens)


@settings(max_examples=150)
@given(OPERATIONS, st.integers(6, 11), st.booleans())
def test_raw_chunks_under_a_budget(operations: list[tuple[object, ...]], chunks: int, pin_first: bool) -> None:
    """Sizes are known, so the model knows what is evicted. Six chunks always fit: what may not go, in both layers."""
    budget = chunks * C * TOKEN_BYTES
    store = ChunkStore(C, None, budget=budget, pin_first=pin_first)
    play(store, [x for x in operations if x[0] != "compress"], budget, pin_first)


@settings(max_examples=100)
@given(OPERATIONS, st.integers(0, 3))
def test_encoded_chunks(operations: list[tuple[object, ...]], hot: int) -> None:
    """Exact chunks answer as raw ones do, whatever was compressed when."""
    play(ChunkStore(C, "exact", hot=hot), operations, None, False)
