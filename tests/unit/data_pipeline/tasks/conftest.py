"""One draft with its tasks, made once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.options import Tasks
from data_pipeline.pack.indexed import read_indexed
from data_pipeline.pack.records import read_records
from data_pipeline.tasks.write import generate
from refractor_megatron.tokenizer import Tokenizer
from tests.unit.data_pipeline.tasks.drafts import write_draft

LENGTHS = (256, 1024, 2048)
OPTIONS = Tasks(retrieval=0.1, long_range=0.1, window=256)
BUDGET = {256: (5_000, 5_000), 1024: (25_000, 40_000), 2048: (60_000, 80_000)}


@dataclass(frozen=True)
class Task:
    """A task document as it lies in the files."""

    row: Any  # of compose.TASK
    tokens: Any
    spans: Any
    origins: Any


@dataclass(frozen=True)
class MadeTasks:
    folder: Path
    tokenizer: Tokenizer
    result: dict[str, Any]
    log: list[str]

    def tasks(self, name: str = "tasks") -> list[Task]:
        """All tasks of ``tasks`` or ``tasks-heldout``."""
        data, records = read_indexed(self.folder / name), read_records(self.folder / name)
        rows = np.load(self.folder / f"{name}.npy")
        origins = np.load(self.folder / f"{name}-origins.npy")
        assert len(rows) == len(data.starts) - 1 == len(records.first) - 1
        return [
            Task(
                row,
                data.tokens[data.starts[n] : data.starts[n + 1]].astype(np.int64),
                np.asarray(records.spans[records.first[n] : records.first[n + 1]]),
                origins[row["origin_first"] :][: row["origin_count"]],
            )
            for n, row in enumerate(rows)
        ]

    def text(self, tokens: Any) -> bytes:
        """Bytes of tokens with the names of special ones."""
        return self.tokenizer.decode(tokens.tolist(), show_specials=True)


@pytest.fixture(scope="session")
def draft(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tokenizer]:
    """A dataset without tasks."""
    folder = tmp_path_factory.mktemp("draft")
    return folder, write_draft(folder)


@pytest.fixture(scope="session")
def made(draft: tuple[Path, Tokenizer]) -> MadeTasks:
    """The same with tasks for ``LENGTHS``."""
    folder, tokenizer = draft
    log: list[str] = []
    result = generate(folder, tokenizer, OPTIONS, LENGTHS, BUDGET, 7, log.append)
    return MadeTasks(folder, tokenizer, result, log)
