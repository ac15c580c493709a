"""Context parallelism: one sequence over several ranks, in Megatron's zig-zag shards.

The sequence is cut into 2·cp chunks and rank r holds chunks r and 2·cp-1-r, in that order: a chunk late in the sequence
reads more summaries than an early one, and the two of a rank together read what any other rank's two read. Whole keys
never travel. A chunk needs the ``reach`` keys before it (its *halo*), which a neighbour holds, and the summaries of the
whole sequence, which are gathered. Both are differentiable: a gradient goes back to the rank that holds the key.

Bytes that a rank hands to others are counted in ``TRAFFIC``. Only operations whose payload is known are used (direct
exchange and all-gather, never a reduction whose algorithm the backend chooses), so the count is exact.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from refractor_megatron.fabric.spec import ContextPart


@dataclass
class Traffic:
    """Payload bytes that this rank handed to other ranks, by operation.

    Operations: ``halo`` and ``summaries``, each followed by ``forward`` or ``backward``. A forward that activation
    recomputation runs twice is sent, and counted, twice.
    """

    sent: Counter[str] = field(default_factory=Counter)

    def total(self, direction: str) -> int:
        """Bytes of all operations of one direction, ``forward`` or ``backward``."""
        return sum(count for name, count in self.sent.items() if name.endswith(direction))


TRAFFIC = Traffic()


def part_of(group: Any) -> ContextPart:
    """This process's part, from its context-parallel process group."""
    return ContextPart(group.rank(), group.size())


def local_shard(x: Tensor, dim: int, part: ContextPart) -> Tensor:
    """What a rank holds of a tensor whose dimension ``dim`` is the whole sequence: its two chunks, in local order."""
    if part.size == 1:
        return x
    return torch.cat([x.narrow(dim, lo, hi - lo) for lo, hi in part.chunks(x.shape[dim])], dim=dim)


def with_halos(k: Tensor, v: Tensor, reach: int, group: Any) -> tuple[Tensor, Tensor]:
    """Put before each local chunk the ``reach`` keys and values that precede it in the sequence.

    Args:
        k, v: [b, h_kv, L / cp, d], this rank's two chunks. ``reach`` is at most a chunk, the same on every rank.

    Returns:
        keys, values [b, h_kv, L / cp + 2 · reach, d] in the order [halo a | chunk a | halo b | chunk b]. Nothing stands
        before the first chunk of the sequence: its halo is zeros, for keys that no mask interval reaches.
    """
    part = part_of(group)
    chunk = k.shape[2] // 2
    assert part.size > 1 and k.shape == v.shape and k.shape[2] == 2 * chunk, (part, tuple(k.shape), tuple(v.shape))
    assert 0 <= reach <= chunk, f"a halo of {reach} keys does not fit into one chunk of {chunk}"
    tails = [torch.stack([x[:, :, end - reach : end] for x in (k, v)]) for end in (chunk, 2 * chunk)]
    # each [2 (k, v), b, h_kv, reach, d]
    halo_a, halo_b = _ExchangeHalos.apply(*tails, part, group)  # type: ignore[no-untyped-call]
    keys, values = (
        torch.cat([halo_a[i], x[:, :, :chunk], halo_b[i], x[:, :, chunk:]], dim=2) for i, x in enumerate((k, v))
    )
    return keys, values


def gather_summaries(k_s: Tensor, v_s: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Summaries of the whole sequence, in the order of the sequence, from those of each rank's own chunks.

    Args:
        k_s, v_s: [b, h_kv, n, d], chunk a's before chunk b's, n / 2 of each.

    Returns:
        [b, h_kv, n · cp, d] each. Backward adds up the gradients of all readers at the rank that made the summary, in
        float32 or wider and in the order of the ranks.
    """
    part = part_of(group)
    assert k_s.shape == v_s.shape and k_s.shape[2] % 2 == 0, (tuple(k_s.shape), tuple(v_s.shape))
    local = torch.stack([x.reshape(*x.shape[:2], 2, -1, x.shape[3]) for x in (k_s, v_s)])  # chunks a and b apart
    # [cp, 2 (k, v), b, h_kv, 2 (a, b), n / 2, d]
    shards: Tensor = _AllGather.apply(local.contiguous(), part, group)  # type: ignore[no-untyped-call]
    chunks = torch.cat([shards[..., 0, :, :], shards[..., 1, :, :].flip(0)])  # [2 cp, 2, b, h_kv, n / 2, d]
    k_all, v_all = chunks.permute(1, 2, 3, 0, 4, 5).flatten(3, 4).unbind(0)
    return k_all, v_all


class _ExchangeHalos(torch.autograd.Function):
    """(tail of chunk a, tail of chunk b) -> (halo of chunk a, halo of chunk b), of equal shapes.

    Chunk r-1, before chunk a, is the neighbour r-1's chunk a; chunk 2·cp-2-r, before chunk b, is the neighbour r+1's
    chunk b, and on the last rank its own chunk a. So tails of a go up the line of ranks, tails of b go down, and the
    last rank turns its own round. Gradients take the same ways back.
    """

    @staticmethod
    def forward(ctx: Any, tail_a: Tensor, tail_b: Tensor, part: ContextPart, group: Any) -> tuple[Tensor, Tensor]:
        ctx.part, ctx.group = part, group
        return _along_the_line(tail_a, tail_b, part, group, "halo forward")

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        of_halo_a, of_halo_b = gradients
        of_tail_b, of_tail_a = _along_the_line(of_halo_b, of_halo_a, ctx.part, ctx.group, "halo backward")
        return of_tail_a, of_tail_b, None, None


class _AllGather(torch.autograd.Function):
    """x -> [cp, *x.shape] from all ranks; backward hands each rank the gradients of its own piece and adds them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: ContextPart, group: Any) -> Tensor:
        ctx.part, ctx.group = part, group
        out = x.new_empty(part.size, *x.shape)
        dist.all_gather(list(out.unbind(0)), x, group=group)
        TRAFFIC.sent["summaries forward"] += (part.size - 1) * x.nbytes
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradient.contiguous()
        received = torch.empty_like(gradient)
        dist.all_to_all_single(received, gradient, group=ctx.group)
        TRAFFIC.sent["summaries backward"] += gradient.nbytes // ctx.part.size * (ctx.part.size - 1)
        wide = torch.promote_types(gradient.dtype, torch.float32)
        return received.sum(0, dtype=wide).to(gradient.dtype), None, None


def _along_the_line(
    to_next: Tensor, to_previous: Tensor, part: ContextPart, group: Any, name: str
) -> tuple[Tensor, Tensor]:
    """Send one tensor to rank + 1 and one of equal shape to rank - 1; returns (from rank - 1, from rank + 1).

    Nothing comes from before rank 0: zeros. What the last rank sends up comes back to it.
    """
    first, last = part.rank == 0, part.rank == part.size - 1
    outgoing = [x for x, leaves in ((to_previous, not first), (to_next, not last)) if leaves]
    sent = torch.stack(outgoing)  # in the order of the receiving ranks
    counts = [to_next.numel() if abs(rank - part.rank) == 1 else 0 for rank in range(part.size)]
    received = torch.empty_like(sent)
    if sent.numel():
        dist.all_to_all_single(received.view(-1), sent.view(-1), counts, counts, group=group)
        TRAFFIC.sent[name] += sent.nbytes
    below = torch.zeros_like(to_previous) if first else received[0]
    above = to_next.clone() if last else received[-1]
    return below, above
