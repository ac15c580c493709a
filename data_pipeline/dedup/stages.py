"""Near-duplicates as stages of the build: sign, bands, then rounds of pairs and verify.

Documents are numbered through the shards, from 0; ``dedup-inputs`` holds where each shard begins and every rank. No
task holds more than two shards' shingle sets, one partition's band rows, or the pairs that begin in one shard.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.dedup import lsh
from data_pipeline.dedup.cluster import survivors
from data_pipeline.dedup.minhash import SCHEME, Signer
from data_pipeline.dedup.shingles import HASH, NORMALISER
from data_pipeline.dedup.signatures import Recipe, read_signatures, write_signatures
from data_pipeline.dedup.verify import set_jaccard, shingle_sets
from data_pipeline.engine.arrays import save_arrays
from data_pipeline.engine.tasks import Executor, Stage, task_folder
from data_pipeline.options import Dedup
from data_pipeline.progress import Log
from data_pipeline.shards import Shard

Rows = npt.NDArray[np.int64]
_HERE = "data_pipeline.dedup.stages"


def content_digest(shards: Sequence[Path]) -> str:
    """sha256 of the ids of all documents in order: they state content and source."""
    state = hashlib.sha256()
    for path in shards:
        ids = Shard(path).ids
        state.update(f"{len(ids)};".encode())
        state.update(np.ascontiguousarray(ids).data)
    return state.hexdigest()


def sign_stage(shards: Sequence[Path], options: Dedup) -> Stage:
    """Signatures of every shard, one task each. Thresholds and earlier decisions do not change it."""
    return Stage(
        "dedup-sign",
        f"{_HERE}:sign_task",
        len(shards),
        {
            "content": content_digest(shards),
            "ngram": options.ngram,
            "num_hashes": options.bands * options.rows,
            "seed": options.seed,
            "versions": [SCHEME, HASH, NORMALISER],
        },
        volatile={"shards": [str(path) for path in shards]},
        megabytes=_megabytes(shards),
    )


def sign_task(params: dict[str, Any], index: int, out: Path) -> None:
    """Signatures of shard ``index`` of ``params["shards"]``."""
    recipe = _recipe(params)
    signer = Signer(recipe.num_hashes, recipe.seed, recipe.ngram)
    write_signatures(out, signer.sign(*Shard(Path(params["shards"][index])).text), recipe)


def bands_task(params: dict[str, Any], index: int, out: Path) -> None:
    """A shard's rows (band key, document) of documents that have a rank, sorted."""
    bases, ranks = _load(params["inputs"], "bases"), _load(params["inputs"], "ranks")
    first, last = int(bases[index]), int(bases[index + 1])
    signatures = read_signatures(task_folder(Path(params["signed"]), index), _recipe(params), last - first)
    rows = np.flatnonzero(ranks[first:last] >= 0)
    keys, documents = lsh.sorted_rows(lsh.band_keys(signatures, params["bands"], params["rows"], rows), rows + first)
    np.save(out / "keys.npy", keys)
    np.save(out / "documents.npy", documents)


def pairs_task(params: dict[str, Any], index: int, out: Path) -> None:
    """The pairs that this round compares, of the keys in partition ``index``."""
    parts = []
    for shard in range(params["shards"]):
        folder = task_folder(Path(params["banded"]), shard)
        keys, documents = _load(folder, "keys"), _load(folder, "documents")
        mine = lsh.partition_slice(keys, index, params["partitions"])
        parts.append((keys[mine], documents[mine]))
    keys, documents = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    ranks = _load(params["inputs"], "ranks")
    members, starts = lsh.groups(keys, documents, ranks[documents])
    first = params["previous"] is None
    if first:
        standing, done = np.ones(len(ranks), dtype=np.bool_), np.zeros(len(members), dtype=np.bool_)
    else:
        standing = np.asarray(_load(params["standing_folder"], "standing"))
        done = np.array(_load(task_folder(Path(params["previous_folder"]), index), "done"))
    pairs = lsh.group_pairs(members, starts, standing, done, first, params["whole"], params["most"])
    np.save(out / "pairs.npy", pairs)
    np.save(out / "done.npy", done)
    np.save(out / "members.npy", np.unique(members))
    large = int((np.diff(starts) > params["whole"]).sum())
    (out / "counts.json").write_text(json.dumps({"pairs": len(pairs), "large_groups": large}) + "\n")


