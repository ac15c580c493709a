"""A conversation file as cells with token records, for pictures of masks; one cell stands for one word or token."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.documents import Document, Part
from data_pipeline.sources.messages import conversation
from data_pipeline.sources.strict_json import parse_json
from refractor_megatron.errors import DataError
from refractor_megatron.tokenizer import Tokenizer

#: Longest sample that is drawn: the limit of the elementwise oracle, and what a screen can show.
MOST_CELLS = 2048


@dataclass(frozen=True)
class Message:
    """Cells [start, stop) of one message, its role id, mask bits, and the beginning of its text."""

    start: int
    stop: int
    document: int
    role: int
    bits: int
    text: str


@dataclass(frozen=True)
class Conversation:
    """records: int32 [L, 4] = (document, segment, role, mask_bits); messages cover the cells in order."""

    records: npt.NDArray[np.int32]
    messages: tuple[Message, ...]
    unit: str


def read_conversation(path: Path, roles: Sequence[str], tokenizer: Tokenizer | None = None) -> Conversation:
    """Reads a JSON file: messages, or a list of such lists (several documents packed into one sample).

    Messages are a list, or an object with the list in ``messages``, like a line of a corpus in JSON lines. A message is
    ``{role, content, protocol_tags?, id?, metadata?}``. Without a tokenizer a cell is a word, and an empty
    message one cell; with one, a message has its role and end token besides. Errors: ``DataError`` naming the file, and
    line and column or the message, for JSON that does not parse, malformed messages, and more than 2048 cells.
    """
    size: Callable[[Part], int] = _words
    if tokenizer is not None:
        size = lambda part: len(tokenizer.encode(part.data)) + 2  # noqa: E731
    rows: list[tuple[int, int, int, int]] = []
    messages: list[Message] = []
    for number, document in enumerate(read_documents(path, roles)):
        for part in document.parts:
            cells = size(part)
            text = " ".join(part.data.decode(errors="replace").split())
            messages.append(Message(len(rows), len(rows) + cells, number, part.role, part.bits, text))
            rows += [(number, part.segment, part.role, part.bits)] * cells
    unit = "words" if tokenizer is None else "tokens"
    if len(rows) > MOST_CELLS:
        raise DataError(f"{path}: {len(rows)} {unit} do not fit into a picture of {MOST_CELLS}; shorten the messages.")
    return Conversation(np.array(rows, dtype=np.int32), tuple(messages), unit)


def _words(part: Part) -> int:
    return max(1, len(part.data.split()))


def read_documents(path: Path, roles: Sequence[str]) -> Iterator[Document]:
    """The conversations of a JSON file, each a document; shapes and errors as in `read_conversation`."""
    content = _json(path)
    if isinstance(content, dict) and "messages" in content:
        content = content["messages"]
    if not isinstance(content, list) or not content:
        raise DataError(
            f"{path}: a conversation is a list of messages with role and content, an object with such a list in "
            "messages, or a list of such lists."
        )
    if not isinstance(content[0], list):
        yield conversation(content, str(path), roles)
        return
    for number, messages in enumerate(content, start=1):
        if messages == []:
            raise DataError(f"{path}, document {number}: it has no messages; remove it.")
        yield conversation(messages, f"{path}, document {number}", roles)


def _json(path: Path) -> Any:
    try:
        return parse_json(path.read_bytes())
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}:{error.colno}: not JSON ({error.msg}); correct the syntax.") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: the file is not UTF-8; save it as UTF-8 text.") from None
    except ValueError as error:
        raise DataError(f"{path}: {error}; correct the file.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a JSON file of messages.") from None
