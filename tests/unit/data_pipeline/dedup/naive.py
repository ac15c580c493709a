"""The slow and obvious versions of what ``data_pipeline.dedup`` does, and small corpora to try both on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from unittest.mock import patch

import numpy as np
import numpy.typing as npt

from data_pipeline.dedup import shingles
from data_pipeline.documents import plain
from data_pipeline.engine import tasks
from data_pipeline.engine.tasks import Stage
from data_pipeline.progress import Log
from data_pipeline.shards import Located, Shard, write_shard

M64 = (1 << 64) - 1


class Serial:
    """Runs every task here and now; remembers which stages it was asked for."""

    def __init__(self) -> None:
        self.ran: list[tuple[str, int]] = []

    def run(self, stage: Stage, work: Path, log: Log) -> Path:
        folder = stage.prepare(work)
        todo = tasks.pending(folder, stage.count)
        with patch.object(tasks, "fsync_tree"):  # these results need not outlive a power cut
            for index in todo:
                tasks.run_task(folder, index)
        self.ran.append((stage.name, len(todo)))
        return folder


def within(code: int, ranges: Sequence[tuple[int, int]]) -> bool:
    return any(first <= code <= last for first, last in ranges)


def normal(char: str) -> str:
    """The character as it is hashed; " " for a separator."""
    code = ord(char)
    if code < 0x80:
        return char.lower() if char.isalnum() or char == "_" else " "
    if within(code, shingles._SEPARATORS) or 0x1F000 <= code < 0x20000 or code >= 0x40000:
        return " "
    if 0xFF00 < code < 0xFF60:  # full width; what is no letter or digit separates
        return chr(code - 0xFEE0).lower()
    if char in "ςΣ":
        return "σ"
    lower = char.lower()
    return lower if len(lower) == 1 and (code < 0x590 or 0x1E00 <= code < 0x2000) else char


def words(data: bytes) -> tuple[list[str], int]:
    """Words, and how many of them are single characters of unspaced scripts."""
    out, single = "", 0
    for char in data.decode("utf-8", errors="replace"):
        if within(ord(char), (*shingles._UNSPACED, (0x20000, 0x3FFFF))) and normal(char) != " ":
            out, single = f"{out} {char} ", single + 1
        else:
            out += normal(char)
    return out.split(" "), single


def mix(x: int) -> int:
    x ^= x >> 33
    x = x * 0xFF51AFD7ED558CCD & M64
    x ^= x >> 33
    x = x * 0xC4CEB9FE1A85EC53 & M64
    return x ^ x >> 33


def word_hash(word: str) -> int:
    state = 0xCBF29CE484222325
    for char in word:
        code = ord(char) | (1 << 31 if within(ord(char), (*shingles._UNSPACED, (0x20000, 0x3FFFF))) else 0)
        state = (state ^ code) * 0x100000001B3 & M64
    return mix(state)


def naive_shingles(data: bytes, ngram: int) -> list[int]:
    found, single = words(data)
    found = [word for word in found if word]
    n = shingles.characters_for(ngram) if 2 * single > len(found) else ngram
    hashes = [word_hash(word) for word in found]
    if len(found) < n:
        state = len(found)
        if not found:
            for byte in data:
                state = (state ^ byte) * 0x100000001B3 & M64
        for one in hashes:
            state = (state * 0x9E3779B97F4A7C15 + one) & M64
        return [mix(state ^ 0xCBF29CE484222325)]
    out = []
    for i in range(len(hashes) - n + 1):
        state = 0
        for one in hashes[i : i + n]:
            state = (state * 0x9E3779B97F4A7C15 + one) & M64
        out.append(mix(state))
    return out


def naive_jaccard(one: bytes, other: bytes, ngram: int) -> float:
    a, b = set(naive_shingles(one, ngram)), set(naive_shingles(other, ngram))
    return len(a & b) / len(a | b)


def naive_greedy(order: Sequence[int], edges: set[tuple[int, int]]) -> dict[int, int]:
    """Who goes in whose favour, taking documents in ``order``; ``edges`` go both ways."""
    stay: list[int] = []
    gone: dict[int, int] = {}
    for document in order:
        for survivor in stay:
            if (survivor, document) in edges or (document, survivor) in edges:
                gone[document] = survivor
                break
        else:
            stay.append(document)
    return gone


def flatten(texts: Sequence[bytes]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    offsets = np.concatenate([[0], np.cumsum([len(text) for text in texts])]).astype(np.int64)
    return np.frombuffer(b"".join(texts), dtype=np.uint8), offsets


def write_corpus(folder: Path, texts: Sequence[bytes], per_shard: int, source: str = "s") -> list[Path]:
    folder.mkdir(parents=True)
    paths = []
    for number, first in enumerate(range(0, len(texts), per_shard)):
        rows = [Located(plain(text), 0, first + i + 1) for i, text in enumerate(texts[first : first + per_shard])]
        paths.append(folder / f"{number:05d}.arrow")
        write_shard(paths[-1], 0, source, rows)
    return paths


def ids_of(paths: Sequence[Path]) -> list[str]:
    return [one.tobytes().hex() for path in paths for one in Shard(path).ids]


def all_edges(texts: Sequence[bytes], ngram: int, threshold: float) -> set[tuple[int, int]]:
    sets = [set(naive_shingles(text, ngram)) for text in texts]
    pairs = combinations(range(len(texts)), 2)
    return {(a, b) for a, b in pairs if len(sets[a] & sets[b]) / len(sets[a] | sets[b]) >= threshold}
