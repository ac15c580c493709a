"""The joint key space of a sample and its legal intervals: [level-2 | level-1 summaries | retrieved | tokens].

Under context parallelism a rank holds two chunks of the sequence. Its rows are the queries of both, its tokens are
``[halo | chunk | halo | chunk]``, where a halo holds the keys before the chunk that the local pattern can reach, its
retrieved keys are those of its own tokens, and its summaries are everybody's, in the order of the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from refractor_megatron.distinction.intervals import Rows, compile_intervals, concatenated
from refractor_megatron.distinction.lowerings import dense_block_mask, dense_mask
from refractor_megatron.distinction.retrieved import dense_retrieved_mask, retrieved_rows
from refractor_megatron.distinction.rules import CompiledRules
from refractor_megatron.fabric.spec import ContextPart, MaskSpec, RetrievedSpec, Tier

#: Keys of a tile of the block-sparse kernels.
_TILE = 128
Policies = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False, repr=False)
class SampleKeys:
    """Joint-space intervals of one sample's rows, the rows without any key, and the number of legal edges."""

    rows: Rows
    dead: npt.NDArray[np.int64]
    edges: int


@dataclass(frozen=True)
class JointSpace:
    """Sizes and places of the keys that one rank's queries of a sample of ``length`` tokens may read."""

    length: int
    chunks: tuple[tuple[int, int], ...]
    halo: int
    level2: int
    level1: int
    retrieved: int

    @classmethod
    def of(cls, spec: MaskSpec, part: ContextPart, length: int) -> JointSpace:
        """The space of ``part``; asserts what the configuration checks: chunks hold whole blocks and halos."""
        chunks = part.chunks(length)
        halo = _halo(spec.local.reach(length), chunks[0][1] - chunks[0][0]) if part.size > 1 else 0
        rows = sum(stop - start for start, stop in chunks)
        level2, level1 = spec.summary.counts(length) if spec.summary is not None else (0, 0)
        retrieved = spec.retrieved.count(rows) if spec.retrieved is not None else 0
        if part.size > 1:
            size = chunks[0][1] - chunks[0][0]
            assert halo <= size, f"a halo of {halo} keys exceeds the context-parallel chunk of {size} tokens"
            assert spec.summary is None or size % spec.summary.block_size == 0, (size, spec.summary)
            assert spec.retrieved is None or size % spec.retrieved.chunk == 0, (size, spec.retrieved)
        return cls(length, chunks, halo, level2, level1, retrieved)

    @property
    def rows(self) -> int:
        """Queries."""
        return sum(stop - start for start, stop in self.chunks)

    @property
    def summaries(self) -> int:
        """Summary keys of both levels."""
        return self.level2 + self.level1

    @property
    def far(self) -> int:
        """Keys before the tokens."""
        return self.summaries + self.retrieved

    @property
    def tokens(self) -> int:
        """Token keys, halos included."""
        return self.rows + self.halo * len(self.chunks)

    def tiers(self) -> dict[Tier, tuple[int, int]]:
        """Range [lo, hi) of each tier's keys."""
        total = self.far + self.tokens
        return {"summary": (0, self.summaries), "retrieved": (self.summaries, self.far), "local": (self.far, total)}

    def token_offsets(self) -> list[int]:
        """What turns a position of the sequence into a joint key, for each chunk."""
        offsets, at = [], self.far
        for start, stop in self.chunks:
            offsets.append(at + self.halo - start)
            at += self.halo + stop - start
        return offsets

    def retrieved_offsets(self, spec: RetrievedSpec) -> list[int]:
        """What turns key ``u * fan_in + r``, record r of chunk u, into a joint key, for each context-parallel chunk."""
        offsets, own = [], 0
        for start, stop in self.chunks:
            offsets.append(self.summaries + (own - start // spec.chunk) * spec.fan_in)
            own += -(-(stop - start) // spec.chunk)
        return offsets


def _halo(reach: int, chunk: int) -> int:
    """Keys fetched before a chunk: whole tiles where they fit, so that the chunk itself begins at a tile."""
    tiles = -(-reach // _TILE) * _TILE
    return tiles if tiles <= chunk else reach


def sample_keys(
    records: npt.NDArray[np.integer[Any]],
    rules: CompiledRules,
    spec: MaskSpec,
    part: ContextPart,
    codes: npt.NDArray[np.uint8] | None,
) -> SampleKeys:
    """Compiles one sample, records [L, >= 4]; codes: of ``retrieved.policy_codes`` where tier C is on."""
    space = JointSpace.of(spec, part, len(records))
    assert part.size == 1 or rules.causal, "context parallelism fetches keys before a chunk only"
    intervals = compile_intervals(records, rules, spec.local)
    placed: list[Rows] = []
    if spec.summary is not None and "summary" in spec.tiers:
        per_block, block = spec.summary.per_block, spec.summary.block_size
        blocks = intervals.summary_rows(block)
        if spec.summary.levels == 2:
            groups = intervals.summary_rows(block * spec.summary.fanout, behind=1)
            blocks = blocks.minus(groups.scaled(spec.summary.fanout))
            placed += _of_chunks(groups.scaled(per_block), space, [0] * len(space.chunks))
        placed += _of_chunks(blocks.scaled(per_block), space, [space.level2] * len(space.chunks))
    if spec.retrieved is not None and "retrieved" in spec.tiers:
        assert codes is not None, "retrieved keys need the policies of their records"
        found = retrieved_rows(intervals, records, rules, spec.retrieved.chunk, codes)
        placed += _of_chunks(found, space, space.retrieved_offsets(spec.retrieved))
    if "local" in spec.tiers:
        placed += _of_chunks(intervals.rows, space, space.token_offsets())
    rows = _by_row(placed)
    alive = np.zeros(space.rows, dtype=np.bool_)
    alive[rows.row] = True
    return SampleKeys(rows, np.flatnonzero(~alive), rows.count())


def _of_chunks(rows: Rows, space: JointSpace, offsets: list[int]) -> list[Rows]:
    """The rows of the space's chunks, renumbered; ``offsets`` turns keys into joint keys, chunk by chunk."""
    parts, at = [], 0
    for (start, stop), offset in zip(space.chunks, offsets, strict=True):
        parts.append(rows.between(start, stop).shifted(at, offset))
        at += stop - start
    return parts


def _by_row(parts: list[Rows]) -> Rows:
    """Joins rows whose keys ascend from part to part."""
    rows = concatenated(parts)
    order = np.argsort(rows.row, kind="stable")
    return Rows(rows.row[order], rows.lo[order], rows.hi[order])


def dense_joint(
    records: torch.Tensor, rules: CompiledRules, spec: MaskSpec, part: ContextPart, policies: Policies | None
) -> torch.Tensor:
    """bool [rows, far + tokens] from the elementwise oracles, L <= 2048."""
    space = JointSpace.of(spec, part, records.shape[0])
    blank = torch.zeros(records.shape[0], 0, dtype=torch.bool, device=records.device)
    tiers: dict[Tier, torch.Tensor] = {"summary": blank, "retrieved": blank}
    if spec.summary is not None:
        tiers["summary"] = _dense_summaries(records, rules, spec)
    if spec.retrieved is not None:
        assert policies is not None, "retrieved keys need the policies of their records"
        tiers["retrieved"] = dense_retrieved_mask(records, rules, spec.retrieved.chunk, policies)
    tiers["local"] = dense_mask(records, rules, spec.local)
    whole = torch.cat([mask & (tier in spec.tiers) for tier, mask in tiers.items()], dim=1)  # [L, every key]
    row, column, legible = (x.to(records.device) for x in _held(spec, space, tiers["retrieved"].shape[1]))
    return whole[row][:, column] & legible


def _dense_summaries(records: torch.Tensor, rules: CompiledRules, spec: MaskSpec) -> torch.Tensor:
    """bool [L, level-2 + level-1 summaries]."""
    summary = spec.summary
    assert summary is not None
    blocks = dense_block_mask(records, rules, spec.local, summary.block_size)
    if summary.levels == 1:
        return blocks.repeat_interleave(summary.per_block, 1)
    groups = dense_block_mask(records, rules, spec.local, summary.block_size * summary.fanout, behind=1)
    stand_in = groups.repeat_interleave(summary.fanout, 1)
    blocks[:, : stand_in.shape[1]] &= ~stand_in
    return torch.cat([groups, blocks], 1).repeat_interleave(summary.per_block, 1)


def _held(spec: MaskSpec, space: JointSpace, retrieved: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the whole mask [L, summaries + retrieved + L]: the rows and columns a rank holds, and which of them meet.

    A token key serves the queries of its own chunk only: elsewhere it may stand a second time, as a chunk or a halo.
    """
    row = torch.cat([torch.arange(*chunk) for chunk in space.chunks])
    chunk_of_row = torch.cat([torch.full((stop - start,), i) for i, (start, stop) in enumerate(space.chunks)])
    columns, chunk_of_column = [torch.arange(space.summaries)], [torch.full((space.summaries,), -1)]
    if spec.retrieved is not None:
        size, fan_in = spec.retrieved.chunk, spec.retrieved.fan_in
        for start, stop in space.chunks:
            columns.append(space.summaries + torch.arange(start // size * fan_in, -(-stop // size) * fan_in))
            chunk_of_column.append(torch.full_like(columns[-1], -1))
    for i, (start, stop) in enumerate(space.chunks):
        token = torch.arange(start - space.halo, stop)
        columns.append(torch.where(token >= 0, space.summaries + retrieved + token, 0))
        chunk_of_column.append(torch.where(token >= 0, i, len(space.chunks)))
    owner = torch.cat(chunk_of_column)
    legible = (owner[None, :] == -1) | (owner[None, :] == chunk_of_row[:, None])
    return row, torch.cat(columns), legible
