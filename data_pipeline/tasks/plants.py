"""Sentences with made-up names and numbers that are planted in real text, and the question about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from data_pipeline.tasks.keyed import Draws

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
#: Chains of a HOPS task have this many links; pairs asked at once in a RECALL task.
LINKS, ASKED = (2, 3), (2, 6)


@dataclass(frozen=True)
class Planted:
    """``asked``: lines that hold the evidence, in the order of the answer; ``others``: lines of the same form.

    ``names``: the made-up words and numbers of ``asked``, which must occur nowhere else in the text.
    """

    asked: tuple[str, ...]
    others: tuple[str, ...]
    question: str
    answer: str
    names: tuple[str, ...]


def _names(draws: Draws, count: int) -> list[str]:
    """Different words of three syllables; there are 343 000."""
    return _different(count, lambda: "".join(_syllable(draws) for _ in range(3)))


def _syllable(draws: Draws) -> str:
    return _CONSONANTS[draws.below(len(_CONSONANTS))] + _VOWELS[draws.below(len(_VOWELS))]


def _numbers(draws: Draws, count: int) -> list[str]:
    """Different numbers of six digits."""
    return _different(count, lambda: str(draws.between(100_000, 999_999)))


def _different(count: int, draw: Callable[[], str]) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


def needle(draws: Draws, lines: int) -> Planted:
    """``lines`` codes, one of them asked."""
    lines = max(1, lines)
    keys, values = _names(draws, lines), _numbers(draws, lines)
    text = [f"Remember: the code of {key} is {value}.\n" for key, value in zip(keys, values, strict=True)]
    return Planted((text[0],), tuple(text[1:]), f"What is the code of {keys[0]}?", values[0], (keys[0], values[0]))


def hops(draws: Draws, lines: int) -> Planted:
    """Chains of names of which the last has a code; the code of a first name is asked. All chains are as long."""
    links = draws.between(*LINKS)
    chains = max(2, lines // links)
    keys, values = _names(draws, chains * links), _numbers(draws, chains)
    text = []
    for number, value in enumerate(values):
        chain = keys[number * links : (number + 1) * links]
        text += [
            f"Remember: {key} has the same code as {after}.\n" for key, after in zip(chain, chain[1:], strict=False)
        ]
        text.append(f"Remember: the code of {chain[-1]} is {value}.\n")
    names = (*keys[:links], values[0])
    return Planted(tuple(text[:links]), tuple(text[links:]), f"What is the code of {keys[0]}?", values[0], names)


def recall(draws: Draws, lines: int) -> Planted:
    """Pairs of which several are asked at once, in an order of their own."""
    asked = draws.between(*ASKED)
    lines = max(lines, asked + 2)
    keys, values = _names(draws, lines), _numbers(draws, lines)
    text = [f"Remember: the code of {key} is {value}.\n" for key, value in zip(keys, values, strict=True)]
    question = f"What are the codes of {', '.join(keys[:asked])}, in this order?"
    names = (*keys[:asked], *values[:asked])
    return Planted(tuple(text[:asked]), tuple(text[asked:]), question, ", ".join(values[:asked]), names)
