"""Conversations: messages with roles and protocol tags to parts with records (spec section 3, tag table)."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any

from data_pipeline.documents import Document, Part
from data_pipeline.sources.base import Reading
from refractor_megatron.distinction.roles import ROLE_ID, MaskBit
from refractor_megatron.errors import DataError

_TAG = re.compile(r"<([a-z]+):([^<>:\s]+)>")


def conversation(messages: Any, where: str, reading: Reading) -> Document:
    """The document of one ``messages`` list.

    ``where`` names file and line in errors. Unknown protocol tags are counted, not refused. Raises ``DataError`` for a
    malformed message, an unknown role, or a tool tag followed by a role override.
    """
    if not isinstance(messages, list):
        raise DataError(f"{where}: messages must be a list of objects with role and content; correct this entry.")
    parts: list[Part] = []
    segment = 0
    for index, message in enumerate(messages):
        at = f"{where}, message {index}"
        if not isinstance(message, dict):
            raise DataError(f"{at}: a message is an object with role and content, not {type(message).__name__}.")
        role, bits = _apply_tags(message.get("role"), message.get("protocol_tags") or [], at, reading)
        if bits & MaskBit.SEGMENT and index:
            segment += 1
        parts.append(Part(_content(message.get("content"), at), role, segment, bits))
    return Document(tuple(parts), framed=True)


def _role_id(role: Any, at: str) -> int:
    if role not in ROLE_ID:
        raise DataError(f"{at}: unknown role {role!r}; the roles are {', '.join(ROLE_ID)}.")
    return ROLE_ID[role]


def _apply_tags(role: Any, tags: Any, at: str, reading: Reading) -> tuple[int, int]:
    """Role id and mask bits after the tags, left to right; the last role override wins and bits add up."""
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise DataError(f"{at}: protocol_tags must be a list of strings such as <tool:calc>.")
    role_id, bits, tool = _role_id(role, at), 0, False
    for tag in tags:
        match = _TAG.fullmatch(tag)
        category, name = match.groups() if match else ("", "")
        if category == "tool":
            role_id, bits, tool = ROLE_ID["tool"], bits | MaskBit.TOOL_SCOPE, True
        elif (category, name) == ("safety", "restricted"):
            bits |= MaskBit.SAFETY_SCOPE
        elif (category, name) == ("retrieval", "context"):
            bits |= MaskBit.RET_SCOPE
        elif category == "segment":
            bits |= MaskBit.SEGMENT
        elif category == "role":
            if tool:
                raise DataError(f"{at}: the role override {tag} follows a tool tag, which fixes the role; remove one.")
            role_id = _role_id(name, at)
        else:
            reading.unknown_tags[tag] += 1
    return role_id, int(bits)


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
