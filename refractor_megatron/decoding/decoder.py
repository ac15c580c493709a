"""Batched decoding: prompts of any lengths pass once, together, then every sample grows by a token a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from .answers import Answer, OnText, Request, answer_all
from .chat import Prompt
from .load import Exported

if TYPE_CHECKING:
    from ..hf.configuration_refractor import RefractorConfig
    from ..hf.modeling_refractor import RefractorCache

#: Tokens of a prompt that pass together: progress can be told, and what is not kept is freed.
PIECE = 1024
#: Most new tokens, unless the caller says otherwise.
MAX_TOKENS = 256
#: ``on_progress(done, total)``: tokens of the prompts that have passed.
OnProgress = Callable[[int, int], None]


@dataclass
class Speed:
    """Tokens and seconds of the prompts (prefill) and of the answers; steps: passes of one token a sample."""

    prompt_tokens: int = 0
    prefill_s: float = 0.0
    new_tokens: int = 0
    steps: int = 0
    decode_s: float = 0.0

    @property
    def prompt_tokens_per_s(self) -> float:
        """Of the prefill."""
        return self.prompt_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Of all samples together; the first token of an answer comes from the prefill."""
        return self.new_tokens / self.decode_s if self.decode_s else 0.0

    @property
    def ms_per_token(self) -> float:
        """Milliseconds a step."""
        return 1e3 * self.decode_s / self.steps if self.steps else 0.0


@dataclass
class Decoded:
    """Answers in the order of the requests. cache_bytes, full_bytes: most that the cache held, and what one of every
    key and value would have held then; samples: how many shared it."""

    answers: list[Answer] = field(default_factory=list)
    speed: Speed = field(default_factory=Speed)
    cache_bytes: int = 0
    full_bytes: int = 0
    samples: int = 0


class Decoder:
    """A model that answers requests; several may share a prompt, which then passes once."""

    def __init__(self, exported: Exported, piece: int = PIECE) -> None:
        """``piece``: tokens of a prompt that pass together."""
        assert piece >= 1
        self.model, self.tokenizer, self.config, self.piece = exported.model, exported.tokenizer, exported.config, piece

    def room(self, tokens: int, max_tokens: int | None = None) -> int:
        """`room` in this model's context."""
        return room(self.config, tokens, max_tokens)

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[Request], on_text: OnText | None = None, on_progress: OnProgress | None = None
    ) -> Decoded:
        """Answers all requests together. Raises ``ConfigError`` for one that does not fit into the context."""
        for request in requests:
            self.room(len(request.prompt.ids), request.max_tokens)
        prompts = list({id(request.prompt): request.prompt for request in requests}.values())
        done = Decoded(samples=len(requests))
        started = time.perf_counter()
        cache = self.new_cache()
        logits = self.prefill(cache, prompts, on_progress)
        place = {id(prompt): number for number, prompt in enumerate(prompts)}
        shared = torch.tensor([place[id(request.prompt)] for request in requests], device=logits.device)
        if len(shared) != len(prompts) or shared.tolist() != sorted(shared.tolist()):
            cache.reorder_cache(shared)
            logits = logits.index_select(0, shared)
        done.speed.prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
        done.speed.prefill_s = time.perf_counter() - started
        records = torch.tensor([request.prompt.answer for request in requests], device=logits.device)

        def advance(places: list[int], tokens: list[int]) -> Tensor:
            nonlocal records
            if len(places) < len(records):
                kept = torch.tensor(places, device=records.device)
                cache.reorder_cache(kept)
                records = records.index_select(0, kept)
            ids = torch.tensor(tokens, device=records.device)[:, None]
            out = self.forward(cache, ids, records[:, None])
            done.speed.steps += 1
            self._note_bytes(done, cache)
            return out

        started = time.perf_counter()
        self._note_bytes(done, cache)
        done.answers = answer_all(self.tokenizer, requests, logits, advance, on_text)
        done.speed.decode_s = time.perf_counter() - started
        done.speed.new_tokens = sum(len(answer.ids) for answer in done.answers)
        return done

    def new_cache(self, keep: int = 0) -> RefractorCache:
        """An empty cache that holds at least the last ``keep`` tokens."""
        from ..hf.modeling_refractor import RefractorCache

        return RefractorCache(self.config, keep)

    def prefill(
        self, cache: RefractorCache, prompts: Sequence[Prompt], on_progress: OnProgress | None = None
    ) -> Tensor:
        """Feeds prompts of any lengths, padded on the left, into an empty cache -> logits [prompts, V] after each."""
        longest = max(len(prompt.ids) for prompt in prompts)
        ids = np.full((len(prompts), longest), self.tokenizer.pad, dtype=np.int64)
        records = np.zeros((len(prompts), longest, 4), dtype=np.int32)
        real = np.zeros((len(prompts), longest), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            start = longest - len(prompt.ids)
            ids[row, start:], records[row, start:], real[row, start:] = prompt.ids, prompt.records, 1
        columns = [torch.from_numpy(x).to(self.model.device) for x in (ids, records, real)]
        logits = torch.empty(0)
        for start in range(0, longest, self.piece):
            part = slice(start, min(start + self.piece, longest))
            logits = self.forward(cache, *(column[:, part] for column in columns))
            if on_progress is not None:
                on_progress(part.stop, longest)
        return logits

    def forward(self, cache: RefractorCache, ids: Tensor, records: Tensor, real: Tensor | None = None) -> Tensor:
        """Feeds ids [b, n] with records [b, n, 4] -> logits [b, V] after the last; ``real`` [b, n]: 0 for padding."""
        out = self.model(ids, real, records, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = out.logits[:, -1]
        return logits

    def _note_bytes(self, done: Decoded, cache: RefractorCache) -> None:
        if cache.nbytes > done.cache_bytes:
            done.cache_bytes = cache.nbytes
            done.full_bytes = full_cache_bytes(self.config, int(cache.length.sum()), self.model.dtype.itemsize)


def room(config: RefractorConfig, tokens: int, max_tokens: int | None = None) -> int:
    """Tokens that an answer to ``tokens`` may have: ``max_tokens``, or `MAX_TOKENS` and at most what is left.

    Raises ``ConfigError`` when they do not fit into the context that the model was made for.
    """
    context = config.max_position_embeddings
    made = f"the model was made for {context} (model.context_max)"
    if tokens >= context:
        raise ConfigError(f"the prompt has {tokens} tokens and {made}: shorten it to {context - 1} or fewer.")
    if max_tokens is not None and tokens + max_tokens > context:
        raise ConfigError(
            f"the prompt has {tokens} tokens, --max-tokens is {max_tokens}, and {made}: give --max-tokens "
            f"{context - tokens} or fewer, or shorten the prompt."
        )
    return min(MAX_TOKENS, context - tokens) if max_tokens is None else max_tokens


def full_cache_bytes(config: RefractorConfig, tokens: int, itemsize: int) -> int:
    """Bytes of all keys and values of ``tokens`` tokens: what a decoder without a window keeps."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize * tokens
