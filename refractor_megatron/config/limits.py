"""Ranges of section 16, and settings that contradict each other.

Every problem is one sentence that names the keys and the way out. Values come from ``RunConfig.values()``, so checking
a key does not pass for using it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import ConfigError
from .masks import mask_problems
from .relation_limits import relation_problems, relation_warnings
from .schema import RunConfig, as_text, schema

Values = Mapping[str, Any]


def check(cfg: RunConfig, ranks: int | None = None) -> list[str]:
    """Warnings about ``cfg`` on ``ranks`` processes (None: what depends on the number of ranks is left out).

    Raises ``ConfigError`` with every contradiction, and with every value outside section 16 when ``limits: enforce``;
    with ``limits: warn`` the latter are returned among the warnings.
    """
    v = cfg.values()
    problems = [
        *_names(v),
        *_reserved(v),
        *_shape(v),
        *_sequence(v),
        *relation_problems(v),
        *_schedule(v),
        *mask_problems(v),
    ]
    problems += [*_grid(v), *(_ranks(v, ranks) if ranks is not None else ())]
    warnings = list(relation_warnings(v))
    if outside := _outside_section_16(v):
        sentence = f"outside the ranges of section 16: {outside}"
        if v["limits"] == "enforce":
            problems.append(f"{sentence}; choose values inside, or set limits=warn")
        else:
            warnings.append(sentence)
    if problems:
        raise ConfigError("; ".join(problems) + ".")
    return [sentence + "." for sentence in warnings]


def _names(v: Values) -> Iterator[str]:
    for key in ("data.name", "model.name"):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", v[key]):
            yield f"{key}={v[key]!r} becomes part of a folder's name: use letters, digits, '.', '_' and '-'"


def _outside_section_16(v: Values) -> str:
    dense = v["model.ffn.type"] == "dense"
    found = []
    for key, leaf in schema().items():
        if leaf.limit is None or (dense and key in ("model.ffn.experts", "model.ffn.topk")):
            continue
        low, high = leaf.limit
        if not low <= v[key] <= high:
            found.append(f"{key}={as_text(v[key])} ({as_text(low)} to {as_text(high)})")
    return ", ".join(found)


def _reserved(v: Values) -> Iterator[str]:
    for key, leaf in schema().items():
        if leaf.reserved and v[key] != leaf.default:
            yield (
                f"{key}={as_text(v[key])} would have no effect, no part of this version reads it: leave it at "
                f"{as_text(leaf.default)}"
            )


def _multiple(v: Values, key: str, of: str, way_out: str) -> Iterator[str]:
    if v[key] % v[of]:
        yield f"{key}={v[key]} is not a multiple of {of}={v[of]}: {way_out}"


def _shape(v: Values) -> Iterator[str]:
    heads, dim = v["model.n_heads"], v["model.rope.dim"]
    yield from _multiple(v, "model.d_model", "model.n_heads", "every head needs the same width")
    yield from _multiple(v, "model.n_heads", "model.n_kv_heads", "every key/value head serves the same number of heads")
    if dim > v["model.d_model"]:
        yield f"model.rope.dim={dim} exceeds model.d_model={v['model.d_model']}: set it to {v['model.d_model']}"
    elif dim % heads or (dim // heads) % 2:
        yield (
            f"model.rope.dim={dim} is the rotary width over all heads and leaves {dim / heads:g} for each of "
            f"model.n_heads={heads}, which must be even: set a multiple of {2 * heads}"
        )
    if v["model.rope.scaling"] == "yarn" and v["model.rope.beta_fast"] < v["model.rope.beta_slow"]:
        yield (
            f"model.rope.beta_fast={as_text(v['model.rope.beta_fast'])} is below model.rope.beta_slow="
            f"{as_text(v['model.rope.beta_slow'])}: features that turn fast keep their frequency, slow ones do not"
        )
    if v["model.ffn.type"] == "moe" and v["model.ffn.topk"] > v["model.ffn.experts"]:
        yield (
            f"model.ffn.topk={v['model.ffn.topk']} exceeds model.ffn.experts={v['model.ffn.experts']}: a token can "
            f"visit each expert once"
        )
    if v["model.ffn.type"] == "moe" and v["model.ffn.topk"] == 1 and v["router.renormalize_topk"]:
        yield (
            "model.ffn.topk=1 with router.renormalize_topk=true weighs the one expert 1 whatever the gate says, so the "
            "gate never learns: set router.renormalize_topk=false"
        )


def _sequence(v: Values) -> Iterator[str]:
    length = v["train.seq_len"]
    if length > v["model.context_max"]:
        yield (
            f"train.seq_len={length} exceeds model.context_max={v['model.context_max']}: shorten the sequences "
            f"or raise model.context_max"
        )


def _schedule(v: Values) -> Iterator[str]:
    steps, warmup, cosine = v["train.steps"], v["train.schedule.warmup_steps"], v["train.schedule.cosine.steps"]
    if cosine is not None and warmup >= cosine:
        yield (
            f"train.schedule.warmup_steps={warmup} leaves nothing of train.schedule.cosine.steps={cosine}: warm up "
            f"for fewer steps or train longer"
        )
    if v["train.schedule.cosine.min_lr"] > v["train.optimizer.lr"]:
        yield (
            f"train.schedule.cosine.min_lr={as_text(v['train.schedule.cosine.min_lr'])} exceeds "
            f"train.optimizer.lr={as_text(v['train.optimizer.lr'])}: the cosine would rise"
        )
    rm_tail = v["train.schedule.tail.type"] == "rm"
    if rm_tail and v["train.schedule.cosine.min_lr"] == 0:
        yield "train.schedule.tail.type=rm decays from train.schedule.cosine.min_lr, which is 0: set a positive min_lr"
    if rm_tail and cosine is not None and cosine >= steps:
        yield (
            f"train.schedule.tail.type=rm begins after step {cosine}, where train.steps={steps} already ended: set "
            f"train.schedule.cosine.steps below train.steps"
        )


def _grid(v: Values) -> Iterator[str]:
    for key in ("model.n_heads", "model.n_kv_heads", "model.ffn.hidden"):
        yield from _multiple(v, key, "parallel.tp", "choose a parallel.tp that divides it")
    if v["train.seq_len"] // v["parallel.cp"] % v["parallel.tp"]:
        yield (
            f"train.seq_len={v['train.seq_len']} over parallel.cp={v['parallel.cp']} ranks is not a multiple of "
            f"parallel.tp={v['parallel.tp']}: choose a parallel.tp that divides it"
        )
    yield from _multiple(v, "model.n_layers", "parallel.pp", "every stage holds the same number of layers")
    if v["parallel.ep"] == 1:
        return
    if v["model.ffn.type"] == "dense":
        yield f"parallel.ep={v['parallel.ep']} has no experts to share with model.ffn.type=dense: set parallel.ep=1"
    else:
        yield from _multiple(v, "model.ffn.experts", "parallel.ep", "every rank holds the same number of experts")


def _ranks(v: Values, ranks: int) -> Iterator[str]:
    tp, cp, pp, ep = (v[f"parallel.{name}"] for name in ("tp", "cp", "pp", "ep"))
    if ranks % (tp * cp * pp):
        context = f" times parallel.cp={cp}" if cp > 1 else ""
        yield (
            f"{ranks} ranks cannot form a grid of parallel.tp={tp}{context} times parallel.pp={pp}: start a multiple "
            f"of {tp * cp * pp} ranks"
        )
        return
    dp = ranks // (tp * cp * pp)
    stage = ranks // pp
    if stage % ep:
        yield (
            f"parallel.ep={ep} does not divide the {stage} ranks of a pipeline stage: choose parallel.ep among the "
            f"divisors of {stage}"
        )
    batch, micro = v["train.global_batch"], v["train.micro_batch"]
    if batch % (micro * dp):
        yield (
            f"train.global_batch={batch} is not a multiple of train.micro_batch={micro} times {dp} data-parallel "
            f"ranks: set a multiple of {micro * dp}"
        )
