"""``refractor masks check | draw``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError, OutputError

if TYPE_CHECKING:
    from ...distinction.rules import CompiledRules
    from ...fabric.spec import MaskSpec

    Subparsers = argparse._SubParsersAction[Any]


def add_parser(subparsers: Subparsers) -> None:
    """Add ``masks`` and its verbs; each sets ``args.run``, a function of the namespace that returns the exit code."""
    parser = subparsers.add_parser("masks", help="check and draw the rules of who may read whom")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    _add_check(verbs)
    _add_draw(verbs)


def _add_check(verbs: Subparsers) -> None:
    verb = verbs.add_parser(
        "check",
        help="print who reads whom and what flows indirectly; exit code 2 for a refused rule set",
    )
    verb.add_argument("rules", nargs="?", metavar="RULES.yaml", type=Path, help="a list of rules, or a mapping with it")
    verb.add_argument("--preset", help="check safety.masks of this preset in place of a file")
    verb.add_argument("--all", action="store_true", help="every combination of scope bits, not only the rules' own")
    verb.set_defaults(run=check)


def _add_draw(verbs: Subparsers) -> None:
    verb = verbs.add_parser(
        "draw",
        help="draw the compiled mask of a conversation as a PNG, one cell for each word",
        description="Draws which keys every query reads, tier by tier, and why it does not read the others.",
    )
    verb.add_argument("rules", metavar="RULES.yaml", type=Path, help="a rules file, as for check")
    verb.add_argument(
        "conversation", metavar="CONVERSATION.json", type=Path, help="messages {role, content, protocol_tags}"
    )
    verb.add_argument("--out", type=Path, default=Path("mask.png"), metavar="PNG", help="default mask.png")
    verb.add_argument("--tokenizer", type=Path, metavar="JSON", help="a cell is a token of this tokenizer, not a word")
    local = verb.add_argument_group("tier A, local")
    local.add_argument("--window", type=_positive, default=32, help="cells that a query looks back (default 32)")
    local.add_argument("--pattern", choices=("sliding", "dilated", "block", "hybrid"), default="sliding")
    local.add_argument("--dilation", type=_positive, default=1, help="every d-th unit is read (dilated, hybrid)")
    local.add_argument("--unit", type=_positive, default=1, help="cells of a dilated unit (default 1)")
    local.add_argument("--stride", type=_positive, default=1, help="cells by which the window moves (sliding)")
    summary = verb.add_argument_group("tier B, summaries")
    summary.add_argument("--block", type=_positive, default=16, help="cells of a summarised block (default 16)")
    summary.add_argument("--summaries", type=_count, default=2, help="summaries of a block, 0 = none (default 2)")
    summary.add_argument("--levels", type=int, choices=(1, 2), default=1, help="2 adds summaries of groups of blocks")
    summary.add_argument("--fanout", type=_positive, default=4, help="blocks of a group (default 4)")
    retrieved = verb.add_argument_group("tier C, retrieved")
    retrieved.add_argument("--retrieved", type=_count, default=0, help="records that each chunk reads (default 0)")
    retrieved.add_argument("--chunk", type=_positive, default=32, help="cells of a chunk (default 32)")
    retrieved.add_argument(
        "--policy", nargs="*", choices=("copy", "tools"), default=["copy", "tools"], help="what the records permit"
    )
    verb.set_defaults(run=draw)


def check(args: argparse.Namespace) -> int:
    """Print the rule set and its flows. Raises ``ConfigError`` for a refused set, after printing."""
    from ...distinction.closure import check_closure
    from ...distinction.rule_file import read_rules

    if (args.rules is None) == (args.preset is None):
        raise ConfigError("masks check: give either a rules file or --preset NAME.")
    if args.rules is not None:
        file = read_rules(args.rules)
        _show(file.compiled, args.all)
        file.check()
    else:
        rules = _preset_rules(args.preset)
        _show(rules, args.all)
        check_closure(rules)
    print("\naccepted: nothing flows where a rule on SAFETY_SCOPE forbids it")
    return 0


def _show(rules: CompiledRules, every_scope: bool) -> None:
    from ...distinction.flows import ASCII_MARKS, describe

    text = describe(rules, every_scope)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = text.translate(ASCII_MARKS)
    print(text, flush=True)


def _preset_rules(preset: str) -> CompiledRules:
    from ...config.resolve import PRESET_GROUP, compose
    from ...distinction.contradictions import check_contradictions
    from ...distinction.rules import compile_rules

    rules = compile_rules(compose([f"{PRESET_GROUP}={preset}"]).safety.masks)
    check_contradictions(rules)
    return rules


def draw(args: argparse.Namespace) -> int:
    """Write the picture. Raises ``ConfigError``, ``DataError`` or ``OutputError``."""
    from ...distinction.rule_file import read_rules
    from ...tokenizer import Tokenizer
    from .conversation import read_conversation
    from .picture import compile_picture
    from .render import save

    spec = _spec(args)
    file = read_rules(args.rules)
    file.check()
    tokenizer = None if args.tokenizer is None else Tokenizer.load(args.tokenizer)
    conversation = read_conversation(args.conversation, file.compiled.roles, tokenizer)
    for tag in conversation.unknown_tags:
        print(f"warning: {args.conversation}: unknown protocol tag {tag!r} is ignored", file=sys.stderr)
    picture = compile_picture(conversation, file.compiled, spec, _policy(args.policy))
    try:
        save(picture, args.out, f"{args.conversation.name} under {args.rules.name}")
    except OSError as error:
        raise OutputError(f"{args.out}: cannot be written ({error.strerror}); name another file with --out.") from error
    print(f"{args.out}: {picture.summary_line()}")
    return 0


def _spec(args: argparse.Namespace) -> MaskSpec:
    from ...distinction.pattern import LocalPattern
    from ...fabric.spec import MaskSpec, RetrievedSpec, SummarySpec

    if args.stride > 1 and (args.pattern != "sliding" or args.stride > args.window):
        raise ConfigError("--stride moves a sliding window by at most --window cells; lower it or use --stride 1.")
    return MaskSpec(
        LocalPattern(args.pattern, args.window, args.dilation, args.unit, args.stride),
        SummarySpec(args.block, args.summaries, args.levels, args.fanout) if args.summaries else None,
        RetrievedSpec(args.chunk, args.retrieved) if args.retrieved else None,
    )


def _policy(names: list[str]) -> int:
    from ...distinction.roles import RecordPolicy

    bits = {"copy": RecordPolicy.ALLOW_COPY, "tools": RecordPolicy.ALLOW_TOOLS}
    return int(sum(bits[name] for name in set(names)))


def _positive(text: str) -> int:
    """argparse type: an integer of at least 1."""
    value = _count(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be at least 1, not 0")
    return value


def _count(text: str) -> int:
    """argparse type: an integer of at least 0."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}")
    return int(text)