def sets_task(params: dict[str, Any], index: int, out: Path) -> None:
    """Shingle sets of a shard's documents that share a group with another."""
    bases = _load(params["inputs"], "bases")
    first, last = int(bases[index]), int(bases[index + 1])
    found = []
    for partition in range(params["partitions"]):
        members = _load(task_folder(Path(params["paired"]), partition), "members")
        found.append(members[np.searchsorted(members, first) : np.searchsorted(members, last)])
    rows = np.unique(np.concatenate(found)) - first
    hashes, starts = shingle_sets(*Shard(Path(params["paths"][index])).text, params["ngram"], rows)
    np.save(out / "documents.npy", rows + first)
    np.save(out / "hashes.npy", hashes)
    np.save(out / "starts.npy", starts)


def verify_task(params: dict[str, Any], index: int, out: Path) -> None:
    """Exact Jaccard indices of the round's pairs that begin in shard ``index``; keeps those at the threshold."""
    bases = _load(params["inputs"], "bases")
    first, last = int(bases[index]), int(bases[index + 1])
    found = []
    for partition in range(params["partitions"]):
        pairs = _load(task_folder(Path(params["paired"]), partition), "pairs")
        found.append(pairs[np.searchsorted(pairs[:, 0], first) : np.searchsorted(pairs[:, 0], last)])
    pairs = lsh.unique_pairs(np.concatenate(found))
    score = np.empty(len(pairs), dtype=np.float64)
    shard_of = np.searchsorted(bases, pairs[:, 1], "right") - 1
    for other in np.unique(shard_of):
        chosen = np.flatnonzero(shard_of == other)
        left, right = (task_folder(Path(params["sets"]), int(shard)) for shard in (index, other))
        places = [np.searchsorted(_load(side, "documents"), pairs[chosen, k]) for k, side in enumerate((left, right))]
        score[chosen] = set_jaccard(
            _load(left, "hashes"), _load(left, "starts"), _load(right, "hashes"), _load(right, "starts"),
            np.stack(places, axis=1),
        )  # fmt: skip
    edge = score >= params["threshold"]
    np.save(out / "pairs.npy", pairs[edge])
    np.save(out / "jaccard.npy", score[edge])
    (out / "counts.json").write_text(json.dumps({"compared": len(pairs), "edges": int(edge.sum())}) + "\n")


@dataclass(frozen=True)
class Near:
    """Of each document [n] its survivor, -1 if it stays, and their Jaccard index (0 if it stays); what it took."""

    survivor: Rows
    jaccard: npt.NDArray[np.float64]
    compared: int
    edges: int
    rounds: int


def near_survivors(
    shards: Sequence[Path], ranks: Rows, options: Dedup, executor: Executor, work: Path, log: Log,
    whole: int = lsh.WHOLE_GROUP, most: int = lsh.GROUP_PAIRS,
) -> Near:  # fmt: skip
    """Runs the stages on documents of ``ranks`` [n] >= 0. ``whole`` and ``most``: see ``lsh.group_pairs``; they change
    what is compared, not the outcome."""
    bases = np.concatenate([[0], np.cumsum([len(Shard(path)) for path in shards])]).astype(np.int64)
    assert len(ranks) == bases[-1]
    inputs = save_arrays(work, "dedup-inputs", bases=bases, ranks=ranks)
    signing = sign_stage(shards, options)
    shared = {"inputs": str(inputs.folder)}
    banding = Stage(
        "dedup-bands",
        f"{_HERE}:bands_task",
        len(shards),
        {"sign": signing.digest, "of": inputs.digest, "bands": options.bands, "rows": options.rows}
        | {name: signing.params[name] for name in ("ngram", "num_hashes", "seed")},
        volatile={"signed": str(executor.run(signing, work, log)), **shared},
        megabytes=_megabytes(shards),
    )
    shared |= {"banded": str(executor.run(banding, work, log))}
    partitions = lsh.partitions_for(int((ranks >= 0).sum()) * options.bands)
    plan = {"bands": banding.digest, "shards": len(shards), "partitions": partitions, "whole": whole, "most": most}
    run = _Rounds(shards, ranks, options, executor, work, log, signing.digest)
    return run.all(plan, shared)


