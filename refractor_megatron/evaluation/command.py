"""``refractor eval`` and ``refractor report``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..errors import OutputError
from ..training.folder import RunFolder
from ..training.spawn import spawn


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add both commands."""
    evaluation = subparsers.add_parser("eval", help="evaluate a run's newest checkpoint on all held-out documents")
    evaluation.add_argument("folder", type=Path, help="run folder")
    evaluation.set_defaults(run=evaluate)
    report = subparsers.add_parser("report", help="write a run's HTML report")
    report.add_argument("folder", type=Path, help="run folder")
    report.add_argument("--png", type=Path, help="also write the plots as one picture")
    report.set_defaults(run=write)


def evaluate(args: argparse.Namespace) -> int:
    """Evaluate in a process of its own and print the result."""
    folder = _run_folder(args.folder)
    if code := spawn("refractor_megatron.evaluation.final", [str(folder.path)], 1):
        return code
    print(json.dumps(json.loads(folder.final.read_text()), indent=1))
    return 0


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
        raise OutputError(f"{path} is not a run folder: it has no config.yaml; give a folder that pretrain made.")
    return folder
