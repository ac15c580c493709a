"""Our ids are those of Hugging Face ``tokenizers`` with the same merges and the same split."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path

import pytest

from refractor_megatron.tokenizer import Tokenizer
from refractor_megatron.tokenizer.train import _ranks_of, _train_reference, byte_alphabet

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def pair(texts: list[bytes]) -> tuple[Tokenizer, object, list[int]]:
    """Our tokenizer, the reference, and the map from reference ids to ours."""
    reference = _train_reference([text.decode() for text in texts], 2000)
    ranks = _ranks_of(reference)
    alphabet = byte_alphabet()
    ours = {token: i for i, token in enumerate(ranks)}
    vocabulary = sorted(reference.get_vocab().items(), key=lambda item: item[1])
    return Tokenizer(ranks), reference, [ours[bytes(alphabet[char] for char in token)] for token, _ in vocabulary]


def their_ids(pair: tuple[Tokenizer, object, list[int]], text: str) -> list[int]:
    """Ids of the reference, in our numbers."""
    _, reference, to_ours = pair
    return [to_ours[i] for i in reference.encode(text).ids]  # type: ignore[attr-defined]


def test_ids_equal_on_python_files(pair: tuple[Tokenizer, object, list[int]]) -> None:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
    assert len(files) == 60
    for path in files:
        text = path.read_text(encoding="utf-8", errors="ignore")[:20_000]
        assert pair[0].encode(text) == their_ids(pair, text), path


def test_ids_equal_on_random_unicode(pair: tuple[Tokenizer, object, list[int]]) -> None:
    rng = random.Random(0)
    pools = [
        "abcdef ",
        "0123456789",
        " \t\n\r\u3000",
        "'sdmtlvre",
        "éüßàñ",
        "日本語中文한국어",
        "٠١٢३४",
        "\U0001f600\u200d!?.,",
        "αβγдеж",
    ]
    for _ in range(300):
        alphabet = "".join(rng.sample(pools, 3))
        text = "".join(rng.choices(alphabet, k=rng.randrange(200)))
        assert pair[0].encode(text) == their_ids(pair, text), text
