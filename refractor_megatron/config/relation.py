"""Keys of the relation fabric: who attends to whom, by which tier and kernel (spec sections 3, 4 and 7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .tree import Bounds, Section, branch, leaf

_NOT_NEGATIVE = Bounds(ge=0)
_AT_LEAST_ONE = Bounds(ge=1)
_SHARE = Bounds(ge=0, le=1)
_PLAN = "transformation.layer_plan"
_DATA = "training.dataset"


@dataclass(frozen=True, eq=False, repr=False)
class Local(Section):
    """Tier A: attention to near keys."""

    window: int = leaf(512, "Keys a query sees, itself included", unit="tokens", bounds=_AT_LEAST_ONE, reader=_PLAN)
    pattern: Literal["sliding", "dilated", "block", "hybrid"] = leaf(
        "sliding",
        "Shape of the local neighbourhood: the last window tokens; every dilation-th unit back to window tokens; the "
        "query's own block of window tokens; or half of each of the first two",
        reader=_PLAN,
    )
    dilation: int = leaf(
        1, "Units from one visited unit to the next (patterns dilated and hybrid)", bounds=_AT_LEAST_ONE, section="4",
        reader=_PLAN,
    )  # fmt: skip
    dilation_unit: int = leaf(
        128, "Tokens of a unit: a kernel block for speed, 1 for dilation by single tokens", unit="tokens",
        bounds=_AT_LEAST_ONE, section="own", reader=_PLAN,
    )  # fmt: skip
    stride: int = leaf(
        1, "Tokens the window moves at a time: queries of one stride share their first key", unit="tokens",
        bounds=_AT_LEAST_ONE, section="4", reader=_PLAN,
    )  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class Global(Section):
    """Tier B: attention to pooled summaries of earlier blocks."""

    block_size: int = leaf(
        128, "Tokens pooled into one set of summaries", unit="tokens", bounds=_AT_LEAST_ONE, reader=_PLAN
    )
    summaries_per_block: int = leaf(
        2, "Summaries of each block; 0 turns the tier off", bounds=Bounds(ge=0, le=4), reader=_PLAN
    )
    type: Literal["attn_pool", "mean", "max"] = leaf("attn_pool", "How a block is pooled", reader=_PLAN)
    levels: int = leaf(
        1, "2 also pools the summaries of fanout blocks, for sequences beyond 128k", bounds=Bounds(ge=1, le=2),
        section="own", reader=_PLAN,
    )  # fmt: skip
    fanout: int = leaf(16, "Blocks under one second-level block", bounds=Bounds(ge=2), section="own", reader=_PLAN)


@dataclass(frozen=True, eq=False, repr=False)
class Retrieval(Section):
    """Tier C: attention to retrieved records."""

    enabled: bool = leaf(False, "Attend to records retrieved from the training text", section="7", reader=_PLAN)
    fan_in: int = leaf(
        8, "Retrieved records per chunk", bounds=_NOT_NEGATIVE, limit=(0, 16), reader=f"{_PLAN}, {_DATA}"
    )
    chunk: int = leaf(
        128, "Tokens that retrieve together, for the chunk after them", unit="tokens", bounds=_AT_LEAST_ONE,
        section="own", reader=f"{_PLAN}, {_DATA}",
    )  # fmt: skip
    layers: tuple[int, ...] | None = leaf(
        None, "Layers that attend to retrieved records, counted from 1; null means every layer", section="4",
        reader=_PLAN,
    )  # fmt: skip
    dim: int = leaf(
        256, "Width of a record's vector", unit="features", bounds=_AT_LEAST_ONE, section="own",
        reader=f"{_PLAN}, {_DATA}",
    )  # fmt: skip
    sigma_min: float = leaf(
        0.45, "Smallest cosine similarity", bounds=Bounds(ge=-1, le=1), limit=(0.35, 0.6), reader=_DATA
    )
    t_max_s: int = leaf(604800, "Greatest age of a record", unit="seconds", bounds=_NOT_NEGATIVE, reader=_DATA)
    trust_min: float = leaf(0.6, "Smallest trust of a record's source", bounds=_SHARE, reader=_DATA)
    sources: tuple[str, ...] | None = leaf(
        None, "Sources whose records may be retrieved; null means all", section="7", reader=_DATA
    )


@dataclass(frozen=True, eq=False, repr=False)
class LinearMode(Section):
    """Attention for sequences beyond ``L_switch``."""

    enabled: bool = leaf(True, "Use linear attention for sequences longer than L_switch", reader=_PLAN)
    L_switch: int = leaf(
        65536, "Longest sequence with exact attention", unit="tokens", bounds=_AT_LEAST_ONE, reader=_PLAN
    )
    kernel: Literal["elu+1", "favor+"] = leaf("elu+1", "Feature map of linear attention", reader=_PLAN)
    features: int = leaf(
        256, "Random features of favor+", unit="features", bounds=_AT_LEAST_ONE, section="own", reader=_PLAN
    )


@dataclass(frozen=True, eq=False, repr=False)
class Relation(Section):
    """Who attends to whom, and by which kernel."""

    local: Local = branch(Local)
    global_: Global = branch(Global)
    retrieval: Retrieval = branch(Retrieval)
    linear_mode: LinearMode = branch(LinearMode)
    combine: Literal["joint", "gated", "sum"] = leaf(
        "joint",
        "One softmax over the keys of all tiers, or one for each tier: weighted by learned gates, or added up",
        section="13.1",
        reader=_PLAN,
    )
    backend: Literal["auto", "dense", "blocksparse_cpu", "flex"] = leaf(
        "auto",
        "Attention kernel; auto takes the best one the device has",
        section="own",
        resume="free",
        reader=_PLAN,
    )
