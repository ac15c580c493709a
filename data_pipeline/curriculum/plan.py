"""Makes the stages of a dataset: routes, packs, mixes, writes ``stage-<length>.pack`` and says what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from data_pipeline.curriculum.routing import check_lengths
from data_pipeline.mix import shares as mixing
from data_pipeline.options import Curriculum, Mix, Tasks
from data_pipeline.pack.indexed import read_indexed
from data_pipeline.pack.packed import Packed, path_of, write_packed
from data_pipeline.progress import Log
from refractor_megatron.errors import DataError

if TYPE_CHECKING:
    from data_pipeline.curriculum.deal import Dealt, LeftOut
    from data_pipeline.pack.best_fit import Packing

Ints = npt.NDArray[np.int64]
#: Kinds of made documents, in the order of ``MadeTasks.kinds``; domains of these names follow those of the text.
KINDS = ("tasks/retrieval", "tasks/long_range")


@dataclass(frozen=True)
class MadeTasks:
    """Of each document in ``tasks.bin``: ``kinds`` [n], 0 retrieval, 1 long range; ``lengths`` [n] of its stage."""

    kinds: npt.NDArray[np.integer[Any]]
    lengths: npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class _Texts:
    """First tokens of the documents of each store, the tokens last."""

    train: Ints
    tasks: Ints | None

    @property
    def tokens(self) -> Ints:
        return np.array([one[-1] for one in (self.train, self.tasks) if one is not None], dtype=np.int64)


def plan_stages(
    draft: Path,
    domains: npt.NDArray[np.integer[Any]],
    domain_names: Sequence[str],
    domain_weights: Sequence[float],
    mix: Mix,
    curriculum: Curriculum,
    tasks: Tasks,
    seed: int,
    log: Log,
    made: MadeTasks | None = None,
) -> dict[str, Any]:
    """Writes a packed file for every stage of ``curriculum.lengths`` into ``draft``; returns what the manifest says.

    Only the lengths of documents are read. A stage with too little long text for one sequence is left out, and said to
    be; the first stage must be possible.

    Args:
        domains: domain of each training document, [documents], an index of ``domain_names``.
        domain_weights: at least 0; a domain of weight 0 is in no stage.
        made: which document of ``draft/tasks.bin`` is for which stage; None or empty where there is none.

    Raises ``DataError`` for impossible options, or text that makes no sequence of the first stage.
    """
    from data_pipeline.curriculum.deal import Corpus, deal  # compiles kernels: not before there is something to pack

    check_lengths(curriculum.lengths, curriculum.short_share)
    fixed = [tasks.retrieval, tasks.long_range]
    mixing.with_fixed(np.zeros(0), fixed)  # refuses impossible shares before the work
    made = made if made is not None and len(made.kinds) else None
    texts = _Texts(read_indexed(draft / "train").starts, read_indexed(draft / "tasks").starts if made else None)
    weights = np.asarray(domain_weights, dtype=np.float64)
    assert len(weights) == len(domain_names) and len(domains) == len(texts.train) - 1
    trained = np.where(weights[domains] > 0, domains.astype(np.int64), -1)
    corpus = Corpus(texts.train, trained, len(domain_names), _made(texts.tasks, made))
    stages, left_out = deal(corpus, curriculum.lengths, curriculum.short_share, len(KINDS), f"{seed} curriculum")
    for one in left_out:
        log(_why_left_out(one))
    names = [*domain_names, *KINDS]
    rows = [_write(draft, stage, texts, names, weights, fixed, mix.temperature) for stage in stages]
    for row in rows:
        log(_summary(row))
    used = {stage.length for stage in stages}
    stray = 0 if made is None else int(np.count_nonzero(~np.isin(made.lengths, sorted(used))))
    if stray:
        log(f"data: {stray} made tasks are for stages that were left out, and are not trained on")
    return {
        "seed": seed,
        "temperature": mix.temperature,
        "short_share": curriculum.short_share,
        "domains": names,
        "stages": rows,
        "left_out": [{"length": one.length, **asdict(one.reason)} for one in left_out],
        "tokens_left_over": stages[0].passed,
        "tokens_of_weight_0": int(np.diff(texts.train)[trained < 0].sum()),
        "tasks_of_no_stage": stray,
    }


def _made(starts: Ints | None, made: MadeTasks | None) -> dict[int, list[Ints]]:
    if starts is None or made is None:
        return {}
    length = np.diff(starts)
    assert len(length) == len(made.kinds) == len(made.lengths)
    pieces = np.stack([np.ones_like(length), starts[:-1], length], axis=1)
    assert np.all(length <= made.lengths + 1), "a task document fits into its stage's sequence"
    return {
        int(stage): [pieces[(made.lengths == stage) & (made.kinds == kind)] for kind in range(len(KINDS))]
        for stage in np.unique(made.lengths)
    }


def _write(
    draft: Path,
    stage: Dealt,
    texts: _Texts,
    names: list[str],
    weights: npt.NDArray[np.float64],
    fixed: list[float],
    temperature: float,
) -> dict[str, Any]:
    capacity = stage.length + 1
    sequences = np.array([len(one.starts) - 1 for one in stage.packings], dtype=np.int64)
    text = sequences[: len(weights)] * capacity
    if not text.any():
        raise DataError(
            f"No domain has {capacity} tokens, one sequence of data.curriculum.lengths {stage.length}: lower the "
            "length, build from more text, or set data.mix.by=language."
        )
    given = [share if count else 0.0 for share, count in zip(fixed, sequences[len(weights) :], strict=True)]
    target = mixing.with_fixed(mixing.shares(text, weights, temperature), given)
    slots = mixing.slots(target, names)
    packed = _joined(stage.packings, capacity, texts.tokens, sequences, slots)
    path = path_of(draft, stage.length)
    sha256 = write_packed(path, packed)
    long = np.array([_longer(one.pieces, stage.below) for one in stage.packings], dtype=np.int64)
    drawn = int(sequences.sum()) * slots / mixing.PERIOD
    rows: list[dict[str, Any]] = [
        {
            "name": names[d],
            "sequences": int(sequences[d]),
            "tokens": int(sequences[d]) * capacity,
            "target": float(target[d]),
            "share": float(slots[d] / mixing.PERIOD),
            "long_share": float(long[d] / (sequences[d] * capacity)),
            "epochs_per_pass": float(drawn[d] / sequences[d]),
        }
        for d in np.flatnonzero(sequences)
    ]
    return {
        "length": stage.length,
        "below": stage.below,
        "file": path.name,
        "sha256": sha256,
        "sequences": int(sequences.sum()),
        "tokens": int(sequences.sum()) * capacity,
        "pieces": len(packed.pieces),
        "long_share": float(long.sum() / (sequences.sum() * capacity)),
        "long_share_drawn": float(sum(row["share"] * row["long_share"] for row in rows)),
        **_cuts(packed.pieces, texts, capacity),
        "tokens_passed_down": stage.passed,
        "tasks_without_filler": stage.tasks_out,
        "domains": rows,
        "domains_without_sequence": [names[d] for d in np.flatnonzero(sequences[: len(weights)] == 0)],
        "tasks_without_sequence": [KINDS[k] for k, (f, g) in enumerate(zip(fixed, given, strict=True)) if f > g],
    }


def _joined(packings: list[Packing], capacity: int, stores: Ints, sequences: Ints, slots: Ints) -> Packed:
    pieces = np.concatenate([one.pieces for one in packings])
    before = np.cumsum([0, *(len(one.pieces) for one in packings)])
    starts = np.concatenate([one.starts[:-1] + low for one, low in zip(packings, before, strict=False)])
    return Packed(capacity, stores, sequences, slots, np.append(starts, len(pieces)), pieces)


def _longer(pieces: Ints, below: int) -> int:
    """Tokens in pieces that the stage before cannot hold whole."""
    return int(pieces[pieces[:, 2] > below, 2].sum())


def _cuts(pieces: Ints, texts: _Texts, capacity: int) -> dict[str, Any]:
    """How many of the training documents that a sequence could hold were cut, and the tokens of their parts."""
    text = pieces[pieces[:, 0] == 0]
    document = np.searchsorted(texts.train, text[:, 1], side="right") - 1
    length = np.diff(texts.train)[document]
    fits = length <= capacity
    parts = fits & (text[:, 2] < length)
    documents, cut = len(np.unique(document[fits])), len(np.unique(document[parts]))
    return {
        "documents_cut": cut,
        "documents_cut_share": cut / max(1, documents),
        "tokens_cut": int(text[parts, 2].sum()),
        "documents_longer": len(np.unique(document[~fits])),
    }


def _why_left_out(one: LeftOut) -> str:
    return (
        f"data: stage {one.length} is left out: {one.reason.tokens} tokens of documents that no shorter stage holds "
        f"whole fill sequences of one domain, and it needs {one.reason.needs}"
    )


def _summary(row: dict[str, Any]) -> str:
    worst = max(row["domains"], key=lambda one: float(one["epochs_per_pass"]))
    missing = row["domains_without_sequence"]
    long = f"{row['long_share']:.1%} in documents too long for the stage before, " if row["below"] else ""
    return (
        f"data: stage {row['length']}: {row['sequences']} sequences, {row['tokens']} tokens, {long}"
        f"{row['documents_cut_share']:.2%} of documents cut; "
        f"{worst['name']} is read {worst['epochs_per_pass']:.2f} times a pass"
        + (f"; {len(missing)} domains have no sequence here" if missing else "")
        + "".join(f"; no {name} here" for name in row["tasks_without_sequence"])
    )