class _Rounds:
    """Compares, removes and compares what still stands, until nothing is left to compare (see ``lsh``)."""

    def __init__(
        self, shards: Sequence[Path], ranks: Rows, options: Dedup, executor: Executor, work: Path, log: Log, signed: str
    ) -> None:
        self._shards, self._ranks, self._options, self._signed = shards, ranks, options, signed
        self._executor, self._work, self._log = executor, work, log
        self._pairs, self._scores = [np.empty((0, 2), dtype=np.int64)], [np.empty(0)]
        self._compared = 0
        self._sets: tuple[str, Path] | None = None  # digest and folder

    def all(self, plan: dict[str, Any], shared: dict[str, str]) -> Near:
        """Runs round after round; ``plan`` and ``shared`` are what the pairs' tasks are told in each."""
        previous: tuple[Stage, Path] | None = None
        for number in itertools.count(1):
            params: dict[str, Any] = {**plan, "previous": None, "standing": None}
            told: dict[str, Any] = dict(shared)
            if previous is not None:
                stays = (self._ranks >= 0) & (self._decide()[0] < 0)
                standing = save_arrays(self._work, "dedup-standing", standing=stays)
                params |= {"previous": previous[0].digest, "standing": standing.digest}
                told |= {"previous_folder": str(previous[1]), "standing_folder": str(standing.folder)}
            stage = Stage("dedup-pairs", f"{_HERE}:pairs_task", plan["partitions"], params, volatile=told)
            folder = self._executor.run(stage, self._work, self._log)
            counts = _counts(folder, plan["partitions"])
            if counts["pairs"]:
                self._verify(stage, folder, shared)
            if not counts["pairs"] or not counts["large_groups"]:
                survivor, edge = self._decide()
                scores = np.append(np.concatenate(self._scores), 0.0)[edge]  # -1 takes the last
                return Near(survivor, scores, self._compared, sum(map(len, self._pairs)), number)
            previous = stage, folder
        raise AssertionError("every round leaves less to compare")

    def _decide(self) -> tuple[Rows, Rows]:
        return survivors(np.concatenate(self._pairs), self._ranks)

    def _verify(self, pairs: Stage, folder: Path, shared: dict[str, str]) -> None:
        told = {"paired": str(folder), "inputs": shared["inputs"], "paths": [str(path) for path in self._shards]}
        if self._sets is None:  # the first round's groups are all the groups there are
            params = {
                "pairs": pairs.digest,
                "sign": self._signed,
                "partitions": pairs.count,
                "ngram": self._options.ngram,
            }
            stage = Stage(
                "dedup-sets", f"{_HERE}:sets_task", len(self._shards), params, volatile=told,
                megabytes=_megabytes(self._shards),
            )  # fmt: skip
            self._sets = stage.digest, self._executor.run(stage, self._work, self._log)
        params = {"pairs": pairs.digest, "sets": self._sets[0], "partitions": pairs.count}
        params["threshold"] = self._options.threshold
        told = {"paired": str(folder), "inputs": shared["inputs"], "sets": str(self._sets[1])}
        stage = Stage(
            "dedup-verify", f"{_HERE}:verify_task", len(self._shards), params, volatile=told,
            megabytes=_megabytes(self._shards),
        )  # fmt: skip
        verified = self._executor.run(stage, self._work, self._log)
        for index in range(stage.count):
            done = task_folder(verified, index)
            self._pairs.append(np.load(done / "pairs.npy"))
            self._scores.append(np.load(done / "jaccard.npy"))
        self._compared += _counts(verified, stage.count)["compared"]


def _recipe(params: dict[str, Any]) -> Recipe:
    return Recipe(params["ngram"], params["num_hashes"], params["seed"])


def _load(folder: Path | str, name: str) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = np.load(Path(folder) / f"{name}.npy", mmap_mode="r")
    return array


def _counts(folder: Path, count: int) -> dict[str, int]:
    total: dict[str, int] = {}
    for index in range(count):
        for name, value in json.loads((task_folder(folder, index) / "counts.json").read_bytes()).items():
            total[name] = total.get(name, 0) + value
    return total


def _megabytes(shards: Sequence[Path]) -> tuple[float, ...]:
    return tuple(path.stat().st_size / 1e6 for path in shards)
