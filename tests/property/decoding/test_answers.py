"""Answers from scripted logits: what is streamed is what is returned, whatever the tokens are and where they stop."""

from __future__ import annotations

import argparse
import inspect
from dataclasses import dataclass, field

import torch
from hypothesis import given
from hypothesis import strategies as st

from refractor_megatron.decoding.answers import Request, answer_all
from refractor_megatron.decoding.chat import message_prompt, text_prompt
from refractor_megatron.evaluation.sampling import SamplingOptions
from refractor_megatron.tokenizer import Tokenizer, train_tokenizer

TOKENIZER = train_tokenizer([inspect.getsource(argparse).encode()], 320)
#: An embedding table is padded; the model's logits go on beyond the tokenizer.
WIDTH = TOKENIZER.vocab_size + 5
GREEDY = SamplingOptions(temperature=0.0)
CHAT = message_prompt(TOKENIZER, b"hello", "user", "--prompt")
TEXT = text_prompt(TOKENIZER, b"hello", "--prompt")
ORDINARY = st.integers(0, len(TOKENIZER.ranks) - 1)
STOPS = st.sampled_from([TOKENIZER.end, TOKENIZER.eod])


@dataclass
class Script:
    """A model that wants the given tokens: each row its own, then ever the first."""

    wanted: list[list[int]]
    rows: list[int] = field(default_factory=list)
    fed: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rows = list(range(len(self.wanted)))
        self.fed = [[] for _ in self.wanted]

    def logits(self) -> torch.Tensor:
        """What each row wants most, then whatever may be chosen; forbidden tokens it wants more."""
        out = torch.zeros(len(self.rows), WIDTH)
        out[:, sorted(FORBIDDEN)] = 100.0
        for place, row in enumerate(self.rows):
            left = self.wanted[row][len(self.fed[row]) :]
            out[place, left[0] if left else 0] += 10.0
        return out

    def advance(self, places: list[int], tokens: list[int]) -> torch.Tensor:
        """As `answer_all` asks."""
        self.rows = [self.rows[place] for place in places]
        for row, token in zip(self.rows, tokens, strict=True):
            self.fed[row].append(token)
        return self.logits()


FORBIDDEN = {TOKENIZER.pad, *TOKENIZER.role_ids.values(), *range(TOKENIZER.vocab_size, WIDTH)}


@given(st.lists(st.tuples(st.lists(ORDINARY, max_size=24), STOPS, st.integers(1, 26)), min_size=1, max_size=4))
def test_streamed_text_is_the_text_and_every_row_stops_for_its_reason(rows: list[tuple[list[int], int, int]]) -> None:
    requests = [Request(CHAT, GREEDY, most) for _, _, most in rows]
    script = Script([[*ids, stop] for ids, stop, _ in rows])
    heard: list[list[tuple[str, str]]] = [[] for _ in rows]
    answers = answer_all(
        TOKENIZER, requests, script.logits(), script.advance, lambda row, text, why: heard[row].append((text, why))
    )
    for number, (answer, (ids, stop, most)) in enumerate(zip(answers, rows, strict=True)):
        whole = [*ids, stop][:most]
        assert answer.ids == whole
        assert script.fed[number] == whole[:-1]  # the last one is never fed
        stopped = len(ids) < most
        assert answer.finish == (CHAT.stops[stop] if stopped else "max_tokens")
        text = TOKENIZER.decode(whole[:-1] if stopped else whole).decode(errors="replace")
        assert answer.text == text == "".join(part for part, _ in heard[number])
        assert [why for _, why in heard[number]] == [""] * (len(heard[number]) - 1) + [answer.finish]
        assert all(part for part, _ in heard[number][:-1])  # nothing empty but, maybe, the last


@given(st.text(min_size=1, max_size=30))
def test_no_part_of_a_character_is_streamed(text: str) -> None:
    data = text.encode(errors="surrogatepass")
    ids = list(data)  # bytes are the first ids: every character comes in pieces
    heard: list[str] = []
    script = Script([ids])
    answer_all(
        TOKENIZER, [Request(TEXT, GREEDY, len(ids))], script.logits(), script.advance, lambda _, t, __: heard.append(t)
    )
    assert "".join(heard) == data.decode(errors="replace")
    if "\ufffd" not in data.decode(errors="replace"):
        assert len([part for part in heard if part]) == len(text)


def test_a_text_has_no_message_to_end() -> None:
    """In a document the end of a message is as forbidden as a role; the end of the document is not."""
    wants = Script([[65, TOKENIZER.end, 66]])
    logits = wants.logits()
    (answer,) = answer_all(TOKENIZER, [Request(TEXT, GREEDY, 3)], logits, wants.advance)
    assert TOKENIZER.end not in answer.ids and answer.finish == "max_tokens"
    wants = Script([[65, TOKENIZER.eod]])
    (answer,) = answer_all(TOKENIZER, [Request(TEXT, GREEDY, 3)], wants.logits(), wants.advance)
    assert (answer.ids, answer.text, answer.finish) == ([65, TOKENIZER.eod], "A", "eod")


def test_role_padding_and_unknown_tokens_are_never_sampled() -> None:
    hot = SamplingOptions(temperature=50.0, top_p=1.0, seed=3)
    script = Script([[]])
    (answer,) = answer_all(TOKENIZER, [Request(CHAT, hot, 400)], script.logits(), script.advance)
    assert FORBIDDEN.isdisjoint(answer.ids) and len(set(answer.ids)) > 50


def test_the_tokenizer_is_the_one_the_module_names() -> None:
    assert isinstance(TOKENIZER, Tokenizer) and len(FORBIDDEN) == 5 + 1 + len(TOKENIZER.role_ids)
