"""Decoding with the cache against recomputation of everything at every step, and batches against single rows."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.documents import plain
from data_pipeline.sources.messages import conversation
from data_pipeline.tokenise.encode import encode_document
from refractor_megatron.decoding.answers import Answer, Request
from refractor_megatron.decoding.chat import Prompt, chat_prompt, message_prompt, text_prompt
from refractor_megatron.decoding.decoder import Decoder, full_cache_bytes
from refractor_megatron.decoding.load import Exported
from refractor_megatron.decoding.sampling import allowed_tokens
from refractor_megatron.errors import CheckpointError, ConfigError
from refractor_megatron.evaluation.sampling import SamplingOptions, next_tokens
from refractor_megatron.tokenizer import Tokenizer

from .conftest import CONTEXT, make_exported

GREEDY = SamplingOptions(temperature=0.0)
SUMMARIES = {"block_size": 8, "per_block": 2, "levels": 1, "fanout": 4, "pooling": "attn_pool"}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "window and summaries": {},
    "two levels, gated": {"summaries": SUMMARIES | {"levels": 2, "fanout": 2}, "combine": "gated"},
    "hybrid, max pooling, sum": {
        "local_attention": {"kind": "hybrid", "window": 24, "dilation": 2, "unit": 4},
        "summaries": SUMMARIES | {"pooling": "max", "per_block": 1}, "combine": "sum",
    },
    "dilated, mean pooling": {
        "local_attention": {"kind": "dilated", "window": 16, "dilation": 3, "unit": 1},
        "summaries": SUMMARIES | {"pooling": "mean"},
    },
    "blocks, records in one layer": {
        "local_attention": {"kind": "block", "window": 16},
        "retrieval": {"chunk": 8, "fan_in": 2, "dim": 16, "layers": [2]},
    },
    "linear": {"linear_attention": {"kernel": "elu+1", "features": 16, "seed": 1}, "summaries": None},
    "every key, dense, tied": {
        "local_attention": {"kind": "sliding", "window": None}, "summaries": None, "num_experts": 0,
        "num_experts_per_tok": 0, "router_gate_features": False, "tie_word_embeddings": True,
    },
}  # fmt: skip
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "what is argparse? " * 3, "protocol_tags": ["<segment:a>"]},
    {"role": "assistant", "content": "a parser", "protocol_tags": ["<tool:calc>"]},
    {"role": "data", "content": "secret words", "protocol_tags": ["<safety:restricted>", "<segment:b>"]},
    {"role": "user", "content": "go on"},
]


def packed(tokenizer: Tokenizer) -> Prompt:
    """A finished document, a finished conversation, and the text to continue, as training packs them."""
    text = text_prompt(tokenizer, b"import argparse\nparser = argparse.ArgumentParser(", "text")
    ids, records = [], []
    for number, document in enumerate([plain(b"usage: prog [options]"), conversation(MESSAGES, "messages")]):
        encoded = encode_document(tokenizer, document)
        rows = np.repeat(encoded.spans[:, 1:], encoded.spans[:, 0], axis=0)
        ids.append(encoded.tokens)
        records.append(np.concatenate([np.full((len(rows), 1), number), rows], axis=1))
    last = text.records + np.array([2, 0, 0, 0])
    ids_, records_ = np.concatenate([*ids, text.ids]), np.concatenate([*records, last]).astype(np.int32)
    return Prompt(ids_, records_, (2, *text.answer[1:]), text.stops)


def prompts_of(tokenizer: Tokenizer) -> list[Prompt]:
    """Of very different lengths."""
    return [
        chat_prompt(tokenizer, conversation(MESSAGES, "messages")),
        text_prompt(tokenizer, b"d", "text"),
        packed(tokenizer),
    ]


def full_logits(exported: Exported, ids: list[int], records: list[tuple[int, ...]]) -> torch.Tensor:
    """[n, V] of a whole sequence at once, without a cache."""
    with torch.no_grad():
        out = exported.model(torch.tensor([ids]), records=torch.tensor([records], dtype=torch.int32), use_cache=False)
    logits: torch.Tensor = out.logits[0]
    return logits


def recomputed(exported: Exported, request: Request) -> Answer:
    """The answer by full recomputation at every step."""
    prompt, generator = request.prompt, request.options.generator()
    ids, records = prompt.ids.tolist(), [tuple(row) for row in prompt.records.tolist()]
    hidden = ~allowed_tokens(exported.tokenizer, prompt, exported.config.vocab_size)
    answer = Answer()
    while not answer.finish:
        logits = full_logits(exported, ids, records)[-1].masked_fill(hidden, float("-inf"))
        token = int(next_tokens(logits[None], [request.options], [generator]))
        answer.ids.append(token)
        answer.finish = prompt.stops.get(token, "max_tokens" if len(answer.ids) == request.max_tokens else "")
        ids.append(token)
        records.append(prompt.answer)
    text = [token for token in answer.ids if token not in prompt.stops]
    answer.text = exported.tokenizer.decode(text).decode(errors="replace")
    return answer


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_answers_are_those_of_full_recomputation(name: str, tokenizer: Tokenizer) -> None:
    """A ragged batch of a conversation, a single letter and packed documents; greedy and sampled."""
    exported = make_exported(tokenizer, **ARCHITECTURES[name])
    prompts = prompts_of(tokenizer)
    options = [GREEDY, SamplingOptions(0.9, 0.9, seed=5), GREEDY]
    requests = [Request(p, o, n) for p, o, n in zip(prompts, options, (36, 50, 20), strict=True)]
    done = Decoder(exported, piece=19).generate(requests)
    assert done.answers == [recomputed(exported, request) for request in requests]
    assert {answer.finish for answer in done.answers} <= {"end", "eod", "max_tokens"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_full_recomputation_at_every_position(name: str, tokenizer: Tokenizer) -> None:
    exported = make_exported(tokenizer, **ARCHITECTURES[name])
    exported = replace(exported, model=copy.deepcopy(exported.model).float())
    decoder, prompts = Decoder(exported), prompts_of(tokenizer)
    for prompt in (prompts[0], prompts[2]):
        whole = full_logits(exported, prompt.ids.tolist(), [tuple(row) for row in prompt.records.tolist()])
        cache = decoder.new_cache()
        for at in range(len(prompt.ids)):
            ids, records = torch.tensor([[prompt.ids[at]]]), torch.from_numpy(prompt.records[at : at + 1])[None]
            with torch.inference_mode():
                logits = decoder.forward(cache, ids, records)
            assert (logits[0] - whole[at]).abs().max() <= 1e-5 * max(1.0, float(whole.abs().max()))


def test_a_row_does_not_depend_on_its_batch(exported: Exported, tokenizer: Tokenizer) -> None:
    decoder, prompts = Decoder(exported, piece=16), prompts_of(tokenizer)
    requests = [Request(p, SamplingOptions(1.0, 0.95, seed=n), 12 + 9 * n) for n, p in enumerate(prompts)]
    together = decoder.generate(requests).answers
    assert together == [decoder.generate([request]).answers[0] for request in requests]
    assert decoder.generate(requests[::-1]).answers == together[::-1]


def test_a_shared_prompt_passes_once_and_answers_differ(exported: Exported, tokenizer: Tokenizer) -> None:
    prompt, other = text_prompt(tokenizer, b"parser.add_", "text"), text_prompt(tokenizer, b"def ", "text")
    options = [SamplingOptions(1.0, 1.0, seed=seed) for seed in (3, 4, 3)]
    order = [(prompt, options[0]), (other, options[0]), (prompt, options[1]), (prompt, options[2])]
    done = Decoder(exported).generate([Request(p, o, 16) for p, o in order])
    assert done.speed.prompt_tokens == len(prompt.ids) + len(other.ids)
    assert done.answers[0] == done.answers[3] != done.answers[2]
    for answer, (asked, option) in zip(done.answers, order, strict=True):
        assert answer == recomputed(exported, Request(asked, option, 16))


def test_speed_and_bytes_are_counted(exported: Exported, tokenizer: Tokenizer) -> None:
    prompt, seen = text_prompt(tokenizer, b"parser " * 40, "text"), []
    request = Request(prompt, GREEDY, 10)
    done = Decoder(exported, piece=50).generate([request, request], on_progress=lambda *x: seen.append(x))
    total = len(prompt.ids)
    assert seen == [*((n, total) for n in range(50, total, 50)), (total, total)]
    tokens = sum(len(answer.ids) for answer in done.answers)
    assert (done.speed.new_tokens, done.speed.steps) == (tokens, max(len(a.ids) for a in done.answers) - 1)
    assert done.speed.tokens_per_s > 0 and done.speed.prompt_tokens_per_s > 0 and done.speed.ms_per_token > 0
    longest = total + done.speed.steps
    assert (
        full_cache_bytes(exported.config, 2 * total, 8)
        <= done.full_bytes
        <= full_cache_bytes(exported.config, 2 * longest, 8)
    )
    config = exported.config
    window = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 24 * 8
    assert done.cache_bytes > window


def test_what_the_context_cannot_hold_is_refused(exported: Exported, tokenizer: Tokenizer) -> None:
    decoder = Decoder(exported)
    assert decoder.room(10) == 256 and decoder.room(CONTEXT - 3) == 3 and decoder.room(10, CONTEXT - 10) == CONTEXT - 10
    with pytest.raises(ConfigError, match=f"--max-tokens {CONTEXT - 10} or fewer"):
        decoder.room(10, CONTEXT - 9)
    with pytest.raises(ConfigError, match=rf"has {CONTEXT} tokens and the model was made for {CONTEXT} .*context_max"):
        decoder.room(CONTEXT)
    prompt = message_prompt(tokenizer, b"x" * 3 * CONTEXT, "user", "--prompt")
    with pytest.raises(ConfigError, match="context_max"):
        decoder.generate([Request(prompt, GREEDY, 1)])


def test_logits_that_are_not_finite_are_refused(exported: Exported, tokenizer: Tokenizer) -> None:
    model = copy.deepcopy(exported.model)
    with torch.no_grad():
        model.lm_head.weight[3] = float("inf")
    prompt = text_prompt(tokenizer, b"def", "text")
    with pytest.raises(CheckpointError, match="not finite"):
        Decoder(replace(exported, model=model)).generate([Request(prompt, GREEDY, 2)])
