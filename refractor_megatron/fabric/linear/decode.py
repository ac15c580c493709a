"""Incremental decoding in linear mode: one state for each live bucket of each sample."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from refractor_megatron.distinction.intervals import Records, run_keys
from refractor_megatron.distinction.rules import BoolTable, CompiledRules, token_types
from refractor_megatron.errors import DataError
from refractor_megatron.fabric.linear.attention import normalised, with_ones
from refractor_megatron.fabric.linear.features import FeatureMap
from refractor_megatron.fabric.linear.plan import require_causal

#: Tokens of which ``absorb`` holds the features at a time.
_PIECE = 4096


@dataclass
class _Lanes:
    """Live buckets of one sample, all of its current document.

    lane: number of each (type class, of the current segment); buckets of earlier segments are live if their role is
    shared, and then read alike: they have one lane for each class. kind: a token type of each lane's class.
    """

    document: int
    segment: int
    lane: dict[tuple[int, bool], int] = field(default_factory=dict)
    kind: list[int] = field(default_factory=list)

    def number(self, kind: int, current: bool, rules: CompiledRules) -> int:
        """The lane of a bucket, a new one if need be."""
        name = (int(rules.type_class[kind]), current)
        if name not in self.lane:
            self.lane[name] = len(self.kind)
            self.kind.append(kind)
        return self.lane[name]


class LinearState:
    """Running states of a batch, fed one token at a time; equal to ``linear_attention`` over the same tokens.

    In each sample documents, and segments within a document, follow each other with rising numbers, padding anywhere.
    Then a bucket dies with its segment, or with its document where its role is shared, and the memory is
    [b, lanes, h_kv, m, d + 1] with at most two lanes for each type class that occurs, however long the sequence.
    For inference: the states are updated in place, without a graph.
    """

    def __init__(
        self,
        rules: CompiledRules,
        feature_map: FeatureMap,
        batch: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Before the first token. Errors: ``ConfigError`` when a rule lets tokens read later ones."""
        require_causal(rules)
        self.rules, self.feature_map = rules, feature_map
        shape = (batch, 1, kv_heads, feature_map.width, head_dim + 1)
        self.states = torch.zeros(shape, dtype=dtype, device=device)
        self._samples = [_Lanes(-1, -1) for _ in range(batch)]

    @property
    def live(self) -> list[int]:
        """Number of live buckets of each sample."""
        return [len(lanes.kind) for lanes in self._samples]

    @torch.no_grad()
    def step(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, record: torch.Tensor) -> torch.Tensor:
        """Adds one token to each sample and attends from it.

        q: [b, h, d]; k, v: [b, h_kv, d]; record: int [b, >= 4]; returns [b, h, d], zeros for padding.
        Errors: ``DataError`` when a document or segment comes back.
        """
        columns = record.cpu().numpy()[:, None, :4]
        lanes = [self._lane(sample, token) for sample, token in enumerate(columns)]
        lane = torch.tensor(lanes, device=self.states.device)
        real = (lane >= 0).to(self.states).reshape(-1, 1, 1, 1)
        fk, v1 = self.feature_map.key(k.to(self.states)), with_ones(v.to(self.states))
        token = fk.unsqueeze(-1) * v1.unsqueeze(-2) * real
        self.states[torch.arange(len(lanes), device=lane.device), lane.clamp(min=0)] += token

        reads, alone = (torch.from_numpy(x).to(self.states) for x in self._reads(lanes))
        # A token reads itself even where its bucket may not read itself.
        sums = torch.einsum("bl,blhmd->bhmd", reads, self.states) + token * alone.reshape(-1, 1, 1, 1)
        fq = self.feature_map.query(torch.unflatten(q.to(self.states), 1, (k.shape[1], -1)))
        return (normalised(fq @ sums) * real).flatten(1, 2).to(q.dtype)

    @torch.no_grad()
    def absorb(self, k: torch.Tensor, v: torch.Tensor, records: torch.Tensor) -> None:
        """Adds many tokens at once, such as a prompt whose outputs ``linear_attention`` has computed.

        k, v: [b, h_kv, L, d]; records: int [b, L, >= 4]. Errors: as ``step``.
        """
        for sample, columns in enumerate(records.cpu().numpy()[..., :4]):
            starts = run_keys(columns, self.rules)[:, 0].tolist()
            for first, last in zip(starts, [*starts[1:], len(columns)], strict=True):
                lane = self._lane(sample, columns[first : first + 1])
                for piece in range(first, last if lane >= 0 else first, _PIECE):
                    part = slice(piece, min(piece + _PIECE, last))
                    fk = self.feature_map.key(k[sample : sample + 1, :, part].to(self.states))[0]
                    self.states[sample, lane] += fk.transpose(1, 2) @ with_ones(v[sample, :, part].to(self.states))

    def _lane(self, sample: int, token: Records) -> int:
        """Lane of the token with records ``token`` [1, 4]; -1 for padding."""
        document, segment = int(token[0, 0]), int(token[0, 1])
        if document < 0:
            return -1
        lanes = self._samples[sample]
        if (document, segment) != (lanes.document, lanes.segment):
            lanes = self._enter(sample, document, segment)
        number = lanes.number(int(token_types(token)[0]), True, self.rules)
        if number == self.states.shape[1]:
            self.states = torch.cat([self.states, torch.zeros_like(self.states)], dim=1)
        return number

    def _enter(self, sample: int, document: int, segment: int) -> _Lanes:
        """A new segment begins: what it cannot read is dropped, and what it can read becomes the past."""
        old, new = self._samples[sample], _Lanes(document, segment)
        if (document, segment) < (old.document, old.segment):
            raise DataError(
                f"sample {sample} goes back from document {old.document}, segment {old.segment} to document "
                f"{document}, segment {segment}; decode documents and segments in rising order."
            )
        states = torch.zeros_like(self.states[sample])
        for lane, kind in enumerate(old.kind):
            if document == old.document and self.rules.shared[kind]:
                states[new.number(kind, False, self.rules)] += self.states[sample, lane]
        self.states[sample] = states
        self._samples[sample] = new
        return new

    def _reads(self, lanes: list[int]) -> tuple[BoolTable, BoolTable]:
        """-> (bool [b, lanes] what each sample's token reads, bool [b] whether its own bucket is missing there)."""
        reads = np.zeros(self.states.shape[:2], dtype=np.bool_)
        alone = np.zeros(len(lanes), dtype=np.bool_)
        for row, (live, lane) in enumerate(zip(self._samples, lanes, strict=True)):
            if lane >= 0:
                reads[row, : len(live.kind)] = self.rules.table[live.kind[lane], live.kind]
                alone[row] = not reads[row, lane]
        return reads, alone
