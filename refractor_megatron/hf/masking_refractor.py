"""Who may read whom, and what decoding remembers: rules, records, masks, cache.

Self-contained: it travels beside the weights. Written elementwise from the definitions; shares no code with the
training path, so that the two check each other.

Shapes: b samples, n new tokens, m keys, g key/value heads, d head width, T token types (role x scope).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_refractor import SCOPE_BITS, RefractorConfig

#: Permissions of a retrieved record, and the code of "no record".
ALLOW_COPY, ALLOW_TOOLS, NO_RECORD = 1, 2, 4
WRITING_ROLES, CALLING_ROLE, RETRIEVED_ROLE = ("assistant", "code", "tool"), "tool", "data"


# --------------------------------------------------------------------------------------------------------- who may read


class Rules:
    """The rules as tables over token types: ``role * 8 + scope``."""

    def __init__(self, config: RefractorConfig) -> None:
        self.roles, self.types = config.roles, len(config.roles) * 8
        # on the CPU by name: transformers builds models on the meta device
        kind = torch.arange(self.types, device="cpu")
        self.role, self.scope = kind // 8, kind % 8
        self.table = torch.ones(self.types, self.types, dtype=torch.bool, device="cpu")
        for rule in config.mask_rules:
            self.table &= self._allowed(rule)
        self.shared = self._among(config.shared_roles)
        self.records = self._record_table()

    def _among(self, names: list[str] | tuple[str, ...]) -> Tensor:
        wanted = [self.roles.index(name) for name in names]
        return torch.isin(self.role, torch.tensor(wanted, dtype=torch.long, device="cpu"))

    def _allowed(self, rule: dict[str, Any]) -> Tensor:
        """bool [T, T] (query, key): what one rule permits."""
        when = rule["when"]
        bits = sum(1 << list(SCOPE_BITS).index(bit) for bit in when.get("bits", ()))
        inside = (self.scope & bits) == bits
        match = inside & self._among([when["role"]]) if when.get("role") else inside
        forbidden = torch.zeros_like(self.table)
        if rule.get("allow_read_from") is not None:
            forbidden |= match[:, None] & ~self._among(rule["allow_read_from"])[None, :]
        if rule.get("allow_write_to") is not None:
            forbidden |= ~self._among(rule["allow_write_to"])[:, None] & match[None, :]
        if bits:  # a scope's lists govern the edges across its boundary
            forbidden &= ~(inside[:, None] & inside[None, :])
        return ~forbidden

    def _record_table(self) -> Tensor:
        """bool [T, 5]: a query of this type may read a retrieved record of this policy; column 4 is no record."""
        names = list(SCOPE_BITS)
        calls = self._among([CALLING_ROLE]) | (self.scope >> names.index("TOOL_SCOPE") & 1).bool()
        writes = self._among(WRITING_ROLES)
        retrieved = self.roles.index(RETRIEVED_ROLE) * 8 + (1 << names.index("RET_SCOPE"))
        out = torch.zeros(self.types, NO_RECORD + 1, dtype=torch.bool, device="cpu")
        for policy in range(NO_RECORD):
            hidden = (calls & (not policy & ALLOW_TOOLS)) | (writes & (not policy & ALLOW_COPY))
            out[:, policy] = self.table[:, retrieved] & ~hidden
        return out

    def to(self, device: torch.device) -> Rules:
        """The tables on ``device``."""
        if self.table.device != device:
            for name in ("table", "shared", "records"):
                setattr(self, name, getattr(self, name).to(device))
        return self

    def kinds(self, records: Tensor) -> Tensor:
        """Token types [...] of records [..., 4]."""
        scope = sum((records[..., 3] & bit != 0).long() << i for i, bit in enumerate(SCOPE_BITS.values()))
        return records[..., 2].long() * 8 + scope


@dataclass
class Tokens:
    """Position in its sequence (-1: none), document (negative: padding), segment and type of tokens, int64 [b, ...]."""

    position: Tensor
    document: Tensor
    segment: Tensor
    kind: Tensor

    def columns(self) -> tuple[Tensor, ...]:
        return self.position, self.document, self.segment, self.kind

    def at(self, index: Tensor) -> Tokens:
        """Of [b, m] tokens those at ``index`` [b, ...]."""
        return Tokens(*(x.gather(1, index.flatten(1)).reshape(index.shape) for x in self.columns()))


def may_read(q: Tokens, k: Tokens, rules: Rules) -> Tensor:
    """bool [b, n, m]: query [b, n] may read key [b, m], before any window."""
    at, past = q.position[:, :, None], k.position[:, None, :]
    same_document = (q.document[:, :, None] == k.document[:, None, :]) & (k.document >= 0)[:, None, :]
    in_segment = (q.segment[:, :, None] == k.segment[:, None, :]) | rules.shared[k.kind][:, None, :]
    legal = rules.table[q.kind[:, :, None], k.kind[:, None, :]] & in_segment & (past < at)
    return (legal | (past == at)) & same_document & (past >= 0)


@dataclass
class Groups:
    """Records of whole groups of tokens: what a query must meet to read every token of a group.

    document: int64 [b, k], -1 where tokens differ; segment: of the tokens whose role is not shared, -1 where there are
    none, -2 where they differ; kinds: bool [b, k, T] that occur.
    """

    document: Tensor
    segment: Tensor
    kinds: Tensor

    @classmethod
    def of(cls, tokens: Tokens, rules: Rules) -> Groups:
        """Groups of tokens [b, k, items]."""
        first, last = tokens.document.amin(-1), tokens.document.amax(-1)
        shared = rules.shared[tokens.kind]
        low = tokens.segment.masked_fill(shared, torch.iinfo(torch.long).max).amin(-1)
        high = tokens.segment.masked_fill(shared, -1).amax(-1)
        segment = torch.where(high < 0, -1, torch.where(low == high, high, -2))
        kinds = torch.zeros(*first.shape, rules.types, dtype=torch.bool, device=first.device)
        return cls(torch.where(first == last, first, -1), segment, kinds.scatter(2, tokens.kind, True))

    def legal(self, q: Tokens, rules: Rules) -> Tensor:
        """bool [b, n, k]: the query may read every token of the group, order apart."""
        document = (q.document[:, :, None] == self.document[:, None]) & (self.document >= 0)[:, None]
        segment = (q.segment[:, :, None] == self.segment[:, None]) | (self.segment == -1)[:, None]
        forbidden = (~rules.table).float()[q.kind] @ self.kinds.float().transpose(1, 2)
        return document & segment & (forbidden == 0)


def in_window(local: dict[str, Any], q: Tensor, k: Tensor) -> Tensor:
    """The local pattern, elementwise: position ``k <= q`` lies within reach of ``q`` (broadcastable)."""
    kind, window, unit, dilation = (local[name] for name in ("kind", "window", "unit", "dilation"))
    if window is None:
        return (q - k) == (q - k)
    if kind == "sliding":
        return k >= (q // local["stride"] + 1) * local["stride"] - window
    if kind == "block":
        return q // window == k // window
    near = max(1, window // 2) if kind == "hybrid" else window
    if kind == "dilated":
        apart = q // unit - k // unit
        return (apart % dilation == 0) & (apart // dilation < max(1, window // unit))
    apart = (q - near + 1) // unit - k // unit
    return (apart <= 0) | ((apart % dilation == 0) & (apart // dilation <= max(1, (window - near) // unit)))


def readable_groups(groups: Groups, q: Tokens, size: int, behind: int, local: dict[str, Any], rules: Rules) -> Tensor:
    """bool [b, n, k]: group j of ``size`` tokens is complete, wholly legal, and not read in full by the window."""
    at = q.position[:, :, None]
    start = torch.arange(groups.document.shape[1], device=at.device) * size  # [k]
    complete = start + size <= (at // size - behind) * size
    if local["kind"] in ("sliding", "block"):  # one stretch that ends at the query
        near = in_window(local, at, start)
    else:
        token = start[:, None] + torch.arange(size, device=at.device)
        near = in_window(local, at[..., None], token).all(-1)
    return groups.legal(q, rules) & complete & ~near


# ---------------------------------------------------------------------------------------------------------------- cache


class RefractorCache:
    """What decoding keeps of each sample: window keys, summaries, the current chunk's retrieved keys, ids and records.

    Samples may differ in length. The window is a ring: position p stands in slot p mod C, where C grows with the
    sequence up to the largest of the pattern's reach, a block, and ``keep``; without a window it has no bound. Linear
    attention keeps states instead. Tensors are updated in place, without a graph.

    Args:
        keep: tokens that must stay in the ring for ``tokens``, whatever the pattern.
    """

    is_compileable = False

    def __init__(self, config: RefractorConfig, keep: int = 0) -> None:
        self.config, self.length, self.columns = config, torch.zeros(0, dtype=torch.long), 0
        block = config.summaries["block_size"] if config.summaries else 1
        self.grows = config.reach is None and config.linear_attention is None
        self.ring = 0 if self.grows else max((config.reach or 0) + 1, block, keep)
        self.layers: list[dict[str, Tensor]] = [{} for _ in range(config.num_hidden_layers)]
        self.shared: dict[str, Tensor] = {}  # history [b, cap, 4], ids [b, cap], groups, ...

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of ids that have passed, padding included: transformers cuts its inputs by this."""
        return self.columns

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return int(self.length.max()) if len(self.length) else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        held = [self.shared, *self.layers]
        return sum(x.numel() * x.element_size() for part in held for x in part.values())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Samples ``beam_idx`` take the places 0, 1, ..."""
        for part in (self.shared, *self.layers):
            for name, value in part.items():
                part[name] = value.index_select(0, beam_idx.to(value.device))
        self.length = self.length.index_select(0, beam_idx.to(self.length.device))

    def buffer(
        self, part: dict[str, Tensor], name: str, like: Tensor, size: int, dim: int, most: int | None = None
    ) -> Tensor:
        """A tensor with at least ``size`` places along ``dim``, grown by doubling, up to ``most``; contents stay."""
        old = part.get(name)
        have = old.shape[dim] if old is not None else 0
        if old is None or have < size:
            shape = list(like.shape)
            shape[dim] = max(size, 2 * have if most is None else min(2 * have, most))
            part[name] = like.new_zeros(shape)
            if old is not None:
                part[name].narrow(dim, 0, have).copy_(old)
        return part[name]

    def tokens(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rotated keys and values [b, g, stop - start, d] of positions that every sample's ring still holds."""
        size = self.layers[layer]["k"].shape[2]
        low, high = int(self.length.min()), int(self.length.max())
        if not (0 <= start <= stop <= low and (self.grows or start >= high - size)):
            raise IndexError(f"positions {start}..{stop} are not in a ring of {size} at lengths {low}..{high}")
        slot = torch.arange(start, stop, device=self.length.device) % size
        return self.layers[layer]["k"][:, :, slot], self.layers[layer]["v"][:, :, slot]

    def rewind(self, position: int, read: Callable[[int, int, int], tuple[Tensor, Tensor]]) -> None:
        """Forgets all tokens from ``position`` on. ``read(layer, start, stop)`` gives keys and values [b, g, n, d] of
        the tokens before it that the ring should hold. Raises ``RuntimeError`` for linear attention and for
        layers with retrieved records, whose past states are gone."""
        if self.config.linear_attention or self.config.retrieval:
            raise RuntimeError("linear attention and retrieved records keep no earlier state to go back to")
        if not 0 < position <= int(self.length.min()):
            raise IndexError(f"cannot go back to {position} from {int(self.length.min())}")
        start = 0 if self.grows else max(0, position - self.ring)
        for number, layer in enumerate(self.layers):
            k, v = read(number, start, position)
            slot = torch.arange(start, position, device=k.device) % layer["k"].shape[2]
            layer["k"][:, :, slot], layer["v"][:, :, slot] = k.to(layer["k"]), v.to(layer["v"])
        self.length, self.columns = torch.full_like(self.length, position), position


