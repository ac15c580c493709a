"""Zig-zag shards, halos and gathered summaries against the whole sequence on one rank, with gradients and bytes."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_megatron.fabric import context_parallel
from refractor_megatron.fabric.context_parallel import gather_summaries, local_shard, part_of, with_halos
from refractor_megatron.fabric.spec import WHOLE, ContextPart
from tests.ranks import in_threads

SIZES = (2, 3, 4)


class PerThread(threading.local):
    """Traffic of each thread, as each is a rank of its own here."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()


def whole(size: int, chunk: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """k, v [2, 3, L, 4] of a sequence of 2 · size chunks."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, 2 * size * chunk, 4)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))


def layout(x: torch.Tensor, part: ContextPart, reach: int) -> torch.Tensor:
    """[halo a | chunk a | halo b | chunk b] cut from the whole sequence."""
    padded = torch.cat([torch.zeros_like(x[:, :, :reach]), x], dim=2)
    return torch.cat([padded[:, :, lo : hi + reach] for lo, hi in part.chunks(x.shape[2])], dim=2)


@pytest.mark.parametrize("size", SIZES)
def test_shards_cover_the_sequence_once(size: int) -> None:
    tokens = torch.arange(24 * size)
    parts = [local_shard(tokens, 0, ContextPart(rank, size)) for rank in range(size)]
    assert torch.equal(torch.cat(parts).sort().values, tokens)
    first, last = parts[0][:12], parts[0][12:]
    assert torch.equal(first, tokens[:12]) and torch.equal(last, tokens[-12:])
    assert local_shard(tokens, 0, WHOLE) is tokens
    with pytest.raises(AssertionError):
        ContextPart(0, size).chunks(24 * size + 1)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(SIZES), st.integers(1, 9), st.data())
def test_halos_and_their_gradients(size: int, chunk: int, data: st.DataObject) -> None:
    reach = data.draw(st.integers(0, chunk))
    k, v = (x.requires_grad_() for x in whole(size, chunk))
    weights = [torch.randn(2, 2, 3, 2 * chunk + 2 * reach, 4, dtype=torch.float64) for _ in range(size)]

    def rank(group: Any) -> tuple[torch.Tensor, ...]:
        part = part_of(group)
        k_own, v_own = (local_shard(x.detach(), 2, part).requires_grad_() for x in (k, v))
        keys, values = with_halos(k_own, v_own, reach, group)
        (torch.stack([keys, values]) * weights[part.rank]).sum().backward()
        return keys.detach(), values.detach(), k_own.grad, v_own.grad

    found = in_threads(size, rank)
    parts = [ContextPart(n, size) for n in range(size)]
    expected = [torch.stack([layout(x, part, reach) for x in (k, v)]) for part in parts]
    sum((e * w).sum() for e, w in zip(expected, weights, strict=True)).backward()
    for part, (keys, values, k_grad, v_grad) in zip(parts, found, strict=True):
        assert torch.equal(torch.stack([keys, values]), expected[part.rank])
        torch.testing.assert_close(k_grad, local_shard(k.grad, 2, part), rtol=0, atol=1e-14)
        torch.testing.assert_close(v_grad, local_shard(v.grad, 2, part), rtol=0, atol=1e-14)


@pytest.mark.parametrize("size", SIZES)
def test_summaries_and_their_gradients(size: int) -> None:
    k, v = (x.requires_grad_() for x in whole(size, chunk=3))
    weights = [torch.randn(2, *k.shape, dtype=torch.float64) for _ in range(size)]

    def rank(group: Any) -> tuple[torch.Tensor, ...]:
        part = part_of(group)
        k_own, v_own = (local_shard(x.detach(), 2, part).requires_grad_() for x in (k, v))
        gathered = torch.stack(gather_summaries(k_own, v_own, group))
        (gathered * weights[part.rank]).sum().backward()
        return gathered.detach(), k_own.grad, v_own.grad

    found = in_threads(size, rank)
    (torch.stack([k, v]) * sum(weights)).sum().backward()
    for n, (gathered, k_grad, v_grad) in enumerate(found):
        part = ContextPart(n, size)
        assert torch.equal(gathered, torch.stack([k, v]))
        torch.testing.assert_close(k_grad, local_shard(k.grad, 2, part), rtol=0, atol=1e-14)
        torch.testing.assert_close(v_grad, local_shard(v.grad, 2, part), rtol=0, atol=1e-14)


def test_bf16_gradients_of_summaries_add_up_in_float32() -> None:
    """1 + 3 · 2⁻⁸: adding 2⁻⁸ to 1 in bf16, one after the other, would stay at 1."""
    k, v = whole(4, chunk=1, dtype=torch.bfloat16)

    def rank(group: Any) -> torch.Tensor:
        part = part_of(group)
        own = local_shard(k, 2, part).requires_grad_()
        gathered, _ = gather_summaries(own, local_shard(v, 2, part), group)
        gathered.backward(torch.full_like(gathered, 1.0 if part.rank == 0 else 2.0**-8))
        return own.grad

    for gradient in in_threads(4, rank):
        assert torch.equal(gradient, torch.full_like(gradient, 1 + 3 * 2.0**-8)) and gradient[0, 0, 0, 0] > 1


@pytest.mark.parametrize("size", SIZES)
def test_bytes_are_those_that_leave_the_rank(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    traffic = PerThread()
    monkeypatch.setattr(context_parallel, "TRAFFIC", traffic)
    chunk, reach = 8, 5
    k, v = whole(size, chunk, torch.float32)

    def rank(group: Any) -> dict[str, int]:
        part = part_of(group)
        k_own, v_own = (local_shard(x, 2, part).requires_grad_() for x in (k, v))
        keys = with_halos(k_own, v_own, reach, group)
        summaries = gather_summaries(k_own[:, :, ::4], v_own[:, :, ::4], group)
        sum(x.sum() for x in (*keys, *summaries)).backward()
        return dict(traffic.sent)

    row = 2 * 3 * 4 * 4  # bytes of one token's keys: batch, heads, width, float32
    for n, sent in enumerate(in_threads(size, rank)):
        neighbours = (n > 0) + (n < size - 1)
        halo, gathered = neighbours * 2 * reach * row, (size - 1) * 2 * (2 * chunk // 4) * row
        assert sent == {
            "halo forward": halo,
            "halo backward": halo,
            "summaries forward": gathered,
            "summaries backward": gathered,
        }
