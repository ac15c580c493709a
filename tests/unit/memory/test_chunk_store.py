"""The store of chunks: what it answers, what it evicts, what it counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from refractor_megatron.errors import CapabilityError, CheckpointError, ConfigError, RefractorError
from refractor_megatron.memory.chunks import ChunkStore, RangeMissing
from refractor_megatron.memory.codecs import encode

C, H, D = 8, 2, 32
CHUNK_BYTES = 2 * H * C * D * 4  # of one layer, raw


def kv(chunk: int, layer: int = 0, tokens: int = C, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(100 * layer + chunk)
    keys, values = torch.randn(2, 1, H, tokens, D, generator=draw).to(dtype)
    return keys, values


def filled(chunks: int, store: ChunkStore, layers: int = 1) -> ChunkStore:
    for i in range(chunks):
        for layer in range(layers):
            store.put(layer, i, *kv(i, layer))
    return store


def test_a_range_across_chunks_is_exactly_that_range() -> None:
    store = filled(4, ChunkStore(C, "exact", hot=1))
    whole = [torch.cat(column, 2) for column in zip(*(kv(i) for i in range(4)), strict=True)]
    for start, stop in ((0, 1), (3, 5), (7, 9), (0, 32), (8, 16), (31, 32), (5, 30)):
        for got, expected in zip(store.get(0, start, stop), whole, strict=True):
            assert torch.equal(got, expected[:, :, start:stop])
    assert store.statistics().raw == 1 and store.statistics().encoded == 3


def test_put_copies() -> None:
    store, (keys, values) = ChunkStore(C, None), kv(0)
    store.put(0, 0, keys, values)
    keys.zero_(), values.zero_()
    assert torch.equal(store.get(0, 0, C)[0], kv(0)[0])


def test_missing_says_which_positions_and_why() -> None:
    store = filled(6, ChunkStore(C, None, budget=3 * CHUNK_BYTES))
    with pytest.raises(
        RangeMissing, match=r"^keys and values of layer 0, positions 2 to 23, were evicted .*\.$"
    ) as caught:
        store.get(0, 2, 40)
    assert (caught.value.layer, caught.value.start, caught.value.stop, caught.value.evicted) == (0, 2, 24, True)
    assert isinstance(caught.value, RefractorError)
    with pytest.raises(RangeMissing, match=r"positions 48 to 49, are not stored") as never:
        store.get(0, 40, 50)
    assert not never.value.evicted and not store.has(0, 40, 50) and store.has(0, 40, 48) and not store.has(1, 40, 48)
    statistics = store.statistics()
    assert (statistics.hits, statistics.misses, statistics.evictions) == (0, 4, 3)


def test_a_chunk_computed_again_is_there_again() -> None:
    store = filled(6, ChunkStore(C, None, budget=3 * CHUNK_BYTES))
    store.put(0, 1, *kv(1))
    assert torch.equal(store.get(0, 8, 16)[1], kv(1)[1]) and store.has(0, 40, 48)
    store.put(0, 2, *kv(2, tokens=3))
    with pytest.raises(RangeMissing, match="positions 19 to 19, are not stored"):
        store.get(0, 16, 20)
    assert (store.statistics().hits, store.statistics().misses, store.statistics().hit_rate) == (1, 1, 0.5)


def test_the_least_recently_used_goes_first_and_the_first_chunk_can_be_pinned() -> None:
    for pin_first, left in ((False, [2, 4, 5]), (True, [0, 2, 5])):
        store = filled(3, ChunkStore(C, None, budget=3 * CHUNK_BYTES, pin_first=pin_first))
        for i in (3, 4, 5):
            store.get(0, 2 * C, 3 * C)
            store.put(0, i, *kv(i))
        assert sorted(store.statistics().ages) == left


def test_a_chunk_leaves_all_layers_together() -> None:
    store = filled(5, ChunkStore(C, None, budget=6 * CHUNK_BYTES), layers=2)
    assert sorted(store.statistics().ages) == [2, 3, 4] and store.nbytes == 6 * CHUNK_BYTES
    assert store.statistics().evictions == 2
    assert all(store.has(layer, 16, 40) and not store.has(layer, 15, 16) for layer in (0, 1))


def test_a_budget_smaller_than_what_must_stay_is_refused() -> None:
    store = ChunkStore(C, None, budget=CHUNK_BYTES - 1)
    with pytest.raises(CapabilityError, match=r"cannot hold chunk 0 of layer 0 .* raise the budget"):
        store.put(0, 0, *kv(0))
    assert store.nbytes == 0 and not store.has(0, 0, 1)


def test_compress_saves_what_it_says_and_keeps_the_newest_raw() -> None:
    store = filled(5, ChunkStore(C, None), layers=2)
    before = store.nbytes
    saved = store.compress(codec="norm", hot=2)
    assert before - store.nbytes == saved > 0 and store.compress(codec="norm", hot=2) == 0
    statistics = store.statistics()
    assert (statistics.raw, statistics.encoded) == (4, 6)
    assert statistics.by_codec["norm"].tensors == 12 and statistics.escalations == 0
    assert 0 < statistics.by_codec["norm"].mean <= statistics.by_codec["norm"].maximum <= 1e-3
    assert torch.equal(store.get(1, 24, 40)[0], torch.cat([kv(3, 1)[0], kv(4, 1)[0]], 2))


def test_ratio_and_escalations_are_reported() -> None:
    store = ChunkStore(512, "norm", hot=0)
    draw = torch.Generator().manual_seed(0)
    store.put(0, 0, *torch.randn(2, 1, 4, 512, 64, generator=draw).half())
    statistics = store.statistics()
    assert statistics.compression_ratio == pytest.approx(0.508, abs=0.001) and statistics.hit_rate is None
    spoilt = torch.full((1, 4, 512, 64), float("inf"))
    store.put(0, 1, spoilt, spoilt)
    statistics = store.statistics()
    assert statistics.escalations == 2 and statistics.by_codec["exact"].tensors == 2
    assert torch.equal(store.get(0, 600, 602)[0], spoilt[:, :, :2])
    assert statistics.ages[0].tokens == 512 and statistics.ages[1].tokens == 0 and statistics.ages[0].idle == 1


def test_rope_state_travels_with_its_chunk() -> None:
    store = ChunkStore(C, "norm", hot=0)
    store.put(0, 0, *kv(0), rope_state=b"yarn 4")
    store.put(0, 1, *kv(1))
    assert store.rope_state(0, 0) == b"yarn 4" and store.rope_state(0, 1) is None
    without = filled(2, ChunkStore(C, "norm", hot=0)).nbytes
    assert store.nbytes == without + len(b"yarn 4")
    with pytest.raises(RangeMissing):
        store.rope_state(0, 2)


@pytest.mark.parametrize("hot", [0, 4])
def test_a_rewind_keeps_the_first_tokens_of_the_chunk_it_cuts(hot: int) -> None:
    store = filled(3, ChunkStore(C, "exact", hot=hot))
    store.drop(after=11)
    assert store.has(0, 0, 11) and not store.has(0, 10, 12) and not store.has(0, 16, 17)
    assert torch.equal(store.get(0, 8, 11)[0], kv(1)[0][:, :, :3])
    store.put(0, 1, *kv(1, tokens=5))
    assert store.has(0, 0, 13) and torch.equal(store.get(0, 12, 13)[1], kv(1, tokens=5)[1][:, :, 4:])
    store.drop(before=8)
    assert not store.has(0, 7, 8) and store.has(0, 8, 13)
    store.drop(after=0)
    assert store.nbytes == 0 and store.statistics().chunks == 0


def test_dropped_is_not_evicted() -> None:
    store = filled(6, ChunkStore(C, None, budget=3 * CHUNK_BYTES))
    store.drop(before=16)
    for start, evicted in ((0, False), (16, True)):
        with pytest.raises(RangeMissing) as caught:
            store.get(0, start, start + 1)
        assert caught.value.evicted is evicted


def test_damage_in_memory_is_found_and_named() -> None:
    store = filled(2, ChunkStore(C, "norm", hot=0))
    entry = store._chunks[1].layers[0]
    keys = encode(kv(1)[0])
    object.__setattr__(entry, "kv", (keys[:-1] + bytes([keys[-1] ^ 1]), entry.kv[1]))
    with pytest.raises(CheckpointError, match="the keys of layer 0, chunk 1 is damaged"):
        store.get(0, 0, 16)


def test_an_unknown_codec_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="there is no codec 'fp4'"):
        ChunkStore(C, "fp4")