def write(buffer: Tensor, index: Tensor, ok: Tensor, values: Tensor, dim: int = 1) -> None:
    """buffer[sample, index] = values for index [b, x] where ``ok``; ``dim``: the axis of places in both tensors."""
    sample, column = ok.nonzero(as_tuple=True)
    place = index[sample, column]
    buffer.transpose(1, dim)[sample, place] = values.transpose(1, dim)[sample, column].to(buffer.dtype)


class Step:
    """What all layers share while n new tokens pass: their records, and which keys each of them may read.

    Args:
        records: int [b, n, 4]; valid: bool [b, n], real tokens come first in each sample.
        retrieved: vectors [b, U, R, D] and policies int [b, U, R] (-1: no record) of the chunks that begin in a longer
            call, of which ``first_chunk`` [b] is the first.

    rotation: cosines and sines of the tokens' positions, set by the model.
    """

    rotation: tuple[Tensor, Tensor]

    def __init__(
        self,
        config: RefractorConfig,
        rules: Rules,
        cache: RefractorCache | None,
        records: Tensor,
        valid: Tensor,
        retrieved: tuple[Tensor, Tensor] | None,
        first_chunk: Tensor | None,
    ) -> None:
        b, n = valid.shape
        self.config, self.rules, self.cache = config, rules, cache
        self.valid, self.count = valid, valid.sum(1)
        self.length = cache.length if cache is not None else torch.zeros_like(self.count)
        position = torch.where(valid, self.length[:, None] + torch.arange(n, device=valid.device), -1)
        self.history = records
        if cache is not None:
            self.history = cache.buffer(cache.shared, "history", records.int(), int((self.length + n).max()), 1)
            write(self.history, position, valid, records)
        columns = records.long()
        self.records, self.features_of = records, len(config.roles)
        self.new = Tokens(position, columns[..., 0], columns[..., 1], rules.kinds(records))
        self.linear = config.linear_attention is not None
        if self.linear:
            self._plan_states()
            return
        self.ring = self._ring()
        known = may_read(self.new, self.ring, rules)
        near = in_window(config.local_attention, position[:, :, None], self.ring.position[:, None, :])
        fresh = may_read(self.new, self.new, rules)
        fresh &= in_window(config.local_attention, position[:, :, None], position[:, None, :])
        self.masks: dict[str, list[Tensor]] = {"local": [known & near, fresh]}
        self._hidden: dict[tuple[str, ...], Tensor] = {}
        if config.summaries:
            self._plan_summaries(config.summaries)
        if config.retrieval:
            self._plan_retrieved(config.retrieval, retrieved, first_chunk)

    def tokens_at(self, position: Tensor) -> Tokens:
        """Tokens at positions [b, ...]; a negative position is no token, and one to come is whatever stands there."""
        index = position.clamp(0, self.history.shape[1] - 1).flatten(1)
        records = self.history.gather(1, index[..., None].expand(-1, -1, 4)).reshape(*position.shape, 4).long()
        return Tokens(position, records[..., 0], records[..., 1], self.rules.kinds(records))

    @cached_property
    def gate_features(self) -> Tensor:
        """float32 [b, n, roles + 3]: role and scope bits, one-hot."""
        bits = torch.tensor(list(SCOPE_BITS.values()), device=self.records.device)
        roles = F.one_hot(self.records[..., 2].long(), self.features_of)
        return torch.cat([roles, (self.records[..., 3:].long() & bits) != 0], dim=-1).float()

    def hidden(self, tiers: tuple[str, ...]) -> Tensor:
        """bool [b, 1, 1, n, m]: keys of these tiers that the new tokens may not read, in the order of ``masks``."""
        if tiers not in self._hidden:
            legal = torch.cat([mask for tier in tiers for mask in self.masks[tier]], dim=-1)
            self._hidden[tiers] = ~legal[:, None, None]
        return self._hidden[tiers]

    def _ring(self) -> Tokens:
        """Tokens [b, C] whose keys the cache holds, by slot."""
        held, device = 0, self.length.device
        if self.cache is not None and "k" in self.cache.layers[0]:
            self.size = self.cache.layers[0]["k"].shape[2]
            held = min(self.size, int(self.length.max()))
        slot = torch.arange(held, device=device)
        last = self.length[:, None] - 1
        position = last - (last - slot) % self.size if held else slot.expand(len(self.length), 0)
        return self.tokens_at(position.clamp(min=-1))

    def _completed(self, size: int) -> tuple[Tensor, Tensor, int]:
        """Groups of ``size`` tokens that these tokens complete: index [b, x], which exist, and the most there are."""
        before, after = self.length // size, (self.length + self.count) // size
        index = before[:, None] + torch.arange(int((after - before).max()), device=before.device)
        return index, index < after[:, None], int(after.max())

    def _groups(self, name: str, size: int) -> tuple[Groups, Tensor, Tensor]:
        """All complete groups of ``size`` tokens, and index and existence of those just completed."""
        index, ok, total = self._completed(size)
        tokens = self.tokens_at(index[..., None] * size + torch.arange(size, device=index.device))
        tokens = Tokens(*(x.where(ok[..., None], 0) for x in tokens.columns()))
        groups = Groups.of(tokens, self.rules)
        if self.cache is None:
            return groups, index, ok
        held = []
        for field in ("document", "segment", "kinds"):
            buffer = self.cache.buffer(self.cache.shared, f"{name}_{field}", getattr(groups, field), total, 1)
            write(buffer, index, ok, getattr(groups, field))
            held.append(buffer[:, :total])
        return Groups(*held), index, ok

    def _plan_summaries(self, spec: dict[str, Any]) -> None:
        """Masks of both levels, and which tokens or summaries make the summaries that are due."""
        block, per_block, local = spec["block_size"], spec["per_block"], self.config.local_attention
        groups, self.block, self.block_ok = self._groups("block", block)
        mask = readable_groups(groups, self.new, block, 0, local, self.rules)
        self.masks["summary"] = []
        if spec["levels"] == 2:
            size = block * spec["fanout"]
            upper, self.group, self.group_ok = self._groups("group", size)
            stands_in = readable_groups(upper, self.new, size, 1, local, self.rules)
            covered = stands_in.repeat_interleave(spec["fanout"], 2)
            mask[:, :, : covered.shape[2]] &= ~covered
            self.masks["summary"].append(stands_in.repeat_interleave(per_block, 2))
        self.masks["summary"].append(mask.repeat_interleave(per_block, 2))
        token = (self.block[..., None] * block + torch.arange(block, device=mask.device)).flatten(1)
        held = self.ring.position.shape[1]
        ahead = token - self.length[:, None]
        at = torch.where(ahead >= 0, held + ahead, token % self.size if held else 0)
        self.block_tokens = at.clamp(0, held + self.new.position.shape[1] - 1)  # in [ring | new]

    def _plan_retrieved(
        self, spec: dict[str, Any], retrieved: tuple[Tensor, Tensor] | None, first_chunk: Tensor | None
    ) -> None:
        """Vectors and places of the records of the chunks that begin here, and the mask over [current | these]."""
        chunk, fan_in, b = spec["chunk"], spec["fan_in"], len(self.length)
        begin, end = -(-self.length // chunk), -(-(self.length + self.count) // chunk)
        number = begin[:, None] + torch.arange(int((end - begin).max()), device=begin.device)  # [b, x]
        codes = torch.full((b, number.shape[1], fan_in), NO_RECORD, device=begin.device)
        self.record_vectors = torch.zeros(b, number.shape[1], fan_in, spec["dim"], device=begin.device)
        if retrieved is not None and retrieved[1].shape[1]:
            vectors, policies = retrieved
            assert first_chunk is not None
            index, given = number - first_chunk[:, None], policies.shape[1]
            missing = (index >= given) | (number >= end[:, None])
            index = index.clamp(max=given - 1)
            codes = policies.long().gather(1, index[..., None].expand_as(codes))
            codes = torch.where((codes < 0) | missing[..., None], NO_RECORD, codes)
            at = index[..., None, None].expand(-1, -1, fan_in, vectors.shape[3])
            self.record_vectors = vectors.gather(1, at)
        self.record_place = (number * chunk).repeat_interleave(fan_in, 1)  # [b, x R]
        if self.cache is not None:
            held = self.cache.shared
            held.setdefault("chunk", torch.full_like(begin, -1))
            held.setdefault("codes", torch.full((b, fan_in), NO_RECORD, device=begin.device))
            number = torch.cat([held["chunk"][:, None], number], 1)
            codes = torch.cat([held["codes"][:, None], codes], 1)
            current = (self.length + self.count - 1) // chunk
            self.current = (current[:, None] == number).float().argmax(1)  # [b], of [held | new]
            held["chunk"], held["codes"] = current, codes[torch.arange(b), self.current]
        asked = self.tokens_at((number[..., None] - 1) * chunk + torch.arange(chunk, device=begin.device))
        legal = Groups.of(asked, self.rules).legal(self.new, self.rules)  # [b, n, x]
        legal &= (self.new.position[:, :, None] // chunk == number[:, None]) & (number > 0)[:, None]
        readable = self.rules.records[self.new.kind[:, :, None, None], codes[:, None]]  # [b, n, x, R]
        self.masks["retrieved"] = [(readable & legal[..., None]).flatten(2)]

    def _plan_states(self) -> None:
        """Linear attention: which running states, one for each (document, segment, type), are read, kept and made."""
        device, b = self.valid.device, len(self.valid)
        held = self.cache.shared if self.cache is not None else {}
        lanes = held.get("lanes", torch.full((b, 0, 3), -1, device=device))
        past = Tokens(torch.where(lanes[..., 0] >= 0, 0, -1), lanes[..., 0], lanes[..., 1], lanes[..., 2].clamp(min=0))
        self.reads = may_read(self.new, past, self.rules)
        self.within = may_read(self.new, self.new, self.rules)
        if self.cache is None:
            return
        names, token = torch.stack([self.new.document, self.new.segment, self.new.kind], -1), self.valid
        made: list[list[list[int]]] = []
        for row, (old, new) in enumerate(zip(lanes.tolist(), names.tolist(), strict=True)):
            new = [name for name, real in zip(new, token[row].tolist(), strict=True) if real and name[0] >= 0]
            old = [name for name in old if name[0] >= 0]
            last = (new or old or [[-1, -1, 0]])[-1]
            for before, name in zip([max(old, default=[-1, -1, 0]), *new], new, strict=False):
                if name[:2] < before[:2]:
                    raise ValueError(
                        f"sample {row} goes back to document {name[0]}, segment {name[1]}: its state is gone"
                    )
            shared = self.rules.shared.tolist()
            live = [x for x in [*old, *new] if x[0] == last[0] and (x[1] == last[1] or shared[x[2]])]
            made.append([list(x) for x in dict.fromkeys(map(tuple, live))])
        width = max(map(len, made))
        filled = [[*rows, *[[-1, -1, 0]] * (width - len(rows))] for rows in made]
        held["lanes"] = torch.tensor(filled, dtype=torch.long, device=device).reshape(b, width, 3)
        self.kept, self.made = (
            ((x[:, :, None] == held["lanes"][:, None]).all(-1) & real[:, :, None]).float()
            for x, real in ((lanes, lanes[..., 0] >= 0), (names, token & (names[..., 0] >= 0)))
        )


def derived_records(config: RefractorConfig, ids: Tensor, valid: Tensor, cache: RefractorCache | None) -> Tensor:
    """Records int [b, n, 4] of ids [b, n] that come without any, going on from the cache's last token.

    A message has its role from its opening token through its end token. An end-of-document token is plain text, and the
    next token begins a new document in segment 0. Scope bits go on until the message ends.
    """
    plain, device = config.roles.index(RETRIEVED_ROLE), ids.device
    b, n = ids.shape
    eod = config.eos_token_id if isinstance(config.eos_token_id, int) else -1
    record = torch.tensor([[0, 0, plain, 0]] * b, device=device)
    last = torch.full((b,), -1, device=device)
    if cache is not None and cache.longest:
        at, begun = (cache.length - 1).clamp(min=0)[:, None], cache.length > 0
        past = cache.shared["history"].gather(1, at[..., None].expand(-1, -1, 4))[:, 0].long()
        record = torch.where(begun[:, None], past, record)
        last = torch.where(begun, cache.shared["ids"].gather(1, at)[:, 0], last)
    opens = torch.full((config.vocab_size,), -1, device=device)
    for name, token in config.role_token_ids.items():
        opens[token] = config.roles.index(name)
    before = torch.cat([last[:, None], ids[:, :-1]], 1)
    fresh, closed = before == eod, before == (-1 if config.end_token_id is None else config.end_token_id)
    document = record[:, :1] + (fresh & valid).long().cumsum(1)
    segment = torch.where(document > record[:, :1], 0, record[:, 1:2])
    role = torch.where(fresh | closed | (ids == eod), plain, -1)  # -1: as the token before
    role = torch.where(opens[ids] >= 0, opens[ids], role)
    marked = torch.where(role >= 0, torch.arange(n, device=device), -1).cummax(1).values
    role = torch.where(marked >= 0, role.gather(1, marked.clamp(min=0)), record[:, 2:3])
    bits = torch.where(marked >= 0, 0, record[:, 3:4])
    return torch.stack([document, segment, role, bits], -1)


def check_inputs(
    config: RefractorConfig, ids: Tensor, records: Tensor | None, retrieved: tuple[Tensor, Tensor] | None
) -> None:
    """Raises ``ValueError`` for inputs whose shapes do not go together."""
    if ids.dim() != 2 or not ids.shape[1]:
        raise ValueError(f"input_ids are [samples, tokens], at least one token; given {list(ids.shape)}")
    if records is not None and tuple(records.shape) != (*ids.shape, 4):
        raise ValueError(f"records are {[*ids.shape, 4]} for these input_ids, not {list(records.shape)}")
    if retrieved is None:
        return
    if config.retrieval is None:
        raise ValueError("retrieved: this model was trained without retrieval and cannot read it")
    vectors, policies = (list(x.shape) for x in retrieved)
    fan_in, dim = config.retrieval["fan_in"], config.retrieval["dim"]
    if len(vectors) != 4 or [vectors[0], *vectors[2:]] != [len(ids), fan_in, dim] or policies != vectors[:3]:
        raise ValueError(
            f"retrieved are vectors [{len(ids)}, chunks, {fan_in}, {dim}] and policies of the same chunks, not "
            f"{vectors} and {policies}"
        )


def refuse_unknown(given: dict[str, Any], config: RefractorConfig) -> None:
    """Raises ``ValueError`` for what transformers may ask of a model and this one would silently not do."""
    asked = {name: value for name, value in given.items() if value is not None and value is not False}
    asked.pop("cache_position", None)
    if not asked.pop("return_dict", True) or given.get("return_dict") is False:
        asked["return_dict=False"] = True
    asked |= {name: True for name in ("output_hidden_states", "output_attentions") if getattr(config, name, False)}
    if asked:
        raise ValueError(f"{min(asked)} is nothing that this model takes or gives")
