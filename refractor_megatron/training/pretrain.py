"""``refractor pretrain``: configuration, data, ranks, evaluation, report. Imports no torch."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__
from ..checkpoint import manifest as checkpoints
from ..config import RunConfig, compose
from ..config.limits import check
from ..config.schema import as_text, schema
from ..config.yaml_file import read_yaml
from ..distinction.closure import compile_checked
from ..errors import OutputError
from ..evaluation.evidence import commit
from ..resilience.lock import exclusive
from ..resilience.signals import EXIT_STOPPED
from .dataset import add_corpus_flags, dataset_of, prepared
from .folder import RunFolder, write_json
from .spawn import spawn
from .weights import StartWeights, adopt_weights, check_tokenizer, tokenizer_file

#: Unless the command line or a saved run's configuration names another.
_PRESET = "pilot"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``pretrain``."""
    parser = subparsers.add_parser(
        "pretrain", help="build data, train, evaluate, report", description="Train one run from raw text to report."
    )
    add_corpus_flags(parser, _PRESET)
    parser.add_argument(
        "--config",
        type=Path,
        help="YAML file merged after the preset (the specification's 12.1 loads); that of a run brings its preset",
    )
    parser.add_argument(
        "--weights", type=Path, help="start from the weights of another run or checkpoint (default: random weights)"
    )
    parser.add_argument("--steps", type=int, help="same as train.steps=N")
    parser.add_argument("--ranks", type=int, default=1, help="processes on this machine (default: 1)")
    parser.add_argument("--out", type=Path, help="run folder (default: runs/PRESET)")
    parser.add_argument("--prepare-only", action="store_true", help="write configuration and data, start no rank")
    parser.set_defaults(run=pretrain, preset=None)


def pretrain(args: argparse.Namespace) -> int:
    """Run the whole story; every part that is already there is left as it is."""
    if args.ranks < 1:
        raise OutputError(f"--ranks {args.ranks} makes no sense: give 1 or more.")
    overrides = [*_preset(args), *args.overrides]
    if args.steps is not None:
        overrides.append(f"train.steps={args.steps}")
    cfg = compose(overrides, args.config)
    for warning in check(cfg, args.ranks):
        print(f"note: {warning}", file=sys.stderr)
    compile_checked(cfg.safety.masks)  # before any data is built
    folder = RunFolder(args.out or Path("runs") / cfg.preset)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make {folder.path} ({error.strerror}): choose another folder with --out.") from None
    with exclusive(folder.path):
        _adopt_config(folder, cfg)
        start, notes = adopt_weights(folder, cfg, args.weights)
        data = _data(folder, cfg, args, start)
        for note in [*notes, *check_tokenizer(start, data)]:
            print(f"note: {note}", file=sys.stderr)
        _record_environment(folder, cfg, args, start)
        if args.prepare_only:
            print(f"prepared {folder.path}: config {cfg.hash}, data {data['digest'][:12]}")
            return 0
        return _train_and_report(folder, cfg, args.ranks)


def _preset(args: argparse.Namespace) -> list[str]:
    """The override that chooses the preset; none where ``--config`` is a saved run, which names its own."""
    if args.preset is None and args.config is not None and read_yaml(args.config)[1]:
        return []
    return [f"experiment={args.preset or _PRESET}"]


def _train_and_report(folder: RunFolder, cfg: RunConfig, ranks: int) -> int:
    done = checkpoints.latest_step(folder.checkpoints)
    if done >= cfg.train.steps:
        print(f"{folder.path}: training is done (step {done} of {cfg.train.steps})")
    else:
        code = spawn("refractor_megatron.training.worker", [str(folder.path)], ranks)
        if code == EXIT_STOPPED:
            done = checkpoints.latest_step(folder.checkpoints)
            print(f"stopped by a signal, saved at step {done} of {cfg.train.steps}: the same command goes on")
        if code:
            return code
    if not _is_final(folder, cfg.train.steps):
        code = spawn("refractor_megatron.evaluation.final", [str(folder.path)], 1)
        if code:
            return code
    from ..evaluation.report import write_report

    write_report(folder.path)
    _say_where(folder)
    return 0


