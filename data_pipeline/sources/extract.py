"""Plain text out of HTML pages and manual pages."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from selectolax.lexbor import LexborNode

_DROP = (
    "script, style, head, nav, aside, header, footer, form, svg, button, a.headerlink, div.sphinxsidebar, div.related, "
    "div.navheader, div.navfooter, div.footer, div.toc, div.nav, #hd, #ft, #sidebar"
)
#: Elements that begin on a new line, and those with an empty line around them.
_BLOCKS = frozenset((
    "address", "article", "aside", "blockquote", "body", "br", "caption", "dd", "details", "div", "dl", "dt",
    "fieldset", "figure", "figcaption", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "main", "ol", "p",
    "pre", "section", "summary", "table", "tbody", "td", "th", "thead", "tr", "ul",
))  # fmt: skip
_PARAGRAPHS = frozenset(
    ("blockquote", "dl", "h1", "h2", "h3", "h4", "h5", "h6", "ol", "p", "pre", "section", "table", "ul")
)
_BULLET = "- "
_SPACE = re.compile(r"[ \t\r\n\f]+")
_TRAILING = re.compile(r"[ \t]+\n")
_GAP = re.compile(r"\n{3,}")


def html_text(data: bytes) -> bytes:
    """Text of an HTML page: blocks on lines of their own, ``<pre>`` as it stands, navigation left out."""
    from selectolax.lexbor import LexborHTMLParser

    page = LexborHTMLParser(data)
    for node in page.css(_DROP):
        node.decompose()
    out: list[str] = []
    if page.body is not None:
        _walk(page.body, out)
    return _tidy("".join(out)).encode()


def _walk(root: LexborNode, out: list[str]) -> None:
    """Depth-first over ``root`` without recursion; pages can nest deeply."""
    stack: list[LexborNode | str] = [root]
    while stack:
        node = stack.pop()
        if isinstance(node, str):
            out.append(node)
            continue
        tag = node.tag
        if tag == "-text":
            text = _SPACE.sub(" ", node.text_content or "")
            if out and out[-1].endswith(("\n", _BULLET)):
                text = text.lstrip()
            if text:
                out.append(text)
            continue
        end = "\n\n" if tag in _PARAGRAPHS else "\n" if tag in _BLOCKS else ""
        if end and not (out and out[-1] == _BULLET):
            out.append(end)
        if tag == "pre":
            out.append((node.text(deep=True) or "").strip("\n") + end)
            continue
        if tag == "li":
            out.append(_BULLET)
        if end:
            stack.append(end)
        children = []
        child = node.child
        while child is not None:
            children.append(child)
            child = child.next
        stack.extend(reversed(children))


def _tidy(text: str) -> str:
    text = _GAP.sub("\n\n", _TRAILING.sub("\n", text)).strip()
    return text + "\n" if text else ""


_ESCAPES = {
    "-": "-", "e": "\\", "\\": "\\", "&": "", "/": "", ",": "", "|": "", "^": "", "c": "", "%": "", ":": "",
    " ": " ", "~": " ", "0": " ", "'": "'", "`": "`", ".": ".", "t": "\t",
}  # fmt: skip
_GLYPHS = {
    "aq": "'", "dq": '"', "em": "\u2014", "en": "\u2013", "bu": "\u2022", "co": "\xa9", "rg": "\xae",
    "lq": "\u201c", "rq": "\u201d", "oq": "\u2018", "cq": "\u2019", "ti": "~", "ha": "^", "rs": "\\", "mu": "\xd7",
    "->": "\u2192", "<-": "\u2190", "<=": "\u2264", ">=": "\u2265", "+-": "\xb1", "hy": "-", "ga": "`", "at": "@",
    "sh": "#", "lB": "[", "rB": "]", "lC": "{", "rC": "}", "ss": "\xdf", "12": "\xbd", "14": "\xbc", "*a": "\u03b1",
    "*b": "\u03b2", "*m": "\u03bc", "*p": "\u03c0", "tm": "\u2122", "de": "\xb0", "sc": "\xa7", "dg": "\u2020",
    "Do": "$", "ba": "|", "sl": "/", "ul": "_", "or": "|", "cu": "\u222a", "if": "\u221e", "la": "\u27e8",
    "ra": "\u27e9",
}  # fmt: skip
_ROFF_ESCAPE = re.compile(
    r'\\(?:"[^\n]*'  # comment
    r"|f(?:\[[^\]]*\]|\(..|.)"  # font
    r"|[sS][+-]?\d+"  # size
    r"|\*(?:\[(?P<s1>[^\]]*)\]|\((?P<s2>..)|(?P<s3>.))"  # string
    r"|[hvwlLoDXZ]'[^']*'"  # motion, drawing
    r"|\[(?P<g1>[^\]]*)\]|\((?P<g2>..)"  # glyph
    r"|(?P<one>.))"
)
_CONTINUED = re.compile(r"(?<!\\)\\\n")
_ARGUMENT = re.compile(r'"((?:[^"]|"")*)"?|(\S+)')
_HEADINGS = frozenset(("SH", "SS", "Sh", "Ss"))
_PARAGRAPH_REQUESTS = frozenset(("PP", "P", "LP", "Pp", "TP", "IP", "HP"))
_LINE_REQUESTS = frozenset(("TQ", "sp", "br", "RS", "RE", "Bl", "El", "It", "Bd", "Ed", "in", "ti"))
_FONTS = frozenset(("B", "I", "R", "SM", "SB", "BR", "RB", "BI", "IB", "RI", "IR"))
_SKIP_TO = {"TS": "TE", "EQ": "EN", "de": ".", "ig": "."}


def man_text(data: bytes) -> bytes:
    """Text of a ``man`` page source: requests and fonts removed, paragraphs filled, examples kept line by line.

    Tables and equations are left out, as their sources are not prose. ``.so`` redirections give nothing.
    """
    lines = _CONTINUED.sub("", data.decode(errors="replace")).splitlines()
    out: list[str] = []
    fill, skip_to = True, ""
    for line in lines:
        control = line[:1] in (".", "'")
        request, _, rest = line[1:].strip().partition(" ") if control else ("", "", "")
        if skip_to:
            skip_to = "" if request == skip_to or (skip_to == "." and line.strip() == "..") else skip_to
        elif not control:
            _put(out, _unescape(line), fill)
        elif request in _SKIP_TO:
            skip_to = _SKIP_TO[request]
        elif request in ("nf", "EX", "fi", "EE"):
            fill = request in ("fi", "EE")
            out.append("\n")
        elif request in _HEADINGS:
            out.append(f"\n\n{_unescape(_arguments(rest, ' '))}\n")
        elif request == "TH":
            out.append(_unescape(" ".join(_split(rest)[:2])) + "\n")
        elif request in _PARAGRAPH_REQUESTS or request in _LINE_REQUESTS:
            out.append("\n\n" if request in _PARAGRAPH_REQUESTS else "\n")
            if request == "IP" and rest:
                _put(out, _unescape(_split(rest)[0]), fill)
        elif request in _FONTS:
            _put(out, _unescape(_arguments(rest, "" if len(request) == 2 and request != "SM" else " ")), fill)
        elif request in ("UR", "MT"):
            _put(out, f"<{_unescape(rest)}>", fill)
    return _tidy("".join(out)).encode()


def _put(out: list[str], text: str, fill: bool) -> None:
    if fill and text and out and not out[-1].endswith("\n"):
        text = " " + text
    if text or not fill:
        out.append(text if fill else text + "\n")
    else:
        out.append("\n\n")


def _split(rest: str) -> list[str]:
    return [quoted.replace('""', '"') or bare for quoted, bare in _ARGUMENT.findall(rest)]


def _arguments(rest: str, joint: str) -> str:
    return joint.join(_split(rest))


def _unescape(text: str) -> str:
    return _ROFF_ESCAPE.sub(_glyph, text) if "\\" in text else text


def _glyph(match: re.Match[str]) -> str:
    string = match["s1"] or match["s2"] or match["s3"]
    if string is not None:
        return {"lq": "\u201c", "rq": "\u201d", "Tm": "\u2122", "R": "\u00ae"}.get(string, "")
    name = match["g1"] or match["g2"]
    if name is not None:
        if name.startswith("u") and len(name) == 5:
            return chr(int(name[1:], 16)) if re.fullmatch("[0-9A-F]{4}", name[1:]) else ""
        return _GLYPHS.get(name, "")
    one = match["one"]
    return _ESCAPES.get(one, one) if one is not None else ""
