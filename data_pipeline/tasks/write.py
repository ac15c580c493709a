"""Writes ``tasks.*`` and ``tasks-heldout.*``: documents in the dataset's own formats, and the tables about them.

``tasks.bin/.idx/.rec`` are read like a split's; ``tasks.npy`` has a row of ``compose.TASK`` for each document and
``tasks-origins.npy`` one of ``compose.ORIGIN`` for each copied stretch. Training tasks are made of training text alone,
``tasks-heldout`` of held-out text alone. Without a single task of a split, its files are not written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.options import Tasks
from data_pipeline.pack.indexed import IndexedWriter
from data_pipeline.pack.records import RecordWriter
from data_pipeline.progress import Log, Progress
from data_pipeline.tasks.compose import ORIGIN, TASK, Made, share_beyond
from data_pipeline.tasks.library import build_library, chunk_of
from data_pipeline.tasks.long_range import LongRangeTasks, possible
from data_pipeline.tasks.retrieval import RetrievalTasks
from data_pipeline.tasks.text import Places, Text, Vocabulary, read_text
from refractor_megatron.tokenizer import Tokenizer

#: Contexts of long-range tasks may hold each token of the split so often in a stage, on average.
REUSE = 4
#: Evaluation tasks of each family and stage, and most tokens of a family in a stage.
EVALUATION, EVALUATION_TOKENS = 64, 1 << 22
#: Long-range tasks in a row that may be rejected before a stage is given up.
_PATIENCE = 64


def generate(
    draft: Path,
    tokenizer: Tokenizer,
    options: Tasks,
    lengths: tuple[int, ...],
    budget_tokens: Mapping[int, tuple[int, int]],
    seed: int,
    log: Log,
    groups: Mapping[str, Places] | None = None,
) -> dict[str, Any]:
    """Makes the tasks of all stages from ``draft/train.*`` and ``draft/heldout.*``.

    Args:
        draft: folder of the dataset in the making; both tables of provenance must be there.
        lengths: stages by tokens of a sequence, rising; a task has at most one more.
        budget_tokens: stage -> tokens wanted of (retrieval, long-range) tasks; a family of share 0 gets none.
        groups: by split ("train", "heldout") a number for each document, int64 [documents], equal for the parts of one
            text: no record is of the text that is asked about. None: every document is a text of its own.

    Returns: for each of ``tasks`` and ``tasks-heldout`` the counts of documents, tokens and bytes, and under ``stages``
    what was made of each kind, what was wanted, and what was rejected for which reason; ``copied_tokens``: how many
    are quoted from the split, and ``copied_distinct``: how many tokens of it that is. The training text they are from
    is trained on as text, too, in the stage that its document went to.

    Raises ``DataError`` for missing or damaged files.
    """
    missing = set(lengths) - set(budget_tokens)
    assert not missing, f"no budget for the stages {sorted(missing)}"
    vocabulary = Vocabulary(tokenizer)
    wanted = {
        stage: (
            budget_tokens[stage][0] if options.retrieval > 0 else 0,
            budget_tokens[stage][1] if options.long_range > 0 else 0,
        )
        for stage in lengths
    }
    evaluation = {stage: tuple(EVALUATION_TOKENS if one else 0 for one in wanted[stage]) for stage in lengths}
    splits: tuple[tuple[str, str, Mapping[int, tuple[int, ...]], int | None], ...] = (
        ("tasks", "train", wanted, None),
        ("tasks-heldout", "heldout", evaluation, EVALUATION),
    )
    made = {}
    for name, split, budget, most in splits:
        text = read_text(draft, split, vocabulary, groups[split] if groups is not None else None)
        made[name] = _write(draft / name, text, vocabulary, options, budget, most, seed, log)
    return made


def _write(
    prefix: Path,
    text: Text,
    vocabulary: Vocabulary,
    options: Tasks,
    wanted: Mapping[int, tuple[int, ...]],
    most: int | None,
    seed: int,
    log: Log,
) -> dict[str, Any]:
    """One split; ``wanted``: tokens of (retrieval, long-range) for each stage, ``most``: tasks of each."""
    if text.refused:
        log(f"data: {prefix.name}: {text.refused} documents may not be copied and are left out")
    makers = _Makers(text, vocabulary, options.window, seed)
    total = sum(sum(tokens) for tokens in wanted.values()) / 1e6
    out = _Output(prefix, vocabulary)
    stages = []
    try:
        with Progress(f"data: {prefix.name}", total, log, unit="Mtok") as progress:
            for stage, (retrieval, long_range) in wanted.items():
                for family, tokens in ((makers.retrieval, retrieval), (makers.long_range, long_range)):
                    if tokens:
                        stages.append(_stage(out, family(stage), stage, tokens, most, options.window, progress))
                        _tell(prefix.name, stages[-1], log)
        counts = out.close(text)
    finally:
        out.abandon()
    return {**counts, "stages": stages}


@dataclass(frozen=True)
class _Family:
    """What makes the tasks of a family for a stage; ``why_none``: the reason if it cannot."""

    name: str
    tasks: Iterator[Made | None]
    rejected: Counter[str]
    most_tokens: int
    why_none: str = ""


class _Makers:
    """The families of one split. The index of the last size of chunk is kept."""

    def __init__(self, text: Text, vocabulary: Vocabulary, window: int, seed: int) -> None:
        self._text, self._vocabulary, self._window, self._seed = text, vocabulary, window, seed
        self._chunk = 0
        self._retrieval: RetrievalTasks | None = None
        self._long_range = LongRangeTasks(text, vocabulary, window, seed)

    def retrieval(self, stage: int) -> _Family:
        """Records of a tenth of a sequence or of ``library.CHUNK`` tokens."""
        chunk = chunk_of(stage)
        if not chunk:
            return _none("retrieval", f"{stage} tokens are too few for several records")
        if self._retrieval is None or chunk != self._chunk:
            library = build_library(self._text, chunk, self._vocabulary.tokenizer.vocab_size, self._seed)
            self._retrieval, self._chunk = RetrievalTasks(library, self._vocabulary, self._seed), chunk
        one = self._retrieval
        one.rejected.clear()
        return _Family("retrieval", one.of_stage(stage, stage + 1), one.rejected, 1 << 62)

    def long_range(self, stage: int) -> _Family:
        """Sequences filled to the last token."""
        one = self._long_range
        one.rejected.clear()
        if not possible(stage + 1, self._window):
            return _none("long_range", f"no evidence can lie beyond the window of {self._window} tokens")
        return _Family("long_range", one.of_stage(stage, stage + 1), one.rejected, REUSE * one.total)


def _none(name: str, why: str) -> _Family:
    return _Family(name, iter(()), Counter(), 0, why)


def _stage(
    out: _Output, family: _Family, stage: int, wanted: int, most: int | None, window: int, progress: Progress
) -> dict[str, Any]:
    """Takes tasks until there are enough, and says what came of it."""
    kinds: Counter[str] = Counter()
    tokens = in_a_row = 0
    before = out.origins
    goal = min(wanted, family.most_tokens)
    for made in family.tasks if goal else ():
        in_a_row = 0 if made is not None else in_a_row + 1
        if in_a_row >= _PATIENCE:
            break
        if made is None:
            continue
        out.add(made, stage, window)
        kinds[made.kind.name.lower()] += 1
        tokens += len(made.tokens)
        progress.advance(len(made.tokens) / 1e6)
        if tokens >= goal or kinds.total() == most:
            break
    return {
        "stage": stage,
        "family": family.name,
        "wanted_tokens": wanted,
        "tokens": tokens,
        "documents": kinds.total(),
        **out.copied(before),
        "kinds": dict(sorted(kinds.items())),
        "rejected": dict(sorted(family.rejected.items())),
        "why_none": family.why_none,
    }


def _tell(name: str, stage: dict[str, Any], log: Log) -> None:
    family = stage["family"].replace("_", "-")
    said = (
        f"data: {name}: stage {stage['stage']}: {stage['documents']} {family} tasks, {stage['tokens']} tokens, "
        f"{stage['copied_tokens']} of them quoted"
    )
    if stage["why_none"]:
        said += f"; left out: {stage['why_none']}"
    elif name == "tasks" and stage["tokens"] < stage["wanted_tokens"]:
        said += f" of {stage['wanted_tokens']} wanted: the text gives no more"
    if stage["rejected"]:
        said += f"; rejected: {', '.join(f'{why} {count}' for why, count in stage['rejected'].items())}"
    log(said)


class _Output:
    """The files of one split's tasks."""

    def __init__(self, prefix: Path, vocabulary: Vocabulary) -> None:
        self._prefix = prefix
        self._tokens = IndexedWriter(prefix, vocabulary.tokenizer.vocab_size)
        self._records = RecordWriter(prefix)
        self._token_bytes = vocabulary.tokenizer.token_bytes
        self._rows, self._origins = bytearray(), bytearray()
        self._counts = {"documents": 0, "tokens": 0, "bytes": 0}

    def add(self, made: Made, stage: int, window: int) -> None:
        """Appends a task of ``stage``."""
        assert len(made.tokens) <= stage + 1 and int(made.spans[:, 0].sum()) == len(made.tokens)
        self._tokens.add(made.tokens)
        self._records.add(made.spans)
        row = np.zeros((), dtype=TASK)
        row["kind"], row["stage"] = made.kind, stage
        row["answer_start"], row["answer_length"] = made.answer[0], made.answer[1] - made.answer[0]
        row["evidence"] = -1
        row["evidence"][: len(made.evidence)] = made.evidence
        row["evidence_share"] = share_beyond(made.evidence, made.answer[0], window)
        row["label"], row["records"] = made.label, made.records
        row["origin_first"], row["origin_count"] = self.origins, len(made.origins)
        self._rows += row.tobytes()
        origins = np.zeros(len(made.origins), dtype=ORIGIN)
        origins["task"] = self._counts["documents"]
        if made.origins:
            origins["at"], origins["length"], origins["start"] = np.array(made.origins).T
        self._origins += origins.tobytes()
        self._counts["documents"] += 1
        self._counts["tokens"] += len(made.tokens)
        self._counts["bytes"] += int(self._token_bytes[made.tokens].sum())

    @property
    def origins(self) -> int:
        """Copied stretches so far."""
        return len(self._origins) // ORIGIN.itemsize

    def copied(self, first: int) -> dict[str, int]:
        """Tokens copied in the stretches from number ``first`` on, and how many different tokens of the split."""
        since = np.frombuffer(bytes(self._origins[first * ORIGIN.itemsize :]), dtype=ORIGIN)
        order = np.argsort(since["start"], kind="stable")
        start = since["start"][order]
        stop = np.maximum.accumulate(start + since["length"][order])
        fresh = stop - np.maximum(start, np.concatenate([start[:1], stop[:-1]]))
        return {"copied_tokens": int(since["length"].sum()), "copied_distinct": int(np.maximum(0, fresh).sum())}

    def close(self, text: Text) -> dict[str, int]:
        """Writes the index, the records and the tables; nothing where there is no task."""
        if not self._counts["documents"]:
            self.abandon()
            self._prefix.with_suffix(".bin").unlink()
            return self._counts
        self._tokens.close()
        self._records.close()
        origins = np.frombuffer(self._origins, dtype=ORIGIN)
        origins["document"] = np.searchsorted(text.data.starts, origins["start"], side="right") - 1
        np.save(self._prefix.with_suffix(".npy"), np.frombuffer(self._rows, dtype=TASK), allow_pickle=False)
        np.save(self._prefix.with_name(f"{self._prefix.name}-origins.npy"), origins, allow_pickle=False)
        return self._counts

    def abandon(self) -> None:
        """Closes the file of tokens; for a build that failed."""
        self._tokens.abandon()
