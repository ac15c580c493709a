"""``data inspect``, ``data report`` and ``data verify``: what is in a dataset folder."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from refractor_megatron.errors import DataError

if TYPE_CHECKING:
    from data_pipeline.report.contents import Contents

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_HEADS = 3
_HEAD_TOKENS = 48


def add_inspect_parser(subparsers: Subparsers) -> None:
    """Adds ``inspect`` to the actions of ``data``."""
    parser = subparsers.add_parser("inspect", help="what a dataset folder holds; a document, a sample, the audit")
    parser.add_argument("folder", type=Path)
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--document", metavar="N|ID", help="a document by its number or its id (hex): text and records")
    one.add_argument("--sample", type=int, metavar="N", help="training sample N of a stage: its pieces")
    one.add_argument(
        "--audit", nargs="?", const="", metavar="RULE", help="rules that dropped or changed documents; rows of RULE"
    )
    parser.add_argument("--stage", type=int, metavar="LENGTH", help="the stage of --sample (default: the shortest)")
    parser.add_argument("--seed", type=int, help="train.seed of the order of --sample (default: 0)")
    parser.add_argument("--full", action="store_true", help="all of a document, of a sample's pieces, of a rule's rows")
    parser.set_defaults(run=inspect_command)


def add_report_parser(subparsers: Subparsers) -> None:
    """Adds ``report`` to the actions of ``data``."""
    parser = subparsers.add_parser("report", help="one HTML page about a dataset folder; prints its path")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, help="the page (default: FOLDER.html beside the folder)")
    parser.set_defaults(run=report_command)


def report_command(args: argparse.Namespace) -> int:
    """Writes the page and prints where it is."""
    from data_pipeline.report.page import write_report

    print(write_report(args.folder, args.out))
    return 0


def inspect_command(args: argparse.Namespace) -> int:
    """Prints what is asked for. Without a question: every file's sha256 is compared, then a screen about the whole."""
    from data_pipeline.report import look, overview
    from data_pipeline.report.contents import Contents

    if args.sample is None and (args.stage is not None or args.seed is not None):
        raise DataError("--stage and --seed say which --sample to show; give --sample N as well.")
    if args.full and args.document is None and args.sample is None and not args.audit:
        raise DataError("--full shows all of a --document, a --sample or an --audit RULE; give one of them as well.")
    data = Contents.load(args.folder)
    if args.document is not None:
        lines = look.document(data, args.document, args.full)
    elif args.sample is not None:
        lines = look.sample(data, args.sample, args.stage, args.seed or 0, args.full)
    elif args.audit is not None:
        lines = overview.audit(data, args.audit, args.full)
    else:
        _print_seal(data)
        lines = overview.overview(data)
    for line in lines:
        print(line)
    if (args.document, args.sample, args.audit) == (None, None, None):
        _print_heads(data)
    return 0


def verify_command(args: argparse.Namespace) -> int:
    """Compares every byte of a folder with its manifest; one line for each file at fault, and exit code 3."""
    from data_pipeline.receipts.verify import verify_folder

    lines = verify_folder(args.folder, log=lambda line: print(line, file=sys.stderr))
    for line in lines:
        print(line)
    if lines:
        raise DataError(f"{args.folder} is damaged; restore it, or delete it and build it again.")
    root = json.loads((args.folder / "manifest.json").read_bytes()).get("merkle_root", "none: of an older version")
    print(f"{args.folder}: intact, Merkle root {root}")
    if args.root is not None and args.root != root:
        raise DataError(f"{args.folder} is intact, but its Merkle root is not {args.root}: it is another dataset.")
    return 0


def _print_seal(data: Contents) -> None:
    from data_pipeline import manifest as manifests

    manifests.verify(data.folder, data.manifest)
    vocabulary = data.manifest["tokenizer"]["vocab_size"]
    print(f"{data.folder}: intact, content sha256 {data.manifest['content_sha256'][:16]}, vocabulary {vocabulary}")


def _print_heads(data: Contents) -> None:
    """The first tokens of a few windows, as training would see them."""
    from data_pipeline.report.look import record_runs
    from data_pipeline.stream import SampleStream
    from refractor_megatron.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(data.folder / "tokenizer.json")
    stream = SampleStream(data.folder, min(_HEAD_TOKENS, data.manifest["splits"]["train"]["tokens"] - 1), seed=0)
    for index in range(min(_HEADS, stream.samples_per_epoch)):
        sample = stream.sample(index)
        text = tokenizer.decode(sample.tokens.tolist(), show_specials=True).decode(errors="replace")
        print(f"sample {index}: {text!r}")
        for line in record_runs(sample.records):
            print(f"  {line}")
