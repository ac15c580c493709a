"""``refractor config show | explain | diff``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import diff as diff_module
from . import explain as explain_module
from .limits import check
from .resolve import PRESET_GROUP, compose
from .resolved import render

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[Any]


def add_parser(subparsers: Subparsers) -> None:
    """Add ``config`` and its verbs; each sets ``args.run``, a function of the namespace that returns the exit code."""
    parser = subparsers.add_parser("config", help="show, explain and compare configurations")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    verb = verbs.add_parser("show", help="print a resolved configuration and what is wrong with it")
    verb.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides, for instance model=8b")
    verb.add_argument("--preset", help="the preset to start from (default: reference)")
    verb.add_argument("--config", "--file", dest="file", help="a YAML file that is laid over the preset")
    verb.set_defaults(run=show)

    verb = verbs.add_parser("explain", help="say what a key or a section means")
    verb.add_argument("key", metavar="KEY")
    verb.set_defaults(run=explain)

    verb = verbs.add_parser("diff", help="list the keys in which two configurations differ")
    verb.add_argument("a", metavar="A", help="preset, YAML file or run folder")
    verb.add_argument("b", metavar="B", help="preset, YAML file or run folder")
    verb.set_defaults(run=diff)


def show(args: argparse.Namespace) -> int:
    """Print the resolved YAML; warnings go to stderr. Raises ``ConfigError``, after printing, for contradictions."""
    preset = [f"{PRESET_GROUP}={args.preset}"] if args.preset else []
    cfg = compose([*preset, *args.overrides], Path(args.file) if args.file else None)
    print(render(cfg), end="", flush=True)
    for warning in check(cfg):
        print(f"warning: {warning}", file=sys.stderr)
    return 0


def explain(args: argparse.Namespace) -> int:
    """Print what is known about ``args.key``."""
    print(explain_module.explain(args.key))
    return 0


def diff(args: argparse.Namespace) -> int:
    """Print the table of differences between ``args.a`` and ``args.b``."""
    print(diff_module.diff(args.a, args.b))
    return 0
