"""The loop that turns logits into answers: sample, stop, stream; how the next logits come about is the caller's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from ..evaluation.sampling import SamplingOptions
from ..tokenizer import StreamDecoder, Tokenizer
from .chat import Prompt
from .sampling import Sampler

#: ``on_text(request, text, finish)``: text of a request that is complete, in order; ``finish`` as in `Answer` with the
#: last of it, which may be empty, and empty before.
OnText = Callable[[int, str, str], None]


@dataclass(frozen=True)
class Request:
    """A prompt, how to sample, and the most tokens of the answer (at least 1)."""

    prompt: Prompt
    options: SamplingOptions
    max_tokens: int


@dataclass
class Answer:
    """ids: the new tokens, the one that ended the answer included. text: of the others.

    finish: ``end`` of the message, ``eod`` (end of the document), or ``max_tokens``.
    """

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = ""


class _Open:
    """An answer that is still being written."""

    def __init__(self, request: Request, decoder: StreamDecoder, say: Callable[[str, str], None]) -> None:
        assert request.max_tokens >= 1
        self.answer = Answer()
        self._request, self._decoder, self._say = request, decoder, say

    def take(self, token: int) -> bool:
        """Adds a token; whether the answer goes on."""
        answer, stops = self.answer, self._request.prompt.stops
        answer.ids.append(token)
        text = "" if token in stops else self._decoder.push(token)
        answer.finish = stops.get(token, "max_tokens" if len(answer.ids) == self._request.max_tokens else "")
        if answer.finish:
            text += self._decoder.flush()
        answer.text += text
        if text or answer.finish:
            self._say(text, answer.finish)
        return not answer.finish


def answer_all(
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    logits: Tensor,
    advance: Callable[[list[int], list[int]], Tensor],
    on_text: OnText | None = None,
) -> list[Answer]:
    """Answers every request.

    Args:
        logits: [requests, V] after the prompts.
        advance: ``advance(places, tokens)`` keeps those samples of its last batch that stand at ``places``, feeds each
            its token, and returns their logits [len(places), V].
    """
    sampler = Sampler(tokenizer, [r.prompt for r in requests], [r.options for r in requests], logits.shape[-1])
    say = on_text or (lambda row, text, finish: None)
    answers = [_Open(request, tokenizer.stream_decoder(), partial(say, row)) for row, request in enumerate(requests)]
    rows = list(range(len(requests)))
    while True:
        chosen = sampler.choose(logits, rows).tolist()
        places = [place for place, row in enumerate(rows) if answers[row].take(chosen[place])]
        if not places:
            return [one.answer for one in answers]
        rows = [rows[place] for place in places]
        logits = advance(places, [chosen[place] for place in places])
