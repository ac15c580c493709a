"""Conversations: messages with roles and protocol tags to parts with records (spec section 3, tag table)."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from typing import Any

from data_pipeline.documents import Document, Part
from refractor_megatron.distinction.roles import ROLES
from refractor_megatron.distinction.tags import read_tags
from refractor_megatron.errors import DataError

#: Fields of a message, and of a content that is an object (request format of the Reframer).
FIELDS = ("id", "role", "content", "protocol_tags", "metadata")
CONTENT_FIELDS = ("type", "value", "encoding")


def conversation(messages: Any, where: str, roles: Sequence[str] = ROLES) -> Document:
    """The document of one ``messages`` list.

    ``where`` names file and line in errors; the id of a role is its place in ``roles``. Raises ``DataError`` for a
    malformed message, an unknown field, role or protocol tag, or a role after a tool tag: a misspelt field or tag would
    silently drop the bit that hides a message.
    """
    if not isinstance(messages, list):
        raise DataError(f"{where}: messages must be a list of objects with role and content; correct this entry.")
    parts: list[Part] = []
    segment = 0
    for number, message in enumerate(messages, start=1):
        at = f"{where}, message {number}"
        if not isinstance(message, dict):
            raise DataError(f"{at}: a message is an object with role and content, not {type(message).__name__}.")
        _known_fields(message, FIELDS, at, "a message")
        hint = read_tags(message.get("role"), message.get("protocol_tags") or [], at, roles)
        if hint.new_segment and parts:
            segment += 1
        parts.append(Part(_content(message.get("content"), at), roles.index(hint.role), segment, hint.bits))
    return Document(tuple(parts), framed=True)


def _known_fields(values: dict[str, Any], known: Collection[str], at: str, what: str) -> None:
    """Refuses unknown fields that hold something; in Parquet every row has the columns of all rows, null if unused."""
    for field, value in values.items():
        if field not in known and value is not None:
            close = get_close_matches(field, known, n=1)
            hint = f"did you mean {close[0]!r}" if close else f"known are {', '.join(known)}"
            raise DataError(f"{at}: {what} has no field {field!a}; {hint}.")


def _content(content: Any, at: str) -> bytes:
    """Bytes of a string, or of an object {value, encoding: utf-8 | base64}."""
    if isinstance(content, bytes):
        return content
    encoding = "utf-8"
    if isinstance(content, dict):
        _known_fields(content, CONTENT_FIELDS, at, "content")
        encoding = content.get("encoding") or "utf-8"
        content = content.get("value")
    if not isinstance(content, str):
        raise DataError(f"{at}: content must be a string or an object with a string value; correct this entry.")
    if encoding == "utf-8":
        return content.encode(errors="surrogatepass")
    if encoding == "base64":
        try:
            return base64.b64decode(content, validate=True)
        except binascii.Error as error:
            raise DataError(f"{at}: content is not valid base64 ({error}).") from error
    raise DataError(f"{at}: unknown content encoding {encoding!r}; use utf-8 or base64.")
