"""Text for tests without a download: made from a seed, so the same in every commit, and like language to a model."""

from __future__ import annotations

import random
from functools import cache
from itertools import accumulate
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS, WORDS, TOPICS = 320, 6000, 12


def write_corpus(folder: Path) -> Path:
    """Write the documents into ``folder`` as .txt; 1.3 MB, half of the files below 2.4 kB, one of 31 kB."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(_documents()):
        (folder / f"document_{number:03}.txt").write_text(text, encoding="utf-8")
    return folder


@cache
def _documents() -> tuple[str, ...]:
    """Zipf's law over made-up words; a document keeps to its topic, whose own words are a third of it."""
    rng = random.Random(20)
    vocabulary = _vocabulary(rng)
    weights = list(accumulate(1 / (rank + 2.7) for rank in range(WORDS)))
    topics = [rng.sample(vocabulary[100:], 80) for _ in range(TOPICS)]
    return tuple(_document(rng, vocabulary, weights, topics[n % TOPICS]) for n in range(DOCUMENTS))


def _vocabulary(rng: random.Random) -> list[str]:
    """Different words of one to four syllables, the frequent ones short."""
    onsets = [*"bdfgklmnprstv", "st", "tr"]
    syllables = [a + b + c for a in onsets for b in "aeiou" for c in ("", "n", "r")]
    syllables += ["é", "ß", "ör", "ia"]
    words: dict[str, None] = {}
    while len(words) < WORDS:
        longest = 1 if len(words) < 60 else 2 if len(words) < 800 else 4
        words["".join(rng.choices(syllables, k=rng.randint(1, longest)))] = None
    return list(words)


def _document(rng: random.Random, vocabulary: list[str], weights: list[float], topic: list[str]) -> str:
    paragraphs, left = [], int(min(9000, max(60, rng.lognormvariate(5.75, 1.1))))
    while left > 0:
        sentences = []
        for _ in range(rng.randint(2, 7)):
            words = rng.choices(vocabulary, cum_weights=weights, k=rng.randint(4, 18))
            words = [rng.choice(topic) if rng.random() < 0.33 else word for word in words]
            if rng.random() < 0.1:
                words[-1] = str(rng.randint(1, 1999))
            left -= len(words)
            sentences.append(" ".join(words).capitalize() + rng.choice("....?;"))
        paragraphs.append(" ".join(sentences))
    return "\n\n".join(paragraphs) + "\n"
