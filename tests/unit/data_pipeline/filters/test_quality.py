"""The compiled signals equal a plain reading of their definitions; a rule takes only what lies beyond its threshold."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.filters import quality
from data_pipeline.filters.characters import _DENSE, _LONG, _MORE_DENSE, BULLETS, CLOSING_QUOTES, SENTENCE_ENDS
from data_pipeline.filters.quality import RULES, STOP_WORDS, Rule, chosen_rules, compute
from data_pipeline.filters.signals import SIGNALS
from refractor_megatron.errors import ConfigError


def pack(texts: Sequence[bytes]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    offsets = np.cumsum([0, *map(len, texts)]).astype(np.int64)
    return np.frombuffer(b"".join(texts), np.uint8), offsets


# --- the naive twin: the definitions of the table SIGNALS, on strings ------------------------------------------------


def is_letter(c: str) -> bool:
    return unicodedata.category(c)[0] == "L" or 0x20000 <= ord(c) < 0x40000


def is_alnum(c: str) -> bool:
    return is_letter(c) or unicodedata.category(c)[0] in "NM"


def within(c: str, ranges: Sequence[tuple[int, int]]) -> bool:
    return is_alnum(c) and any(start <= ord(c) <= stop for start, stop in ranges)


def is_dense(c: str) -> bool:
    return within(c, _DENSE + _MORE_DENSE)


def is_long(c: str) -> bool:
    return within(c, _LONG)


def code(token: str) -> str:
    kept = "".join(c.lower() if c.isascii() else c for c in token if is_alnum(c))
    return kept or token


def repeated(tokens: list[str], n: int) -> int:
    seen, at, covered = set(), 0, 0
    codes = [code(token) for token in tokens]
    while at + n <= len(tokens):
        gram = tuple(codes[at : at + n])
        if gram in seen:
            covered += sum(map(len, tokens[at : at + n]))
            at += n
        else:
            seen.add(gram)
            at += 1
    return covered


def top(tokens: list[str], n: int) -> int:
    number: Counter[tuple[str, ...]] = Counter()
    best = (1, 0)
    for at in range(len(tokens) - n + 1):
        gram = tuple(code(token) for token in tokens[at : at + n])
        number[gram] += 1
        best = max(best, (number[gram], sum(map(len, tokens[at : at + n]))))
    return best[0] * best[1] if best[0] > 1 else 0


def sentences(text: str) -> int:
    found = 0
    for at, c in enumerate(text):
        following = text[at + 1 : at + 2]
        if c in SENTENCE_ENDS and following not in (*SENTENCE_ENDS,):
            found += not c.isascii() or not following or not is_alnum(following)
    return found


def ellipses(tokens: list[str]) -> int:
    return sum(token.count("...") + token.count("…") for token in tokens)


def phrase(tokens: list[str], *choices: str) -> bool:
    line = [code(token) for token in tokens]
    wanted = [choice.split() for choice in choices]
    return any(line[at : at + len(words)] == words for words in wanted for at in range(len(line)))


def duplicates(units: list[tuple[tuple[str, ...], int]]) -> tuple[int, int]:
    seen: set[tuple[str, ...]] = set()
    number = characters = 0
    for key, size in units:
        number += key in seen
        characters += size if key in seen else 0
        seen.add(key)
    return number, characters


def twin(text: str, language: str) -> dict[str, float]:
    """Every signal by its definition."""
    lines = [line.split() for line in text.split("\n")]
    tokens = [token for line in lines for token in line]
    full = [line for line in lines if line]
    spaced = [t for t in tokens if any(map(is_alnum, t)) and not any(is_dense(c) or is_long(c) for c in t)]
    dense, long = (sum(map(test, "".join(tokens))) for test in (is_dense, is_long))
    words = len(spaced) + dense // 2 + long // 5
    chars, alnum = sum(map(len, tokens)), sum(map(is_alnum, "".join(tokens)))
    paragraphs: list[list[tuple[str, ...]]] = [[]]
    for line in lines:
        if line:
            paragraphs[-1].append(tuple(line))
        elif paragraphs[-1]:
            paragraphs.append([])
    blocks = [p for p in paragraphs if p]
    line_units = [(tuple(line), sum(map(len, line))) for line in full]
    block_units = [
        ((*sum(((*line, "\n") for line in p), ()),), sum(len(t) for line in p for t in line)) for p in blocks
    ]
    same_lines, same_line_chars = duplicates(line_units)
    same_blocks, same_block_chars = duplicates(block_units)

    def lines_with(test: list[bool]) -> float:
        return sum(test) / max(len(full), 1)

    out: dict[str, float] = {
        "words": words,
        "mean_word_length": sum(sum(map(is_alnum, t)) for t in spaced) / max(len(spaced), 1),
        "spaceless": (dense + long) / max(chars, 1),
        "alphanumeric": alnum / max(chars, 1),
        "hash_ratio": text.count("#") / max(words, 1),
        "ellipsis_ratio": ellipses(tokens) / max(words, 1),
        "newline_ratio": text.count("\n") / max(words, 1),
        "alphabetic_words": sum(any(map(is_letter, t)) for t in tokens) / max(len(tokens), 1),
        "stop_words": len({code(t) for t in tokens} & set(STOP_WORDS[language])) if language in STOP_WORDS else -1,
        "sentences": sentences(text),
        "curly": text.count("{"),
        "lorem_ipsum": sum(phrase(line, "lorem ipsum") for line in full),
        "bullet_lines": lines_with([line[0][0] in BULLETS for line in full]),
        "ellipsis_lines": lines_with([line[-1].endswith(("...", "…")) for line in full]),
        "terminal_lines": lines_with([line[-1][-1] in SENTENCE_ENDS + CLOSING_QUOTES for line in full]),
        "short_lines": lines_with([len(" ".join(line)) <= 30 for line in full]),
        "javascript_lines": lines_with([phrase(line, "javascript") for line in full]),
        "policy_lines": lines_with([phrase(line, *POLICIES) for line in full]),
        "duplicate_lines": same_lines / max(len(full), 1),
        "duplicate_line_characters": same_line_chars / max(chars, 1),
        "duplicate_paragraphs": same_blocks / max(len(blocks), 1),
        "duplicate_paragraph_characters": same_block_chars / max(chars, 1),
    }
    out |= {f"top_{n}gram": min(1.0, top(tokens, n) / max(chars, 1)) for n in (2, 3, 4)}
    return out | {f"repeated_{n}gram": repeated(tokens, n) / max(chars, 1) for n in range(5, 11)}


POLICIES = ("privacy policy", "cookie policy", "terms of use", "use of cookies", "uses cookies", "use cookies")
WORDS = [
    *("the", "The", "and", "of", "a", "be", "to", "use", "terms", "cookies", "uses", "privacy", "policy", "cookie"),
    *(
        "lorem",
        "ipsum",
        "Lorem",
        "JavaScript",
        "{x}",
        "#",
        "##",
        "...",
        "end.",
        "wait...",
        "so…",
        "-",
        "*",
        "•x",
        "3.14",
    ),
    *(
        "e.g.",
        '"quoted."',
        "|",
        "---",
        "Größe",
        "слово",
        "И",
        "言葉",
        "テスト。",
        "ภาษาไทย",
        "x",
        "longer-word",
        "naïve!?",
        "𠀀",
    ),
]
GAPS = [" ", "  ", "\t", "\n", "\n\n", "\n \n", "\u3000", "\u00a0", "\r\n"]
_pieces = st.lists(st.sampled_from(WORDS) | st.sampled_from(GAPS), max_size=60).map("".join)
_lines = st.lists(st.sampled_from(["the end.", "- one two", "a b c d e f g", "", "言葉。"]), max_size=40).map("\n".join)
_phrases = st.lists(st.sampled_from(WORDS), max_size=50).map(" ".join)
_few = st.lists(st.sampled_from(["a", "b", "cc", "d."]), max_size=80).map(" ".join)
_texts = _pieces | _lines | _phrases | _few | st.text(st.characters(exclude_categories=("Cs",)), max_size=80)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(_texts, st.sampled_from(["en", "de", "ja", "ru", "zxx"])), max_size=5))
@example([("a b a b a b a b a b a b", "en"), ("lorem\nipsum. Lorem ipsum dolor", "en"), ("", "de"), ("\n", "de")])
@example([("", "en"), (" ".join("abcdefghijkl") + "\n" + " ".join("abcdefghijkl"), "en")])
def test_signals_equal_the_naive_twin(documents: list[tuple[str, str]]) -> None:
    signals = compute(*pack([text.encode() for text, _ in documents]), [language for _, language in documents])
    assert tuple(signals) == SIGNALS
    for row, (text, language) in enumerate(documents):
        expected = twin(text, language)
        got = {name: values[row] for name, values in signals.items()}
        assert got == {name: np.float32(value) for name, value in expected.items()}, text


def test_signals_do_not_depend_on_the_neighbours() -> None:
    """The hash tables serve all documents of a shard and are never cleared: entries of others must not count."""
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS[:20], size)) for size in (3, 900, 40, 5000, 40, 900)]
    together = compute(*pack([text.encode() for text in texts]), ["en"] * len(texts))
    for row, text in enumerate(texts):
        alone = compute(*pack([text.encode()]), ["en"])
        assert {name: values[row] for name, values in together.items()} == {k: v[0] for k, v in alone.items()}


@given(st.binary(max_size=60))
@settings(deadline=None)
def test_any_bytes_give_finite_signals(data: bytes) -> None:
    signals = compute(*pack([data, b"a b"]), ["en", "en"])
    assert all(np.isfinite(values).all() for values in signals.values())
    assert signals["words"][1] == 2  # what stands before does not run over


# --- the rules, on made texts just this side of the threshold and just beyond -----------------------------------------


def label(i: int) -> str:
    return "".join(chr(97 + i // 26**k % 26) for k in (3, 2, 1, 0))


def prose(words: int) -> str:
    """Different words of 5 letters."""
    return " ".join("u" + label(i) for i in range(words))


def filler(characters: int) -> list[str]:
    """Different words that sum to ``characters``, which leave n-grams alone."""
    return [*prose(characters // 5).split(), *(["q" * (characters % 5)] if characters % 5 else [])]


def grams(n: int, size: int, total: int, copies: int = 2) -> str:
    """``n`` words of ``size`` characters, ``copies`` times, in a text of ``total`` characters."""
    gram = [chr(97 + i) * size for i in range(n)]
    rest = filler(total - copies * n * size)
    return " ".join(word for copy in range(copies) for word in (*gram, rest[copy])) + " " + " ".join(rest[copies:])


def blocks(unit: int, copies: int, total: int, gap: str) -> str:
    """A line of ``unit`` characters, ``copies`` times, in a text of ``total`` characters."""
    return gap.join(["p" * unit] * copies + [" ".join(filler(total - unit * copies))])


def lines(special: str, count: int, total: int = 100) -> str:
    """``count`` lines like ``special`` ("@" becomes a different word in each), of ``total``."""
    plain = [f"a plain line of text that goes on {label(i)} here" for i in range(total - count)]
    return "\n".join([special.replace("@", label(i)) for i in range(count)] + plain)


#: rule, text that passes, text that fails: as near to the threshold as whole characters, words or lines allow.
CASES: list[tuple[str, str, str]] = [
    ("c4-lorem-ipsum", "lorem and ipsum", "Lorem ipsum, dolor"),
    ("santacoder-alphanumeric", "a=== " * 10, "a=== " * 10 + "="),
    ("loose-word-count", prose(10), prose(9)),
    ("loose-mean-word-length", "ab cd", "ab c"),
    ("loose-mean-word-length", f"{'a' * 15} {'b' * 15}", f"{'a' * 15} {'b' * 16}"),
    ("loose-ellipsis-ratio", prose(10) + " ... ...", prose(10) + " ... ... …"),
    ("loose-ellipsis-lines", lines("more @ ...", 60), lines("more @ ...", 61)),
    ("loose-alphabetic-words", "one " + "12 " * 4, "one " + "12 " * 5),
    ("loose-duplicate-lines", "\n".join("aaaaaaabcd"), "\n".join("aaaaaaaabc")),
    ("loose-duplicate-line-characters", blocks(10, 3, 40, "\n"), blocks(10, 3, 39, "\n")),
    ("loose-duplicate-paragraph-characters", blocks(10, 3, 40, "\n\n"), blocks(10, 3, 39, "\n\n")),
    ("loose-top-2gram", grams(2, 80, 800), grams(2, 80, 799)),
    ("loose-top-4gram", grams(4, 64, 1600), grams(4, 64, 1599)),
    ("loose-repeated-10gram", grams(10, 10, 400, 3), grams(10, 10, 399, 3)),
    ("gopher-word-count", prose(50), prose(49)),
    ("gopher-word-count", "ab " * 100_000, "ab " * 100_001),
    ("gopher-mean-word-length", "abc def", "abc de"),
    ("gopher-mean-word-length", "a" * 10, "a" * 11),
    ("gopher-hash-ratio", "# " + prose(10), "## " + prose(10)),
    ("gopher-ellipsis-ratio", "... " + prose(10), "... … " + prose(10)),
    ("gopher-bullet-lines", lines("- item @", 90), lines("• item @", 91)),
    ("gopher-ellipsis-lines", lines("more @…", 30), lines("more @…", 31)),
    ("gopher-alphabetic-words", "one two six ten 4", "one two six 10 4"),
    ("gopher-stop-words", "The quality of", "the quality"),
    ("gopher-duplicate-lines", "\n".join("aaaabcdefg"), "\n".join("aaaaabcdef")),
    ("gopher-duplicate-line-characters", blocks(20, 2, 100, "\n"), blocks(20, 2, 99, "\n")),
    ("gopher-duplicate-paragraphs", "\n\n".join("aaaabcdefg"), "\n\n".join("aaaaabcdef")),
    ("gopher-duplicate-paragraph-characters", blocks(20, 2, 100, "\n\n"), blocks(20, 2, 99, "\n\n")),
    ("gopher-top-2gram", grams(2, 40, 800), grams(2, 40, 799)),
    ("gopher-top-3gram", grams(3, 36, 1200), grams(3, 36, 1199)),
    ("gopher-top-4gram", grams(4, 32, 1600), grams(4, 32, 1599)),
    *(
        (f"gopher-repeated-{n}gram", grams(n, 2 * share, 200 * n), grams(n, 2 * share, 200 * n - 1))
        for n, share in ((5, 15), (6, 14), (7, 13), (8, 12), (9, 11), (10, 10))
    ),
    ("c4-curly", "no brackets", "a { bracket"),
    ("c4-sentences", "One. Two! Three?", "One. Two, e.g"),
    ("c4-javascript", lines("needs JavaScript, @", 20), lines("needs JavaScript, @", 21)),
    ("c4-policy", lines("Privacy policy @", 20), lines("our terms of use @", 21)),
    ("fineweb-terminal-lines", lines("An end @.", 12), lines("An end @.", 11)),
    ("fineweb-short-lines", lines("this line is of thirty...@", 67), lines("this line is of thirty...@", 68)),
    ("fineweb-newline-ratio", "a\nb\nc\nd e f g h i j", "a\nb\nc\nd\ne f g h i j"),
    ("fineweb-duplicate-line-characters", blocks(2, 2, 200, "\n"), blocks(2, 2, 199, "\n")),
]


def judged(text: str, language: str = "en", framed: bool = False) -> dict[str, npt.NDArray[np.generic]]:
    signals: dict[str, npt.NDArray[np.generic]] = dict(compute(*pack([text.encode()]), [language]))
    return signals | {"language": np.array([language]), "framed": np.array([framed])}


def rule_of(name: str) -> Rule:
    (rule,) = (rule for rule in RULES if rule.name.partition("/")[0] == name)
    return rule


def test_every_rule_has_a_case() -> None:
    assert {name for name, _, _ in CASES} == {rule.name.partition("/")[0] for rule in RULES}
    assert len({rule.name for rule in RULES}) == len(RULES)
    assert all(rule.name.count("/") == 1 and rule.name.partition("/")[2].isdigit() for rule in RULES)
    assert all(rule.signal in SIGNALS and (rule.on or rule.note) for rule in RULES)


@pytest.mark.parametrize(("name", "passing", "failing"), CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)])
def test_threshold(name: str, passing: str, failing: str) -> None:
    rule = rule_of(name)
    good, bad = judged(passing), judged(failing)
    assert rule.applies(good).all() and rule.applies(bad).all()
    assert not rule.fails(good).any(), good[rule.signal]
    assert rule.fails(bad).all(), bad[rule.signal]
    value = float(bad[rule.signal][0])  # type: ignore[arg-type]
    assert rule.threshold(value) in (rule.low, rule.high)
    assert rule.credit(np.asarray(good[rule.signal], np.float32)) == 1
    assert 0 <= rule.credit(np.asarray(bad[rule.signal], np.float32))[0] < 1


def test_rules_about_words_leave_scripts_without_spaces_alone() -> None:
    text = "これは長い文章であり、言葉の間に空白がありません。" * 20
    signals = judged(text, "ja")
    assert signals["spaceless"] > quality.SPACELESS  # type: ignore[operator]
    assert not any(rule.applies(signals).any() for rule in RULES if rule.spaced)
    words = sum(map(is_dense, text)) // 2
    assert signals["words"] == words > 100


def test_conversations_and_short_texts_are_spared() -> None:
    chat = judged("yes. thanks!", framed=True)
    assert not any(rule.fails(chat).any() for rule in chosen_rules())
    assert rule_of("loose-word-count").fails(judged("yes. thanks!")).all()
    assert rule_of("c4-lorem-ipsum").fails(judged("Lorem ipsum", framed=True)).all()
    short = judged("a b a b a b")
    assert short["top_2gram"] > 0.4 and not rule_of("loose-top-2gram").applies(short).any()  # type: ignore[operator]


def test_stop_words_only_of_languages_that_have_a_list() -> None:
    rule = rule_of("gopher-stop-words")
    assert rule.fails(judged("ett kort", "sv")).all()
    assert not rule.fails(judged("et og i", "da")).any()
    unlisted = judged("ett kort", "is")
    assert unlisted["stop_words"] == -1 and not rule.fails(unlisted).any()
    assert all(len(set(words)) == 8 == len(words) for words in STOP_WORDS.values())


def test_chosen_rules() -> None:
    assert chosen_rules() == tuple(rule for rule in RULES if rule.on)
    chosen = chosen_rules(on=["c4-curly"], off=["loose-word-count/1"], thresholds={"loose-top-2gram": (None, 0.9)})
    names = [rule.name for rule in chosen]
    assert "c4-curly/1" in names and "loose-word-count/1" not in names
    assert [rule.high for rule in chosen if rule.name == "loose-top-2gram/1"] == [0.9]
    with pytest.raises(ConfigError, match="'gopher'"):
        chosen_rules(on=["gopher"])


def test_quality_prefers_the_cleaner_version() -> None:
    clean = prose(200) + ".\n" + "The end of the text.\n"
    dirty = clean + "menu | # | login { } ...\n" * 40
    texts = [clean, dirty, "", "### ... {{{"]
    signals: dict[str, npt.NDArray[np.generic]] = dict(compute(*pack([t.encode() for t in texts]), ["en"] * 4))
    signals |= {"language": np.array(["en"] * 4), "framed": np.zeros(4, np.bool_)}
    score = quality.quality(signals)
    assert score.dtype == np.float32 and (score >= 0).all() and (score <= 1).all()
    assert score[0] > score[1] and score[0] == score.max()
