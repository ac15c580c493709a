"""KV Cache++, the cold part: keys and values in chunks of tokens; old chunks are compressed, the least used evicted."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..errors import CapabilityError, RefractorError
from .codecs import codec_named, codec_of, decode, encode, inspect
from .statistics import Age, Counters, Statistics

Pair = tuple[Tensor, Tensor]
_Part = Tensor | bytes  # as it was put, or encoded


class RangeMissing(RefractorError):
    """Keys and values asked for are not in the store. Whoever has the tokens can compute them again.

    ``layer``; ``start`` and ``stop``: the first run of missing positions inside the range asked for; ``evicted``: they
    were there and had to make room.
    """

    def __init__(self, layer: int, start: int, stop: int, evicted: bool) -> None:
        self.layer, self.start, self.stop, self.evicted = layer, start, stop, evicted
        why = "were evicted to keep the byte budget" if evicted else "are not stored"
        super().__init__(
            f"keys and values of layer {layer}, positions {start} to {stop - 1}, {why}: compute them again."
        )


@dataclass(frozen=True)
class _Entry:
    """Keys and values of one layer in one chunk: raw tensors, or two encoded byte strings."""

    kv: tuple[_Part, _Part]
    tokens: int  # valid ones; fewer than stored after a rewind into an encoded chunk
    device: torch.device
    rope_state: bytes | None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = sum(x.untyped_storage().nbytes() if isinstance(x, Tensor) else len(x) for x in self.kv)
        return held + len(self.rope_state or b"")

    @property
    def is_raw(self) -> bool:
        """Whether nothing is encoded."""
        return isinstance(self.kv[0], Tensor)


@dataclass
class _Chunk:
    """One chunk of all layers, which come and go together: a forward pass that has lost one layer's is lost."""

    layers: dict[int, _Entry] = field(default_factory=dict)
    used: int = 0  # clock of the last access


