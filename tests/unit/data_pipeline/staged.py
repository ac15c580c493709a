"""A dataset folder with stages, written without a build: documents of random tokens, in domains, and made tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline import manifest as manifests
from data_pipeline.curriculum.plan import MadeTasks, plan_stages
from data_pipeline.options import Curriculum, Mix, Tasks
from data_pipeline.pack.indexed import IndexedWriter
from data_pipeline.pack.records import RecordWriter
from data_pipeline.packed_stream import KEY
from refractor_megatron.tokenizer import train_tokenizer

VOCABULARY = 300
LENGTHS = (16, 64)
NAMES = ["web", "books", "code"]


def document_lengths(count: int = 400, seed: int = 0) -> list[int]:
    """Mostly short documents, some of up to three sequences of the longest stage."""
    drawn = np.random.default_rng(seed).lognormal(2.5, 1.0, count)
    return np.clip(drawn, 1, 3 * LENGTHS[-1]).astype(int).tolist()


def write_store(prefix: Path, lengths: Sequence[int], seed: int = 1) -> None:
    """``prefix.bin/.idx/.rec``: random tokens; half of a document is segment 0, role user, the rest 1, role data."""
    rng = np.random.default_rng(seed)
    tokens, records = IndexedWriter(prefix, VOCABULARY), RecordWriter(prefix)
    for length in lengths:
        tokens.add(rng.integers(0, VOCABULARY, length))
        half = length // 2
        spans = [[half, 0, 1, 0], [length - half, 1, 3, 4]] if half else [[length, 0, 5, 0]]
        records.add(np.array(spans, dtype=np.int32))
    tokens.close()
    records.close()


def write_staged(
    folder: Path,
    lengths: Sequence[int],
    stages: tuple[int, ...] = LENGTHS,
    *,
    weights: Sequence[float] = (1.0, 1.0, 1.0),
    temperature: float = 1.0,
    short_share: float = 0.35,
    tasks: Tasks | None = None,
    seed: int = 7,
    made: Sequence[tuple[int, int, int]] = (),
    log: Any = lambda line: None,
) -> dict[str, Any]:
    """Returns the manifest. Document i is of domain i mod 3; ``made``: (kind, stage, length) of each task."""
    folder.mkdir(parents=True)
    write_store(folder / "train", lengths)
    write_store(folder / "heldout", [5, 7], seed=2)
    table = None
    if made:
        write_store(folder / "tasks", [length for _, _, length in made], seed=3)
        table = MadeTasks(*(np.array(column) for column in list(zip(*made, strict=True))[:2]))
    train_tokenizer([b"some words"], VOCABULARY).save(folder / "tokenizer.json")
    plan = plan_stages(
        folder, np.arange(len(lengths)).astype(np.int32) % 3, NAMES, weights, Mix(temperature=temperature),
        Curriculum(stages, short_share), tasks or Tasks(), seed, log, table,
    )  # fmt: skip
    for name in manifests.DATASET.files:
        if not (folder / name).exists():
            (folder / name).write_text("[]")
    splits = {
        "train": {"documents": len(lengths), "tokens": sum(lengths), "bytes": 3 * sum(lengths)},
        "heldout": {"documents": 2, "tokens": 12, "bytes": 36},
    }
    return sealed(folder, {"splits": splits, KEY: plan})


def sealed(folder: Path, body: dict[str, Any]) -> dict[str, Any]:
    """Writes the manifest of what is in ``folder`` now, over an older one; the stages and tasks are content."""
    (folder / "manifest.json").unlink(missing_ok=True)
    content = sorted(path.name for path in folder.iterdir() if path.name.startswith(("stage-", "tasks.")))
    return manifests.seal(folder, body, content=tuple(content))
