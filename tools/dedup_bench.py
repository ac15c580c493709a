"""Near-duplicates on one core: speed beside libraries, quality against exact truth; writes outbox/benchmarks/dedup.*.

python tools/dedup_bench.py --shards 'WORK/ingest-*/*/*.arrow' --work SCRATCH [--datatrove PYTHON]

The text is that of shards which an ingest stage wrote, of the sources ``--source`` names: by default two versions of
the same books, so that near-duplicates are natural, and ``--planted`` copies of which 0 to 8 % of the words are
replaced, deleted or followed by another. Everything runs in turn on one core; end to end in a fresh process for each
round. datasketch and rensa are no run-time dependencies: pip install 'datasketch>=2' rensa. datatrove needs an
environment of its own: pip install 'datatrove==0.10.1' 'xxhash<4' spacy tokenizers.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = os.environ["RAYON_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
import fnmatch
import glob
import importlib.metadata
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.dedup.minhash import Signer
from data_pipeline.dedup.removals import Removals, deduplicate
from data_pipeline.dedup.shingles import shingle
from data_pipeline.documents import plain
from data_pipeline.engine.local import LocalExecutor
from data_pipeline.engine.tasks import Stage
from data_pipeline.options import Dedup
from data_pipeline.progress import Log
from data_pipeline.shards import Located, Shard, write_shards
from refractor_megatron.evaluation.evidence import commit, processor

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("linux-doc-*", "libboost*-doc", "libreoffice-help-en-us")
#: Bytes of documents that are copied with edits.
EDITED = (500, 100_000)
MOST_EDITS = 0.08
PARTS = ("signatures", "end", "quality", "datatrove")
NUM_HASHES = 128


@dataclass(frozen=True)
class Corpus:
    """Shards, the last of which hold the planted documents, and names by number of source."""

    shards: list[str]
    names: list[str]
    documents: int
    planted: int
    bytes: int

    @property
    def paths(self) -> list[Path]:
        return [Path(one) for one in self.shards]


def main() -> int:
    args = arguments()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if args.one:
        print(json.dumps(end_to_end(Corpus(**json.loads((args.work / "corpus.json").read_bytes())), args.work)))
        return 0
    from dedup_quality import beside_datatrove, quality
    from dedup_report import write

    args.work.mkdir(parents=True, exist_ok=True)
    corpus = assembled(args)
    (args.work / "corpus.json").write_text(json.dumps(asdict(corpus)))
    print(f"{corpus.documents} documents, {corpus.bytes / 1e6:.1f} MB", file=sys.stderr)
    result: dict[str, Any] = {
        "commit": commit(),
        "hardware": processor(),
        "command": shlex.join(["python", "tools/dedup_bench.py", *sys.argv[1:]]),
        "versions": versions(),
        "corpus": about(corpus),
        "options": asdict(Dedup(enabled=True)),
        "load_average": os.getloadavg()[0],
    }
    if "signatures" in args.parts:
        result["signatures"] = signatures(corpus, args)
    if "end" in args.parts:
        result["end"] = rounds_end_to_end(args)
    if {"quality", "datatrove"} & set(args.parts):
        result["quality"] = quality(corpus, args.seeds, args.work)
    if "datatrove" in args.parts:
        result["datatrove"] = beside_datatrove(corpus, args)
    for path in write(result, args.out):
        print(path)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True, help="pattern of the .arrow files of an ingest stage")
    parser.add_argument("--source", nargs="+", default=list(SOURCES), help="patterns of source names")
    parser.add_argument("--work", type=Path, required=True, help="scratch folder")
    parser.add_argument("--planted", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=7, help="of signatures; end to end takes the same number")
    parser.add_argument("--subset-mb", type=float, default=6.0, help="text of one round of signatures")
    parser.add_argument("--seeds", type=int, default=12, help="hash seeds of the quality part")
    parser.add_argument("--datatrove", help="the Python that has datatrove; without it that part is left out")
    parser.add_argument("--datatrove-documents", type=int, default=4000)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), help=",".join(PARTS))
    parser.add_argument("--out", type=Path, default=ROOT / "outbox" / "benchmarks" / "dedup.md")
    parser.add_argument("--one", choices=("end",), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown parts {sorted(unknown)}; choose from {', '.join(PARTS)}")
    return args


def versions() -> dict[str, str]:
    packages = ("numba", "numpy", "pyarrow", "datasketch", "rensa")
    return {"python": sys.version.split()[0], **{one: importlib.metadata.version(one) for one in packages}}


# The text.


def assembled(args: argparse.Namespace) -> Corpus:
    """The chosen shards and one more folder of planted documents."""
    chosen, names = [], {}
    for path in map(Path, sorted(glob.glob(args.shards))):
        unit = json.loads((path.parents[1] / "stage.json").read_bytes())["params"]["units"][int(path.parent.name)]
        if any(fnmatch.fnmatchcase(unit["name"], pattern) for pattern in args.source):
            chosen.append(path)
            names[unit["source"]] = unit["name"]
    if not chosen:
        raise SystemExit(f"no shard of {args.shards} belongs to a source like {', '.join(args.source)}")
    planted_source = max(names) + 1
    folder, table = args.work / "planted", [names.get(number, "-") for number in range(planted_source)] + ["planted"]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    planted = plant(chosen, args.planted)
    write_shards(folder, planted_source, "planted", planted)
    shards = [*chosen, *sorted(folder.glob("*.arrow"))]
    opened = [Shard(path) for path in shards]
    sizes = sum(int(one.sizes.sum()) for one in opened)
    return Corpus([str(path) for path in shards], table, sum(map(len, opened)), len(planted), sizes)


def plant(shards: Sequence[Path], count: int, seed: int = 0) -> list[Located]:
    """Copies of ``count`` documents, each with a share of edited words drawn from 0 to ``MOST_EDITS``."""
    random = np.random.default_rng(seed)
    opened = [Shard(path) for path in shards]
    places = [(i, int(row)) for i, one in enumerate(opened) for row in np.flatnonzero(
        (one.sizes >= EDITED[0]) & (one.sizes <= EDITED[1]))]  # fmt: skip
    chosen = [places[i] for i in random.permutation(len(places))[:count]]
    vocabulary = sorted({word for shard, row in chosen[:200] for word in opened[shard].text_of(row).split()})
    rates = random.uniform(0, MOST_EDITS, len(chosen))
    return [
        Located(plain(edited(opened[shard].text_of(row), rate, vocabulary, random)), 0, number + 1)
        for number, ((shard, row), rate) in enumerate(zip(chosen, rates, strict=True))
    ]


def edited(text: bytes, rate: float, vocabulary: Sequence[bytes], random: np.random.Generator) -> bytes:
    """``text`` with about ``rate`` of its words replaced, deleted or followed by another, a third each."""
    pieces = re.split(rb"(\s+)", text)  # words at even places
    for place in 2 * np.flatnonzero(random.random((len(pieces) + 1) // 2) < rate):
        word = vocabulary[random.integers(len(vocabulary))]
        kind = random.integers(3)
        pieces[place] = word if kind == 0 else b"" if kind == 1 else pieces[place] + b" " + word
    return b"".join(pieces)


def about(corpus: Corpus) -> dict[str, Any]:
    return {
        "sources": [name for name in corpus.names if name not in ("-", "planted")],
        "documents": corpus.documents,
        "planted": corpus.planted,
        "megabytes": corpus.bytes / 1e6,
        "shards": len(corpus.shards),
    }


# a. Signatures.

TEXT, READY = "text to signatures", "ready sets to signatures"


@dataclass(frozen=True)
class Contender:
    """``run`` is timed on what ``prepare`` makes of documents; ``target``: ours is to be so many times faster."""

    name: str
    timed: str
    prepare: Callable[[list[bytes]], Any]
    run: Callable[[Any], Any]
    target: float | None = None


def flat(documents: list[bytes]) -> tuple[Any, Any]:
    """Bytes and offsets."""
    return np.frombuffer(b"".join(documents), np.uint8), np.cumsum([0, *map(len, documents)], dtype=np.int64)


def strings(documents: list[bytes]) -> list[str]:
    return [one.decode("utf-8", "replace") for one in documents]


def token_sets(texts: list[str]) -> list[set[str]]:
    """Word 5-grams as one does it in Python; of fewer words the whole text."""
    sets = []
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        sets.append({" ".join(words[i : i + 5]) for i in range(len(words) - 4)} or {text})
    return sets


def shingles_of(documents: list[bytes]) -> tuple[Any, Any]:
    return shingle(*flat(documents), 5)


def upper_halves(documents: list[bytes]) -> list[list[int]]:
    """Of each document the distinct 32-bit hashes that ``affine32`` mixes, as lists, which datasketch iterates over."""
    hashes, starts = shingles_of(documents)
    upper = hashes >> np.uint64(32)
    return [np.unique(upper[a:b]).tolist() for a, b in zip(starts[:-1], starts[1:], strict=True)]


def contenders() -> list[Contender]:
    import rensa
    from datasketch import MinHash

    signer = Signer(NUM_HASHES, 1, 5)

    def sha1(sets: list[set[str]]) -> list[Any]:
        tokens = ([one.encode() for one in each] for each in sets)
        return [one.hashvalues for one in MinHash.generator(tokens, num_perm=NUM_HASHES, seed=1, scheme="affine32")]

    def given(lists: list[list[int]]) -> list[Any]:
        made = MinHash.generator(lists, num_perm=NUM_HASHES, seed=1, scheme="affine32", hashfunc=lambda one: one)
        return [one.hashvalues for one in made]

    def of_sets(sets: list[set[str]]) -> Any:
        return rensa.RMinHash.digest_matrix_from_token_sets(sets, NUM_HASHES, 1)

    def of_flat(shingles: tuple[Any, Any]) -> Any:
        hashes, starts = shingles
        return rensa.RMinHash.digest_matrix_from_flat_token_hashes(hashes, starts.astype(np.uint64), NUM_HASHES, 1)

    def ready(documents: list[bytes]) -> list[set[str]]:
        return token_sets(strings(documents))

    return [
        Contender("this project", TEXT, flat, lambda text: signer.sign(*text)),
        Contender("datasketch, sha1 of Python token sets", TEXT, strings, lambda t: sha1(token_sets(t)), 50.0),
        Contender("datasketch, our shingles as its tokens", TEXT, list, lambda d: given(upper_halves(d))),
        Contender("rensa, Python token sets", TEXT, strings, lambda t: of_sets(token_sets(t)), 5.0),
        Contender("rensa, our shingles as flat hashes", TEXT, list, lambda d: of_flat(shingles_of(d))),
        Contender("this project", READY, shingles_of, lambda shingles: signer.sign_shingles(*shingles)),
        Contender("datasketch, sha1 of Python token sets", READY, ready, sha1),
        Contender("datasketch, our shingles as its tokens", READY, upper_halves, given),
        Contender("rensa, Python token sets", READY, ready, of_sets),
        Contender("rensa, our shingles as flat hashes", READY, shingles_of, of_flat),
    ]


def signatures(corpus: Corpus, args: argparse.Namespace) -> dict[str, Any]:
    """Medians over rounds of other documents; all contenders have the same in each. The first round is not counted."""
    random = np.random.default_rng(1)
    places = [(i, row) for i, path in enumerate(corpus.paths) for row in range(len(Shard(path)))]
    order, opened, at = random.permutation(len(places)), [Shard(path) for path in corpus.paths], 0
    all_of_them = contenders()
    rates: list[list[float]] = [[] for _ in all_of_them]
    sizes: list[float] = []
    for number in range(args.rounds + 1):
        limit = args.subset_mb * 1e6 if number else 5e5
        documents: list[bytes] = []
        while sum(map(len, documents)) < limit:
            shard, row = places[order[at % len(order)]]
            documents.append(opened[shard].text_of(row))
            at += 1
        size = sum(map(len, documents))
        for contender, own in zip(all_of_them, rates, strict=True):
            prepared = contender.prepare(documents)
            start = time.process_time()
            contender.run(prepared)
            spent = time.process_time() - start
            if number:
                own.append(size / 1e6 / spent)
        if number:
            sizes.append(size / 1e6)
        print(f"signatures: round {number} of {args.rounds}, {size / 1e6:.1f} MB", file=sys.stderr)
    medians = [statistics.median(own) for own in rates]
    base = {c.timed: value for c, value in zip(all_of_them, medians, strict=True) if c.name == "this project"}
    rows = [
        {"name": c.name, "timed": c.timed, "mb_per_s": value, "all": own, "ours_faster": base[c.timed] / value,
         "target": c.target}
        for c, value, own in zip(all_of_them, medians, rates, strict=True)
    ]  # fmt: skip
    sample = [opened[shard].text_of(row) for shard, row in (places[i] for i in order[:300])]
    return {"rows": rows, "megabytes": sizes, "equal": equal_to_datasketch(sample), "compared": len(sample)}


def equal_to_datasketch(documents: list[bytes]) -> int:
    """How many documents' signatures are datasketch's bit for bit, for seeds that differ."""
    from datasketch import MinHash

    equal = 0
    for seed in (1, 7):
        ours = Signer(NUM_HASHES, seed, 5).sign(*flat(documents))
        theirs = MinHash.generator(
            upper_halves(documents), num_perm=NUM_HASHES, seed=seed, scheme="affine32", hashfunc=lambda one: one
        )
        same = [np.array_equal(mine, one.hashvalues) for mine, one in zip(ours, theirs, strict=True)]
        equal = sum(same) if seed == 1 else min(equal, sum(same))
    if equal != len(documents):
        raise SystemExit(f"only {equal} of {len(documents)} signatures equal datasketch's")
    return equal


# b. End to end.


class Timed:
    """One worker, this process; seconds by name of stage."""

    def __init__(self) -> None:
        self._executor, self.seconds = LocalExecutor(1), dict[str, float]()

    def run(self, stage: Stage, work: Path, log: Log) -> Path:
        start = time.perf_counter()
        folder = self._executor.run(stage, work, log)
        self.seconds[stage.name] = self.seconds.get(stage.name, 0.0) + time.perf_counter() - start
        return folder


def remove_duplicates(
    shards: Sequence[Path], names: Sequence[str], work: Path, seed: int = 1
) -> tuple[Removals, Timed]:
    """The build's own step, every document in and of equal quality, in the empty folder ``work``."""
    counts, timed = [len(Shard(path)) for path in shards], Timed()
    keep, scores = [np.ones(n, np.bool_) for n in counts], [np.zeros(n, np.float32) for n in counts]
    options = Dedup(enabled=True, seed=seed)
    return deduplicate(shards, keep, scores, names, options, timed, work, lambda line: None), timed


