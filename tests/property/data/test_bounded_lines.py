"""Lines of bounded length against ``splitlines`` of the whole."""

from __future__ import annotations

import io

import zstandard
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.sources import compressed
from data_pipeline.sources.lines import bounded_lines

TEXTS = st.lists(st.sampled_from([b"", b"a", b"bb", b"ccccc", b"d" * 40, b"e\r", b"\x00"]), max_size=12)


@given(TEXTS, st.booleans(), st.integers(1, 45))
def test_every_line_has_its_number_and_long_ones_are_said_to_be(lines: list[bytes], ended: bool, limit: int) -> None:
    data = b"\n".join(lines) + (b"\n" if ended and lines else b"")
    expected = data.split(b"\n")[: -1 if data.endswith(b"\n") or not data else None]
    found = list(bounded_lines(io.BytesIO(data), limit))
    assert [number for number, _, _ in found] == list(range(1, len(expected) + 1))
    for (_, line, bad), whole in zip(found, expected, strict=True):
        assert (bad is not None) == (len(whole.rstrip(b"\r")) > limit)
        if bad is None:
            assert line.rstrip(b"\n") == whole
        else:
            assert bad.reason == "too-long" and whole.startswith(line.rstrip(b"\n"))


@given(st.lists(st.binary(max_size=5000), max_size=6), st.integers(1, 9000))
def test_zstd_frames_concatenate_however_they_are_read(parts: list[bytes], step: int) -> None:
    raw = io.BytesIO(b"".join(zstandard.compress(part) for part in parts))
    stream = compressed._ZstdFrames(raw)
    out = bytearray()
    while block := stream.read(step):
        out += block
    assert bytes(out) == b"".join(parts)
