"""Perplexity of documents: split into words, trained by fold, scored by the other."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.documents import plain
from data_pipeline.filters import perplexity
from data_pipeline.filters.ngram import NgramModel, discounts, word_hashes
from data_pipeline.shards import Located, Shard, write_shard

_SUBJECTS = ("the keeper", "an old sailor", "the north wind", "a young clerk", "my neighbour", "the baker's daughter")
_VERBS = ("carries", "remembers", "paints", "repairs", "sells", "borrows")
_OBJECTS = (
    "a lantern",
    "the blue boat",
    "three letters",
    "his father's coat",
    "the broken clock",
    "a map of the coast",
)
_ENDS = ("before dawn", "in the harbour", "without a word", "every second winter", "for very little money")


def _sentences(draw: random.Random, count: int) -> str:
    return " ".join(
        f"{draw.choice(_SUBJECTS)} {draw.choice(_VERBS)} {draw.choice(_OBJECTS)} {draw.choice(_ENDS)}."
        for _ in range(count)
    )


def _words(text: str | bytes) -> list[int]:
    data = text.encode() if isinstance(text, str) else text
    return word_hashes(np.frombuffer(data, np.uint8)).tolist()


def test_words_ignore_case_digits_and_punctuation() -> None:
    assert _words("The (year) 1984, twice!") == _words("the YEAR 2031 -- Twice")
    assert len(_words("The (year) 1984, twice!")) == 4
    assert _words("12 apples") != _words("123 apples")
    assert len(_words("吾輩は猫である。名前")) == 9
    assert len(_words(b"\xff one \xfe two")) == 2
    assert _words("  ... ") == []


def test_few_counts_get_fixed_discounts() -> None:
    assert discounts(np.array([1, 1, 2, 3], np.int64)) == (0.5, 1.0, 1.5)
    counts = np.repeat(np.array([1, 2, 3, 4], np.int64), [100, 40, 20, 10])
    y = 100 / 180
    assert discounts(counts) == pytest.approx((1 - 2 * y * 0.4, 2 - 3 * y * 0.5, 3 - 4 * y * 0.5))


def test_a_model_is_stored_whole(tmp_path: Path) -> None:
    model = NgramModel.train([word_hashes(np.frombuffer(_sentences(random.Random(1), 50).encode(), np.uint8))])
    for name in ("a.npz", "b.npz"):
        model.save(tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    loaded = NgramModel.load(tmp_path / "a.npz")
    for name in NgramModel.__dataclass_fields__:
        assert np.array_equal(getattr(loaded, name), getattr(model, name)), name


def test_long_documents_are_scored_by_start_and_middle() -> None:
    text = np.frombuffer(" ".join(f"word{i:06d}" for i in range(2000)).encode(), np.uint8)
    head, middle = (piece.tobytes().decode().split() for piece in perplexity.slices(text))
    assert head == [f"word{i:06d}" for i in range(len(head))] and 330 < len(head) < 373
    first = int(middle[0][4:])
    assert middle == [f"word{i:06d}" for i in range(first, first + len(middle))] and 150 < len(middle) < 187
    assert abs(first + len(middle) / 2 - 1000) < 20
    assert [piece.tobytes() for piece in perplexity.slices(text[:6144])] == [text[:6144].tobytes()]


def test_slices_of_text_without_spaces_hold_whole_characters() -> None:
    text = np.frombuffer(("猫" * 4000).encode(), np.uint8)
    pieces = [piece.tobytes().decode() for piece in perplexity.slices(text)]
    assert [set(piece) for piece in pieces] == [{"猫"}, {"猫"}]
    assert all(1 <= len(piece) * 3 <= limit for piece, limit in zip(pieces, (4096, 2048), strict=True))
    binary = np.full(10000, 0x80, np.uint8)  # no character starts anywhere
    assert len(perplexity.slices(binary)) == 2


Corpus = list[tuple[str, str]]


def _corpus() -> Corpus:
    """(kind, text): ordinary English, the same words shuffled, letters at random, and too short."""
    draw = random.Random(5)
    texts = [("text", _sentences(draw, 40)) for _ in range(90)]
    for _ in range(12):
        words = _sentences(draw, 40).split()
        draw.shuffle(words)
        texts.append(("shuffled", " ".join(words)))
        texts.append(("garbage", "".join(draw.choice("abcdefghijklmnop ") for _ in range(800))))
    return [*texts, ("short", "the keeper paints"), ("short", "")]


def _written(folder: Path, corpus: Corpus, cuts: Sequence[int], language: str = "en") -> dict[str, Any]:
    shards, signals = [], []
    for number, texts in enumerate(np.split(np.arange(len(corpus)), list(cuts))):
        path = folder / f"{number}.arrow"
        write_shard(path, 0, "made", [Located(plain(corpus[i][1].encode()), 0, int(i) + 1) for i in texts])
        pq.write_table(pa.table({"language": [language] * len(texts)}), folder / f"{number}.parquet")
        shards.append(str(path))
        signals.append(str(folder / f"{number}.parquet"))
    return {"shards": shards, "signals": signals, "seed": 3, "sample_bytes": 1 << 20}


def _scored(folder: Path, params: dict[str, Any]) -> dict[bytes, float]:
    models = folder / "models"
    models.mkdir()
    perplexity.train_task(params, 0, models)
    values: dict[bytes, float] = {}
    for index, path in enumerate(params["shards"]):
        out = folder / f"out{index}"
        out.mkdir()
        perplexity.score_task({**params, "models": str(models)}, index, out)
        column = pq.read_table(out / "perplexity.parquet").column("perplexity")
        assert column.type == pa.float32()
        shard = Shard(Path(path))
        values |= {shard.ids[row].tobytes(): value for row, value in enumerate(column.to_pylist())}
    return values


def test_bad_text_is_more_perplexing(tmp_path: Path) -> None:
    corpus = _corpus()
    params = _written(tmp_path, corpus, [])
    values = _scored(tmp_path, params)
    ids = Shard(Path(params["shards"][0])).ids
    of: dict[str, list[float]] = {}
    for row, (kind, _) in enumerate(corpus):
        of.setdefault(kind, []).append(values[ids[row].tobytes()])
    assert max(of["text"]) < min(of["shuffled"]) < max(of["shuffled"]) < min(of["garbage"])
    assert np.isnan(of["short"]).all()


def test_shards_and_their_order_change_nothing(tmp_path: Path) -> None:
    corpus = _corpus()
    results = []
    for name, texts, cuts in (("a", corpus, []), ("b", corpus[::-1], [10, 11, 70])):
        folder = tmp_path / name
        folder.mkdir()
        results.append(_scored(folder, _written(folder, texts, cuts)))
        reports = json.loads((folder / "models" / "languages.json").read_text())
        assert list(reports) == ["en"] and all(one["words"] >= 5000 for one in reports["en"])
    first, second = results
    assert first.keys() == second.keys()
    np.testing.assert_array_equal([first[one] for one in first], [second[one] for one in first])
    for name in ("en-0.npz", "en-1.npz", "languages.json"):
        assert (tmp_path / "a/models" / name).read_bytes() == (tmp_path / "b/models" / name).read_bytes()


def test_a_document_is_scored_by_a_model_that_has_not_seen_it(tmp_path: Path) -> None:
    """A text of words that occur nowhere else is as strange to its score as if it were not in the corpus at all."""
    draw = random.Random(8)
    alien = " ".join("".join(draw.choice("bcdfgaeiou") for _ in range(9)) for _ in range(200))
    corpus = [("text", _sentences(draw, 40)) for _ in range(90)]
    values = _scored(tmp_path, _written(tmp_path, [*corpus, ("alien", alien)], []))
    shard = Shard(tmp_path / "0.arrow")
    fold = int(perplexity.folds(shard.ids)[-1])
    words = word_hashes(np.frombuffer(alien.encode(), np.uint8))
    own, other = (NgramModel.load(tmp_path / "models" / f"en-{one}.npz") for one in (fold, 1 - fold))
    assert np.isin(words, own.vocabulary).all() and not np.isin(words, other.vocabulary).any()
    expected = np.exp(-np.log(other.probabilities([words])).mean())
    assert values[shard.ids[-1].tobytes()] == pytest.approx(float(expected), rel=1e-6)
    assert expected > 20 * np.exp(-np.log(own.probabilities([words])).mean())


@pytest.mark.parametrize(("language", "count"), [("und", 90), ("en", 5)])
def test_no_model_no_perplexity(tmp_path: Path, language: str, count: int) -> None:
    draw = random.Random(9)
    corpus = [("text", _sentences(draw, 40)) for _ in range(count)]
    values: npt.NDArray[np.float64] = np.array(
        list(_scored(tmp_path, _written(tmp_path, corpus, [], language)).values()), np.float64
    )
    assert np.isnan(values).all()


def test_samples_are_bounded_and_follow_the_seed(tmp_path: Path) -> None:
    draw = random.Random(4)
    corpus = [("text", _sentences(draw, 40)) for _ in range(120)]
    params = {**_written(tmp_path, corpus, []), "sample_bytes": 100_000}
    vocabularies = []
    for seed in (1, 1, 2):
        out = tmp_path / f"models{len(vocabularies)}"
        out.mkdir()
        perplexity.train_task({**params, "seed": seed}, 0, out)
        report = json.loads((out / "languages.json").read_text())["en"]
        assert all(10 <= one["documents"] <= 30 for one in report)
        vocabularies.append((out / "en-0.npz").read_bytes())
    assert vocabularies[0] == vocabularies[1] != vocabularies[2]