class ChunkStore:
    """Keys and values of past tokens by layer and position (spec: KV Cache++, ``put``, ``get``, ``compress``).

    Chunk ``i`` holds positions ``[i · chunk, (i + 1) · chunk)``; the last one may be shorter. The newest ``hot`` chunks
    of each layer stay as they were put; older ones are encoded. Where ``budget`` is exceeded, the chunk whose last
    access is longest ago is evicted in all layers, never the newest one nor the one being put. One store serves one
    batch of sequences; it belongs to one thread.

    Args:
        chunk: tokens in a chunk (``memory.kv.chunk``).
        codec: name, as `codecs.codec_for` gives it, or None to keep every chunk raw.
        bound: largest measured error, None for the codec's own; a chunk that misses it escalates.
        hot: chunks of each layer that stay raw.
        budget: bytes that the store may hold, None without limit.
        pin_first: never evict chunk 0, whose first tokens (attention sinks, the system prompt) all later ones read.
    """

    def __init__(
        self,
        chunk: int = 512,
        codec: str | None = "norm",
        *,
        bound: float | None = None,
        hot: int = 1,
        budget: int | None = None,
        pin_first: bool = False,
    ) -> None:
        assert chunk > 0 and hot >= 0
        if codec is not None:
            codec_named(codec)
        self.chunk, self.codec, self.bound, self.hot = chunk, codec, bound, hot
        self.budget, self.pin_first = budget, pin_first
        self.nbytes = 0
        self._chunks: OrderedDict[int, _Chunk] = OrderedDict()  # least recently used first
        self._evicted: set[tuple[int, int]] = set()  # (layer, chunk)
        self._clock = 0
        self._counters = Counters()

    def put(self, layer: int, chunk_id: int, keys: Tensor, values: Tensor, rope_state: bytes | None = None) -> None:
        """Store (or replace) a chunk of ``layer``; copies its input, then compresses and evicts as set.

        keys, values: [b, h_kv, n, d], rotary positions applied, 0 < n <= chunk; rope_state: what the caller needs to
        know about those positions, kept as it is.

        Errors: ``CapabilityError`` when the budget cannot hold the chunk beside those that may not be evicted; the
        store then holds what it held before, less what was evicted and less an older form of the chunk.
        """
        assert keys.shape == values.shape and keys.dim() == 4 and keys.dtype == values.dtype, (keys.shape, values.shape)
        assert 0 < keys.shape[2] <= self.chunk and chunk_id >= 0 and layer >= 0, (layer, chunk_id, keys.shape)
        copies = (_copy(keys), _copy(values))
        self._clock += 1
        self._forget(layer, chunk_id)
        self._keep(layer, chunk_id, _Entry(copies, keys.shape[2], keys.device, rope_state))
        self._evicted.discard((layer, chunk_id))
        self._counters.puts += 1
        self.compress(layer)
        self._evict(layer, chunk_id)

    def get(self, layer: int, start: int, stop: int) -> Pair:
        """Keys and values [b, h_kv, stop − start, d] of exactly the positions [start, stop), on the device of `put`.

        Raises:
            RangeMissing: some of them are not here; nothing is decoded then.
            CheckpointError: an encoded chunk was damaged in memory.
        """
        assert 0 <= start < stop, (start, stop)
        ids = range(start // self.chunk, (stop - 1) // self.chunk + 1)
        self._clock += 1
        self._check(layer, start, stop, ids)
        parts = []
        for i in ids:
            self._touch(i)
            first = i * self.chunk
            window = slice(max(start - first, 0), min(stop - first, self.chunk))
            parts.append([x[:, :, window] for x in self._tensors(layer, i)])
        self._counters.hits += len(ids)
        keys, values = (torch.cat(list(column), dim=2) for column in zip(*parts, strict=True))
        return keys, values

    def has(self, layer: int, start: int, stop: int) -> bool:
        """Whether `get` would find all of [start, stop); counts as no access."""
        return self._gap(layer, start, stop) is None

    def rope_state(self, layer: int, chunk_id: int) -> bytes | None:
        """What `put` was given with the chunk. Raises ``RangeMissing`` when it is not here."""
        start = chunk_id * self.chunk
        self._check(layer, start, start + 1, range(chunk_id, chunk_id + 1))
        return self._chunks[chunk_id].layers[layer].rope_state

    def compress(self, layer: int | None = None, *, codec: str | None = None, hot: int | None = None) -> int:
        """Encode every raw chunk but the newest ``hot`` of each layer (None: of all layers); returns bytes saved.

        ``codec`` and ``hot`` stand in for the store's own in this call. What is encoded already stays as it is.
        """
        name, hot, before = codec or self.codec, self.hot if hot is None else hot, self.nbytes
        if name is None:
            return 0
        layers = {at for chunk in self._chunks.values() for at in chunk.layers} if layer is None else {layer}
        for at in layers:
            ids = sorted(i for i, chunk in self._chunks.items() if at in chunk.layers)
            for i in ids[: len(ids) - hot]:
                entry = self._chunks[i].layers[at]
                if entry.is_raw:
                    self._swap(at, i, replace(entry, kv=self._encoded(entry, name)))
        return before - self.nbytes

    def drop(self, *, before: int | None = None, after: int | None = None) -> None:
        """Forget chunks that end at or in front of ``before``, and every position from ``after`` on (a rewind).

        A chunk that ``after`` cuts stays with its first tokens; to go on, put the whole of it again. Dropped positions
        count as never stored, those that were evicted too.
        """
        for i in list(self._chunks):
            for layer, entry in list(self._chunks[i].layers.items()):
                first, kept = i * self.chunk, entry.tokens
                if after is not None:
                    kept = min(kept, after - first)
                if kept <= 0 or (before is not None and first + entry.tokens <= before):
                    self._forget(layer, i)
                elif kept < entry.tokens:
                    self._swap(layer, i, _shortened(entry, kept))
        self._evicted = {
            (layer, i)
            for layer, i in self._evicted
            if (after is None or i * self.chunk < after) and (before is None or (i + 1) * self.chunk > before)
        }

    def statistics(self) -> Statistics:
        """What the store did and holds."""
        entries = [(i, layer, entry) for i, chunk in self._chunks.items() for layer, entry in chunk.layers.items()]
        newest = max((i * self.chunk + entry.tokens for i, _, entry in entries), default=0)
        ends = {i: i * self.chunk + max(e.tokens for e in chunk.layers.values()) for i, chunk in self._chunks.items()}
        ages = {i: Age(newest - ends[i], self._clock - chunk.used) for i, chunk in self._chunks.items()}
        encoded = [part for _, _, entry in entries for part in entry.kv if isinstance(part, bytes)]
        values = sum(inspect(part).values for part in encoded)
        return Statistics(
            **vars(self._counters) | {"by_codec": dict(self._counters.by_codec)},
            chunks=len(self._chunks),
            raw=sum(entry.is_raw for _, _, entry in entries),
            encoded=sum(not entry.is_raw for _, _, entry in entries),
            nbytes=self.nbytes,
            bits_per_value=8 * sum(map(len, encoded)) / values if values else None,
            ages=ages,
        )

    def _encoded(self, entry: _Entry, codec: str) -> tuple[bytes, bytes]:
        keys, values = (encode(x, codec, self.bound) for x in entry.kv if isinstance(x, Tensor))
        for part in (keys, values):
            header = inspect(part)
            self._counters.encoded_as(codec_of(header).name, header.error, header.codec != header.asked)
        return keys, values

    def _tensors(self, layer: int, chunk_id: int) -> list[Tensor]:
        entry = self._chunks[chunk_id].layers[layer]
        whole = []
        for part, what in zip(entry.kv, ("keys", "values"), strict=True):
            if isinstance(part, bytes):
                part = decode(part, f"the {what} of layer {layer}, chunk {chunk_id}").to(entry.device)
            whole.append(part)
        return whole

    def _gap(self, layer: int, start: int, stop: int) -> tuple[int, int, bool] | None:
        """First run of positions of [start, stop) that are not here, and whether its first chunk was evicted."""
        at = start
        while at < stop:
            i = at // self.chunk
            end = self._end(layer, i)
            if at >= end:
                upto = at
                while upto < stop and upto >= self._end(layer, upto // self.chunk):
                    upto = (upto // self.chunk + 1) * self.chunk
                return at, min(upto, stop), (layer, i) in self._evicted
            at = end
        return None

    def _end(self, layer: int, chunk_id: int) -> int:
        """Position after the last one held of the chunk; its first where nothing is."""
        chunk = self._chunks.get(chunk_id)
        entry = chunk.layers.get(layer) if chunk else None
        return chunk_id * self.chunk + (entry.tokens if entry else 0)

    def _check(self, layer: int, start: int, stop: int, ids: range) -> None:
        gap = self._gap(layer, start, stop)
        if gap is not None:
            self._counters.misses += sum(self._end(layer, i) < min(stop, (i + 1) * self.chunk) for i in ids)
            raise RangeMissing(layer, *gap)

    def _touch(self, chunk_id: int) -> None:
        self._chunks.move_to_end(chunk_id)
        self._chunks[chunk_id].used = self._clock

    def _keep(self, layer: int, chunk_id: int, entry: _Entry) -> None:
        self._chunks.setdefault(chunk_id, _Chunk()).layers[layer] = entry
        self._touch(chunk_id)
        self.nbytes += entry.nbytes

    def _swap(self, layer: int, chunk_id: int, entry: _Entry) -> None:
        layers = self._chunks[chunk_id].layers
        self.nbytes += entry.nbytes - layers[layer].nbytes
        layers[layer] = entry

    def _forget(self, layer: int, chunk_id: int) -> None:
        chunk = self._chunks.get(chunk_id)
        if chunk is not None and layer in chunk.layers:
            self.nbytes -= chunk.layers.pop(layer).nbytes
            if not chunk.layers:
                del self._chunks[chunk_id]

    def _evict(self, layer: int, chunk_id: int) -> None:
        """Make room for the chunk just put."""
        while self.budget is not None and self.nbytes > self.budget:
            held = {chunk_id, max(self._chunks), 0 if self.pin_first else chunk_id}
            oldest = next((i for i in self._chunks if i not in held), None)
            if oldest is None:
                need = self.nbytes
                self._forget(layer, chunk_id)
                raise CapabilityError(
                    f"a cache budget of {self.budget:,} bytes cannot hold chunk {chunk_id} of layer {layer} beside the "
                    f"chunks that are never evicted ({need:,} bytes): raise the budget or make memory.kv.chunk smaller."
                )
            for at in list(self._chunks[oldest].layers):
                self._forget(at, oldest)
                self._evicted.add((at, oldest))
            self._counters.evictions += 1


def _copy(tensor: Tensor) -> Tensor:
    """A copy that shares nothing with a ring buffer that will be written again."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _shortened(entry: _Entry, tokens: int) -> _Entry:
    """The first ``tokens``; an encoded chunk keeps its bytes, so that it is not quantised twice."""
    kv = entry.kv
    if entry.is_raw:
        keys, values = (_copy(x[:, :, :tokens]) for x in kv if isinstance(x, Tensor))
        kv = (keys, values)
    return replace(entry, kv=kv, tokens=tokens)
