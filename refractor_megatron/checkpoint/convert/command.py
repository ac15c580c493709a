"""``refractor convert``: a run's checkpoint to a Hugging Face folder and back, and ``convert verify``."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from .foreign_config import FAMILIES

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_EPILOG = """\
refractor convert runs/pilot --to hf --out served/pilot       export the newest checkpoint
refractor convert served/pilot --to megatron --out runs/back  a run folder with a checkpoint for any grid
refractor convert verify served/pilot                         check an exported folder again
refractor convert models/llama --to megatron --out runs/llama a Llama, Mistral or Mixtral folder, tiers off
refractor convert runs/llama --to llama --out models/back     and back
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``convert SOURCE --to hf|megatron --out FOLDER`` and ``convert verify FOLDER``."""
    parser = subparsers.add_parser(
        "convert",
        help="checkpoints to Hugging Face folders and back, checked",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="run folder, checkpoint or model folder; or the word verify")
    parser.add_argument("folder", nargs="?", type=Path, help="with verify: the exported folder")
    parser.add_argument("--to", choices=("hf", "megatron", *FAMILIES), help="which format to write")
    parser.add_argument("--out", type=Path, help="folder to write; it must not exist, or be empty")
    parser.add_argument("--weights", choices=("raw", "ema"), help="export these weights (default: raw)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="export weights in this type (default: as stored)")
    parser.add_argument("--shard-size", default="4GB", help="largest file, e.g. 500MB or 4GiB (default: 4GB)")
    parser.add_argument(
        "--drop-tiers",
        action="store_true",
        help="with --to llama, mistral or mixtral: leave out what these cannot express; the ledger names it",
    )
    parser.add_argument("--ledger", action="store_true", help="print what became of every tensor")
    parser.add_argument(
        "--no-logits",
        action="store_true",
        help="leave out the comparison of logits, for models that do not fit into memory twice",
    )
    parser.set_defaults(run=convert)


def convert(args: argparse.Namespace) -> int:
    """Do what the arguments say; progress goes to standard error."""
    if args.source == "verify":
        return _verify(args)
    if args.folder is not None:
        raise ConfigError(f"convert takes one folder: {args.folder} is one too many (verify FOLDER is a command).")
    if args.to is None or args.out is None:
        raise ConfigError(f"convert needs --to {', '.join(('hf', 'megatron', *FAMILIES))}, and --out FOLDER.")
    if args.drop_tiers and args.to not in FAMILIES:
        raise ConfigError(f"--drop-tiers goes with --to {', '.join(FAMILIES)}: a REFRACTOR folder keeps everything.")
    try:
        ledger = _converted(args)
    except KeyboardInterrupt:
        _log("interrupted: nothing was written")
        return 130
    if args.ledger:
        print(ledger.text())
    elif args.drop_tiers:
        print("\n".join(ledger.dropped) or "nothing had to be dropped")
    if args.drop_tiers and ledger.dropped:
        _log(f"warning: {args.out} computes something else than the model that was trained: tiers were dropped")
    print(args.out)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from .verify import verify_folder

    given = [name for name in ("to", "out", "weights", "dtype") if getattr(args, name) is not None]
    given += [name.replace("_", "-") for name in ("ledger", "no_logits", "drop_tiers") if getattr(args, name)]
    if given:
        raise ConfigError(f"convert verify takes no --{given[0]}: it checks a folder as it is.")
    if args.folder is None:
        raise ConfigError("convert verify needs the exported folder: refractor convert verify FOLDER.")
    verify_folder(args.folder, _log)
    print(f"{args.folder}  ok")
    return 0


def _converted(args: argparse.Namespace) -> Any:
    from .foreign import is_foreign

    if args.to in FAMILIES:
        return _to_foreign(args)
    if is_foreign(Path(args.source)):
        return _from_foreign(args)
    if args.to == "hf" and (Path(args.source) / "config.json").is_file():
        raise ConfigError(
            f"{args.source} is a folder for transformers already: convert it --to megatron, or give the run to export."
        )
    return _to_hf(args) if args.to == "hf" else _to_megatron(args)


def _to_foreign(args: argparse.Namespace) -> Any:
    from .foreign_writer import export_foreign

    weights, options = args.weights or "raw", _foreign_options(args)
    return export_foreign(
        Path(args.source), args.out, args.to, options, _log, weights=weights, drop_tiers=args.drop_tiers
    )


def _from_foreign(args: argparse.Namespace) -> Any:
    from .foreign_import import import_hf, import_megatron

    if args.weights is not None:
        raise ConfigError(f"--weights chooses between those of a run, and {args.source} is one model: leave it out.")
    if args.to == "megatron" and args.dtype is not None:
        raise ConfigError("--dtype chooses what is exported; --to megatron takes the folder's weights as they are.")
    return (import_hf if args.to == "hf" else import_megatron)(
        Path(args.source), args.out, _foreign_options(args), _log
    )


def _foreign_options(args: argparse.Namespace) -> Any:
    from .foreign_import import ForeignOptions
    from .tensors import CHOICES

    dtype = CHOICES[args.dtype] if args.dtype else None
    return ForeignOptions(byte_count(args.shard_size), dtype, not args.no_logits)


def _to_hf(args: argparse.Namespace) -> Any:
    from .tensors import CHOICES
    from .to_hf import ExportOptions, export

    dtype = CHOICES[args.dtype] if args.dtype else None
    options = ExportOptions(args.weights or "raw", byte_count(args.shard_size), dtype, not args.no_logits)
    return export(Path(args.source), args.out, options, _log)


def _to_megatron(args: argparse.Namespace) -> Any:
    from .to_megatron import ImportOptions, import_folder

    for name in ("weights", "dtype"):
        if getattr(args, name) is not None:
            raise ConfigError(
                f"--{name} chooses what is exported; --to megatron takes the folder's weights as they are."
            )
    return import_folder(
        Path(args.source), args.out, ImportOptions(byte_count(args.shard_size), not args.no_logits), _log
    )


def byte_count(text: str) -> int:
    """Bytes of a size like ``4GB`` (10^9) or ``512MiB`` (2^20). Raises ``ConfigError`` for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    size = int(float(found[1]) * _UNITS[found[2]]) if found is not None and found[2] in _UNITS else 0
    if size < 1:
        raise ConfigError(f"--shard-size {text!r} is no size: write it like 500MB or 4GiB.")
    return size


def _log(text: str) -> None:
    print(text, file=sys.stderr)
