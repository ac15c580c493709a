"""Text of shards as a corpus of .jsonl.zst files, once or several times over, for ``data_build_bench.py``."""

from __future__ import annotations

import glob
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import zstandard

from data_pipeline.shards import Shard

#: A character of a script without spaces, or a run of others.
UNIT = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uac00-\ud7ff]|[^\\s\u2e80-\u9fff]+")


def text_of(shards: str, folder: Path, share: float, copies: int = 1) -> Path:
    """Fills ``folder``, one sub-folder a source, with the first ``share`` of every shard's documents, ``copies`` times.

    Returns it; what an earlier call has filled stays. In further copies the words of a document change places,
    characters where a script has no spaces, so that none is a duplicate of another while lengths, languages and
    vocabulary stay.
    """
    if (folder / "bytes.txt").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    total = 0
    for path in map(Path, sorted(glob.glob(shards))):
        unit = json.loads((path.parents[1] / "stage.json").read_bytes())["params"]["units"][int(path.parent.name)]
        shard = Shard(path)
        (folder / unit["name"]).mkdir(parents=True, exist_ok=True)
        for copy in range(copies):
            target = folder / unit["name"] / f"{path.parent.name}-{path.stem}-{copy}.jsonl.zst"
            with target.open("wb") as raw, zstandard.ZstdCompressor(level=3).stream_writer(raw) as packed:
                out = io.TextIOWrapper(packed, encoding="utf-8", newline="\n")
                for row in range(max(1, int(share * len(shard)))):
                    text = moved(shard.text_of(row).decode("utf-8", "replace"), copy, row)
                    total += len(text.encode())
                    out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                out.flush()
                out.detach()
    if not total:
        raise SystemExit(f"{shards} names no shard")
    (folder / "bytes.txt").write_text(str(total))  # no kind of file that a corpus is read from
    return folder


def moved(text: str, copy: int, row: int) -> str:
    """``text`` with its words in another order, that of copy 0 as it is; white space stays where it was."""
    if copy == 0:
        return text
    units = UNIT.findall(text)
    order = iter(np.random.default_rng([copy, row]).permutation(len(units)).tolist())
    return UNIT.sub(lambda _: units[next(order)], text)
