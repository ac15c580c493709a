"""How the next token is chosen, for evaluation and for decoding; and continuations by full recomputation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ConfigError

if TYPE_CHECKING:  # the function of a few rows of logits is used where neither Megatron nor an index is
    from data_pipeline.retrieval.neighbours import Neighbours

    from ..engines.megatron import MegatronEngine

#: ``torch.Generator`` takes seeds below.
_SEEDS = 2**63


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen: temperature, then top-k, then top-p of what is left.

    temperature: divides the logits; 0 takes the most likely token. top_p: the smallest set of most likely tokens that
    together have at least this probability. top_k: at most so many tokens; 0 sets no limit. seed: of the row's own
    generator. Errors: ``ConfigError`` for a value out of range.
    """

    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature {self.temperature} makes no sense: give 0 (most likely token) or more.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top-p {self.top_p} makes no sense: give more than 0 and at most 1 (no limit).")
        if self.top_k < 0:
            raise ConfigError(f"top-k {self.top_k} makes no sense: give 1 or more, or 0 for no limit.")
        if not 0 <= self.seed < _SEEDS:
            raise ConfigError(f"seed {self.seed} makes no sense: give 0 or more, below 2**63.")

    def generator(self) -> torch.Generator:
        """The generator of a row: on the CPU, so that a seed means the same on every device."""
        return torch.Generator().manual_seed(self.seed)


def next_tokens(logits: Tensor, options: Sequence[SamplingOptions], generators: Sequence[torch.Generator]) -> Tensor:
    """One token for each row, by inverting the cumulative distribution of the tokens that the options leave.

    A row depends on its own logits, options and generator alone, whatever batch it is in: each choice above temperature
    0 takes one uniform number from the row's generator. Of equally likely tokens the one with the lower id comes first.

    Args:
        logits: [b, V]; ``-inf`` for a token that may not be chosen, at least one finite in each row.

    Returns:
        int64 [b].
    """
    assert len(options) == len(generators) == logits.shape[0]
    if all(option.temperature == 0 for option in options):
        return logits.argmax(dim=-1)
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    temperature = _column(logits, [o.temperature or 1.0 for o in options])
    probabilities = torch.softmax((ordered - ordered[:, :1]).double() / temperature, dim=-1)  # no overflow near 0
    top_k = _column(logits, [float(o.top_k or logits.shape[1]) for o in options])
    rank = torch.arange(logits.shape[1], device=logits.device)
    probabilities = probabilities.masked_fill(rank >= top_k, 0.0)
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    top_p = _column(logits, [o.top_p if o.top_p < 1 else math.inf for o in options])
    outside = probabilities.cumsum(-1) - probabilities >= top_p  # the most likely token always stays
    kept = probabilities.masked_fill(outside, 0.0)
    cumulative = kept.cumsum(-1)
    drawn = _column(logits, [_uniform(o, g) for o, g in zip(options, generators, strict=True)])
    place = torch.searchsorted(cumulative, drawn * cumulative[:, -1:], right=True)
    last = (kept > 0).sum(-1, keepdim=True) - 1  # rounding may put the number at the very end
    place = torch.minimum(place, last)
    greedy = torch.tensor([[o.temperature == 0] for o in options], device=logits.device)
    return order.gather(-1, place.masked_fill(greedy, 0)).squeeze(-1)


def _column(logits: Tensor, values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]


def _uniform(options: SamplingOptions, generator: torch.Generator) -> float:
    return 0.0 if options.temperature == 0 else torch.rand((), dtype=torch.float64, generator=generator).item()


def continue_prompts(
    engine: MegatronEngine,
    tokens: Tensor,
    records: Tensor,
    count: int,
    vocab_size: int,
    options: SamplingOptions,
    neighbours: Neighbours | None = None,
) -> Tensor:
    """Continue prompts of one length by full recomputation: no cache, so what is shown is exactly what was trained.

    Args:
        tokens: int64 [b, p]; records: int32 [b, p, 4 + R]. New tokens take the record of the last prompt token.
        vocab_size: ids at or above it are padding of the embedding table and are never chosen.
        options: of the first row; the seed of row ``i`` is ``i`` more.
        neighbours: retrieves, for text that is not in the index, whenever a chunk is complete; needed where R > 0.

    Returns:
        int64 [b, count].
    """
    rows = range(tokens.shape[0])
    generators = [replace(options, seed=options.seed + row).generator() for row in rows]
    prompt = tokens.shape[1]
    assert prompt + count <= engine.seq_len
    for _ in range(count):
        logits = engine.logits(tokens, records)[:, -1, :vocab_size].cpu()
        chosen = next_tokens(logits, [options] * len(rows), generators)
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
