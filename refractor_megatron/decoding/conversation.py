"""``refractor generate`` on one conversation that goes back: several answers to a prompt, or a chat at the terminal."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import ConfigError
from .answers import Request
from .chat import Prompt, next_turn
from .command import Prefill, Shown, finish, options_of, print_stats, speed_of
from .decoder import Decoder
from .session import Session, own_codec

_HELP = "/retry: another answer   /undo: take the last message back   /stats   /help   /quit; else your message"


def converse(args: argparse.Namespace, decoder: Decoder, prompt: Prompt) -> int:
    """Answers ``prompt`` ``--num`` times, each from its end; with ``--chat`` goes on with lines of the input."""
    codec = None if args.kv_codec == "none" else args.kv_codec
    if codec == "auto":
        codec = own_codec(decoder)
    budget = None if args.kv_budget_mb is None else int(args.kv_budget_mb * 1e6)
    session = Session(decoder, codec, budget=budget)
    if args.chat:
        _Chat(args, session).run(prompt)
        return 0
    options, most = options_of(args), decoder.room(len(prompt.ids), args.max_tokens)
    requests = [Request(prompt, replace(options, seed=options.seed + number), most) for number in range(args.num)]
    shown = Shown(args.num, stream=not args.no_stream)
    session.feed(prompt, Prefill())
    end, answers = session.position, []
    for number, request in enumerate(requests):
        session.rewind(end)
        answers.append(session.answer(prompt, request.options, most, None if args.json else shown.at(number)))
    finish(args, requests, answers, stats_of(session))
    return 0


def stats_of(session: Session) -> dict[str, Any]:
    """Speed, bytes beside those of a full cache, and what going back cost."""
    stats = speed_of(session.speed) | {
        "hot_bytes": session.hot_bytes,
        "cold_bytes": session.cold_bytes,
        "full_cache_bytes": session.full_bytes,
        "rewinds": session.rewinds.count,
        "restored_tokens": session.rewinds.restored_tokens,
        "recomputed_tokens": session.rewinds.recomputed_tokens,
    }
    chunks = session.chunk_statistics
    if chunks is None:
        return stats
    errors = {name: {"mean": found.mean, "max": found.maximum} for name, found in chunks.by_codec.items()}
    return stats | {
        "chunks": chunks.chunks,
        "chunk_hits": chunks.hits,
        "chunk_misses": chunks.misses,
        "chunk_hit_rate": chunks.hit_rate,
        "chunk_evictions": chunks.evictions,
        "codec_escalations": chunks.escalations,
        "compression_ratio": chunks.compression_ratio,
        "measured_errors": errors,
    }


@dataclass
class _Chat:
    """Lines of the input as messages of the user. ``turns``: where each of them began, and what was asked there."""

    args: argparse.Namespace
    session: Session
    turns: list[tuple[int, Prompt]] = field(default_factory=list)
    answers: int = 0

    def run(self, first: Prompt) -> None:
        """Until ``/quit`` or the end of the input."""
        self._turn(first)
        while (line := self._line()) is not None:
            try:
                if not self._obey(line):
                    return
            except ConfigError as error:  # too long: there are shorter messages, and /undo
                print(f"error: {error}", file=sys.stderr)

    def _line(self) -> str | None:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None

    def _obey(self, line: str) -> bool:
        if line == "/quit":
            return False
        if line == "/retry":
            self._again()
        elif line == "/undo":
            self._undo()
        elif line == "/stats":
            print_stats(stats_of(self.session))
        elif line.startswith("/"):
            print(_HELP, file=sys.stderr)
        elif line:
            _, asked = self.turns[-1]
            self._turn(next_turn(self.session.decoder.tokenizer, asked, line.encode(errors="surrogateescape")))
        return True

    def _turn(self, prompt: Prompt) -> None:
        begin = self.session.position
        self.session.decoder.room(begin + len(prompt.ids), self.args.max_tokens)  # before anything has passed
        self.session.feed(prompt, Prefill())
        self.turns.append((begin, prompt))
        self._answer(prompt)

    def _again(self) -> None:
        """The last answer once more, from another seed."""
        begin, prompt = self.turns[-1]
        self.session.rewind(begin + len(prompt.ids))
        self._answer(prompt)

    def _undo(self) -> None:
        """The conversation as it was before the last message."""
        if len(self.turns) == 1:
            print("nothing to take back: this is the beginning.", file=sys.stderr)
            return
        begin, _ = self.turns.pop()
        self.session.rewind(begin)

    def _answer(self, prompt: Prompt) -> None:
        options = options_of(self.args)
        options = replace(options, seed=options.seed + self.answers)
        self.answers += 1
        most = self.session.decoder.room(self.session.position, self.args.max_tokens)
        self.session.answer(prompt, options, most, Shown(1, stream=not self.args.no_stream).at(0))
