"""Encoding in bulk: the ids of ``Tokenizer.encode`` for many documents at once, several times faster.

gigatoken does the work. It scans text by hand-written scanners of well-known split patterns, of which Llama 3's is ours
but for one alternative: it also takes contractions in mixed case (``'Ll``) and with a long s. Where none of those can
begin a piece the two patterns cut alike; everything else goes through ``Tokenizer.encode``'s own steps. So do imported
tokenizers with another pattern; ``FastEncoder.fast`` says which it is.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import os
import re
import string
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from refractor_megatron.tokenizer.hf_files import merge_pair
from refractor_megatron.tokenizer.pieces import PIECE_CHARS, SPLIT_PATTERN, bounded, utf8_runs
from refractor_megatron.tokenizer.tokenizer import Tokenizer
from refractor_megatron.tokenizer.train import byte_alphabet

if TYPE_CHECKING:
    import gigatoken
    import psutil

    Ids = npt.NDArray[np.int32]
    Longs = npt.NDArray[np.int64]
    Bytes = npt.NDArray[np.uint8]

#: By these very words the library knows the pattern. The rest is ``SPLIT_PATTERN`` after its first alternative.
LIBRARY_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + SPLIT_PATTERN.partition(")|")[2]

#: The library keeps every word it meets. When the process has grown by this (bytes) in it, it is loaded afresh.
GROWTH_BYTES = 512 << 20

#: What the library's pattern takes for contractions and ours does not, the last with a long s.
_ODD = rb"'(?:lL|Ll|vE|Ve|rE|Re|\xc5\xbf)"
_LINE_END = re.compile(rb"\n(?=[A-Za-z])")
#: No piece ends between these and a quote: a blank leads the piece of the quote, and marks share it.
_BEFORE = frozenset(b" " + string.punctuation.encode())
#: Characters that the split pattern treats each in its own way.
_PROBE = "aZé日1٣ \n\r\t\u3000'!\u0301s"


class FastEncoder:
    """Encodes batches. Threads may share one; the library keeps the interpreter to itself, so they take turns."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._file = _library_file(tokenizer) if tokenizer.pattern == SPLIT_PATTERN else None
        self._load()
        assert self._agrees(), "the installed gigatoken cuts text otherwise than tiktoken"

    @property
    def fast(self) -> bool:
        """Whether this tokenizer takes the fast path; ids are the same on both."""
        return self._file is not None

    def encode_batch(self, data: Bytes, offsets: Longs) -> tuple[Ids, Longs]:
        """``(ids, starts)`` of documents ``data[offsets[i]:offsets[i + 1]]``, ``offsets`` int64 [n + 1] not falling.

        ids: int32, all documents back to back; document i is ``ids[starts[i]:starts[i + 1]]``, equal to
        ``Tokenizer.encode`` of its bytes.
        """
        assert offsets.ndim == 1 and len(offsets) and offsets[0] >= 0 and offsets[-1] <= len(data)
        assert (np.diff(offsets) >= 0).all(), "offsets do not fall"
        data, offsets = np.ascontiguousarray(data), np.ascontiguousarray(offsets)
        if self._growth > GROWTH_BYTES:
            self._load()
        before = _resident()
        # One id a byte at most. Pages that are never written cost no memory.
        ids = np.empty(int(offsets[-1] - offsets[0]), dtype=np.uint32)
        starts = [0]
        for row in self._rows(data, offsets):
            starts.append(starts[-1] + len(row))
            ids[starts[-2] : starts[-1]] = row
        self._growth += max(0, _resident() - before - ids[: starts[-1]].nbytes)
        return ids[: starts[-1]].view(np.int32), np.array(starts, dtype=np.int64)

    def _load(self) -> None:
        self._library: gigatoken.Tokenizer | None = None  # frees the old one first
        self._growth = 0
        if self._file:
            import gigatoken

            self._library = gigatoken.Tokenizer.from_json(self._file)

    def _rows(self, data: Bytes, offsets: Longs) -> Iterator[npt.NDArray[np.uint32]]:
        """Ids of each document."""
        library, plain = self._library, _plain(data, offsets) if self._file else np.zeros(len(offsets) - 1, np.bool_)
        whole, at = data.data, offsets.tolist()
        for start, stop, simple in zip(at[:-1], at[1:], plain.tolist(), strict=True):
            raw = bytes(whole[start:stop])
            yield library.encode(raw) if library and simple else self._in_pieces(raw, library)

    def _in_pieces(self, raw: bytes, library: gigatoken.Tokenizer | None) -> npt.NDArray[np.uint32]:
        """Ids of any document, cut as ``Tokenizer.encode`` cuts it."""
        if library is None:
            return np.array(self._tokenizer.encode(raw), dtype=np.uint32)
        rows = [np.empty(0, dtype=np.uint32)]
        for run in utf8_runs(raw):
            if isinstance(run, bytes):
                rows.append(np.array(self._tokenizer.encode(run), dtype=np.uint32))
                continue
            for piece in map(str.encode, bounded(run)):
                for part, simple in _parts(piece):
                    ids = library.encode(part) if simple else np.array(self._tokenizer.encode(part), dtype=np.uint32)
                    rows.append(ids)
        return np.concatenate(rows)

    def _agrees(self) -> bool:
        """Whether the library scans as it should: every three of unlike characters, one after the other."""
        text = "".join(map("".join, itertools.product(_PROBE, repeat=3)))
        return bool(self._in_pieces(text.encode(), self._library).tolist() == self._tokenizer.encode(text))


