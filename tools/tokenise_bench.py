"""Encoding speed on one core: ours beside libraries, same text, interleaved; writes outbox/benchmarks/tokenise.*.

python tools/tokenise_bench.py --tokenizer DATASET/tokenizer.json --shards 'WORK/ingest-*/*/*.arrow'

Every round has other documents, as a build has, so that a library's cache holds what it learnt of the text before and
not the very words it is timed on; the first round warms up and does not count. Time is that of the processor, over all
threads of the process. Libraries that are not installed are named as such
(pip install quicktok-v1 kitoken fastokens bpe-openai); gigatoken is what the
project encodes with, behind a check that gives its own split pattern.
"""

from __future__ import annotations

import argparse
import glob
import importlib.metadata
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.shards import Shard
from refractor_megatron.evaluation.evidence import commit, processor, record, table
from refractor_megatron.tokenizer import Tokenizer
from refractor_megatron.tokenizer.fast import LIBRARY_PATTERN, FastEncoder
from refractor_megatron.tokenizer.hf_files import hf_backend
from refractor_megatron.tokenizer.pieces import PIECE_CHARS

ROOT = Path(__file__).resolve().parents[1]
#: Llama 3's split pattern differs from ours in contractions of mixed case alone; libraries without ours get this one.
NEAR_PATTERN = LIBRARY_PATTERN
OWN, NEAR, OTHER = "ours", "ours, Llama 3's split", "another"
#: Bytes of text of a round for HF tokenizers, which needs minutes for what takes the others seconds.
HF_BYTES = 400_000

Documents = list[bytes]
#: Prepared input to encoded output, the timed part; output to one row of ids a document.
Encode = Callable[[Any], Any]


@dataclass
class Contender:
    """``prepare`` turns documents into what ``encode`` takes, ``rows`` its answer into ids; neither is timed."""

    name: str
    package: str
    vocabulary: str
    prepare: Callable[[Documents], Any]
    encode: Encode
    rows: Callable[[Any], list[list[int]]]
    limit: int | None = None
    rates: list[tuple[float, float]] = field(default_factory=list)
    differing: int = 0
    compared: int = 0


def flat(documents: Documents) -> tuple[Any, Any]:
    """Bytes and offsets."""
    offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    return np.frombuffer(b"".join(documents), dtype=np.uint8), offsets


def strings(documents: Documents) -> list[str]:
    """Documents as ``str``."""
    return [document.decode() for document in documents]


def split(answer: tuple[Any, Any]) -> list[list[int]]:
    """Rows of flat ids and offsets."""
    ids, starts = answer
    return [ids[a:b].tolist() for a, b in zip(starts[:-1], starts[1:], strict=True)]


def lists(answer: Any) -> list[list[int]]:
    """Rows of a sequence of sequences."""
    return [np.asarray(row).tolist() for row in answer]


def ours(tokenizer: Tokenizer, folder: Path) -> Contender:
    encoder = FastEncoder(tokenizer)
    assert encoder.fast, "the tokenizer has another split pattern; build the dataset with its own tokenizer"
    return Contender("this project", "gigatoken", OWN, flat, lambda text: encoder.encode_batch(*text), split)


def tiktoken_library(tokenizer: Tokenizer, folder: Path) -> Contender:
    import tiktoken

    ranks = {token: i for i, token in enumerate(tokenizer.ranks)}
    encoding = tiktoken.Encoding("own", pat_str=tokenizer.pattern, mergeable_ranks=ranks, special_tokens={})
    return Contender(
        "tiktoken", "tiktoken", OWN, strings, lambda texts: [encoding.encode_ordinary(one) for one in texts], lists
    )


def hugging_face(tokenizer: Tokenizer, folder: Path) -> Contender:
    backend = hf_backend(tokenizer)
    return Contender(
        "HF encode_batch_fast",
        "tokenizers",
        OWN,
        strings,
        lambda texts: backend.encode_batch_fast(texts, add_special_tokens=False),
        lambda rows: [row.ids for row in rows],
        HF_BYTES,
    )


def hugging_face_file(tokenizer: Tokenizer, folder: Path, pattern: str) -> Path:
    """A tokenizer.json with our vocabulary and one split pattern, which other libraries read."""
    body = json.loads(hf_backend(tokenizer).to_str())
    last = body["pre_tokenizer"]["pretokenizers"][-1]
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    body["pre_tokenizer"]["pretokenizers"] = [cut, last]
    body["added_tokens"] = []  # ours are never looked for in text
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(body))
    return path


def kitoken_library(tokenizer: Tokenizer, folder: Path) -> Contender:
    import kitoken  # type: ignore[import-not-found]

    encoder = kitoken.Kitoken.from_tokenizers_file(str(hugging_face_file(tokenizer, folder, tokenizer.pattern)))
    return Contender("kitoken", "kitoken", OWN, strings, lambda texts: [encoder.encode(one) for one in texts], lists)


