"""Going back in a conversation: what is restored is what was there, and what was evicted is computed again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from refractor_megatron.decoding.chat import Prompt, message_prompt, next_turn, text_prompt
from refractor_megatron.decoding.decoder import Decoder
from refractor_megatron.decoding.load import Exported
from refractor_megatron.decoding.session import Session, own_codec
from refractor_megatron.errors import CapabilityError, ConfigError
from refractor_megatron.evaluation.sampling import SamplingOptions
from refractor_megatron.tokenizer import Tokenizer

from .conftest import CONTEXT, make_exported
from .test_decoder import ARCHITECTURES

CHUNK, PIECE = 32, 24
SAMPLED = SamplingOptions(1.0, 0.95, seed=11)
RESTORABLE = [name for name in ARCHITECTURES if "linear" not in name and "records" not in name and "every" not in name]


def single(exported: Exported) -> Decoder:
    """In float32, which the codecs take."""
    return Decoder(replace(exported, model=copy.deepcopy(exported.model).float()), piece=PIECE)


@pytest.fixture(scope="module")
def decoder(exported: Exported) -> Decoder:
    return single(exported)


@pytest.fixture(scope="module")
def long(tokenizer: Tokenizer) -> Prompt:
    """Of 200 tokens."""
    data = bytes(97 + (7 * n * n + n // 5) % 26 for n in range(2000))
    prompt = text_prompt(tokenizer, data, "text")
    return replace(prompt, ids=prompt.ids[:200], records=prompt.records[:200])


def part(prompt: Prompt, start: int, stop: int | None = None) -> Prompt:
    """Tokens [start, stop) of a prompt."""
    return replace(prompt, ids=prompt.ids[start:stop], records=prompt.records[start:stop])


def trace(session: Session) -> list[torch.Tensor]:
    """Collects the logits of every pass of a session from now on."""
    seen: list[torch.Tensor] = []
    forward: Callable[..., torch.Tensor] = session.decoder.forward

    def recorded(*args: Any, **kwargs: Any) -> torch.Tensor:
        logits = forward(*args, **kwargs)
        seen.append(logits.clone())
        return logits

    session.decoder = copy.copy(session.decoder)
    session.decoder.forward = recorded  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize(
    "name,position",
    [(RESTORABLE[0], n) for n in (199, 177, 160, 101, 32, 20)] + [(name, 101) for name in RESTORABLE[1:]],
)
def test_exact_chunks_leave_no_trace_of_going_back(
    name: str, position: int, tokenizer: Tokenizer, long: Prompt
) -> None:
    """The same passes, bit for bit, as in a session that never went further; any place, no token twice."""
    decoder = single(make_exported(tokenizer, **ARCHITECTURES[name]))
    straight, turned = (Session(decoder, "exact", CHUNK) for _ in range(2))
    for session in (straight, turned):
        session.feed(part(long, 0, position))
    turned.feed(part(long, position))
    turned.answer(long, SAMPLED, 12)
    assert turned.rewind(position) == 0
    assert (turned.position, turned.rewinds.recomputed_tokens) == (position, 0)
    edit = part(long, 7, 50)
    seen = [trace(session) for session in (straight, turned)]
    for session in (straight, turned):
        session.feed(edit)
    answers = [session.answer(edit, SAMPLED, 15) for session in (straight, turned)]
    assert answers[0] == answers[1]
    assert len(seen[0]) == len(seen[1]) and all(map(torch.equal, *seen))
    if position <= 101:  # what lies further back than the window comes from the chunks
        statistics = turned.chunk_statistics
        assert statistics is not None and statistics.hits > 0 and statistics.misses == 0


def test_regenerating_needs_no_pass(decoder: Decoder, long: Prompt) -> None:
    session = Session(decoder, "exact", CHUNK)
    session.feed(long)
    end = session.position
    first = session.answer(long, SAMPLED, 20)
    seen = trace(session)
    session.rewind(end)
    assert not seen
    assert session.answer(long, SAMPLED, 20) == first
    session.rewind(end)
    assert session.answer(long, replace(SAMPLED, seed=12), 20) != first


@pytest.mark.parametrize("codec,bound", [("tight", 2e-2), ("norm", 2e-1)])
def test_compressed_chunks_deviate_within_measure(codec: str, bound: float, decoder: Decoder, long: Prompt) -> None:
    """Logits after going back differ from those of never having gone, by no more than the codec's errors explain."""
    straight, turned = Session(decoder, "exact", CHUNK), Session(decoder, codec, CHUNK)
    straight.feed(part(long, 0, 101))
    for session in (turned,):
        session.feed(long)
        session.rewind(101)
    seen = [trace(session) for session in (straight, turned)]
    for session in (straight, turned):
        session.feed(part(long, 101, 131))
    one, two = (torch.cat(x) for x in seen)
    deviation = float((one - two).norm() / one.norm())
    assert 0 < deviation < bound
    assert turned.cold_bytes < turned.full_bytes
    statistics = turned.chunk_statistics
    assert statistics is not None and statistics.by_codec[codec].maximum > 0


