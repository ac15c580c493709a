"""One rank of ``python tools/record.py context``: what context-parallel attention visits and sends. Needs torchrun.

python -m torch.distributed.run --standalone --nproc-per-node 4 tools/context_traffic.py --length 65536 --out out.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from refractor_megatron.distinction.generators import plain_records
from refractor_megatron.distinction.pattern import LocalPattern
from refractor_megatron.distinction.rules import compile_rules
from refractor_megatron.fabric import plan_for, pool, tri_tier_attention
from refractor_megatron.fabric.context_parallel import TRAFFIC, gather_summaries, part_of, with_halos
from refractor_megatron.fabric.layout import Layout
from refractor_megatron.fabric.plan import MaskPlan
from refractor_megatron.fabric.spec import ContextPart, MaskSpec, SummarySpec

#: The spec's pattern of tiers A and B; retrieved keys never travel between ranks.
SPEC = MaskSpec(LocalPattern(window=512), SummarySpec(block_size=128, per_block=2))
HEADS, WIDTH, BYTES = 4, 64, 4
RULES = compile_rules([])


def records_of(length: int, documents: Sequence[int]) -> torch.Tensor:
    """Plain records int32 [1, L, 4] of documents of the given lengths."""
    return torch.from_numpy(plain_records(length, documents=documents))[None]


def packed(length: int) -> list[int]:
    """Lengths of packed documents, log-uniform from 1k to 16k, seed 0."""
    rng = np.random.default_rng(0)
    lengths: list[int] = []
    while (left := length - sum(lengths)) > 0:
        lengths.append(min(left, int(np.exp(rng.uniform(np.log(1024), np.log(16384))))))
    return lengths


def attend(plan: MaskPlan, group: Any) -> float:
    """Attention of this rank, forward and backward; returns the seconds it took."""
    part, rows = part_of(group), plan.length
    length = rows * part.size
    generator = torch.Generator().manual_seed(part.rank)
    q, k, v = (torch.randn(1, HEADS, rows, WIDTH, generator=generator).requires_grad_() for _ in range(3))
    summary = SPEC.summary
    assert summary is not None
    queries = torch.zeros(HEADS, summary.per_block, WIDTH).requires_grad_()
    frequencies = 1e4 ** (-torch.arange(0, WIDTH, 2) / WIDTH)
    dist.barrier()
    started = time.perf_counter()
    own = [
        pool("attn_pool", k_chunk, v_chunk, queries, summary.per_block, summary.block_size, frequencies, start)
        for k_chunk, v_chunk, (start, _) in zip(k.chunk(2, 2), v.chunk(2, 2), part.chunks(length), strict=True)
    ]
    k_far, v_far = gather_summaries(torch.cat([x[0] for x in own], 2), torch.cat([x[1] for x in own], 2), group)
    keys, values = with_halos(k, v, plan.space.halo, group)
    out = tri_tier_attention(q, keys, values, k_far, v_far, plan, WIDTH**-0.5)
    torch.autograd.backward(out.sum())
    return time.perf_counter() - started


def contiguous_pairs(layout: Layout, size: int) -> list[int]:
    """Visited pairs of each rank, had rank r the r-th of ``size`` equal stretches of the sequence."""
    pairs = [0] * size
    for visit in layout.visits:
        rank = visit.first * size // layout.rows
        assert (visit.last - 1) * size // layout.rows == rank, "a visit belongs to one rank"
        pairs[rank] += (visit.last - visit.first) * visit.keys
    return pairs


def imbalance(pairs: Sequence[int]) -> float:
    """How much longer the busiest rank works than the average one: max / mean - 1."""
    return max(pairs) * len(pairs) / sum(pairs) - 1


def ring(length: int, size: int) -> dict[str, int]:
    """Bytes that a rank of ring attention sends: its keys and values go to every other rank, forward and again
    backward, there with their gradients (the hop home not counted)."""
    shard = 2 * HEADS * length // size * WIDTH * BYTES
    return {"forward": (size - 1) * shard, "backward": (size - 1) * 2 * shard}


def main() -> None:
    """Measure, gather, and write the JSON on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    part, length = part_of(group), args.length
    parts = [ContextPart(rank, part.size) for rank in range(part.size)]
    plan = plan_for(records_of(length, [length]), RULES, SPEC, part)
    seconds = attend(plan, group)
    mine = {
        "rank": part.rank,
        "visited_pairs": plan.layout.visited_pairs,
        "forward": TRAFFIC.total("forward"),
        "backward": TRAFFIC.total("backward"),
        "by_operation": dict(TRAFFIC.sent),
        "ring_pairs": plan.stats.causal_pairs,
        "seconds": round(seconds, 2),
    }
    ranks: list[Any] = [None] * part.size
    dist.all_gather_object(ranks, mine)
    if part.rank == 0:
        rows = {"one document": [length], "packed documents": packed(length)}
        balance = {}
        for name, documents in rows.items():
            records = records_of(length, documents)
            zigzag = [plan_for(records, RULES, SPEC, p).layout.visited_pairs for p in parts]
            contiguous = contiguous_pairs(plan_for(records, RULES, SPEC).layout, part.size)
            balance[name] = {"zigzag": imbalance(zigzag), "contiguous": imbalance(contiguous)}
        result = {
            "length": length,
            "size": part.size,
            "ranks": ranks,
            "ring": ring(length, part.size),
            "balance": balance,
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
