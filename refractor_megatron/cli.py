"""``refractor``: the command line. Each command is imported when it runs, so that ``--help`` is immediate."""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from . import __version__
from .errors import OutputError, RefractorError

#: command -> (module with ``add_parser``, one line of help)
COMMANDS = {
    "doctor": ("refractor_megatron.compat.doctor", "what is installed, what is missing, what that disables"),
    "config": ("refractor_megatron.config.command", "show, explain and compare configurations"),
    "data": ("refractor_megatron.training.dataset", "build a dataset and look into it"),
    "pretrain": ("refractor_megatron.training.pretrain", "build data, train, evaluate, report"),
    "eval": ("refractor_megatron.evaluation.command", "evaluate a run on held-out documents"),
    "report": ("refractor_megatron.evaluation.command", "write a run's HTML report"),
    "masks": ("refractor_megatron.evaluation.masks.command", "check and draw the rules of who may read whom"),
    "bench": ("refractor_megatron.evaluation.bench_attention", "measure attention beside dense flash attention"),
    "parity": ("refractor_megatron.training.parity", "compare a grid with one rank, parameter by parameter"),
    "ckpt": ("refractor_megatron.checkpoint.command", "list and verify checkpoints"),
    "convert": ("refractor_megatron.checkpoint.convert.command", "checkpoints to transformers and back, checked"),
    "generate": ("refractor_megatron.decoding.command", "generate text with an exported model"),
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, as every other error is said; sub-commands inherit it."""

    def error(self, message: str) -> NoReturn:
        """Print the sentence and leave with exit code 2."""
        self.exit(2, f"error: {message}; see {self.prog} --help.\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``refractor``; returns the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal cannot show is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()  # a full disk must be noticed here: at exit Python only mutters
    except BrokenPipeError:  # the reader (head, less) has seen enough
        _drop_output()
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _drop_output()
        print(f"error: {error.filename or 'the output'}: {error.strerror}; free space and run again.", file=sys.stderr)
        return OutputError.exit_code


def _parse(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """The arguments; overrides may stand anywhere among the flags (argparse takes one group of them)."""
    args, extra = parser.parse_known_args(arguments)
    unknown = [word for word in extra if word.startswith("-") or "=" not in word or not hasattr(args, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if extra:
        args.overrides = [*args.overrides, *extra]
    return args


def _drop_output() -> None:
    """What is still buffered goes nowhere, so that Python's own flush at exit cannot fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _Parser(
        prog="refractor",
        description="Train long-context, retrieval-aware mixture-of-experts decoders with compiled information flow.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    chosen = next((a for a in arguments if not a.startswith("-")), None)
    try:
        if chosen in COMMANDS:
            importlib.import_module(COMMANDS[chosen][0]).add_parser(subparsers)
        else:
            for name, (_, text) in COMMANDS.items():
                subparsers.add_parser(name, help=text)
        args = _parse(parser, arguments)
        code: int = args.run(args)
        return code
    except RefractorError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
