"""The data pipeline and the tokenizer stay light."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import loaded_after

HEAVY = ["torch", "megatron", "numba", "pyarrow", "rich", "selectolax", "tokenizers", "tiktoken", "zstandard"]


def test_importing_is_light() -> None:
    code = (
        "import data_pipeline.stream, data_pipeline.packed_stream, data_pipeline.command\n"
        "import data_pipeline.retrieval.build, data_pipeline.retrieval.neighbours, refractor_megatron.tokenizer"
    )
    assert loaded_after(code).isdisjoint(HEAVY)


@pytest.mark.parametrize("forbidden", ["torch", "megatron"])
def test_building_and_streaming_never_load_torch(tmp_path: Path, forbidden: str) -> None:
    code = f"""
from pathlib import Path
from data_pipeline.build import build
from data_pipeline.options import Options
from data_pipeline.stream import SampleStream
root = Path({str(tmp_path)!r})
(root / "corpus").mkdir()
for i in range(9):
    (root / "corpus" / f"{{i}}.txt").write_text(f"text number {{i}} " * 30)
built = build(root / "corpus", root / "out", Options("t", 300, 1.0, 0.2), cache=root / "cache", log=lambda line: None)
SampleStream(built.folder, 8, 0).sample(0)
"""
    assert forbidden not in loaded_after(code)