def fastokens_library(tokenizer: Tokenizer, folder: Path) -> Contender:
    from fastokens._native import Tokenizer as Native  # type: ignore[import-not-found]

    native = Native.from_json_str(hugging_face_file(tokenizer, folder, tokenizer.pattern).read_text())
    return Contender(
        "fastokens",
        "fastokens",
        OWN,
        strings,
        lambda texts: [native.encode(one, add_special_tokens=False) for one in texts],
        lambda rows: [list(row.ids) for row in rows],
    )


def gigatoken_library(tokenizer: Tokenizer, folder: Path) -> Contender:
    import gigatoken

    encoder = gigatoken.Tokenizer.from_json(hugging_face_file(tokenizer, folder, NEAR_PATTERN).read_text())
    return Contender("gigatoken", "gigatoken", NEAR, list, lambda texts: [encoder.encode(one) for one in texts], lists)


def gigatoken_batch(tokenizer: Tokenizer, folder: Path) -> Contender:
    import gigatoken

    encoder = gigatoken.Tokenizer.from_json(hugging_face_file(tokenizer, folder, NEAR_PATTERN).read_text())
    return Contender(
        "gigatoken encode_batch",
        "gigatoken",
        NEAR,
        list,
        lambda texts: encoder.encode_batch(texts, parallel=False),
        lists,
    )


def quicktok_library(tokenizer: Tokenizer, folder: Path) -> Contender:
    import quicktok  # type: ignore[import-not-found]

    quicktok.import_tokenizer(str(hugging_face_file(tokenizer, folder, NEAR_PATTERN)), "own", str(folder))
    encoder = quicktok.get_encoding("own", str(folder))
    return Contender("quicktok", "quicktok-v1", NEAR, strings, lambda texts: encoder.encode_batch(texts, 1), split)


def quicktok_llama(tokenizer: Tokenizer, folder: Path) -> Contender:
    import quicktok

    encoder = quicktok.get_encoding("llama3")
    return Contender(
        "quicktok, llama3", "quicktok-v1", OTHER, strings, lambda texts: encoder.encode_batch(texts, 1), split
    )


def bpe_openai_library(tokenizer: Tokenizer, folder: Path) -> Contender:
    import bpe_openai  # type: ignore[import-not-found]

    encoder = bpe_openai.get_encoding("cl100k_base")
    return Contender(
        "bpe-openai, cl100k", "bpe-openai", OTHER, strings, lambda texts: [encoder.encode(one) for one in texts], lists
    )


MAKERS: tuple[Callable[[Tokenizer, Path], Contender], ...] = (
    ours,
    gigatoken_library,
    gigatoken_batch,
    quicktok_library,
    tiktoken_library,
    kitoken_library,
    fastokens_library,
    hugging_face,
    quicktok_llama,
    bpe_openai_library,
)


def contenders(tokenizer: Tokenizer, folder: Path) -> tuple[list[Contender], list[str]]:
    """Those that can be run, and a line for each that cannot."""
    found, absent = [], []
    for number, make in enumerate(MAKERS):
        scratch = folder / str(number)
        scratch.mkdir()
        try:
            found.append(make(tokenizer, scratch))
        except ImportError as error:
            absent.append(f"{make.__name__}: not installed ({error.name})")
        except Exception as error:  # a library that refuses our vocabulary says so in its own way
            absent.append(f"{make.__name__}: refuses ({str(error).splitlines()[0][:120]})")
    return found, absent


def sample(paths: Sequence[str], size: int) -> Documents:
    """Documents up to ``size`` bytes, taken evenly over all shards: UTF-8 and no longer than encoders see at once."""
    kept: Documents = []
    for path in paths:
        shard, held = Shard(Path(path)), 0
        for row in np.random.default_rng(0).permutation(len(shard)).tolist():
            data = shard.text_of(row)
            if data and usable(data):
                kept.append(data)
                held += len(data)
            if held >= size / len(paths):
                break
    order = np.random.default_rng(1).permutation(len(kept))
    return [kept[i] for i in order]


def usable(data: bytes) -> bool:
    """Whether every library takes a document whole."""
    try:
        return len(data.decode()) <= PIECE_CHARS
    except UnicodeDecodeError:
        return False


def rounds(documents: Documents, count: int) -> Iterator[Documents]:
    """Disjoint parts of about the same number of bytes."""
    reach = np.cumsum([len(one) for one in documents])
    cuts = np.searchsorted(reach, reach[-1] * np.arange(1, count) / count)
    for part in np.split(np.arange(len(documents)), cuts):
        yield [documents[i] for i in part]


def head(documents: Documents, limit: int | None) -> Documents:
    """First documents of together about ``limit`` bytes."""
    if limit is None:
        return documents
    reach = np.cumsum([len(one) for one in documents])
    return documents[: int(np.searchsorted(reach, limit)) + 1]


