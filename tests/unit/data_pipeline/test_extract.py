from __future__ import annotations

import pytest

from data_pipeline.sources.base import Bad
from data_pipeline.sources.extract import html_text, man_text
from data_pipeline.sources.licence import short_licence
from data_pipeline.sources.mallard import mallard_text

HTML = b"""<html><head><title>No</title><style>x{}</style></head><body><nav>menu</nav>
<h1>Title</h1><p>One <b>bold</b>
  word.</p><pre>  keep
    this</pre><ul><li><p>first</p></li><li>second</li></ul>
<table><tr><td>a</td><td>b</td></tr></table><script>var x;</script>tail &amp; end</body></html>"""

MAN = rb""".\" comment
.TH OPEN 2 2020-01-01 Linux
.SH NAME
open \- open a file
.SH DESCRIPTION
The
.BR open ()
call \fIopens\fP
a file.
.PP
.nf
int x;
  int \
y;
.fi
.TS
l l.
dropped	table
.TE
.IP \(bu 2
item \(aqone\(aq
.de XX
hidden
..
See
.UR https://example.org
the page
.UE .
"""


def test_html_blocks_and_preformatted_text() -> None:
    assert html_text(HTML).decode() == (
        "Title\n\nOne bold word.\n\n  keep\n    this\n\n- first\n\n- second\n\na\n\nb\n\ntail & end\n"
    )


def test_html_without_text_is_empty() -> None:
    assert html_text(b"") == b""
    assert html_text(b"<html><head><title>x</title></head></html>") == b""


def test_deep_html_does_not_recurse() -> None:
    assert html_text(b"<div>" * 5000 + b"deep").strip() == b"deep"


def test_man_page() -> None:
    text = man_text(MAN).decode()
    assert text == (
        "OPEN 2\n\nNAME\nopen - open a file\n\nDESCRIPTION\nThe open() call opens a file.\n\n"
        "int x;\n  int y;\n\n\u2022 item 'one' See <https://example.org> the page\n"
    )


def test_redirected_man_page_is_empty() -> None:
    assert man_text(b".so man2/open.2\n") == b""


@pytest.mark.parametrize("source", [b"\\", b"\\f", b"\\(", b".IP", b".SH", b"'", b".", b".TS\nrest", b"\xff\\[uXYZW]"])
def test_broken_man_source_does_not_fail(source: bytes) -> None:
    assert isinstance(man_text(source), bytes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Files: *\nLicense: GPL-2+\n text\n\nFiles: b\nLicense: BSD-3-clause\n", "GPL-2+, BSD-3-clause"),
        ("License: A\nLicense: B\nLicense: A\nLicense: C\nLicense: D\n", "A, B, C and 1 more"),
        ("License:\n prose goes here\nsee /usr/share/common-licenses/GPL-2.\n", "GPL-2"),
        ("PSF LICENSE AGREEMENT FOR PYTHON", "PSF"),
        ("", "see copyright file"),
    ],
)
def test_short_licence(text: str, expected: str) -> None:
    assert short_licence(text) == expected


PAGE = """<?xml version="1.0" encoding="utf-8"?>
<page xmlns="http://projectmallard.org/1.0/" id="x"><info><desc>not this</desc></info><!-- nor this -->
<title>Titel</title><p>Ein <gui>Knopf</gui> und
  <code>ls</code>.</p><media type="image"><p>a picture</p></media>
<steps><item><p>eins</p></item><item><p>zwei</p></item></steps><screen>a b</screen></page>"""


def test_mallard_page() -> None:
    assert mallard_text(PAGE.encode()).decode() == "Titel\nEin Knopf und ls.\neins\nzwei\na b\n"
    assert mallard_text(b"<page/>") == b""


@pytest.mark.parametrize("data", [b"", b"<page>", b"\xff", b"<page>&unknown;</page>"])
def test_broken_mallard_page_is_said_to_be(data: bytes) -> None:
    with pytest.raises(Bad) as caught:
        mallard_text(data)
    assert caught.value.reason == "broken-xml"


def test_deep_mallard_page_does_not_recurse() -> None:
    assert mallard_text(b"<p>" * 5000 + b"deep" + b"</p>" * 5000) == b"deep\n"
