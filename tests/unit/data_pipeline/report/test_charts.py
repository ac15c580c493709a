"""Charts: bars in proportion, within the picture, and said in words."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.report.charts import HEIGHT, WIDTH, Histogram, Series
from data_pipeline.report.html import count, percent, short


def _bars(chart: Histogram) -> list[dict[str, str]]:
    svg = chart.svg()
    tree = ElementTree.fromstring(svg[svg.index("<svg") : svg.index("</svg>") + 6])
    return [bar.attrib for bar in tree.iter("rect")]


@given(
    st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)), min_size=2, max_size=40),
    st.booleans(),
    st.floats(1e-3, 1e3),
    st.floats(1.01, 1e6),
)
def test_bars_are_as_high_as_their_counts(
    counts: list[tuple[int, int]], logarithmic: bool, low: float, factor: float
) -> None:
    steps = len(counts)
    edges = [low * factor ** (k / steps) if logarithmic else low + k * factor for k in range(steps + 1)]
    series = [Series("a", "kept", [a for a, _ in counts]), Series("b", "gone", [b for _, b in counts])]
    chart = Histogram("t", edges, series, "x", logarithmic, [(edges[1], "here")])
    total = sum(a + b for a, b in counts)
    if not total:
        assert chart.svg() == ""
        return
    bars = _bars(chart)
    heights = sum(float(bar["height"]) for bar in bars)
    highest = max(a + b for a, b in counts)
    assert len(bars) == sum((a > 0) + (b > 0) for a, b in counts)
    for bar in bars:
        assert 0 <= float(bar["x"]) <= float(bar["x"]) + float(bar["width"]) <= WIDTH + 1
        assert float(bar["y"]) >= -0.1 and float(bar["y"]) + float(bar["height"]) <= HEIGHT
    # heights are rounded, and the least bar stays visible
    assert heights == pytest.approx(total / highest * (HEIGHT - 74), rel=0.55, abs=0.8 * len(bars))


def test_a_chart_says_what_it_shows() -> None:
    svg = Histogram("Title <", [1.0, 10.0, 100.0], [Series("kept", "kept", [3, 1])], "x & y", True).svg()
    assert 'role="img" aria-label="Title &lt;. kept: 4 documents. x &amp; y from 1 to 100."' in svg
    assert "<title>1 to 10: 3 documents</title>" in svg


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00\u202fk"),
        (62_681_975, "62.7\u202fM"),
        (999_600, "1000\u202fk"),
        (2e12, "2.00\u202fT"),
    ],
)
def test_short_numbers(number: float, said: str) -> None:
    assert short(number) == said


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (0, "0.0\u202f%"),
        (1e-9, "<\u202f0.1\u202f%"),
        (0.5, "50.0\u202f%"),
        (0.99999, ">\u202f99.9\u202f%"),
        (1, "100\u202f%"),
    ],
)
def test_percent_never_says_none_or_all_wrongly(share: float, said: str) -> None:
    assert percent(share) == said


def test_count_parts_thousands() -> None:
    assert count(1234567) == "1\u202f234\u202f567"
