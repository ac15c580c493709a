"""A dataset in the making: text of several topics, so that chunks have neighbours, in the files that tasks are made of.

Every document has a mark of its own, a word of the form x<split><number>x in each line, by which its text is known.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from data_pipeline.documents import Document, Part, plain
from data_pipeline.pack.indexed import IndexedWriter
from data_pipeline.pack.records import RecordWriter
from data_pipeline.provenance import FOREVER, ROW, UNDATED, Provenance
from data_pipeline.tasks.text import PROVENANCE
from data_pipeline.tokenise.encode import encode_document
from refractor_megatron.distinction.roles import ROLE_ID, MaskBit, RecordPolicy
from refractor_megatron.tokenizer import Tokenizer, train_tokenizer

_SYLLABLES = ("wa", "li", "xo", "que", "ny", "hur", "jet", "cam", "yol", "wick", "sha", "chon")
TRAIN, HELDOUT = 90, 30
#: Documents: not to be copied, with a restricted message, of training text longer than any stage.
FORBIDDEN, RESTRICTED, LONG = 3, 4, 5


def _mark(split: str, number: int) -> str:
    return f"x{split[0]}{number}x"


def _text(split: str, number: int, words: int) -> bytes:
    draw = random.Random(f"{split} {number}")
    topic = random.Random(number % 6)
    known = ["".join(topic.choices(_SYLLABLES, k=3)) for _ in range(30)]
    lines = []
    for low in range(0, words, 21):
        line = draw.choices(known, k=min(21, words - low))
        lines.append(f"{_mark(split, number)} " + " ".join(line))
    return ("\n".join(lines) + ".\n").encode()


def documents(split: str) -> list[Document]:
    """The split's documents; the odd ones are of source "b"."""
    made = []
    for number in range(TRAIN if split == "train" else HELDOUT):
        policy = RecordPolicy(0) if number == FORBIDDEN else RecordPolicy.ALLOW_COPY
        provenance = Provenance(source="ab"[number % 2], policy=policy)
        if number % 15 == RESTRICTED:
            made.append(_conversation(split, number, provenance))
        else:
            words = 1500 if number == LONG else 60 + 7 * (number % 40)
            made.append(plain(_text(split, number, words), provenance))
    if split == "train":  # a near-identical twin of a document
        twin = made[10].parts[0].data + b"And one more line.\n"
        made.append(plain(twin, Provenance(source="a")))
    return made


def _conversation(split: str, number: int, provenance: Provenance) -> Document:
    secret = f"secret{_mark(split, number)} ".encode() * 40
    return Document(
        (
            Part(_text(split, number, 90), ROLE_ID["data"]),
            Part(secret, ROLE_ID["data"], bits=int(MaskBit.SAFETY_SCOPE)),
            Part(_text(split, number, 120), ROLE_ID["data"], bits=int(MaskBit.RET_SCOPE)),
            Part(secret, ROLE_ID["user"]),
            Part(secret, ROLE_ID["tool"], bits=int(MaskBit.TOOL_SCOPE)),
        ),
        framed=True,
        provenance=provenance,
    )


def write_draft(folder: Path) -> Tokenizer:
    """Writes ``train.*``, ``heldout.*`` and their tables of provenance; returns the tokenizer."""
    splits = {split: documents(split) for split in ("train", "heldout")}
    texts = [part.data for part in (p for one in splits["train"] for p in one.parts)]
    tokenizer = train_tokenizer([*texts, b"Remember: the code of one is 123456.\n" * 20], 700)
    for split, made in splits.items():
        tokens, records = IndexedWriter(folder / split, tokenizer.vocab_size), RecordWriter(folder / split)
        for document in made:
            encoded = encode_document(tokenizer, document)
            tokens.add(encoded.tokens)
            records.add(encoded.spans)
        tokens.close()
        records.close()
        rows = [
            ("ab".index(one.provenance.source or ""), UNDATED, 1.0, int(one.provenance.policy), FOREVER) for one in made
        ]
        np.save(folder / PROVENANCE[split], np.array(rows, dtype=ROW))
    tokenizer.save(folder / "tokenizer.json")
    return tokenizer


def forbidden_words(split: str) -> list[bytes]:
    """Bytes that no task made of ``split`` may hold."""
    other = "heldout" if split == "train" else "train"
    count = HELDOUT if other == "heldout" else TRAIN
    marks = [_mark(other, number).encode() for number in range(count)]
    return [*marks, _mark(split, FORBIDDEN).encode(), b"secret"]


def positions(tokenizer: Tokenizer, tokens: np.ndarray) -> np.ndarray:
    """First byte of each token in the decoded text, and behind the last one the number of bytes."""
    return np.concatenate([[0], np.cumsum(tokenizer.token_bytes[tokens])])
