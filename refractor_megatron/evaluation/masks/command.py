"""``refractor masks check | draw``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError, OutputError

if TYPE_CHECKING:
    from ...distinction.rules import CompiledRules
    from ...fabric.spec import MaskSpec

    Subparsers = argparse._SubParsersAction[Any]

#: Flags of ``draw`` that only some settings use: default, when they are used, and what to give to use them.
_DILATED = ("dilated", "hybrid")
_CONDITIONAL: dict[str, tuple[Any, Callable[[argparse.Namespace], bool], str]] = {
    "dilation": (1, lambda args: args.pattern in _DILATED, "--pattern dilated or hybrid"),
    "unit": (1, lambda args: args.pattern in _DILATED, "--pattern dilated or hybrid"),
    "stride": (1, lambda args: args.pattern == "sliding", "--pattern sliding"),
    "block": (16, lambda args: args.summaries > 0, "--summaries 1 or more"),
    "levels": (1, lambda args: args.summaries > 0, "--summaries 1 or more"),
    "fanout": (4, lambda args: args.levels == 2, "--levels 2"),
    "chunk": (32, lambda args: args.retrieved > 0, "--retrieved 1 or more"),
    "policy": (3, lambda args: args.retrieved > 0, "--retrieved 1 or more"),
}
#: Most cells of a window, block or chunk: more than any sample has.
_MOST = 1 << 20


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
    verb.add_argument(
        "rules", nargs="?", metavar="RULES.yaml", type=Path, help="rules, or a configuration that sets them"
    )
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
    size = _whole(1, _MOST)
    local = verb.add_argument_group("tier A, local")
    local.add_argument(
        "--window", type=size, default=32, metavar="N", help="cells that a query looks back (default 32)"
    )
    local.add_argument("--pattern", choices=("sliding", "dilated", "block", "hybrid"), default="sliding")
    local.add_argument(
        "--dilation", type=size, metavar="N", help="every N-th unit is read (dilated, hybrid; default 1)"
    )
    local.add_argument("--unit", type=size, metavar="N", help="cells of a dilated unit (default 1)")
    local.add_argument("--stride", type=size, metavar="N", help="cells by which the window moves (sliding; default 1)")
    summary = verb.add_argument_group("tier B, summaries")
    summary.add_argument("--block", type=size, metavar="N", help="cells of a summarised block (default 16)")
    summary.add_argument(
        "--summaries", type=_whole(0, 4), default=2, metavar="N", help="summaries of a block, 0 to 4 (default 2)"
    )
    summary.add_argument("--levels", type=int, choices=(1, 2), help="2 adds summaries of groups of blocks (default 1)")
    summary.add_argument("--fanout", type=_whole(2, _MOST), metavar="N", help="blocks of a group (default 4)")
    retrieved = verb.add_argument_group("tier C, retrieved")
    retrieved.add_argument(
        "--retrieved", type=_whole(0, 64), default=0, metavar="N", help="records that each chunk reads (default 0)"
    )
    retrieved.add_argument("--chunk", type=size, metavar="N", help="cells of a chunk (default 32)")
    retrieved.add_argument(
        "--policy", type=_policy, metavar="P,P", help="what the records permit: copy,tools (default), or none"
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
        rules = file.compiled
        _show(rules, args.all)
        file.check()
    else:
        rules = _preset_rules(args.preset)
        _show(rules, args.all)
        check_closure(rules)
    print("\naccepted: nothing flows where a rule on SAFETY_SCOPE forbids it")
    if not rules.causal:
        names = ", ".join(map(repr, rules.noncausal_rules()))
        print(f"not for training: a token would read its own label, because of causal: false in {names}")
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
    _check_out(args)
    file = read_rules(args.rules)
    file.check()
    tokenizer = None if args.tokenizer is None else Tokenizer.load(args.tokenizer)
    conversation = read_conversation(args.conversation, file.compiled.roles, tokenizer)
    _check_far_keys(spec, len(conversation.records))
    picture = compile_picture(conversation, file.compiled, spec, args.policy)
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        save(picture, args.out, f"{args.conversation.name} under {args.rules.name}")
    except OSError as error:
        raise OutputError(f"{args.out}: cannot be written ({error.strerror}); name another file with --out.") from error
    print(f"{args.out}: {picture.summary_line()}")
    return 0


def _check_out(args: argparse.Namespace) -> None:
    """The picture is a PNG and takes no input's place."""
    if args.out.suffix.lower() != ".png":
        raise OutputError(f"{args.out}: the picture is a PNG; give --out a name that ends in .png.")
    inputs = [path for path in (args.rules, args.conversation, args.tokenizer) if path is not None]
    if args.out.resolve() in [path.resolve() for path in inputs]:
        raise OutputError(f"{args.out}: this file is an input and would be overwritten; name another one with --out.")


def _check_far_keys(spec: MaskSpec, length: int) -> None:
    """Every summary and every retrieved record is a column of the picture."""
    from .conversation import MOST_CELLS

    summaries = 0 if spec.summary is None else sum(spec.summary.counts(length))
    records = 0 if spec.retrieved is None else spec.retrieved.count(length)
    for number, what, way_out in (
        (summaries, "summaries", "raise --block or lower --summaries"),
        (records, "retrieved records", "raise --chunk or lower --retrieved"),
    ):
        if number > MOST_CELLS:
            raise ConfigError(f"{number} {what} do not fit into a picture of {MOST_CELLS}; {way_out}.")


def _spec(args: argparse.Namespace) -> MaskSpec:
    from ...distinction.pattern import LocalPattern
    from ...fabric.spec import MaskSpec, RetrievedSpec, SummarySpec

    for flag, (default, used, needed) in _CONDITIONAL.items():
        if getattr(args, flag) is None:
            setattr(args, flag, default)
        elif not used(args):
            raise ConfigError(f"--{flag} has no effect without {needed}; give that too, or leave it out.")
    if args.stride > args.window:
        raise ConfigError("--stride moves the window by at most --window cells; lower it.")
    return MaskSpec(
        LocalPattern(args.pattern, args.window, args.dilation, args.unit, args.stride),
        SummarySpec(args.block, args.summaries, args.levels, args.fanout) if args.summaries else None,
        RetrievedSpec(args.chunk, args.retrieved) if args.retrieved else None,
    )


def _policy(text: str) -> int:
    """argparse type: ``RecordPolicy`` bits of names with commas between, or none."""
    from ...distinction.roles import RecordPolicy

    bits = {"copy": RecordPolicy.ALLOW_COPY, "tools": RecordPolicy.ALLOW_TOOLS}
    names = [] if text == "none" else text.split(",")
    if any(name not in bits for name in names):
        raise argparse.ArgumentTypeError(f"must be copy, tools, copy,tools or none, not {text!r}")
    return int(sum(bits[name] for name in set(names)))


def _whole(low: int, high: int) -> Callable[[str], int]:
    """argparse type: a whole number within the bounds."""

    def parse(text: str) -> int:
        # 20 digits are beyond every bound, and int() refuses some thousands of them.
        value = int(text) if text.isascii() and text.isdigit() and len(text) <= 20 else None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, not {text[:24]!r}")
        return value

    return parse
