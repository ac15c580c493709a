"""Settings of the relation fabric that contradict each other or the sequence (see ``limits``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Values = Mapping[str, Any]

#: Longest sequence for dilation by single tokens: each key is an interval of its own there.
TOKEN_DILATION_LIMIT = 8192


def relation_problems(v: Values) -> Iterator[str]:
    """One sentence for each contradiction."""
    if is_linear(v):
        yield from _linear_mode(v)
        return
    yield from _local(v)
    yield from _summaries(v)
    yield from _retrieval(v)
    yield from _context_parallel(v)
    if v["relation.combine"] != "joint" and not (has_summaries(v) or has_retrieval(v)):
        yield (
            f"relation.combine={v['relation.combine']} has only the local tier to combine: turn on summaries or "
            f"retrieval, or set relation.combine=joint"
        )


def is_linear(v: Values) -> bool:
    """True when linear attention takes the place of the tiers."""
    return bool(v["relation.linear_mode.enabled"] and v["train.seq_len"] > v["relation.linear_mode.L_switch"])


def has_summaries(v: Values) -> bool:
    """True when some query can ever read a summary."""
    covered = v["relation.local.pattern"] in ("sliding", "block") and v["relation.local.window"] >= v["train.seq_len"]
    return bool(v["relation.global.summaries_per_block"] > 0 and not covered)


def has_retrieval(v: Values) -> bool:
    """True when some layer reads retrieved records."""
    return bool(v["relation.retrieval.enabled"] and v["relation.retrieval.fan_in"] > 0)


def relation_warnings(v: Values) -> Iterator[str]:
    """Settings without effect that are no contradiction."""
    window, length = v["relation.local.window"], v["train.seq_len"]
    if is_linear(v):
        return
    if v["relation.global.summaries_per_block"] and not has_summaries(v):
        yield (
            f"relation.local.window={window} covers the whole of train.seq_len={length}, so summaries are never read "
            f"and the model has none: set relation.global.summaries_per_block=0 to say so"
        )
    group = v["relation.global.block_size"] * v["relation.global.fanout"]
    if has_summaries(v) and v["relation.global.levels"] == 2 and length <= 2 * group:
        yield (
            f"relation.global.levels=2 summarises groups of {group} tokens that lie a whole group behind, and "
            f"train.seq_len={length} has none: set relation.global.levels=1 or a smaller relation.global.fanout"
        )


def _local(v: Values) -> Iterator[str]:
    pattern, window, unit = (v[f"relation.local.{name}"] for name in ("pattern", "window", "dilation_unit"))
    if pattern == "sliding" and v["relation.local.stride"] > window:
        yield (
            f"relation.local.stride={v['relation.local.stride']} exceeds relation.local.window={window}: some queries "
            f"would not see their own token; set a stride of at most the window"
        )
    if pattern in ("dilated", "hybrid"):
        room = window if pattern == "dilated" else window - window // 2
        if unit > room:
            yield (
                f"relation.local.dilation_unit={unit} does not fit into the {room} tokens that pattern {pattern} "
                f"dilates of relation.local.window={window}: choose a smaller unit or a larger window"
            )
        if unit < 16 and v["train.seq_len"] > TOKEN_DILATION_LIMIT:
            yield (
                f"relation.local.dilation_unit={unit} is meant for checking short sequences and train.seq_len="
                f"{v['train.seq_len']} exceeds {TOKEN_DILATION_LIMIT}: set a unit of 16 tokens or more"
            )


def _summaries(v: Values) -> Iterator[str]:
    length, window, block = v["train.seq_len"], v["relation.local.window"], v["relation.global.block_size"]
    per_block, kind = v["relation.global.summaries_per_block"], v["relation.global.type"]
    if per_block == 0:
        return
    if length % block:
        yield (
            f"train.seq_len={length} is not a multiple of relation.global.block_size={block}: blocks must fill the "
            f"sequence"
        )
    if block > window and window < length:
        yield (
            f"relation.global.block_size={block} exceeds relation.local.window={window}: tokens that left the window "
            f"would wait for their summary, unread; set a block no larger than the window"
        )
    if kind != "attn_pool" and block % per_block:
        yield (
            f"relation.global.type={kind} pools equal parts of a block and relation.global.block_size={block} does not "
            f"divide by relation.global.summaries_per_block={per_block}: choose numbers that do"
        )


def _retrieval(v: Values) -> Iterator[str]:
    if not v["relation.retrieval.enabled"]:
        return
    length, chunk, layers = v["train.seq_len"], v["relation.retrieval.chunk"], v["relation.retrieval.layers"]
    if v["relation.retrieval.fan_in"] == 0:
        yield "relation.retrieval.fan_in=0 retrieves nothing: set relation.retrieval.enabled=false to say so"
    if length % chunk or length == chunk:
        yield (
            f"relation.retrieval.chunk={chunk} must divide train.seq_len={length} into several chunks: the tokens of "
            f"a chunk read what the chunk before it retrieved"
        )
    if layers is not None:
        wrong = [layer for layer in layers if not 1 <= layer <= v["model.n_layers"]]
        if wrong or not layers or len(set(layers)) != len(layers):
            yield (
                f"relation.retrieval.layers={list(layers)} must name layers 1 to {v['model.n_layers']}, each once: "
                f"set null for every layer"
            )


def _context_parallel(v: Values) -> Iterator[str]:
    length, cp = v["train.seq_len"], v["parallel.cp"]
    if cp == 1:
        return
    wholes = {"relation.global.block_size": has_summaries(v), "relation.retrieval.chunk": has_retrieval(v)}
    for key in (key for key, used in wholes.items() if used):
        if length % (2 * cp * v[key]):
            yield (
                f"train.seq_len={length} cut into {2 * cp} chunks for parallel.cp={cp} would cut through "
                f"{key}={v[key]}: choose a train.seq_len that is a multiple of {2 * cp * v[key]}"
            )
    if length % (2 * cp):
        yield f"train.seq_len={length} does not divide into the {2 * cp} chunks of parallel.cp={cp}: set a multiple"
    elif (reach := local_reach(v)) > length // (2 * cp):
        yield (
            f"parallel.cp={cp} cuts train.seq_len={length} into chunks of {length // (2 * cp)} tokens, and "
            f"relation.local reaches {reach} tokens back, past the chunk before: lower parallel.cp or the window"
        )


def local_reach(v: Values) -> int:
    """Tokens from a query to the farthest key of its local pattern (tested against ``distinction.pattern``)."""
    window, unit, dilation = (v[f"relation.local.{name}"] for name in ("window", "dilation_unit", "dilation"))
    pattern, longest = v["relation.local.pattern"], v["train.seq_len"] - 1
    if pattern == "dilated":
        return int(min((max(1, window // unit) - 1) * dilation * unit + unit - 1, longest))
    if pattern == "hybrid":
        near = max(1, window // 2)
        return int(min(near + unit - 2 + max(1, (window - near) // unit) * dilation * unit, longest))
    return int(min(window - 1, longest))


def _linear_mode(v: Values) -> Iterator[str]:
    if v["parallel.cp"] > 1:
        yield (
            f"train.seq_len={v['train.seq_len']} exceeds relation.linear_mode.L_switch="
            f"{v['relation.linear_mode.L_switch']}, and linear attention does not share a sequence between ranks: set "
            f"parallel.cp=1, or relation.linear_mode.enabled=false for the three tiers"
        )
