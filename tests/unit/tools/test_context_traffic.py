"""``tools/context_traffic.py`` on two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from refractor_megatron.fabric.spec import ContextPart
from tests.runs import printed


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.timeout(300)
def test_two_ranks_say_what_they_visit_and_send(tmp_path: Path) -> None:
    """The window of 512 reaches 511 keys back, which is rounded to whole tiles."""
    length, out = 2048, tmp_path / "out.json"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    printed(*launch, "tools/context_traffic.py", f"--length={length}", f"--out={out}")
    result = json.loads(out.read_text())
    assert (result["length"], result["size"], len(result["ranks"])) == (length, 2, 2)
    for rank, found in enumerate(result["ranks"]):
        rows = [q for start, stop in ContextPart(rank, 2).chunks(length) for q in range(start, stop)]
        assert found["ring_pairs"] == sum(q + 1 for q in rows) and 0 < found["visited_pairs"] < found["ring_pairs"]
        sent = found["by_operation"]
        halo = 512 * 2 * 4 * 64 * 4  # keys and values, heads, width, bytes
        assert sent["halo forward"] == sent["halo backward"] == halo
        assert found["forward"] + found["backward"] == sum(sent.values())
    assert sum(found["ring_pairs"] for found in result["ranks"]) == length * (length + 1) // 2
    assert set(result["balance"]) == {"one document", "packed documents"}
