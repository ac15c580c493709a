"""datatrove's MinHash steps on one JSON Lines file; run by the Python that has datatrove (see ``dedup_bench.py``).

python tools/datatrove_dedup.py JOB.json

The job names ``documents`` (JSON Lines of id and text), a scratch ``folder``, ``bands``, ``rows``, ``ngram`` and
``pairs`` of row numbers. Writes ``folder``/answer.json: rows removed, clusters, candidate pairs, the exact Jaccard
index of candidates and of ``pairs`` over datatrove's own shingles, and seconds of each step.
"""

import importlib.metadata
import json
import os
import struct
import sys
import time
from itertools import chain
from pathlib import Path


def main() -> int:
    job = json.loads(Path(sys.argv[1]).read_text())
    os.environ["TQDM_DISABLE"] = "1"
    from datatrove.data import Document
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.logging import logger

    logger.remove()
    lines = Path(job["documents"]).read_text(encoding="utf-8").split("\n")
    documents = [Document(id=row["id"], text=row["text"]) for row in map(json.loads, filter(None, lines))]
    folder = Path(job["folder"])
    config = MinhashConfig(n_grams=job["ngram"], num_buckets=job["bands"], hashes_per_bucket=job["rows"])
    seconds = {}

    start = time.perf_counter()
    signer = MinhashDedupSignature(str(folder / "sigs"), config, language="eng")
    signer.get_signature(signer.get_shingles("one two three four five six"))  # loads the tokenizer
    seconds["load"], start = time.perf_counter() - start, time.perf_counter()
    signer.run(iter(documents), 0, 1)
    seconds["sign"], start = time.perf_counter() - start, time.perf_counter()
    for rank in range(config.num_buckets):
        MinhashDedupBuckets(str(folder / "sigs"), str(folder / "dups"), config=config).run(
            None, rank, config.num_buckets
        )
    seconds["buckets"], start = time.perf_counter() - start, time.perf_counter()
    MinhashDedupCluster(str(folder / "dups"), str(folder / "remove"), config, save_cluster_id=True).run(None, 0, 1)
    seconds["cluster"] = time.perf_counter() - start

    found = set()
    for path in (folder / "dups").glob("*.dups"):
        found.update((min(a, b), max(a, b)) for _, a, _, b in struct.iter_unpack("<4I", path.read_bytes()))
    shingles: dict = {}
    for row in set(chain.from_iterable(found)) | set(chain.from_iterable(job["pairs"])):
        shingles[row] = set(signer.get_shingles(documents[row].text).ravel().tolist())
    answer = {
        "version": importlib.metadata.version("datatrove"),
        "seconds": seconds,
        "removed": integers(folder / "remove" / "000000.remove"),
        "clusters": dict(struct.iter_unpack("<2I", read(folder / "remove" / "000000.clusters"))),
        "candidates": [[a, b, jaccard(shingles[a], shingles[b])] for a, b in sorted(found)],
        "pairs": [[a, b, jaccard(shingles[a], shingles[b])] for a, b in job["pairs"]],
    }
    (folder / "answer.json").write_text(json.dumps(answer))
    return 0


def read(path: Path) -> bytes:
    """Bytes of a file; none where datatrove wrote none."""
    return path.read_bytes() if path.exists() else b""


def integers(path: Path) -> list:
    return [one for (one,) in struct.iter_unpack("<I", read(path))]


def jaccard(left: set, right: set) -> float:
    """0 where datatrove has no shingles: documents of fewer words than an n-gram."""
    return len(left & right) / len(left | right) if left or right else 0.0


if __name__ == "__main__":
    sys.exit(main())
