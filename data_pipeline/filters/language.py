"""Language of a document by the model that py3langid bundles (Lui and Baldwin 2012), run by a compiled kernel.

The library walks a state machine over the bytes in Python, at about 1 MB/s; here numba walks it, and the sums are taken
in double precision and in the order of first occurrence, so that they depend on nothing but the text. The label is that
of the library with ``norm_probs``, with one exception: a text without any feature of the model is "und" with score 0
(the library gives 1/classes to all, and "sr" wins, since it holds two classes).
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from numba import njit

#: A longer document is judged by its first ``HEAD`` bytes and ``MIDDLE`` bytes from its middle, cut at characters.
HEAD, MIDDLE = 1000, 500
UNKNOWN = "und"
#: Weights are kept as whole multiples of 1 / this: exact, and half the memory traffic of float32.
_SCALE = 512


@dataclass(frozen=True)
class Model:
    """Arrays of the model. ``moves`` [rows * 256]: the next state; ``base`` [states]: where a state's row begins;
    ``feature`` [states]: the feature seen there, or -1; ``weights`` [features, classes] and ``prior`` [classes], in
    units of 1 / ``_SCALE``; ``first`` [classes]: of the classes with the same label the first.
    """

    moves: npt.NDArray[np.uint32]
    base: npt.NDArray[np.int64]
    feature: npt.NDArray[np.int32]
    weights: npt.NDArray[np.int16]
    prior: npt.NDArray[np.float64]
    classes: tuple[str, ...]
    first: npt.NDArray[np.int64]


@cache
def load_model() -> Model:
    """The model, once for each process (about 0.5 s, 70 MB)."""
    from py3langid.langid import LanguageIdentifier  # type: ignore[import-untyped]

    library = LanguageIdentifier.from_model_file("data/model.npz.xz")
    scaled = np.asarray(library.nb_ptc, np.float32) * np.float32(_SCALE)
    weights = scaled.astype(np.int16)
    assert np.array_equal(weights, scaled)  # half-precision numbers from 2 to 16 are multiples of 1/512
    classes = tuple(str(label) for label in library.nb_classes)
    return Model(
        moves=np.asarray(library.tk_nextmove, np.uint32),
        base=np.asarray(library.tk_row, np.int64) << 8,
        feature=np.asarray(library.tk_output, np.int32),
        weights=weights,
        prior=np.asarray(library.nb_pc, np.float64) * _SCALE,
        classes=classes,
        first=np.array([classes.index(label) for label in classes], np.int64),
    )


def languages() -> tuple[str, ...]:
    """Codes that ``identify`` may give, sorted."""
    return tuple(sorted({*load_model().classes, "und"}))


def sample(text: bytes) -> bytes:
    """What of a document is looked at: all of a short one, else its head, a line end and a slice of its middle."""
    if len(text) <= HEAD + MIDDLE:
        return text
    middle = max(HEAD, len(text) // 2)
    begin = _character(text, middle)
    return text[: _character(text, HEAD)] + b"\n" + text[begin : _character(text, min(begin + MIDDLE, len(text)))]


def _character(text: bytes, at: int) -> int:
    """``at``, moved back to the start of a character (by three bytes at most)."""
    for back in range(4):
        if at - back <= 0 or at - back >= len(text) or text[at - back] & 0xC0 != 0x80:
            return at - back
    return at


def prepared(text: bytes) -> bytes:
    """What the library feeds its model: NFC, and lower case where all is upper case."""
    if text.isascii():
        return text.lower() if text.isupper() else text
    try:
        decoded = text.decode()
    except UnicodeDecodeError as error:
        if error.start < len(text) - 3:
            return text
        decoded = text[: error.start].decode()  # cut within its last character
    if decoded.isupper():
        decoded = decoded.lower()
    return unicodedata.normalize("NFC", decoded).encode()


@njit(cache=True, nogil=True)
def _scores(flat, offsets, moves, base, feature, weights, prior, logs, first):  # type: ignore[no-untyped-def]
    """Best class int64 [n] (-1 without features) and its probability float64 [n] of the texts flat[offsets[i]:...]."""
    documents, classes = offsets.shape[0] - 1, prior.shape[0]
    best, score = np.full(documents, -1, np.int64), np.zeros(documents)
    counts = np.zeros(weights.shape[0], np.int32)
    found = np.empty(logs.shape[0], np.int32)
    sums = np.empty(classes)
    for d in range(documents):
        state, distinct = np.int64(0), 0
        for i in range(offsets[d], offsets[d + 1]):
            state = np.int64(moves[base[state] + flat[i]])
            f = feature[state]
            if f >= 0:
                if counts[f] == 0:
                    found[distinct] = f
                    distinct += 1
                counts[f] += 1
        if distinct == 0:
            continue
        for c in range(classes):
            sums[c] = prior[c]
        for k in range(distinct):
            f = found[k]
            weight = logs[counts[f]]
            counts[f] = 0
            row = weights[f]
            for c in range(classes):
                sums[c] += weight * row[c]
        # softmax, cooled by the root of the length as the library does; classes of one label together
        top, heat = sums.max(), 1.0 / (_SCALE * np.sqrt(np.float64(offsets[d + 1] - offsets[d])))
        total = 0.0
        for c in range(classes):
            sums[c] = np.exp((sums[c] - top) * heat)
            total += sums[c]
        for c in range(classes):
            if first[c] != c:
                sums[first[c]] += sums[c]
                sums[c] = 0.0
        best[d] = np.argmax(sums)
        score[d] = sums[best[d]] / total
    return best, score


def classify(texts: list[bytes]) -> tuple[list[str], npt.NDArray[np.float32]]:
    """Label and probability of each text, all of it looked at."""
    model = load_model()
    ready = [prepared(text) for text in texts]
    offsets = np.zeros(len(ready) + 1, np.int64)
    np.cumsum([len(text) for text in ready], out=offsets[1:])
    flat = np.frombuffer(b"".join(ready), np.uint8)
    longest = max((len(text) for text in ready), default=0)
    logs = np.log1p(np.arange(longest + 1, dtype=np.float32)).astype(np.float64)
    best, score = _scores(
        flat, offsets, model.moves, model.base, model.feature, model.weights, model.prior, logs, model.first
    )
    return [UNKNOWN if one < 0 else model.classes[one] for one in best.tolist()], score.astype(np.float32)


def identify(flat: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]) -> tuple[list[str], npt.NDArray[np.float32]]:
    """Language code and probability, float32 [n], of each document flat[offsets[i]:offsets[i + 1]], by its ``sample``.

    Codes: ISO 639-1, or -3 where there is none; "zxx": no language; "und": undetermined.
    """
    bounds = offsets.tolist()
    return classify([sample(flat[begin:end].tobytes()) for begin, end in zip(bounds, bounds[1:], strict=False)])
