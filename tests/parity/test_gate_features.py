"""Gating features on a grid: each rank's router must get the records of its own tokens."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from refractor_megatron.cli import main
from tests.warm import warm_ranks

pytestmark = [pytest.mark.slow, pytest.mark.gloo, pytest.mark.timeout(600)]

WORDS = ("mask", "role", "tool", "scope", "query", "key", "record", "expert", "router", "layer", "window", "block")


def write_conversations(folder: Path) -> Path:
    """A folder with conversations whose roles and scopes change every few words."""
    rng = random.Random(5)
    text = lambda: " ".join(rng.choices(WORDS, k=rng.randint(2, 14)))  # noqa: E731
    folder.mkdir()
    with (folder / "talk.jsonl").open("w") as out:
        for _ in range(600):
            messages = [
                {"role": "system", "content": text()},
                {"role": "user", "content": text()},
                {"role": "data", "content": text(), "protocol_tags": ["<retrieval:context>"]},
                {"role": "tool", "content": text(), "protocol_tags": ["<tool:calc>"]},
                {"role": "assistant", "content": text()},
                {"role": "user", "content": text(), "protocol_tags": ["<segment:next>", "<safety:restricted>"]},
                {"role": "assistant", "content": text()},
            ]
            out.write(json.dumps({"messages": messages}) + "\n")
    return folder


def test_routers_read_the_records_of_their_own_tokens(tmp_path: Path) -> None:
    """Sequence parallelism gives a rank a share of the tokens, context parallelism two chunks of them, both a share."""
    out = tmp_path / "parity.json"
    arguments = ["parity", "--corpus", str(write_conversations(tmp_path / "text")), "--data-root", str(tmp_path / "d")]
    arguments += ["train.optimizer.lr=1e-3", "train.schedule.cosine.min_lr=1e-4", "router.gate_features=true"]
    with warm_ranks():
        assert main([*arguments, "--grids", "tp2,cp2,tp2cp2", "--steps", "4", "--out", str(out)]) == 0
    table = json.loads(out.read_text())["grids"]
    assert set(table) == {"tp2", "cp2", "tp2cp2"}
    for row in table.values():
        assert row["gradient"] <= 1e-4 and row["parameters"] == 22  # nano's 20 and a table for each of two routers
