"""The document: what a source yields and everything after it works on."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from functools import cached_property

from data_pipeline.provenance import UNSTATED, Provenance
from refractor_megatron.distinction.roles import DOCUMENT_ROLE, ROLE_ID

#: Longer plain documents are cut into parts (bytes): about a million tokens. A small cap on the corpus lowers it.
PART_BYTES = 4 << 20
#: How far a cut may move back to end at a line (bytes).
_LINE_REACH = 1 << 16


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of text with one record: role id, segment number within the document, mask bits."""

    data: bytes
    role: int = ROLE_ID[DOCUMENT_ROLE]
    segment: int = 0
    bits: int = 0


@dataclass(frozen=True)
class Document:
    """Parts in reading order. ``framed`` documents are conversations: each part gets its role and end tokens.

    ``provenance`` is not content: of documents with equal content one is kept, with the strictest that any states.
    """

    parts: tuple[Part, ...]
    framed: bool = False
    provenance: Provenance = UNSTATED

    @cached_property
    def key(self) -> bytes:
        """16-byte content hash. Equal content has equal keys wherever it came from."""
        digest = hashlib.blake2b(b"conversation" if self.framed else b"text", digest_size=16)
        for part in self.parts:
            digest.update(struct.pack("<qiqI", len(part.data), part.role, part.segment, part.bits))
            digest.update(part.data)
        return digest.digest()

    @property
    def size(self) -> int:
        """Bytes of text."""
        return sum(len(part.data) for part in self.parts)

    @property
    def blank(self) -> bool:
        """Nothing but white space."""
        return all(not part.data or part.data.isspace() for part in self.parts)


def plain(data: bytes, provenance: Provenance = UNSTATED) -> Document:
    """A document without roles."""
    return Document((Part(data),), provenance=provenance)


def cut_position(data: bytes, limit: int) -> int:
    """Where to cut ``data``, longer than ``limit`` >= 8: at 1..limit, after the last near line end, else before a
    character's start."""
    cut = data.rfind(b"\n", max(1, limit - _LINE_REACH), limit) + 1
    if cut:
        return cut
    cut = limit
    while cut > limit - 4 and data[cut] & 0xC0 == 0x80:  # a UTF-8 continuation byte
        cut -= 1
    return cut if data[cut] & 0xC0 != 0x80 else limit
