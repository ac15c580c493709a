"""What a model is asked, as ids with token records: text to continue, or a conversation to answer.

Roles come from structure alone. The text of a prompt or a message can hold no special token (`Tokenizer.encode` makes
none), and no special token but the ends is ever sampled: a message cannot open another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_pipeline.documents import Document, Part, plain
from data_pipeline.tokenise.encode import encode_document

from ..distinction.roles import DOCUMENT_ROLE, ROLE_ID, ROLES
from ..errors import DataError
from ..evaluation.masks.conversation import read_documents
from ..tokenizer import Tokenizer

#: Role that answers a conversation.
ANSWERING_ROLE = "assistant"


@dataclass(frozen=True)
class Prompt:
    """ids: int64 [n]; records: int32 [n, 4] = (document, segment, role, mask_bits).

    answer: the record of every new token. stops: id that ends the answer -> what it ends, ``end`` (of the message) or
    ``eod`` (end of the document); no other special token may be sampled.
    """

    ids: npt.NDArray[np.int64]
    records: npt.NDArray[np.int32]
    answer: tuple[int, int, int, int]
    stops: Mapping[int, str]


def text_prompt(tokenizer: Tokenizer, data: bytes, where: str) -> Prompt:
    """Text to be continued as the document that it begins, as in pre-training.

    Raises ``DataError`` for an empty text, naming ``where`` it comes from.
    """
    if not data:
        raise DataError(f"{where} is empty: give at least one character to continue.")
    ids, records = _encoded(tokenizer, plain(data))
    return Prompt(ids, records, (0, 0, ROLE_ID[DOCUMENT_ROLE], 0), {tokenizer.eod: "eod"})


def chat_prompt(tokenizer: Tokenizer, document: Document, role: str = ANSWERING_ROLE) -> Prompt:
    """A conversation, with the message of ``role`` that answers it opened in the segment of the last message."""
    assert document.framed and document.parts
    ids, records = _encoded(tokenizer, document)
    answer = (0, document.parts[-1].segment, ROLE_ID[role], 0)
    ids = np.append(ids, tokenizer.role_ids[role])
    records = np.concatenate([records, np.array([answer], dtype=np.int32)])
    return Prompt(ids, records, answer, {tokenizer.end: "end", tokenizer.eod: "eod"})


def message_prompt(tokenizer: Tokenizer, data: bytes, role: str, where: str) -> Prompt:
    """A conversation of one message of ``role``. Raises ``DataError`` for an unknown role or an empty text."""
    if role not in ROLES:
        raise DataError(f"unknown role {role!r}; the roles are {', '.join(ROLES)}.")
    if not data:
        raise DataError(f"{where} is empty: give at least one character to answer.")
    return chat_prompt(tokenizer, Document((Part(data, ROLE_ID[role]),), framed=True))


def next_turn(tokenizer: Tokenizer, answered: Prompt, data: bytes, role: str = "user") -> Prompt:
    """What follows an answer to ``answered``: its end, a message of ``role``, and the opening of the next answer."""
    turn = chat_prompt(tokenizer, Document((Part(data, ROLE_ID[role], answered.answer[1]),), framed=True))
    ids = np.concatenate([[tokenizer.end], turn.ids])
    records = np.concatenate([np.array([answered.answer], dtype=np.int32), turn.records])
    return Prompt(ids, records, turn.answer, turn.stops)


def read_messages(tokenizer: Tokenizer, path: Path) -> list[Prompt]:
    """The conversations of a JSON file: a list of messages, an object with one in ``messages``, or a list of lists.

    A message is ``{role, content, protocol_tags?, id?, metadata?}``. Raises ``DataError`` naming file and place.
    """
    return [chat_prompt(tokenizer, document) for document in read_documents(path, ROLES)]


def _encoded(tokenizer: Tokenizer, document: Document) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Ids and records of an unfinished document: without the end-of-document token."""
    encoded = encode_document(tokenizer, document)
    assert encoded.tokens[-1] == tokenizer.eod
    lengths, fields = encoded.spans[:, 0], encoded.spans[:, 1:]
    rows = np.repeat(fields, lengths, axis=0)[:-1]
    return encoded.tokens[:-1], np.concatenate([np.zeros((len(rows), 1), dtype=np.int32), rows], axis=1)