def end_to_end(corpus: Corpus, work: Path) -> dict[str, Any]:
    """One round in this process, after compiled code has been loaded by a small one."""
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        small = Path(scratch, "small")
        small.mkdir()
        first = Shard(corpus.paths[-1])
        rows = (Located(first.document(i), 0, i + 1) for i in [*range(min(40, len(first)))] * 2)
        write_shards(small, 0, "small", rows)
        remove_duplicates([small / "00000.arrow"], ["small"], Path(scratch, "warm"))
        base, cpu, start = memory("VmRSS"), time.process_time(), time.perf_counter()
        removals, timed = remove_duplicates(corpus.paths, corpus.names, Path(scratch, "work"))
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        return {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "steps": {**timed.seconds, "ids, ranks, survivors, cluster file": seconds - sum(timed.seconds.values())},
            "mb_per_s": corpus.bytes / 1e6 / seconds,
            "mb_per_cpu_s": corpus.bytes / 1e6 / cpu,
            "peak_mb": memory("VmHWM"),
            "base_mb": base,
            "removed": removals.counts,
            "work_done": removals.work_done,
        }


def memory(name: str) -> float:
    """MB that this process holds now (VmRSS), or has held at most (VmHWM); mapped shards count while they are in."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024 / 1e6


def rounds_end_to_end(args: argparse.Namespace) -> dict[str, Any]:
    """Rounds, each in a fresh process on this core, the median by wall time, and all of them."""
    command = [sys.executable, __file__, "--shards", "-", "--work", str(args.work), "--one", "end"]
    rounds = []
    for number in range(args.rounds):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rounds.append(json.loads(done.stdout))
        print(f"end to end: round {number + 1}, {rounds[-1]['mb_per_s']:.1f} MB/s", file=sys.stderr)
    by_speed = sorted(rounds, key=lambda one: one["mb_per_s"])
    return {"median": by_speed[(len(rounds) - 1) // 2], "rounds": rounds}


if __name__ == "__main__":
    sys.exit(main())