def _plain(data: Bytes, offsets: Longs) -> npt.NDArray[np.bool_]:
    """Which documents are one piece of text with nothing odd in it, bool [n]; the library takes them as they are."""
    plain: npt.NDArray[np.bool_] = np.diff(offsets) <= PIECE_CHARS  # at most as many characters as bytes
    begin, end = offsets[[0, -1]].tolist()
    odd = np.array(_odd_places(data[begin:end]), dtype=np.int64) + begin
    plain[np.searchsorted(offsets, odd, side="right") - 1] = False
    return plain & _are_text(data, offsets)


def _odd_places(text: bytes | Bytes) -> list[int]:
    return [match.start() for match in _odd_expression().finditer(text)]


@functools.cache
def _odd_expression() -> Any:
    import re2  # several times faster here than re, and it searches arrays

    options = re2.Options()
    options.encoding = re2.Options.Encoding.LATIN1  # bytes
    return re2.compile(_ODD, options)


def _parts(piece: bytes) -> Iterator[tuple[bytes, bool]]:
    """Consecutive parts of ``piece`` that encode as if alone, and whether the library may: no line with something odd.

    Odd is only what might begin a match of the split pattern. No match goes on from a line end to a letter.
    """
    odd = [place for place in _odd_places(piece) if place == 0 or piece[place - 1] not in _BEFORE]
    if not odd:
        yield piece, True
        return
    lines = [0, *(match.end() for match in _LINE_END.finditer(piece)), len(piece)]
    at = 0
    for line in sorted({bisect.bisect_right(lines, place) - 1 for place in odd}):
        yield piece[at : lines[line]], True
        yield piece[lines[line] : lines[line + 1]], False
        at = lines[line + 1]
    yield piece[at:], True


def _are_text(data: Bytes, offsets: Longs) -> npt.NDArray[np.bool_]:
    """Which documents are UTF-8, bool [n]."""
    import pyarrow as pa

    count = len(offsets) - 1
    texts = pa.LargeStringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(data))
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        return np.array([_is_text(data[a:b].tobytes()) for a, b in itertools.pairwise(offsets)], dtype=np.bool_)
    return np.ones(count, dtype=np.bool_)


def _is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _library_file(tokenizer: Tokenizer) -> str:
    """The vocabulary as Hugging Face's ``tokenizer.json``, without special tokens: text cannot name them."""
    visible = {byte: char for char, byte in byte_alphabet().items()}
    ids = {token: i for i, token in enumerate(tokenizer.ranks)}
    names = {token: "".join(map(visible.__getitem__, token)) for token in ids}
    pairs = [merge_pair(token, ids) for token in tokenizer.ranks if len(token) > 1]
    model = {
        "type": "BPE",
        "vocab": {names[token]: i for token, i in ids.items()},
        "merges": [(names[left], names[right]) for left, right in filter(None, pairs)],
        "ignore_merges": True,
    }
    split = {"type": "Split", "pattern": {"Regex": LIBRARY_PATTERN}, "behavior": "Isolated", "invert": False}
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    steps = {"type": "Sequence", "pretokenizers": [split, letters]}
    return json.dumps({"version": "1.0", "added_tokens": [], "pre_tokenizer": steps, "model": model})


def _resident() -> int:
    """Memory of this process, bytes."""
    return int(_process(os.getpid()).memory_info().rss)


@functools.lru_cache(maxsize=1)
def _process(number: int) -> psutil.Process:
    import psutil

    return psutil.Process(number)
