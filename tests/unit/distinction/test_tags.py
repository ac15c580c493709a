"""Protocol tags: the table of the contract, order and errors."""

from __future__ import annotations

import pytest

from refractor_megatron.distinction.roles import ROLES, MaskBit
from refractor_megatron.distinction.tags import TokenHint, read_tags
from refractor_megatron.errors import DataError
from tests.runs import loaded_after

TOOL, SAFETY, RET, SEGMENT = MaskBit.TOOL_SCOPE, MaskBit.SAFETY_SCOPE, MaskBit.RET_SCOPE, MaskBit.SEGMENT


@pytest.mark.parametrize(
    ("tags", "hint"),
    [
        ([], TokenHint("user")),
        (["<tool:calc>"], TokenHint("tool", TOOL, ("calc",))),
        (["<tool:calc>", "<tool:web.search-2>"], TokenHint("tool", TOOL, ("calc", "web.search-2"))),
        (["<safety:restricted>"], TokenHint("user", SAFETY)),
        (["<retrieval:context>"], TokenHint("user", RET)),
        (["<segment:turn>"], TokenHint("user", SEGMENT, new_segment=True)),
        (["<role:data>"], TokenHint("data")),
        (["<role:code>", "<role:assistant>"], TokenHint("assistant")),
        (["<role:code>", "<tool:calc>"], TokenHint("tool", TOOL, ("calc",))),
        (
            ["<safety:restricted>", "<retrieval:context>", "<segment:x>"],
            TokenHint("user", SAFETY | RET | SEGMENT, new_segment=True),
        ),
        (["<safety:restricted>", "<safety:restricted>"], TokenHint("user", SAFETY)),
    ],
)
def test_the_table(tags: list[str], hint: TokenHint) -> None:
    assert read_tags("user", tags, "m") == hint


def test_tool_id_is_the_last_tool() -> None:
    assert read_tags("user", ["<tool:a>", "<tool:b>"], "m").tool_id == "b"
    assert read_tags("user", [], "m").tool_id is None


def test_unknown_tags_are_refused() -> None:
    with pytest.raises(DataError, match="m 3: UNKNOWN_PROTOCOL_TAG '<colour:red>'; known are <tool:NAME>"):
        read_tags("user", ["<colour:red>"], "m 3")
    for tag in ("<safety:low>", "tool:calc", "<tool:a b>", "<TOOL:x>", "<tool:>", ""):
        with pytest.raises(DataError, match="UNKNOWN_PROTOCOL_TAG"):
            read_tags("user", ["<safety:restricted>", tag], "m")


@pytest.mark.parametrize(
    ("tag", "meant"),
    [
        ("<saftey:restricted>", "<safety:restricted>"),
        ("<safety:low>", "<safety:restricted>"),
        ("<retreival:context>", "<retrieval:context>"),
        ("tool:calc", "<tool:calc>"),
        ("<TOOL: web search>", "<tool:web_search>"),
        ("<segment:>", "<segment:NAME>"),
    ],
)
def test_a_refused_tag_comes_with_the_nearest_one(tag: str, meant: str) -> None:
    with pytest.raises(DataError, match=f"did you mean '{meant}'"):
        read_tags("user", [tag], "m")


@pytest.mark.parametrize(
    ("role", "tags", "words"),
    [
        ("root", [], "m: unknown role 'root'; the roles are system, user"),
        (None, [], "m: unknown role None"),
        (["user"], [], "m: unknown role"),
        ("user", ["<role:root>"], "m: unknown role 'root'"),
        ("user", ["<tool:a>", "<role:user>"], "m: the role override <role:user> follows a tool tag"),
        ("user", ["<tool:a>", "<safety:restricted>", "<role:tool>"], "follows a tool tag"),
        ("user", "<tool:a>", "must be a list of strings"),
        ("user", [3], "must be a list of strings"),
        ("user", {"<tool:a>": 1}, "must be a list of strings"),
    ],
)
def test_mistakes_are_named(role: object, tags: object, words: str) -> None:
    with pytest.raises(DataError) as error:
        read_tags(role, tags, "m")
    assert words in str(error.value)


def test_roles_may_be_extended() -> None:
    assert read_tags("user", ["<role:critic>"], "m", (*ROLES, "critic")).role == "critic"


def test_tags_load_neither_torch_nor_numpy() -> None:
    assert loaded_after("import refractor_megatron.distinction.tags").isdisjoint({"torch", "numpy"})
