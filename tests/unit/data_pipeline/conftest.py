"""Small corpora and a dataset built from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.build import BuiltData, build
from tests.unit.data_pipeline.corpora import TINY, Builder, conversation, write_texts


@pytest.fixture
def builder(tmp_path: Path) -> Builder:
    """``build`` with small options into ``tmp_path``; keyword arguments override."""

    def run(corpus: Path | None, **changes: Any) -> BuiltData:
        given = {key: changes.pop(key) for key in ("tokenizer", "sources_file", "cache", "log") if key in changes}
        arguments: dict[str, Any] = {"cache": tmp_path / "cache", "log": lambda line: None, **given}
        return build(corpus, changes.pop("out", tmp_path / "out"), replace(TINY, **changes), **arguments)

    return run


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> BuiltData:
    """Plain documents and conversations together."""
    root = tmp_path_factory.mktemp("mixed")
    write_texts(root / "corpus" / "texts")
    lines = "".join(json.dumps(conversation(i)) + "\n" for i in range(20))
    (root / "corpus" / "chat.jsonl").write_text(lines)
    return build(
        root / "corpus", root / "out", replace(TINY, name="mixed"), cache=root / "cache", log=lambda line: None
    )
