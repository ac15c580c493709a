"""Plain text out of Mallard pages, the XML of GNOME's help."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from data_pipeline.sources.base import Bad

_BLOCKS = frozenset(
    ("p", "title", "subtitle", "item", "screen", "code", "tr", "td", "section", "note", "steps", "list")
)
_DROP = frozenset(("info", "media"))


def mallard_text(data: bytes) -> bytes:
    """Blocks on lines of their own; the page's header and the texts of pictures left out. Raises ``Bad``."""
    try:
        root = ET.fromstring(data)
    except (ET.ParseError, ValueError, LookupError) as error:
        raise Bad("broken-xml", str(error)) from error
    out: list[str] = []
    _walk(root, out)
    lines = (" ".join(line.split()) for line in "".join(out).split("\n"))
    text = "\n".join(line for line in lines if line)
    return (text + "\n").encode() if text else b""


def _walk(root: ET.Element, out: list[str]) -> None:
    """Depth-first without recursion; a string on the stack is text to come."""
    stack: list[ET.Element | str] = [root]
    while stack:
        node = stack.pop()
        if isinstance(node, str):
            out.append(node)
            continue
        name = node.tag.rpartition("}")[2] if isinstance(node.tag, str) else ""  # a comment's tag is a function
        if not name or name in _DROP:
            continue
        block = name in _BLOCKS and not (name == "code" and not node.get("mime"))
        out.append("\n" if block else "")
        out.append(" ".join((node.text or "").split("\n")))
        stack.append("\n" if block else "")
        for child in reversed(node):
            stack.append(" ".join((child.tail or "").split("\n")))
            stack.append(child)
