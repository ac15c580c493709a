from __future__ import annotations

from typing import Any

import pytest

from data_pipeline.documents import Document
from data_pipeline.sources.messages import conversation
from refractor_megatron.distinction.roles import ROLE_ID, MaskBit
from refractor_megatron.errors import DataError


def parse(*messages: Any) -> Document:
    return conversation(list(messages), "chat.jsonl:7")


def record(role: str, *tags: str) -> tuple[int, int]:
    (part,) = parse({"role": role, "content": "x", "protocol_tags": list(tags)}).parts
    return part.role, part.bits


def test_no_tags_no_bits() -> None:
    assert record("assistant") == (ROLE_ID["assistant"], 0)


@pytest.mark.parametrize(
    ("tags", "role", "bits"),
    [
        (["<tool:calc>"], "tool", MaskBit.TOOL_SCOPE),
        (["<safety:restricted>"], "user", MaskBit.SAFETY_SCOPE),
        (["<retrieval:context>"], "user", MaskBit.RET_SCOPE),
        (["<segment:turn>"], "user", MaskBit.SEGMENT),
        (["<role:code>", "<role:data>"], "data", 0),
        (["<role:code>", "<tool:run>"], "tool", MaskBit.TOOL_SCOPE),
        (["<safety:restricted>", "<retrieval:context>"], "user", MaskBit.SAFETY_SCOPE | MaskBit.RET_SCOPE),
    ],
)
def test_tag_table(tags: list[str], role: str, bits: int) -> None:
    assert record("user", *tags) == (ROLE_ID[role], bits)


def test_segment_tag_begins_a_new_segment() -> None:
    plain = {"role": "user", "content": "x"}
    tagged = plain | {"protocol_tags": ["<segment:turn>"]}
    assert [part.segment for part in parse(tagged, plain, tagged, plain).parts] == [0, 0, 1, 1]


def test_optional_fields_and_the_empty_columns_of_parquet() -> None:
    message = {"role": "user", "content": "x", "id": "7", "metadata": {"lang": "en"}, "protocol_tags": None}
    assert parse({**message, "name": None}).parts == parse(message).parts


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("ü", "ü".encode()),
        (b"\xff", b"\xff"),
        ({"type": "text", "value": "t"}, b"t"),
        ({"type": "binary", "value": "/w==", "encoding": "base64"}, b"\xff"),
    ],
)
def test_content_forms(content: Any, expected: bytes) -> None:
    assert parse({"role": "user", "content": content}).parts[0].data == expected


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("hi", "a message is an object"),
        ({"content": "x"}, "unknown role None"),
        ({"role": "root", "content": "x"}, "unknown role 'root'; the roles are system"),
        ({"role": "user", "content": "x", "protocol_tags": ["<role:root>"]}, "unknown role 'root'"),
        ({"role": "user", "content": "x", "protocol_tags": ["<tool:a>", "<role:user>"]}, "follows a tool tag"),
        ({"role": "user", "content": "x", "protocol_tags": "<tool:a>"}, "must be a list of strings"),
        (
            {"role": "user", "content": "x", "protocol_tags": ["<saftey:restricted>"]},
            "did you mean '<safety:restricted>'",
        ),
        (
            {"role": "user", "content": "x", "protocol_tag": ["<safety:restricted>"]},
            "no field 'protocol_tag'; did you mean",
        ),
        ({"role": "user", "content": "x", "weight": 1}, "no field 'weight'; known are id, role, content"),
        ({"role": "user", "content": {"value": "x", "encodng": "base64"}}, "content has no field 'encodng'; did you"),
        ({"role": "user"}, "content must be a string"),
        ({"role": "user", "content": {"value": "!", "encoding": "base64"}}, "not valid base64"),
        ({"role": "user", "content": {"value": "x", "encoding": "utf-7"}}, "unknown content encoding 'utf-7'"),
    ],
)
def test_bad_message_is_named(message: Any, reason: str) -> None:
    with pytest.raises(DataError, match=f"chat.jsonl:7, message 2: .*{reason}"):
        parse({"role": "user", "content": "fine"}, message)
