"""``refractor generate``: text and answers from an exported folder. Torch is imported when it runs."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, DataError
from ..tokenizer import Tokenizer

if TYPE_CHECKING:
    from .answers import Answer, OnText
    from .chat import Prompt
    from .decoder import Decoder

#: A prefill shorter than this says nothing of its progress; a longer one a line this often (seconds).
QUIET_SECONDS = 5.0
#: Choices of ``--dtype`` (`load.DTYPES`) and ``--kv-codec``; ``auto`` is the model's ``memory.kv.compress_ratio``.
DTYPES, KV_CODECS = ("float32", "bfloat16", "float16"), ("none", "auto", "exact", "tight", "norm")

_DESCRIPTION = """Continue a text, or answer a conversation, with a model that refractor convert exported. The text
streams to the output; notes, progress and --stats go to the error output."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``generate``."""
    parser = subparsers.add_parser("generate", help="generate text with an exported model", description=_DESCRIPTION)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder that refractor convert wrote")
    source = parser.add_argument_group("what to answer (one of these)").add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="text to continue")
    source.add_argument("--prompt-file", type=Path, metavar="FILE", help="the same from a file, byte for byte")
    source.add_argument(
        "--messages",
        type=Path,
        metavar="FILE",
        help="conversation to answer: JSON list of messages {role, content, protocol_tags}, or several such lists",
    )
    parser.add_argument(
        "--role", help="the text is a message of this role, and the assistant answers it (default: it is continued)"
    )
    parser.add_argument(
        "--chat", action="store_true", help="then go on: each line of the input is a user's message; /help lists more"
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-tokens", type=int, metavar="N", help="most tokens of an answer (default: 256)")
    sampling.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0: most likely (default: 0.8)")
    sampling.add_argument("--top-p", type=float, default=0.95, metavar="P", help="1 sets no limit (default: 0.95)")
    sampling.add_argument("--top-k", type=int, default=0, metavar="K", help="0 sets no limit (default)")
    sampling.add_argument("--seed", type=int, default=0, metavar="S", help="of the first answer; the next has one more")
    sampling.add_argument("--num", type=int, default=1, metavar="N", help="answers to each prompt (default: 1)")
    cache = parser.add_argument_group("cache of one conversation (KV Cache++)")
    cache.add_argument(
        "--kv-codec",
        choices=KV_CODECS,
        help="keep old keys and values so compressed, auto: as memory.kv.compress_ratio says; several answers are then "
        "written one after another, each going back to the end of the prompt (default: none, auto with --chat)",
    )
    cache.add_argument("--kv-budget-mb", type=float, metavar="MB", help="most memory of old keys and values")
    where = parser.add_argument_group("machine and output")
    where.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    where.add_argument("--dtype", choices=DTYPES, default="float32", help="precision (default: float32)")
    where.add_argument("--json", action="store_true", help="one JSON object at the end: text, ids, why it ended")
    where.add_argument("--stats", action="store_true", help="print speed and memory")
    where.add_argument("--no-stream", action="store_true", help="print an answer when it is complete")
    parser.set_defaults(run=generate)


def generate(args: argparse.Namespace) -> int:
    """Answer, and print."""
    _check(args)
    text = _text(args)
    options_of(args)
    from .decoder import Decoder, room
    from .load import load_weights, read_exported

    found = read_exported(args.folder)
    prompts = _prompts(args, found.tokenizer, text)
    for prompt in prompts:  # before the weights are read, which takes longest
        room(found.config, len(prompt.ids), args.max_tokens)
    alone = args.chat or args.kv_codec != "none"
    if alone and len(prompts) > 1:
        option = "--chat" if args.chat else f"--kv-codec {args.kv_codec}"
        raise ConfigError(f"{args.messages} has {len(prompts)} conversations and {option} serves one: give one.")
    decoder = Decoder(load_weights(found, args.device, args.dtype))
    for note in found.notes:
        _say(note)
    if alone:
        from .conversation import converse

        return converse(args, decoder, prompts[0])
    return _together(args, decoder, prompts)


def _check(args: argparse.Namespace) -> None:
    """Fills in the codec and refuses what makes no sense, before anything is loaded."""
    args.kv_codec = args.kv_codec or ("auto" if args.chat else "none")
    if args.num < 1:
        raise ConfigError(f"--num {args.num} makes no sense: give 1 or more.")
    if args.max_tokens is not None and args.max_tokens < 1:
        raise ConfigError(f"--max-tokens {args.max_tokens} makes no sense: give 1 or more.")
    if args.role is not None and args.messages is not None:
        raise ConfigError("--role goes with --prompt and --prompt-file: in --messages every message has its own.")
    if args.kv_budget_mb is not None and args.kv_codec == "none":
        raise ConfigError("--kv-budget-mb limits what --kv-codec keeps: give --kv-codec exact, tight or norm.")
    if args.kv_budget_mb is not None and not args.kv_budget_mb > 0:
        raise ConfigError(f"--kv-budget-mb {args.kv_budget_mb} makes no sense: give more than 0.")
    if args.chat:
        if args.json or args.num != 1:
            raise ConfigError("--chat answers one message after the other: leave out --json and --num.")
        if args.role is None and args.messages is None:
            raise ConfigError("--chat begins with a message: give --messages, or --role user beside the prompt.")


def _text(args: argparse.Namespace) -> bytes | None:
    if args.prompt is not None:
        return os.fsencode(args.prompt)  # the bytes that were typed, valid UTF-8 or not
    if args.prompt_file is None:
        return None
    try:
        data: bytes = args.prompt_file.read_bytes()
    except OSError as error:
        raise DataError(f"{args.prompt_file}: cannot be read ({error.strerror}); give a file of text.") from None
    return data


def _prompts(args: argparse.Namespace, tokenizer: Tokenizer, text: bytes | None) -> list[Prompt]:
    from .chat import message_prompt, read_messages, text_prompt

    if text is None:
        return read_messages(tokenizer, args.messages)
    where = "--prompt" if args.prompt is not None else str(args.prompt_file)
    if args.role is None:
        return [text_prompt(tokenizer, text, where)]
    return [message_prompt(tokenizer, text, args.role, where)]


def options_of(args: argparse.Namespace) -> Any:
    """The sampling options of the first answer. Raises ``ConfigError`` for values out of range."""
    from ..evaluation.sampling import SamplingOptions

    return SamplingOptions(args.temperature, args.top_p, args.seed, args.top_k)


def _together(args: argparse.Namespace, decoder: Decoder, prompts: list[Prompt]) -> int:
    """All answers to all prompts in one batch."""
    from .answers import Request

    options = options_of(args)
    requests = [
        Request(prompt, replace(options, seed=options.seed + number), decoder.room(len(prompt.ids), args.max_tokens))
        for prompt in prompts
        for number in range(args.num)
    ]
    shown = None if args.json else Shown(len(requests), stream=not args.no_stream)
    done = decoder.generate(requests, shown, Prefill())
    each = done.cache_bytes / done.samples, done.full_bytes / done.samples
    stats = {
        **speed_of(done.speed),
        "cache_bytes_per_sample": round(each[0]),
        "full_cache_bytes_per_sample": round(each[1]),
        "samples": done.samples,
    }
    finish(args, requests, done.answers, stats)
    return 0


def finish(args: argparse.Namespace, requests: list[Any], answers: list[Answer], stats: dict[str, Any]) -> None:
    """The JSON object, or the statistics."""
    if args.json:
        rows = [
            {
                "prompt": number // args.num,
                "seed": request.options.seed,
                "text": answer.text,
                "finish_reason": answer.finish,
                "prompt_tokens": len(request.prompt.ids),
                "tokens": len(answer.ids),
                "ids": answer.ids,
            }
            for number, (request, answer) in enumerate(zip(requests, answers, strict=True))
        ]
        print(json.dumps({"answers": rows} | ({"stats": stats} if args.stats else {}), ensure_ascii=False))
    elif args.stats:
        print_stats(stats)


def print_stats(stats: dict[str, Any]) -> None:
    """One line a figure that there is, on the error output."""
    for name, value in stats.items():
        if value not in (None, {}):
            _say(f"{name.replace('_', ' ')}: {_figure(value)}")


def _figure(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_figure(inner)}" for name, inner in value.items())
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"


def speed_of(speed: Any) -> dict[str, Any]:
    """Tokens, seconds and rates."""
    return {
        "prompt_tokens": speed.prompt_tokens,
        "prefill_s": round(speed.prefill_s, 4),
        "prompt_tokens_per_s": round(speed.prompt_tokens_per_s, 1),
        "new_tokens": speed.new_tokens,
        "decode_s": round(speed.decode_s, 4),
        "tokens_per_s": round(speed.tokens_per_s, 2),
        "ms_per_step": round(speed.ms_per_token, 3),
    }


class Shown:
    """Answers on the output in their order: the first open one streams, those after it wait for their turn."""

    def __init__(self, count: int, stream: bool) -> None:
        self._count, self._stream = count, stream
        self._waiting, self._ended = [""] * count, [False] * count
        self._current, self._begun = 0, False

    def __call__(self, row: int, text: str, finish: str) -> None:
        """Takes text of an answer; ``finish``: why it ended, empty while it goes on."""
        self._waiting[row] += text
        self._ended[row] = bool(finish)
        while self._current < self._count and (self._stream or self._ended[self._current]):
            if not self._show(self._current):
                return

    def at(self, row: int) -> OnText:
        """Takes the text of one answer that was asked for alone."""
        return lambda _, text, finish: self(row, text, finish)

    def _show(self, row: int) -> bool:
        """Prints what there is of an answer; whether that was its end."""
        if not self._begun and self._count > 1:
            print(f"--- answer {row + 1} of {self._count}")
        ended = self._ended[row]
        print(self._waiting[row], end="\n" if ended else "", flush=True)
        self._waiting[row], self._begun = "", not ended
        self._current += ended
        return ended


class Prefill:
    """Says how far a long prompt has passed."""

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """``done`` of ``total`` tokens have passed."""
        now = time.monotonic()
        if now - self._last >= QUIET_SECONDS and done < total:
            self._last = now
            rate = done / (now - self._started)
            _say(f"prompt: {done:,} of {total:,} tokens, {rate:,.0f} a second, {(total - done) / rate:,.0f} s left")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
