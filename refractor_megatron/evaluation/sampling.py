"""Sampled continuations by full recomputation: no cache, so what is shown is exactly what was trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.retrieval.neighbours import Neighbours

from ..engines.megatron import MegatronEngine


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen."""

    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0


def next_tokens(logits: Tensor, options: SamplingOptions, generator: torch.Generator) -> Tensor:
    """Nucleus sampling: logits [b, V] -> ids [b]."""
    probabilities = torch.softmax(logits.double() / options.temperature, dim=-1)
    ordered, order = probabilities.sort(dim=-1, descending=True)
    outside = ordered.cumsum(-1) - ordered >= options.top_p  # the most likely token always stays
    ordered = ordered.masked_fill(outside, 0.0)
    choice = torch.multinomial(ordered, 1, generator=generator)
    return order.gather(-1, choice).squeeze(-1)


def continue_prompts(
    engine: MegatronEngine,
    tokens: Tensor,
    records: Tensor,
    count: int,
    vocab_size: int,
    options: SamplingOptions,
    neighbours: Neighbours | None = None,
) -> Tensor:
    """Continue prompts of one length.

    Args:
        tokens: int64 [b, p]; records: int32 [b, p, 4 + R]. New tokens take the record of the last prompt token.
        vocab_size: ids at or above it are padding of the embedding table and are never chosen.
        neighbours: retrieves, for text that is not in the index, whenever a chunk is complete; needed where R > 0.

    Returns:
        int64 [b, count].
    """
    generator = torch.Generator().manual_seed(options.seed)
    prompt = tokens.shape[1]
    assert prompt + count <= engine.seq_len
    for _ in range(count):
        logits = engine.logits(tokens, records)[:, -1, :vocab_size].cpu()
        chosen = next_tokens(logits, options, generator)
        record = records[:, -1:]
        if neighbours is not None and tokens.shape[1] % neighbours.chunk == 0:
            record = torch.cat([record[..., :4], _retrieved(tokens, records, neighbours)], dim=2)
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        records = torch.cat([records, record], dim=1)
    return tokens[:, prompt:]


def _retrieved(tokens: Tensor, records: Tensor, neighbours: Neighbours) -> Tensor:
    """Ids int32 [b, 1, R] for the chunk that begins now, found with the one that has just ended."""
    last = slice(tokens.shape[1] - neighbours.chunk, None)
    found = neighbours.found_with(tokens[:, last].cpu().numpy(), records[:, last, 0].cpu().numpy(), None)
    return torch.from_numpy(found)[:, None].to(records)
