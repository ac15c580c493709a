"""Heuristic quality: named rules over numeric signals, with the thresholds of the papers they come from.

Sources: Gopher (Rae et al. 2021, section A.1.1 and its table A1), C4 (Raffel et al. 2020, section 2.2), FineWeb
(Penedo et al. 2024, section 3.6), SantaCoder (Ben Allal et al. 2023, "basic" filter of its code). All but the last were
made for web pages. On by default are the rules that also hold for documentation, books and code; the others say in
``note`` what they take that is good. Signals are stored for all, so that a rule may be switched on, or a threshold
moved, without reading the text again.

Differences from the papers, which cannot be had in one fast pass over bytes: words are parted by white space, not by a
language's tokenizer; C4's line rules (javascript, policy phrases), which cut lines, here judge a document by its share
of such lines; the n-gram that Gopher calls most common must occur twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.filters.characters import flag_table
from data_pipeline.filters.signal_kernels import signal_matrix, word_code
from data_pipeline.filters.signals import SIGNALS
from refractor_megatron.errors import ConfigError

#: More of a text than this in scripts without spaces, and rules about words and their n-grams do not hold for it.
SPACELESS = 0.2

#: Gopher's eight for English; eight of the most frequent for each other language. ASCII capitals match.
STOP_WORDS: dict[str, tuple[str, ...]] = {
    "en": ("the", "be", "to", "of", "and", "that", "have", "with"),
    "cs": ("a", "je", "v", "na", "se", "že", "pro", "s"),
    "da": ("og", "i", "at", "det", "er", "en", "til", "af"),
    "de": ("der", "die", "und", "in", "zu", "den", "das", "mit"),
    "es": ("de", "la", "que", "el", "en", "y", "los", "con"),
    "fi": ("ja", "on", "ei", "se", "että", "oli", "tai", "kun"),
    "fr": ("de", "la", "le", "et", "les", "des", "que", "pour"),
    "hu": ("a", "az", "és", "hogy", "nem", "egy", "is", "vagy"),
    "it": ("di", "e", "che", "il", "la", "per", "un", "con"),
    "nl": ("de", "van", "het", "een", "en", "in", "dat", "met"),
    "no": ("og", "i", "det", "er", "en", "til", "av", "som"),
    "pl": ("w", "i", "na", "z", "do", "nie", "się", "jest"),
    "pt": ("de", "que", "o", "e", "do", "da", "em", "para"),
    "ro": ("de", "și", "în", "a", "la", "care", "cu", "pentru"),
    "ru": ("и", "в", "не", "на", "с", "что", "для", "по"),
    "sv": ("och", "i", "att", "det", "som", "en", "är", "av"),
    "tr": ("ve", "bir", "bu", "için", "ile", "da", "de", "olarak"),
    "uk": ("і", "в", "не", "на", "з", "що", "для", "до"),
}
_LISTED = tuple(sorted(STOP_WORDS))


@dataclass(frozen=True)
class Rule:
    """A document fails where ``signal`` lies below ``low`` or above ``high``; at a threshold it passes.

    ``spaced``: holds only for scripts that part words by spaces. ``conversations``: holds for conversations as well,
    whose turns follow each other without line ends. ``least_words``: shorter documents pass. ``note``: why it is off.
    """

    name: str
    signal: str
    source: str
    low: float | None = None
    high: float | None = None
    on: bool = True
    spaced: bool = False
    conversations: bool = False
    languages: tuple[str, ...] | None = None
    least_words: int = 0
    note: str = ""

    def applies(self, signals: Mapping[str, npt.NDArray[np.generic]]) -> npt.NDArray[np.bool_]:
        """Which documents the rule speaks of, bool [n]."""
        mask = np.ones(len(signals[self.signal]), np.bool_)
        if self.spaced:
            mask &= np.asarray(signals["spaceless"] <= np.float32(SPACELESS))
        if not self.conversations:
            mask &= ~np.asarray(signals["framed"], np.bool_)
        if self.languages is not None:
            mask &= np.isin(signals["language"], self.languages)
        if self.least_words:
            mask &= np.asarray(signals["words"] >= np.float32(self.least_words))
        return mask

    def fails(self, signals: Mapping[str, npt.NDArray[np.generic]]) -> npt.NDArray[np.bool_]:
        """Which documents fail, bool [n]."""
        values = np.asarray(signals[self.signal], np.float32)
        bad = np.zeros(len(values), np.bool_)
        if self.low is not None:
            bad |= values < np.float32(self.low)
        if self.high is not None:
            bad |= values > np.float32(self.high)
        return bad & self.applies(signals)

    def threshold(self, value: float) -> float:
        """The threshold that a failing ``value`` fails."""
        if self.low is not None and value < self.low:
            return self.low
        assert self.high is not None
        return self.high

    def credit(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """How well values pass, 0..1: 1 within the thresholds, else value/low or high/value."""
        values64 = values.astype(np.float64)
        credit = np.ones(len(values))
        if self.low is not None and self.low > 0:
            short = values < np.float32(self.low)
            credit[short] = np.maximum(values64[short], 0.0) / self.low
        if self.high is not None:
            beyond = values > np.float32(self.high)
            credit[beyond] = self.high / values64[beyond]
        return credit


_GOPHER, _C4, _FINEWEB = (
    "Rae et al. 2021, section A.1.1",
    "Raffel et al. 2020, section 2.2",
    "Penedo et al. 2024, section 3.6",
)
_SANTACODER = "Ben Allal et al. 2023, basic filter"
_REPEATED = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
_TEMPLATES = "takes reference pages, which repeat a template, and short ones"
_WRAPPED = "takes text wrapped by hand, lists and code"


def _gopher(
    name: str, signal: str, note: str, low: float | None = None, high: float | None = None, **more: Any
) -> Rule:
    return Rule(f"gopher-{name}/1", signal, _GOPHER, low, high, on=False, note=note, **more)


def _loose(name: str, signal: str, like: str, low: float | None = None, high: float | None = None, **more: Any) -> Rule:
    return Rule(f"loose-{name}/1", signal, f"{like} in {_GOPHER}", low, high, **more)


#: In the order in which a document is judged; the first failed rule is the one that the audit names. "loose" rules are
#: Gopher's with thresholds that documentation and code pass: at Gopher's own, 1 to 5 % of good pages fell to each.
RULES: tuple[Rule, ...] = (
    Rule("c4-lorem-ipsum/1", "lorem_ipsum", _C4, high=0, conversations=True),
    Rule("santacoder-alphanumeric/1", "alphanumeric", _SANTACODER, low=0.25, conversations=True),
    _loose("word-count", "words", "a fifth of the least", low=10),
    _loose(
        "mean-word-length", "mean_word_length", "2 to 15 for 3 to 10", low=2, high=15, spaced=True, conversations=True
    ),
    _loose("ellipsis-ratio", "ellipsis_ratio", "twice", high=0.2, conversations=True),
    _loose("ellipsis-lines", "ellipsis_lines", "twice", high=0.6),
    _loose("alphabetic-words", "alphabetic_words", "a quarter", low=0.2, conversations=True),
    _loose("duplicate-lines", "duplicate_lines", "twice", high=0.60),
    _loose("duplicate-line-characters", "duplicate_line_characters", "twice and a half", high=0.50),
    _loose("duplicate-paragraph-characters", "duplicate_paragraph_characters", "twice and a half", high=0.50),
    _loose("top-2gram", "top_2gram", "twice", high=0.40, spaced=True, conversations=True, least_words=50),
    _loose("top-4gram", "top_4gram", "twice", high=0.32, spaced=True, conversations=True, least_words=50),
    _loose("repeated-10gram", "repeated_10gram", "five times", high=0.50, spaced=True, conversations=True),
    _gopher("word-count", "words", "takes short pages and books", low=50, high=100_000),
    _gopher("mean-word-length", "mean_word_length", "takes code", low=3, high=10, spaced=True),
    _gopher("hash-ratio", "hash_ratio", "takes shell, Python and Markdown", high=0.1),
    _gopher("ellipsis-ratio", "ellipsis_ratio", "takes help for menus, whose entries end so", high=0.1),
    _gopher("bullet-lines", "bullet_lines", "takes checklists and change logs", high=0.9),
    _gopher("ellipsis-lines", "ellipsis_lines", "takes help for menus, whose entries end so", high=0.3),
    _gopher("alphabetic-words", "alphabetic_words", "takes tables and code", low=0.8),
    _gopher("stop-words", "stop_words", "takes code and tables", low=2, languages=_LISTED),
    _gopher("duplicate-lines", "duplicate_lines", _TEMPLATES, high=0.30),
    _gopher("duplicate-line-characters", "duplicate_line_characters", _TEMPLATES, high=0.20),
    _gopher("duplicate-paragraphs", "duplicate_paragraphs", _TEMPLATES, high=0.30),
    _gopher("duplicate-paragraph-characters", "duplicate_paragraph_characters", _TEMPLATES, high=0.20),
    _gopher("top-2gram", "top_2gram", _TEMPLATES, high=0.20, spaced=True),
    _gopher("top-3gram", "top_3gram", _TEMPLATES, high=0.18, spaced=True),
    _gopher("top-4gram", "top_4gram", _TEMPLATES, high=0.16, spaced=True),
    *(
        _gopher(f"repeated-{n}gram", f"repeated_{n}gram", _TEMPLATES, high=high, spaced=True)
        for n, high in _REPEATED.items()
    ),
    Rule("c4-curly/1", "curly", _C4, high=0, on=False, note="takes code and pages with code"),
    Rule("c4-sentences/1", "sentences", _C4, low=3, on=False, note="takes code, tables and short entries"),
    Rule("c4-javascript/1", "javascript_lines", _C4, high=0.2, on=False, note="takes pages about JavaScript"),
    Rule("c4-policy/1", "policy_lines", _C4, high=0.2, on=False, note="takes licences"),
    Rule("fineweb-terminal-lines/1", "terminal_lines", _FINEWEB, low=0.12, on=False, note=_WRAPPED),
    Rule("fineweb-short-lines/1", "short_lines", _FINEWEB, high=0.67, on=False, note=_WRAPPED),
    Rule("fineweb-newline-ratio/1", "newline_ratio", _FINEWEB, high=0.3, on=False, spaced=True, note=_WRAPPED),
    Rule(
        "fineweb-duplicate-line-characters/1", "duplicate_line_characters", _FINEWEB, high=0.01, on=False, note=_WRAPPED
    ),
)


def chosen_rules(
    on: Iterable[str] = (),
    off: Iterable[str] = (),
    thresholds: Mapping[str, tuple[float | None, float | None]] | None = None,
) -> tuple[Rule, ...]:
    """The rules to judge by, in order: those on by default and ``on``, less ``off``; thresholds (low, high) replaced.

    A rule's name may be given without its version. Raises ``ConfigError`` for a name that no rule has.
    """
    known = {key: rule.name for rule in RULES for key in (rule.name, rule.name.partition("/")[0])}
    moved = dict(thresholds or {})
    added, removed = set(on), set(off)
    for name in sorted({*added, *removed, *moved}):
        if name not in known:
            raise ConfigError(
                f"No quality rule is called {name!r}; choose from {', '.join(rule.name for rule in RULES)}."
            )
    added, removed = {known[name] for name in added}, {known[name] for name in removed}
    bounds = {known[name]: pair for name, pair in moved.items()}
    chosen = [rule for rule in RULES if (rule.on or rule.name in added) and rule.name not in removed]
    return tuple(
        replace(rule, low=bounds[rule.name][0], high=bounds[rule.name][1]) if rule.name in bounds else rule
        for rule in chosen
    )


def thresholds_of(texts: Iterable[str]) -> dict[str, tuple[float | None, float | None]]:
    """Thresholds by rule of ``rule=low..high`` texts; a bound left out is none. Raises ``ConfigError`` for others."""
    found = {}
    for text in texts:
        name, _, bounds = text.partition("=")
        low, dots, high = bounds.partition("..")
        try:
            pair = (float(low) if low else None, float(high) if high else None)
            if not name or not dots or (low and high and float(low) > float(high)):
                raise ValueError
            found[name] = pair
        except ValueError:
            raise ConfigError(f"data.filters.thresholds: {text!r} is not rule=low..high with low first.") from None
    return found


def compute(
    flat: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64], languages: Sequence[str]
) -> dict[str, npt.NDArray[np.float32]]:
    """Every signal of ``SIGNALS`` of the documents flat[offsets[i]:offsets[i + 1]], float32 [n].

    ``languages`` [n] picks the list of stop words. The text should be UTF-8; a byte that begins no character counts as
    one sign that is neither letter nor space.
    """
    assert len(languages) == len(offsets) - 1
    place = {language: row for row, language in enumerate(_LISTED)}
    lists = np.array([place.get(language, -1) for language in languages], np.int64)
    codes = np.array([[word_code(word) for word in STOP_WORDS[language]] for language in _LISTED], np.uint64)
    flat = np.ascontiguousarray(flat)
    matrix: npt.NDArray[np.float32] = signal_matrix(flat, np.asarray(offsets, np.int64), flag_table(), lists, codes)
    return {name: np.ascontiguousarray(matrix[:, column]) for column, name in enumerate(SIGNALS)}


def quality(signals: Mapping[str, npt.NDArray[np.generic]]) -> npt.NDArray[np.float32]:
    """One number, float32 [n] in 0..1, to choose between near-duplicates: the mean credit over every rule that applies.

    All of ``RULES`` count alike, whether they are on or not: a version with less repetition, markup or list noise wins.
    """
    total = np.zeros(len(signals["words"]))
    applying = np.zeros(len(total), np.int64)
    for rule in RULES:
        mask = rule.applies(signals)
        total[mask] += rule.credit(np.asarray(signals[rule.signal], np.float32))[mask]
        applying += mask
    return (total / np.maximum(applying, 1)).astype(np.float32)
