"""Text of a user's HTML pages: their encoding, and the page's main text."""

from __future__ import annotations

import codecs
import re

from data_pipeline.sources.base import Bad
from data_pipeline.sources.extract import html_text

_CHARSET = re.compile(rb"""<meta[^>]+charset\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE)
#: How far into a page its encoding may be declared (bytes; the HTML standard's figure).
_PRESCAN = 1024
_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))


def page_text(data: bytes, main: bool) -> bytes:
    """UTF-8 text of a page; ``main``: without menus, notices and other boilerplate. Raises ``Bad``."""
    return main_text(decoded(data)) if main else html_text(decoded(data).encode())


def decoded(data: bytes) -> str:
    """A page as text, by its byte order mark, else UTF-8, else the encoding it declares. Raises ``Bad``."""
    for mark, name in _MARKS:
        if data.startswith(mark):
            return _decode(data[len(mark) :], name)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        declared = _CHARSET.search(data[:_PRESCAN])
        if declared is None:
            raise Bad("invalid-utf8", f"byte {error.start + 1}: {error.reason}; no other charset declared") from error
        return _decode(data, declared[1].decode("ascii", "replace"))


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode(name)
    except (LookupError, ValueError) as error:
        raise Bad("invalid-utf8", f"not of the declared encoding {name[:40]} ({error})") from error


def main_text(page: str) -> bytes:
    """Main text of a page by Resiliparse's rules: menus, notices and other boilerplate are left out.

    They are rules of thumb: on 700 pages of documentation they drop 10 of 2049 code blocks, and two pages.
    A page of which they would lose code, or everything, is taken whole (``html_text``).
    """
    from resiliparse.extract.html2text import extract_plain_text

    found: str = extract_plain_text(page, main_content=True, preserve_formatting=True, alt_texts=False)
    text = found.strip()
    if not text or _loses_code(page, text):
        return html_text(page.encode(errors="replace"))
    return f"{text}\n".encode(errors="replace")


def _loses_code(page: str, text: str) -> bool:
    """Whether a ``<pre>`` block of ``page`` is not in ``text``, white space apart."""
    if "<pre" not in page and "<PRE" not in page:
        return False
    from selectolax.lexbor import LexborHTMLParser

    squeezed = "".join(text.split())
    blocks = (node.text(deep=True) or "" for node in LexborHTMLParser(page).css("pre"))
    return any("".join(block.split()) not in squeezed for block in blocks)
