"""Roles, mask bits and protocol tags: the vocabulary of a token record (spec section 2 and the tag table of section 3).

Pure Python: the data pipeline imports this module and must not pull in torch.
"""

from __future__ import annotations

from enum import IntFlag

#: Role names in id order (uint8). The enumeration is extensible: append, never reorder.
ROLES: tuple[str, ...] = ("system", "user", "assistant", "tool", "code", "data")
ROLE_ID: dict[str, int] = {name: i for i, name in enumerate(ROLES)}
#: Role of plain documents.
DOCUMENT_ROLE = "data"


class MaskBit(IntFlag):
    """The five mask classes as bits of a token's ``mask_bits`` (uint32)."""

    CAUSAL = 1
    SEGMENT = 2
    TOOL_SCOPE = 4
    SAFETY_SCOPE = 8
    RET_SCOPE = 16


#: Bits that take part in role × role × bits rules; CAUSAL and SEGMENT act on positions and segments.
SCOPE_BITS: tuple[MaskBit, ...] = (MaskBit.TOOL_SCOPE, MaskBit.SAFETY_SCOPE, MaskBit.RET_SCOPE)


class RecordPolicy(IntFlag):
    """Permissions of a retrieved record (spec section 2), as bits of a uint8."""

    ALLOW_COPY = 1
    ALLOW_TOOLS = 2


#: Roles whose tokens a model writes: text that may not be copied is hidden from them.
WRITING_ROLES: tuple[str, ...] = ("assistant", "code", "tool")
#: Role that calls tools: text that may not reach a tool is hidden from it, and from every token of TOOL_SCOPE.
CALLING_ROLE = "tool"
#: What a retrieved record is to the rules: text of this role that carries RET_SCOPE.
RETRIEVED_ROLE = "data"
