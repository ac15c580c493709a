"""``refractor eval`` and ``refractor report``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..errors import ConfigError
from ..training.folder import RunFolder
from ..training.spawn import spawn


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add both commands."""
    evaluation = subparsers.add_parser("eval", help="evaluate a run's newest checkpoint on held-out documents")
    actions = evaluation.add_subparsers(metavar="WHAT", required=True)
    heldout = actions.add_parser("heldout", help="loss over the whole held-out split, baselines, sampled continuations")
    heldout.add_argument("folder", type=Path, help="run folder")
    heldout.set_defaults(run=evaluate)
    _add_position(actions)
    report = subparsers.add_parser("report", help="write a run's HTML report")
    report.add_argument("folder", type=Path, help="run folder")
    report.add_argument("--png", type=Path, help="also write the plots as one picture")
    report.set_defaults(run=write)


def _add_position(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    position = actions.add_parser(
        "position",
        help="loss by position in the document",
        description="Loss by position in held-out documents that fill a whole window; writes position.json and .png.",
    )
    position.add_argument("folder", type=Path, help="run folder")
    position.add_argument(
        "--buckets", type=_positions, help="upper ends of the position buckets (default: doubling up to train.seq_len)"
    )
    position.add_argument("--documents", type=int, help="at most so many documents (default: all that are long enough)")
    position.add_argument("--weights", choices=("raw", "ema"), default="raw", help="weights to evaluate (default: raw)")
    position.set_defaults(run=by_position)


def _positions(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def evaluate(args: argparse.Namespace) -> int:
    """Evaluate in a process of its own and print the result."""
    folder = _run_folder(args.folder)
    if code := spawn("refractor_megatron.evaluation.final", [str(folder.path)], 1):
        return code
    print(json.dumps(json.loads(folder.final.read_text()), indent=1))
    return 0


def by_position(args: argparse.Namespace) -> int:
    """Measure in a process of its own, which prints the table."""
    folder = _run_folder(args.folder)
    if args.documents is not None and args.documents < 1:
        raise ConfigError(f"--documents {args.documents} makes no sense: give 1 or more.")
    options = {"weights": args.weights, "documents": args.documents, "buckets": args.buckets}
    return spawn("refractor_megatron.evaluation.position_run", [str(folder.path), json.dumps(options)], 1)


def write(args: argparse.Namespace) -> int:
    """Write ``report.html``."""
    folder = _run_folder(args.folder)
    from .report import write_png, write_report

    print(write_report(folder.path))
    if args.png is not None:
        write_png(folder.path, args.png)
        print(args.png)
    return 0


def _run_folder(path: Path) -> RunFolder:
    folder = RunFolder(path)
    if not folder.config.exists():
        raise ConfigError(f"{path} is not a run folder: it has no config.yaml; give a folder that pretrain made.")
    return folder