def _adopt_config(folder: RunFolder, cfg: RunConfig) -> None:
    """Write the resolved configuration, unless checkpoints of another one are there."""
    if folder.config.exists() and checkpoints.complete(folder.checkpoints):
        old = RunConfig.load(folder.config)
        if old.fixed_hash != cfg.fixed_hash:
            theirs, ours = old.values(), cfg.values()
            changed = [
                f"{key} {as_text(theirs[key])} -> {as_text(ours[key])}"
                for key, leaf in schema().items()
                if leaf.resume == "fixed" and theirs[key] != ours[key]
            ]
            raise OutputError(
                f"{folder.path} holds a run of another configuration ({'; '.join(changed[:4])}): "
                "use the same settings, or start a new run with --out."
            )
    cfg.save(folder.config)


def _data(folder: RunFolder, cfg: RunConfig, args: argparse.Namespace, start: StartWeights | None) -> dict[str, Any]:
    trained = bool(checkpoints.complete(folder.checkpoints))
    tokenizer = args.tokenizer or _tokenizer(folder, start, trained)
    built = dataset_of(cfg, args.corpus, args.data_root, tokenizer)
    entry = {**prepared(cfg, built), "tokenizer": built.manifest["tokenizer"]["sha256"]}
    if folder.data.exists() and trained:
        old = json.loads(folder.data.read_text())
        if old["digest"] != entry["digest"]:
            raise OutputError(
                f"{folder.path} was trained on dataset {old['digest'][:12]}, not {entry['digest'][:12]}: "
                "give the same --corpus, or start a new run with --out."
            )
    write_json(folder.data, {**entry, "read_keys": sorted(cfg.read_keys())})
    if tokenizer is None:
        folder.tokenizer.unlink(missing_ok=True)
    elif not trained:
        shutil.copyfile(built.folder / "tokenizer.json", folder.tokenizer)
    return entry


def _tokenizer(folder: RunFolder, start: StartWeights | None, trained: bool) -> Path | None:
    """The tokenizer that the run began with, or that its first weights know; None to train one on the text."""
    if trained:
        return folder.tokenizer if folder.tokenizer.exists() else None
    return None if start is None else tokenizer_file(start.run)


def _record_environment(
    folder: RunFolder, cfg: RunConfig, args: argparse.Namespace, start: StartWeights | None
) -> None:
    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "absent"

    write_json(
        folder.environment,
        {
            "config_hash": cfg.hash,
            "package": __version__,
            "commit": commit(),
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "ranks": args.ranks,
            "command": shlex.join(["refractor", *sys.argv[1:]]),
            "first_weights": "random" if start is None else str(start),
            **{name: installed(name) for name in ("torch", "megatron-core", "hydra-core", "numpy")},
        },
    )


def _is_final(folder: RunFolder, steps: int) -> bool:
    try:
        return bool(json.loads(folder.final.read_text())["step"] >= steps) and folder.samples.exists()
    except (OSError, ValueError, KeyError):
        return False


def _say_where(folder: RunFolder) -> None:
    final = json.loads(folder.final.read_text())
    for weights in ("raw", "ema"):
        if weights in final:
            loss, bits = final[weights]["loss"], final[weights]["bits_per_byte"]
            print(f"held-out loss, {weights} weights: {loss:.4f} nats/token, {bits:.3f} bits/byte")
    below = final["below_unigram"]
    side = "below" if below >= 0 else "above"
    print(f"same tokens: unigram {final['unigram']:.4f} ({abs(below):.1%} {side} it), bigram {final['bigram']:.4f}")
    for name in ("report", "checkpoints", "metrics", "samples", "config"):
        print(f"  {name:<12} {getattr(folder, name)}")
