"""Conversations: messages with roles and protocol tags to parts with records (spec section 3, tag table)."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any

from data_pipeline.documents import Document, Part
from data_pipeline.sources.base import Reading
from refractor_megatron.distinction.roles import ROLES
from refractor_megatron.distinction.tags import read_tags
from refractor_megatron.errors import DataError


def conversation(messages: Any, where: str, reading: Reading, roles: Sequence[str] = ROLES) -> Document:
    """The document of one ``messages`` list.

    ``where`` names file and line in errors; the id of a role is its place in ``roles``. Unknown protocol tags are
    counted, not refused. Raises ``DataError`` for a malformed message, an unknown role, or a role after a tool tag.
    """
    if not isinstance(messages, list):
        raise DataError(f"{where}: messages must be a list of objects with role and content; correct this entry.")
    parts: list[Part] = []
    segment = 0
    for index, message in enumerate(messages):
        at = f"{where}, message {index}"
        if not isinstance(message, dict):
            raise DataError(f"{at}: a message is an object with role and content, not {type(message).__name__}.")
        hint = read_tags(message.get("role"), message.get("protocol_tags") or [], at, roles)
        reading.unknown_tags.update(warning.tag for warning in hint.warnings)
        if hint.new_segment and index:
            segment += 1
        parts.append(Part(_content(message.get("content"), at), roles.index(hint.role), segment, hint.bits))
    return Document(tuple(parts), framed=True)


def _content(content: Any, at: str) -> bytes:
    """Bytes of a string, or of an object {value, encoding: utf-8 | base64}."""
    if isinstance(content, bytes):
        return content
    encoding = "utf-8"
    if isinstance(content, dict):
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
