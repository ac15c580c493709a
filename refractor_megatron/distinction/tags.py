"""Protocol tags ``<category:identifier>`` of a message -> its role, mask bits, tools and segment (Reframer contract).

| tag | role | mask bit | further |
| --- | --- | --- | --- |
| ``<tool:NAME>`` | tool | TOOL_SCOPE | NAME is counted against the tool budget |
| ``<safety:restricted>`` | kept | SAFETY_SCOPE | |
| ``<retrieval:context>`` | kept | RET_SCOPE | |
| ``<segment:NAME>`` | kept | SEGMENT | the message begins a new segment |
| ``<role:ROLE>`` | ROLE | none | |

Tags act from left to right: the last role wins, bits add up, and a role after a tool tag is an error because the tool
tag has fixed the role. Pure Python: the data pipeline imports this module and must not pull in torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from refractor_megatron.distinction.roles import ROLES, MaskBit
from refractor_megatron.errors import DataError

_CATEGORIES = ("tool", "safety", "retrieval", "segment", "role")
_TAG = re.compile(r"<([a-z]+):([^<>:\s]+)>")
#: Machine-readable code of an unknown tag, in its error.
UNKNOWN_PROTOCOL_TAG = "UNKNOWN_PROTOCOL_TAG"


@dataclass(frozen=True)
class TokenHint:
    """What a message's tags say about all of its tokens.

    role: after overrides. bits: mask bits of ``MaskBit``. tools: names of the tool tags in order, the last one being
    the gating feature ``tool_id``. new_segment: the message begins a new segment.
    """

    role: str
    bits: int = 0
    tools: tuple[str, ...] = ()
    new_segment: bool = False

    @property
    def tool_id(self) -> str | None:
        """Name of the tool that the message belongs to."""
        return self.tools[-1] if self.tools else None


def read_tags(role: object, tags: object, where: str, roles: Sequence[str] = ROLES) -> TokenHint:
    """Applies a message's protocol tags to its role.

    where: file and place of the message, for errors. Errors: ``DataError`` for an unknown role, a malformed list, a
    role after a tool tag, and an unknown tag: skipping a misspelt one would drop the bit that hides the message.
    """
    name = _known_role(role, where, roles)
    if not isinstance(tags, list | tuple) or not all(isinstance(tag, str) for tag in tags):
        raise DataError(f"{where}: protocol_tags must be a list of strings such as <tool:calc>.")
    bits = MaskBit(0)
    tools: list[str] = []
    for tag in tags:
        match = _TAG.fullmatch(tag)
        category, identifier = match.groups() if match else ("", "")
        if category == "tool":
            name, bits = _known_role("tool", where, roles), bits | MaskBit.TOOL_SCOPE
            tools.append(identifier)
        elif (category, identifier) == ("safety", "restricted"):
            bits |= MaskBit.SAFETY_SCOPE
        elif (category, identifier) == ("retrieval", "context"):
            bits |= MaskBit.RET_SCOPE
        elif category == "segment":
            bits |= MaskBit.SEGMENT
        elif category == "role":
            if tools:
                raise DataError(
                    f"{where}: the role override {tag} follows a tool tag, which fixes the role; remove one."
                )
            name = _known_role(identifier, where, roles)
        else:
            raise DataError(f"{where}: {UNKNOWN_PROTOCOL_TAG} {tag!a}; {_nearest_tag(tag)}.")
    return TokenHint(name, int(bits), tuple(tools), MaskBit.SEGMENT in bits)


def _known_role(role: object, where: str, roles: Sequence[str]) -> str:
    if not isinstance(role, str) or role not in roles:
        raise DataError(f"{where}: unknown role {role!r}; the roles are {', '.join(roles)}.")
    return role


def _nearest_tag(tag: str) -> str:
    """The known tag that an unknown one is likely to mean, or the list of all."""
    category, _, identifier = tag.strip(" <>").partition(":")
    close = get_close_matches(category.lower(), _CATEGORIES, n=1)
    if not close:
        return "known are <tool:NAME>, <safety:restricted>, <retrieval:context>, <segment:NAME> and <role:ROLE>"
    only = {"safety": "restricted", "retrieval": "context"}
    meant = only.get(close[0]) or re.sub(r"[<>:\s]+", "_", identifier.strip()) or "NAME"
    return f"did you mean {f'<{close[0]}:{meant}>'!a}"
