"""One document to ids and record spans.

Plain documents: text, then end-of-document; one span (role ``data``, segment 0, bits 0). Conversations: per message the
role token, the content and the end token, all three with the message's record; the closing end-of-document belongs to
the last message's segment with role ``data`` and no bits, so that it never carries a scope.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.documents import Document
from refractor_megatron.distinction.roles import DOCUMENT_ROLE, ROLE_ID, ROLES
from refractor_megatron.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Encoded:
    """``tokens`` int64 [n]; ``spans`` int32 [k, 4] = (length, segment, role, mask_bits), lengths summing to n."""

    tokens: npt.NDArray[np.int64]
    spans: npt.NDArray[np.int32]
    text_bytes: int


def encode_document(tokenizer: Tokenizer, document: Document) -> Encoded:
    """Ids and spans of one document, end-of-document included."""
    ids: list[int] = []
    spans: list[tuple[int, int, int, int]] = []
    for part in document.parts:
        before = len(ids)
        if document.framed:
            ids.append(tokenizer.role_ids[ROLES[part.role]])
        ids.extend(tokenizer.encode(part.data))
        if document.framed:
            ids.append(tokenizer.end)
        _append(spans, len(ids) - before, part.segment, part.role, part.bits)
    ids.append(tokenizer.eod)
    _append(spans, 1, document.parts[-1].segment, ROLE_ID[DOCUMENT_ROLE], 0)
    return Encoded(np.array(ids, dtype=np.int64), np.array(spans, dtype=np.int32), document.size)


def _append(spans: list[tuple[int, int, int, int]], length: int, *record: int) -> None:
    """Adds a span, merging it into the last one if the record is the same."""
    segment, role, bits = record
    if spans and spans[-1][1:] == (segment, role, bits):
        length += spans.pop()[0]
    spans.append((length, segment, role, bits))
