"""A dataset built with everything switched on, from text that would harm a careless page."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from data_pipeline.build import BuiltData, build
from data_pipeline.options import Curriculum, Decontaminate, Dedup, Engine, Filters, Mix, Options, Tasks
from tests.unit.data_pipeline.corpora import conversation

HOSTILE = "<script>alert('mine')</script> <img src=x onerror=alert(1)> \x1b[31m"
WORDS: list[str] = re.findall(
    r"\w+",
    """
    river mountain paper winter garden letter window music summer bread market silver quiet narrow early garage
    engine basket yellow copper forest island doctor pencil travel butter cotton orange planet rocket simple
    battle button candle cousin danger desert dinner effort empire fabric famous father figure finger flight
    """,
)
OPTIONS = Options(
    name="all-on",
    vocab_size=420,
    max_mb=1.0,
    heldout_fraction=0.1,
    max_bad_fraction=0.5,
    dedup=Dedup(enabled=True, paragraphs=True),
    filters=Filters(enabled=True, perplexity_low=2.0, perplexity_high=98.0, pii="scrub"),
    decontaminate=Decontaminate(enabled=True, ngram=5, overlap=0.5),
    mix=Mix(by="source", temperature=2.0),
    tasks=Tasks(retrieval=0.05, long_range=0.05, window=64),
    curriculum=Curriculum(lengths=(128, 512)),
    engine=Engine(workers=1),
)


def _text(rng: random.Random, words: int) -> str:
    """Lines of a few words, in which the and of stand as in English."""
    drawn = [rng.choice(("the", "of", "and", *rng.choices(WORDS, k=4))) for _ in range(words)]
    return "\n".join(" ".join(drawn[at : at + 12]) for at in range(0, words, 12))


def _books(rng: random.Random) -> Iterator[str]:
    """Long and short ones; near-duplicates in a chain, exact ones, ones that overlap, one too short, PII, a shared
    paragraph."""
    for _ in range(110):
        yield _text(rng, rng.randint(40, 120))
    for _ in range(14):
        yield _text(rng, 700)
    paragraph = _text(rng, 40)
    for place in range(4):
        base = _text(rng, 90)
        yield f"{base} {HOSTILE}\n\n{paragraph}"
        yield f"{base} {_text(rng, 4 + 2 * place)} {HOSTILE}\n\n{paragraph}"
        yield f"{base} {_text(rng, 12 + 2 * place)} {HOSTILE}\n\n{paragraph}"
        yield f"{base} {HOSTILE}\n\n{paragraph}"
    for _ in range(12):  # too unlike to be duplicates, but whoever has read one knows half of the other
        base = _text(rng, 90)
        yield base
        yield f"{base}\n{_text(rng, 60)}"
    yield f"{HOSTILE} short.person@letters.fi too short"
    yield f"Write to jane.roe@letters.fi today.\n{_text(rng, 60)}"
    private = f"From secret.person@letters.fi to all\n{_text(rng, 80)}"
    yield private
    yield f"More words before this. {private}"


_BUILT: list[BuiltData] = []


def build_everything(factory: pytest.TempPathFactory) -> BuiltData:
    """Two sources, one of them with an entry that cannot be read. Built once a session."""
    if not _BUILT:
        _BUILT.append(_build(factory))
    return _BUILT[0]


def _build(factory: pytest.TempPathFactory) -> BuiltData:
    root = factory.mktemp("everything")
    rng = random.Random(5)
    (root / "books").mkdir()
    for number, text in enumerate(_books(rng)):
        (root / "books" / f"{number:03}-<b>.txt").write_text(text + "\n")
    lines = [json.dumps(conversation(i)) for i in range(20)]
    lines += [json.dumps({"text": _text(rng, 60)}) for _ in range(30)]
    lines[3] = '{"text": "<script>not closed'
    (root / "chat.jsonl").write_text("\n".join(lines) + "\n")
    entries: list[dict[str, Any]] = [
        {"name": "books <i>", "path": "books", "licence": "CC0-1.0 & more", "weight": 2.0},
        {"name": "talk", "path": "chat.jsonl", "licence": "MIT"},
    ]
    (root / "sources.yaml").write_text(yaml.safe_dump(entries))
    return build(
        None, root / "out", OPTIONS, cache=root / "cache", sources_file=root / "sources.yaml", log=lambda line: None
    )