def measure(tokenizer: Tokenizer, field_of: Sequence[Contender], documents: Documents, count: int) -> None:
    """Times every contender on every round, and compares its ids with ``Tokenizer.encode``.

    In an order drawn for each round: who runs after a relative finds the processor's caches warm.
    """
    rng = np.random.default_rng(2)
    for number, part in enumerate(rounds(documents, count + 1)):
        wanted = [tokenizer.encode(one) for one in part]
        for place in rng.permutation(len(field_of)):
            one = field_of[place]
            texts = head(part, one.limit)
            prepared = one.prepare(texts)
            started = time.process_time()
            answer = one.encode(prepared)
            seconds = time.process_time() - started
            rows = one.rows(answer)
            if number:
                one.rates.append((sum(map(len, texts)) / seconds / 1e6, sum(map(len, rows)) / seconds / 1e6))
            if one.vocabulary != OTHER:
                one.compared += len(rows)
                one.differing += sum(a != b for a, b in zip(rows, wanted[: len(rows)], strict=True))
        print(f"round {number} of {count} done", flush=True)


def summary(one: Contender) -> dict[str, Any]:
    """What is kept of a contender."""
    return {
        "name": one.name,
        "version": importlib.metadata.version(one.package),
        "package": one.package,
        "vocabulary": one.vocabulary,
        "mb_per_s": statistics.median(rate[0] for rate in one.rates),
        "mtok_per_s": statistics.median(rate[1] for rate in one.rates),
        "mb_per_s_rounds": [rate[0] for rate in one.rates],
        "documents_compared": one.compared,
        "documents_differing": one.differing,
    }


def body(kept: dict[str, Any]) -> str:
    """The record's text."""
    rows = []
    for one in kept["contenders"]:
        spread = one["mb_per_s_rounds"]
        differing = (
            "-" if one["vocabulary"] == OTHER else f"{one['documents_differing']} of {one['documents_compared']}"
        )
        rates = [f"{one['mb_per_s']:.1f}", f"{min(spread):.1f} to {max(spread):.1f}", f"{one['mtok_per_s']:.2f}"]
        rows.append([one["name"], f"{one['package']} {one['version']}", one["vocabulary"], *rates, differing])
    header = ["encoder", "package", "vocabulary", "MB/s", "range", "Mtok/s", "documents with other ids"]
    text = (
        f"{kept['documents']:,} documents, {kept['bytes'] / 1e6:.1f} MB, in {kept['rounds']} rounds of different "
        "documents after one to warm up; median and range over rounds, processor time of all threads, one core. The "
        f"vocabulary of {kept['vocab_size']:,} is the project's own where the column says so. `{NEAR}`: the library "
        "has no scanner for our split pattern and ran with the nearest it has, so some ids differ; this project runs "
        "gigatoken so too, finds the few places where the patterns differ, and gives its own ids there. `another`: the "
        "library takes no vocabulary but its own; its rate is of other, mostly larger, tables. Ids are compared with "
        f"`Tokenizer.encode`. HF tokenizers saw the first {HF_BYTES / 1e6:.1f} MB of each round. Libraries answer in "
        "their cheapest form (arrays where they have them).\n\n"
    )
    left_out = "".join(f"- {line}\n" for line in kept["absent"])
    return text + table(header, rows) + (f"\nNot measured:\n\n{left_out}" if left_out else "")


def main() -> int:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json of a dataset")
    parser.add_argument("--shards", required=True, help="glob of document shards")
    parser.add_argument("--megabytes", type=float, default=60.0, help="text in all rounds together")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "outbox" / "benchmarks" / "tokenise.md")
    arguments = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS"):  # read at the first parallel call
        os.environ[name] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    measured = commit()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    paths = sorted(glob.glob(arguments.shards))
    if not paths or arguments.rounds < 1:
        parser.error(f"no shard matches {arguments.shards}" if not paths else "--rounds must be 1 or more")
    tokenizer = Tokenizer.load(arguments.tokenizer)
    documents = sample(paths, int(arguments.megabytes * 1e6))
    with tempfile.TemporaryDirectory() as folder:
        field_of, absent = contenders(tokenizer, Path(folder))
        measure(tokenizer, field_of, documents, arguments.rounds)
    kept = {
        "documents": len(documents),
        "bytes": sum(map(len, documents)),
        "rounds": arguments.rounds,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.digest,
        "contenders": sorted(map(summary, field_of), key=lambda one: -float(one["mb_per_s"])),
        "absent": absent,
    }
    evidence = arguments.out.with_suffix(".json")
    evidence.write_text(json.dumps(kept, indent=1) + "\n")
    command = shlex.join(["python", "tools/tokenise_bench.py", *sys.argv[1:]])
    title = "Tokenising beside the libraries, one core"
    arguments.out.write_text(record(title, measured, processor(), [command], [evidence.name], body(kept)))
    print(arguments.out.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
