"""One conversation that can go back: KV Cache++ behind the decoder's bounded cache (spec section 6).

The cache keeps the window and the summaries, so what lies further back could not be edited without a new prefill. A
session puts each completed chunk of keys and values into a `ChunkStore`, which compresses and evicts. To go back it
fills the window from there; where chunks were evicted, it goes back as far as what is left allows and passes the
tokens in between once more.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import CapabilityError
from ..evaluation.sampling import SamplingOptions
from ..memory.chunks import ChunkStore, RangeMissing
from ..memory.codecs import codec_for
from .answers import Answer, OnText, Request, answer_all
from .chat import Prompt
from .decoder import Decoder, OnProgress, Speed, full_cache_bytes

if TYPE_CHECKING:
    from ..hf.configuration_refractor import RefractorConfig
    from ..memory.statistics import Statistics


@dataclass
class Rewinds:
    """How often a session went back, the tokens whose prefill that saved, and those that had to pass again."""

    count: int = 0
    restored_tokens: int = 0
    recomputed_tokens: int = 0


def why_no_chunks(config: RefractorConfig) -> str | None:
    """Why chunks of keys and values are of no use to a model; None where they are."""
    if config.linear_attention is not None:
        return "a model with linear attention has state that keys and values cannot restore"
    if config.retrieval is not None:
        return "a model with retrieved records has state that keys and values cannot restore"
    return "a model without a window keeps every key and value already" if config.reach is None else None


def own_codec(decoder: Decoder) -> str | None:
    """The codec of the model's ``memory.kv.compress_ratio`` in its precision; None where chunks are of no use.

    Raises ``ConfigError`` for a ratio that no codec reaches.
    """
    if why_no_chunks(decoder.config) is not None:
        return None
    return codec_for(decoder.config.kv_cache["compress_ratio"], decoder.model.dtype)


class Session:
    """A growing sequence of one sample.

    position: tokens that have passed. store: the chunks, None without them. speed, rewinds: counts.
    """

    def __init__(
        self, decoder: Decoder, codec: str | None = None, chunk: int | None = None, budget: int | None = None
    ) -> None:
        """An empty session.

        Args:
            codec: of chunks that are no longer raw (``exact``, ``tight`` or ``norm``); None keeps no chunks: going back
                beyond the window then passes every token again.
            chunk: tokens of a chunk, the model's ``memory.kv.chunk`` if None. budget: most bytes of chunks, if any.

        Raises:
            CapabilityError: chunks are asked for and are of no use to the model.
        """
        config = decoder.config
        why_not = why_no_chunks(config)
        if codec is not None and why_not is not None:
            raise CapabilityError(f"{why_not}: give --kv-codec none.")
        self.decoder, self.chunk = decoder, chunk or int(config.kv_cache["chunk"])
        self.store = ChunkStore(self.chunk, codec, budget=budget) if codec is not None else None
        self.speed, self.rewinds, self.position = Speed(), Rewinds(), 0
        self._can_restore = config.linear_attention is None and config.retrieval is None
        self._ids = np.empty(config.max_position_embeddings, dtype=np.int64)
        self._records = np.empty((config.max_position_embeddings, 4), dtype=np.int32)
        self._logits: dict[int, Tensor] = {}  # position -> [V] after it, where an answer may begin
        self._cache = decoder.new_cache(self._keep)

    @property
    def hot_bytes(self) -> int:
        """Bytes of window, summaries and records."""
        return self._cache.nbytes

    @property
    def cold_bytes(self) -> int:
        """Bytes of the chunks."""
        return self.store.nbytes if self.store is not None else 0

    @property
    def full_bytes(self) -> int:
        """Bytes that one of every key and value would take."""
        return full_cache_bytes(self.decoder.config, self.position, self.decoder.model.dtype.itemsize)

    @property
    def chunk_statistics(self) -> Statistics | None:
        """Of the chunk store."""
        return self.store.statistics() if self.store is not None else None

    @torch.inference_mode()
    def feed(self, prompt: Prompt, on_progress: OnProgress | None = None) -> None:
        """Passes the tokens of ``prompt``, which go on from what has passed.

        Raises ``ConfigError`` where they do not fit into the context.
        """
        self.decoder.room(self.position + len(prompt.ids))
        started = time.perf_counter()
        self._pass(prompt.ids, prompt.records, on_progress)
        self.speed.prompt_tokens += len(prompt.ids)
        self.speed.prefill_s += time.perf_counter() - started

    @torch.inference_mode()
    def next_logits(self) -> Tensor:
        """Logits [V] of the token that would follow; after a rewind the last token passes once more for them."""
        if self.position not in self._logits:
            end = self.position
            self.rewind(end - 1)
            self._pass(self._ids[end - 1 : end], self._records[end - 1 : end])
        return self._logits[self.position]

    @torch.inference_mode()
    def answer(
        self, prompt: Prompt, options: SamplingOptions, max_tokens: int, on_text: OnText | None = None
    ) -> Answer:
        """Answers what has passed; ``prompt`` says with which record and stops.

        All tokens of the answer pass but the one that ended it: whoever goes on closes the message.
        """
        started = time.perf_counter()
        logits = self.next_logits()
        record = np.array([prompt.answer], dtype=np.int32)

        def advance(places: list[int], tokens: list[int]) -> Tensor:
            assert places == [0]
            self.speed.steps += 1
            return self._pass(np.array(tokens), record, keep_logits=False)

        request = Request(prompt, options, max_tokens)
        (answer,) = answer_all(self.decoder.tokenizer, [request], logits[None], advance, on_text)
        if answer.finish == "max_tokens":
            self._pass(np.array(answer.ids[-1:]), record, keep_logits=False)
        self.speed.new_tokens += len(answer.ids)
        self.speed.decode_s += time.perf_counter() - started
        return answer

    @torch.inference_mode()
    def rewind(self, position: int) -> int:
        """Forgets all tokens from ``position`` on; returns how many tokens before it had to pass again."""
        assert 0 <= position <= self.position
        if position == self.position:
            return 0
        start = self._restorable(position)
        if start == 0:
            self._cache = self.decoder.new_cache(self._keep)
        else:
            self._cache.rewind(start, self._read)
        if self.store is not None:
            self.store.drop(after=start)
        self.position = start
        if start < position:
            self._pass(self._ids[start:position], self._records[start:position], keep_logits=False)
        self._logits = {at: kept for at, kept in self._logits.items() if at <= position}
        self.rewinds.count += 1
        self.rewinds.restored_tokens += start
        self.rewinds.recomputed_tokens += position - start
        return position - start

    @property
    def _keep(self) -> int:
        return self.chunk if self.store is not None else 0

    def _pass(
        self,
        ids: npt.NDArray[np.int64],
        records: npt.NDArray[np.int32],
        on_progress: OnProgress | None = None,
        keep_logits: bool = True,
    ) -> Tensor:
        """Feeds tokens in pieces that end where chunks do -> logits [1, V] after the last."""
        device, done, logits = self.decoder.model.device, 0, torch.empty(0)
        while done < len(ids):
            piece = self.decoder.piece
            if self.store is not None:
                piece = min(piece, self.chunk - self.position % self.chunk)
            part = slice(done, min(done + piece, len(ids)))
            columns = [torch.from_numpy(np.array(x[part]))[None].to(device) for x in (ids, records)]
            logits = self.decoder.forward(self._cache, *columns)
            placed = slice(self.position, self.position + part.stop - part.start)
            self._ids[placed], self._records[placed] = ids[part], records[part]
            self.position = placed.stop
            if self.store is not None and self.position % self.chunk == 0:
                self._put(self.store, self.position // self.chunk - 1)
            done = part.stop
            if on_progress is not None:
                on_progress(done, len(ids))
        if keep_logits:
            self._logits[self.position] = logits[0].clone()
        return logits

    def _put(self, store: ChunkStore, number: int) -> None:
        for layer in range(self.decoder.config.num_hidden_layers):
            store.put(layer, number, *self._cache.tokens(layer, number * self.chunk, (number + 1) * self.chunk))

    def _restorable(self, position: int) -> int:
        """The last place at or before ``position`` that can be gone back to without passing tokens again."""
        if not self._can_restore:
            return 0
        while position > 0:
            start, stop = self._window(position), min(position, self._held)
            missing = [
                at for at in self._chunks(start, stop) if not self._has(max(at, start), min(at + self.chunk, stop))
            ]
            if not missing:
                return position
            self._count_misses([(max(at, start), min(at + self.chunk, stop)) for at in missing])
            position = missing[-1]
        return 0

    def _count_misses(self, ranges: list[tuple[int, int]]) -> None:
        """Asks for chunks that are not there, so that the store's statistics know of it."""
        for layer in range(self.decoder.config.num_hidden_layers):
            for start, stop in ranges:
                with contextlib.suppress(RangeMissing):
                    if self.store is not None:
                        self.store.get(layer, start, stop)

    def _chunks(self, start: int, stop: int) -> range:
        """First positions of the chunks that hold [start, stop)."""
        return range(start // self.chunk * self.chunk, stop, self.chunk)

    def _has(self, start: int, stop: int) -> bool:
        layers = range(self.decoder.config.num_hidden_layers)
        return self.store is not None and all(self.store.has(layer, start, stop) for layer in layers)

    def _window(self, position: int) -> int:
        """First position that the cache reads to go back to ``position``."""
        return 0 if self._cache.grows else max(0, position - self._cache.ring)

    @property
    def _held(self) -> int:
        """First position whose keys and values the window holds."""
        return self._window(self.position)

    def _read(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values of [start, stop): what the window holds from there, the rest from the chunks."""
        parts = []
        if start < min(stop, self._held):
            assert self.store is not None
            parts.append(self.store.get(layer, start, min(stop, self._held)))
        if stop > self._held:
            parts.append(self._cache.tokens(layer, max(start, self._held), stop))
        keys, values = (torch.cat(list(column), dim=2) for column in zip(*parts, strict=True))
        return keys, values