@pytest.mark.parametrize("position", [190, 170, 100, 40])
def test_what_was_evicted_is_computed_again(position: int, decoder: Decoder, long: Prompt) -> None:
    free = Session(decoder, "exact", CHUNK)
    free.feed(long)
    assert free.store is not None
    session = Session(decoder, "exact", CHUNK, budget=free.cold_bytes * 2 // 3)
    session.feed(long)
    statistics = session.chunk_statistics
    assert statistics is not None and statistics.evictions > 0 and session.cold_bytes <= free.cold_bytes * 2 // 3
    held = position > 100  # the oldest chunks are evicted first
    again = session.rewind(position)
    assert again == session.rewinds.recomputed_tokens == (0 if held else position)
    statistics = session.chunk_statistics
    assert statistics is not None and (statistics.misses > 0) == (not held)
    straight = Session(decoder, "exact", CHUNK)
    straight.feed(part(long, 0, position))
    seen = [trace(x) for x in (straight, session)]
    for x in (straight, session):
        x.feed(part(long, position))
    one, two = (torch.cat(x) for x in seen)
    assert torch.allclose(one, two, rtol=0, atol=1e-5 * float(one.abs().max()))


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in RESTORABLE])
def test_models_whose_state_cannot_be_restored_pass_again(name: str, tokenizer: Tokenizer, long: Prompt) -> None:
    decoder = single(make_exported(tokenizer, **ARCHITECTURES[name]))
    assert own_codec(decoder) is None
    with pytest.raises(CapabilityError, match="give --kv-codec none"):
        Session(decoder, "exact", CHUNK)
    straight, turned = Session(decoder), Session(decoder)
    straight.feed(part(long, 0, 101))
    turned.feed(long)
    keeps_all = "every" in name
    assert turned.rewind(101) == (0 if keeps_all else 101)
    seen = [trace(session) for session in (straight, turned)]
    for session in (straight, turned):
        session.feed(part(long, 101, 131))
    one, two = (torch.cat(x) for x in seen)
    assert torch.allclose(one, two, rtol=0, atol=1e-5 * float(one.abs().max()))
    assert turned.cold_bytes == 0 and turned.chunk_statistics is None


def test_turns_are_one_conversation(decoder: Decoder, tokenizer: Tokenizer) -> None:
    """What a session has passed after some turns, one of them taken back, is what feeding it all at once gives."""
    session = Session(decoder, "exact", CHUNK)
    first = message_prompt(tokenizer, b"what is a parser? " * 4, "user", "--prompt")
    session.feed(first)
    session.answer(first, SAMPLED, 20)
    middle = session.position
    wrong = next_turn(tokenizer, first, b"a wrong turn " * 9)
    session.feed(wrong)
    session.answer(wrong, SAMPLED, 45)
    session.rewind(middle)
    second = next_turn(tokenizer, first, b"and a lexer?")
    session.feed(second)
    whole = Session(decoder)
    whole.feed(replace(first, ids=session._ids[: session.position], records=session._records[: session.position]))
    one, two = session.next_logits(), whole.next_logits()
    assert torch.allclose(one, two, rtol=0, atol=1e-5 * float(one.abs().max()))


def test_an_answer_may_begin_where_no_message_ended(decoder: Decoder, long: Prompt) -> None:
    session, straight = Session(decoder, "exact", CHUNK), Session(decoder)
    session.feed(long)
    session.rewind(77)
    straight.feed(part(long, 0, 77))
    greedy = SamplingOptions(temperature=0.0)
    assert session.answer(long, greedy, 20) == straight.answer(long, greedy, 20)


def test_counts_and_bytes(decoder: Decoder, long: Prompt) -> None:
    session = Session(decoder, "norm", CHUNK)
    session.feed(long)
    answer = session.answer(long, SAMPLED, 10)
    assert (session.speed.prompt_tokens, session.speed.new_tokens) == (200, len(answer.ids))
    config = decoder.config
    assert session.full_bytes == session.position * 2 * 3 * config.num_key_value_heads * config.head_dim * 4
    assert 0 < session.cold_bytes < session.full_bytes
    session.rewind(100)
    session.rewind(50)
    assert (session.rewinds.count, session.rewinds.restored_tokens) == (2, 150)


def test_the_context_is_the_limit(decoder: Decoder, long: Prompt) -> None:
    session = Session(decoder)
    for _ in range(CONTEXT // 200):
        session.feed(long)
    before = session.position
    with pytest.raises(ConfigError, match=r"tokens and the model was made for .*context_max"):
        session.feed(long)
    assert session.position == before


def test_a_budget_below_two_chunks_is_refused(decoder: Decoder, long: Prompt) -> None:
    with pytest.raises(CapabilityError, match="cache budget of 100 bytes cannot hold chunk"):
        Session(decoder, "exact", CHUNK, budget=100).feed(long)


@pytest.mark.parametrize(
    "ratio,codec,dtype",
    [(0.5, "norm", torch.float32), (0.7, "tight", torch.float32), (1.0, "exact", torch.float32),
     (0.7, "exact", torch.bfloat16)],
)  # fmt: skip
def test_the_model_says_how_chunks_are_kept(ratio: float, codec: str, dtype: torch.dtype, tokenizer: Tokenizer) -> None:
    exported = make_exported(tokenizer, kv_cache={"chunk": 48, "compress_ratio": ratio})
    decoder = Decoder(replace(exported, model=exported.model.to(dtype)))  # type: ignore[arg-type]
    assert own_codec(decoder) == codec
    session = Session(decoder, own_codec(decoder))
    assert session.store is not None and (session.chunk, session.store.chunk, session.store.codec) == (48, 48, codec)
