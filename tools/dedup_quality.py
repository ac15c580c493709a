"""Parts of ``dedup_bench.py``: recall and precision against exact truth, and the outcome beside datatrove's."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from dedup_truth import all_pairs, token_sets
from pyarrow import parquet

from data_pipeline.dedup.cluster import rank_documents, survivors
from data_pipeline.dedup.lsh import candidate_pairs
from data_pipeline.dedup.minhash import Signer
from data_pipeline.dedup.shingles import shingle
from data_pipeline.dedup.verify import jaccard, set_jaccard, shingle_sets
from data_pipeline.options import Dedup
from data_pipeline.shards import Located, Shard, write_shards

if TYPE_CHECKING:
    from dedup_bench import Corpus

Rows = npt.NDArray[np.int64]
#: All pairs from here on are known exactly.
TRUTH = 0.5
LEVELS = (0.7, 0.8, 0.9)
BINS = np.round(np.arange(TRUTH, 1.0001, 0.025), 3)
HERE = Path(__file__).resolve().parent


def chance(index: Any, bands: int, rows: int) -> Any:
    """That a pair of this Jaccard index becomes a candidate."""
    return 1 - (1 - np.asarray(index) ** rows) ** bands


def joined(shards: Sequence[Path]) -> tuple[npt.NDArray[np.uint8], Rows]:
    """Text of all shards as one run of bytes with offsets."""
    texts = [Shard(path).text for path in shards]
    flat = np.concatenate([text[offsets[0] : offsets[-1]] for text, offsets in texts])
    sizes = np.concatenate([np.diff(offsets) for _, offsets in texts])
    return flat, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def codes(pairs: Rows) -> Rows:
    return pairs[:, 0] << 32 | pairs[:, 1]


# c. Quality.


def quality(corpus: Corpus, seeds: int, work: Path) -> dict[str, Any]:
    """Over hash seeds: candidates found, precision after verifying, what is left in."""
    options = Dedup(enabled=True)
    flat, offsets = joined(corpus.paths)
    hashes, starts = shingle(flat, offsets, options.ngram)
    start = time.perf_counter()
    pairs, scores = all_pairs(*token_sets(hashes, starts), TRUTH)
    seconds = time.perf_counter() - start
    print(f"truth: {len(pairs)} pairs in {seconds:.1f} s", file=sys.stderr)
    np.savez(work / "truth.npz", pairs=pairs, scores=scores)
    checked = checked_in_python(flat, offsets, pairs, scores)
    sets = shingle_sets(flat, offsets, options.ngram)
    ranks = ranks_of(corpus)
    ideal = survivors(pairs[scores >= options.threshold], ranks)[0] >= 0
    rows, hits = [], np.zeros((seeds, len(BINS) - 1))
    which = np.minimum(np.searchsorted(BINS, scores, "right") - 1, len(BINS) - 2)
    counts = np.bincount(which, minlength=len(BINS) - 1)
    for number in range(seeds):
        seed = number + 1
        signatures = Signer(options.bands * options.rows, seed, options.ngram).sign_shingles(hashes, starts)
        candidates = candidate_pairs(signatures, options.bands, options.rows)
        found = np.isin(codes(pairs), codes(candidates))
        hits[number] = np.bincount(which[found], minlength=len(BINS) - 1)
        verified = candidates[set_jaccard(*sets, *sets, candidates) >= options.threshold]
        true = np.isin(codes(verified), codes(pairs[scores >= options.threshold]))
        row = {
            "seed": seed,
            "candidates": len(candidates),
            "verified": len(verified),
            "precision": float(true.mean()) if len(verified) else 1.0,
            "recall": {str(level): float(found[scores >= level].mean()) for level in LEVELS},
            "recall_unequal": {
                str(level): float(found[(scores >= level) & (scores < 1)].mean()) for level in LEVELS
            },
            **outcome(corpus, seed, pairs, scores, ranks, work),
        }  # fmt: skip
        rows.append(row)
        print(f"quality: seed {seed}, recall {row['recall']}, precision {row['precision']}", file=sys.stderr)
    expected = chance(scores, options.bands, options.rows)
    return {
        "truth": {
            "seconds": seconds,
            "pairs": {str(level): int((scores >= level).sum()) for level in (TRUTH, 0.6, *LEVELS, 1.0)},
            "in_python": checked,
            "removed_with_all_pairs": int(ideal.sum()),
        },
        "seeds": rows,
        "bins": [
            {"from": float(BINS[i]), "to": float(BINS[i + 1]), "pairs": int(counts[i]),
             "measured": (hits[:, i] / counts[i]).tolist(), "predicted": float(expected[which == i].mean())}
            for i in np.flatnonzero(counts)
        ],
    }  # fmt: skip


def ranks_of(corpus: Corpus) -> Rows:
    opened = [Shard(path) for path in corpus.paths]
    sizes, ids = (np.concatenate([getattr(one, name) for one in opened]) for name in ("sizes", "ids"))
    return rank_documents(np.zeros(len(sizes), np.float32), sizes, ids)


def outcome(
    corpus: Corpus, seed: int, pairs: Rows, scores: npt.NDArray[np.float64], ranks: Rows, work: Path
) -> dict[str, Any]:
    """What the build's step removes, and which duplicates it leaves in.

    Of two documents that stay though their index is at least the level, the one of lower rank counts.
    """
    from dedup_bench import remove_duplicates

    with tempfile.TemporaryDirectory(dir=work) as scratch:
        removals, _ = remove_duplicates(corpus.paths, corpus.names, Path(scratch, "work"), seed)
    stays = ~np.concatenate(removals.removed)
    left = {}
    for level in LEVELS:
        chosen = pairs[scores >= level]
        both = chosen[stays[chosen].all(axis=1)]
        worse = np.where(ranks[both[:, 0]] > ranks[both[:, 1]], both[:, 0], both[:, 1])
        concerned = len(np.unique(chosen))
        left[str(level)] = {"documents": len(np.unique(worse)), "of": concerned}
    return {"kept": int(stays.sum()), "removed": removals.counts, "left_in": left}


def checked_in_python(
    flat: npt.NDArray[np.uint8], offsets: Rows, pairs: Rows, scores: npt.NDArray[np.float64], count: int = 300
) -> dict[str, Any]:
    """The largest difference from sets of Python tuples of words, on pairs of ASCII documents of five words or more."""
    random, compared, worst = np.random.default_rng(3), 0, 0.0
    for place in random.permutation(len(pairs)):
        texts = [flat[offsets[row] : offsets[row + 1]].tobytes() for row in pairs[place]]
        words = [re.findall(rb"[a-z0-9_]+", text.lower()) for text in texts]
        if not all(text.isascii() for text in texts) or min(map(len, words)) < 5:
            continue
        left, right = ({tuple(one[i : i + 5]) for i in range(len(one) - 4)} for one in words)
        worst = max(worst, abs(len(left & right) / len(left | right) - float(scores[place])))
        compared += 1
        if compared == count:
            break
    return {"pairs": compared, "largest_difference": worst}


# d. datatrove.

SAME, ALONE, CHAIN, MISSED = "survivor", "unverified", "chain", "missed"
SHORT, WORDS, THEIRS_MISSED = "short", "words", "theirs-missed"
#: Larger documents and clusters are left out, so that datatrove gets through many.
MOST_BYTES, MOST_MEMBERS = 20_000, 30


def beside_datatrove(corpus: Corpus, args: argparse.Namespace) -> dict[str, Any]:
    """Ours and datatrove's outcome on the same documents, every difference with its reason."""
    if not args.datatrove:
        return {"skipped": "no --datatrove PYTHON was given"}
    truth = np.load(args.work / "truth.npz")
    with tempfile.TemporaryDirectory(dir=args.work) as scratch:
        folder = Path(scratch)
        documents = [
            (i, row) for i, path in enumerate(corpus.paths) for row in range(len(Shard(path)))
        ]  # fmt: skip
        sizes = np.concatenate([Shard(path).sizes for path in corpus.paths])
        chosen = subset(truth["pairs"], sizes, args.datatrove_documents)
        opened = [Shard(path) for path in corpus.paths]
        texts = [opened[i].text_of(row) for i, row in (documents[at] for at in chosen)]
        survivor, edges, seconds = our_outcome([opened[i].document(row) for i, row in (documents[at] for at in chosen)],
                                               folder)  # fmt: skip
        job = {
            "documents": str(folder / "documents.jsonl"),
            "folder": str(folder / "theirs"),
            "bands": 16,
            "rows": 8,
            "ngram": 5,
            "pairs": sorted({(min(a, b), max(a, b)) for a, b in edges}),
        }
        lines = (json.dumps({"id": str(i), "text": text.decode("utf-8", "replace")}) for i, text in enumerate(texts))
        (folder / "documents.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / "theirs").mkdir()
        (folder / "job.json").write_text(json.dumps(job))
        command = [args.datatrove, str(HERE / "datatrove_dedup.py"), str(folder / "job.json")]
        print(f"datatrove: {len(texts)} documents, {sum(map(len, texts)) / 1e6:.2f} MB", file=sys.stderr)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return {"skipped": f"{args.datatrove} failed: {done.stderr.strip().splitlines()[-1]}"}
        answer = json.loads((folder / "theirs" / "answer.json").read_bytes())
    return compared(texts, survivor, edges, seconds, answer)


def subset(pairs: Rows, sizes: Rows, count: int) -> list[int]:
    """Rows of whole clusters (connected by any index >= ``TRUTH``), two thirds, and of documents without neighbours."""
    parent = np.arange(len(sizes))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for a, b in pairs:
        parent[root(int(a))] = root(int(b))
    clusters: dict[int, list[int]] = {}
    for row in range(len(sizes)):
        if sizes[row] <= MOST_BYTES:
            clusters.setdefault(root(row), []).append(row)
    order = [list(clusters.values())[i] for i in np.random.default_rng(5).permutation(len(clusters))]
    many = [row for cluster in order if 1 < len(cluster) <= MOST_MEMBERS for row in cluster][: 2 * count // 3]
    return sorted([*many, *[cluster[0] for cluster in order if len(cluster) == 1][: count - len(many)]])


def our_outcome(documents: Sequence[Any], folder: Path) -> tuple[Rows, dict[tuple[int, int], float], float]:
    """``(survivor, edges, seconds)``: of each removed row its survivor, else -1; all pairs at the threshold, exact."""
    from dedup_bench import remove_duplicates

    (folder / "shards").mkdir()
    write_shards(folder / "shards", 0, "subset", (Located(one, 0, i + 1) for i, one in enumerate(documents)))
    shards = sorted((folder / "shards").glob("*.arrow"))
    start = time.perf_counter()
    removals, _ = remove_duplicates(shards, ["subset"], folder / "ours")
    seconds = time.perf_counter() - start
    bases = np.cumsum([0, *(len(Shard(path)) for path in shards)])
    table = parquet.read_table(removals.clusters).to_pydict()
    survivor = np.full(len(documents), -1, dtype=np.int64)
    for shard, row, to_shard, to_row in zip(
        *(table[name] for name in ("member_shard", "member_row", "survivor_shard", "survivor_row")), strict=True
    ):
        survivor[bases[shard] + row] = bases[to_shard] + to_row
    pairs, scores = all_pairs(*token_sets(*shingle(*joined(shards), 5)), removals.threshold)
    edges = {(int(a), int(b)): float(score) for (a, b), score in zip(pairs, scores, strict=True)}
    return survivor, edges, seconds


def compared(
    texts: list[bytes], survivor: Rows, edges: dict[tuple[int, int], float], seconds: float, answer: dict[str, Any]
) -> dict[str, Any]:
    """Counts, and a row with its reason for each document that only one of the two keeps."""
    ours = {row for row in range(len(texts)) if survivor[row] < 0}
    theirs = set(range(len(texts))) - set(answer["removed"])
    neighbours: dict[int, dict[int, float]] = {}
    for (a, b), score in edges.items():
        neighbours.setdefault(a, {})[b] = neighbours.setdefault(b, {})[a] = score
    cluster = {int(row): one for row, one in answer["clusters"].items()}
    their_index = {(a, b): score for a, b, score in [*answer["pairs"], *answer["candidates"]]}
    candidates: dict[int, list[int]] = {}
    for a, b, _ in answer["candidates"]:
        candidates.setdefault(a, []).append(b)
        candidates.setdefault(b, []).append(a)
    flat = np.frombuffer(b"".join(texts), np.uint8)
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    differing = []
    for row in sorted(ours - theirs):
        near, met = neighbours.get(row, {}), candidates.get(row, [])
        own = jaccard(flat, offsets, np.array([[row, other] for other in met]).reshape(-1, 2)).max(initial=0.0)
        swapped = [m for m in theirs - ours if survivor[m] == row and cluster.get(m) == cluster[row]]
        standing = [other for other in near if other in ours]
        reason = SAME if swapped else MISSED if standing else CHAIN if near else ALONE
        best = max((their_index[min(row, m), max(row, m)] for m in met), default=0.0)
        differing.append({"row": row, "kept_by": "ours", "reason": reason, "ours": float(own), "theirs": best})
    for row in sorted(theirs - ours):
        mate = int(survivor[row])
        pair = (min(row, mate), max(row, mate))
        index = their_index[pair]
        same = row in cluster and cluster.get(mate) == cluster[row]
        reason = SAME if same else SHORT if index == 0 else WORDS if index < 0.7 else THEIRS_MISSED
        differing.append({"row": row, "kept_by": "datatrove", "reason": reason, "ours": edges[pair], "theirs": index})
    for one in differing:
        one["text"] = texts[one["row"]][:70].decode("utf-8", "replace")
    pairs = np.array([one[:2] for one in answer["candidates"]], dtype=np.int64).reshape(-1, 2)
    exact = jaccard(flat, offsets, pairs)
    megabytes = sum(map(len, texts)) / 1e6
    return {
        "version": answer["version"],
        "documents": len(texts),
        "megabytes": megabytes,
        "kept": {"ours": len(ours), "datatrove": len(theirs), "both": len(ours & theirs)},
        "seconds": {"ours": seconds, "datatrove": answer["seconds"]},
        "candidates": len(pairs),
        "candidates_below": {"ours": int((exact < 0.7).sum()),
                             "theirs": sum(score < 0.7 for _, _, score in answer["candidates"])},
        "reasons": dict(Counter(f"{one['kept_by']}: {one['reason']}" for one in differing)),
        "differing": differing,
    }  # fmt: skip
