"""Sampling for a batch of requests: which tokens a request may get, and a generator for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..evaluation.sampling import SamplingOptions, next_tokens
from ..tokenizer import Tokenizer
from .chat import Prompt


def allowed_tokens(tokenizer: Tokenizer, prompt: Prompt, vocab_size: int) -> Tensor:
    """bool [vocab_size]: ordinary tokens and the prompt's stops. Never padding, roles, or ids the tokenizer lacks."""
    allowed = torch.zeros(vocab_size, dtype=torch.bool)
    allowed[: len(tokenizer.ranks)] = True
    allowed[list(prompt.stops)] = True
    return allowed


class Sampler:
    """Chooses the next token of every row that is still being decoded."""

    def __init__(
        self, tokenizer: Tokenizer, prompts: Sequence[Prompt], options: Sequence[SamplingOptions], vocab_size: int
    ) -> None:
        """Row ``i`` answers ``prompts[i]`` with ``options[i]``; ``vocab_size`` is the width of the logits."""
        assert len(prompts) == len(options)
        self._options = list(options)
        self._generators = [option.generator() for option in options]
        self._allowed = torch.stack([allowed_tokens(tokenizer, prompt, vocab_size) for prompt in prompts])

    def choose(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """Logits [len(rows), V] of ``rows`` -> ids int64 [len(rows)] on the CPU.

        Raises ``CheckpointError`` when the model gives numbers that are not finite: nothing can be sampled from them.
        """
        if not bool(logits.isfinite().all()):
            raise CheckpointError(
                "the model gives logits that are not finite: its weights are damaged, or their range is too large for "
                "the precision; give --dtype float32 or export another checkpoint."
            )
        allowed = self._allowed.to(logits.device)[list(rows)]
        options, generators = [self._options[row] for row in rows], [self._generators[row] for row in rows]
        return next_tokens(logits.masked_fill(~allowed, float("-inf")), options, generators).cpu()
