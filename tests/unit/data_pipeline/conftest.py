"""Small corpora and a dataset built from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.build import BuiltData, build
from tests.unit.data_pipeline.corpora import Builder, conversation, write_texts


@pytest.fixture
def builder(tmp_path: Path) -> Builder:
    """``build`` with small defaults into ``tmp_path``; keyword arguments override."""

    def run(corpus: Path | None, **changes: Any) -> BuiltData:
        arguments: dict[str, Any] = {
            "name": "tiny",
            "vocab_size": 400,
            "max_mb": 1.0,
            "heldout_fraction": 0.1,
            "seed": 0,
            "cache": tmp_path / "cache",
            "log": lambda line: None,
        }
        return build(corpus, changes.pop("out", tmp_path / "out"), **(arguments | changes))

    return run


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> BuiltData:
    """Plain documents and conversations together."""
    root = tmp_path_factory.mktemp("mixed")
    write_texts(root / "corpus" / "texts")
    lines = "".join(json.dumps(conversation(i)) + "\n" for i in range(20))
    (root / "corpus" / "chat.jsonl").write_text(lines)
    return build(
        root / "corpus", root / "out", name="mixed", vocab_size=400, max_mb=1.0, heldout_fraction=0.1, seed=0,
        cache=root / "cache", log=lambda line: None,
    )  # fmt: skip
