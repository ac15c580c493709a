"""Where a new run's first weights come from: ``refractor pretrain --weights``, launcher's half. Imports no torch.

The launcher finds the checkpoint and writes it down in the run folder (``weights.json``); the ranks load it before step
one (``training.start``). A run that has checkpoints of its own never reads the source again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import manifest as checkpoints
from ..config import RunConfig
from ..config.schema import as_text, brief
from ..errors import CheckpointError, ConfigError, OutputError
from ..tokenizer import Tokenizer
from .folder import RunFolder, write_json

#: Keys that leave every shape as it is and yet change what the same weights compute.
_MEANING = ("model.rope.", "model.norm.", "model.ffn.topk", "router.gate_temp", "router.renormalize_topk", "relation.")
#: Keys that give every tensor of a plain decoder its shape. What REFRACTOR adds to one may differ.
_SHAPES = (
    "model.d_model",
    "model.n_layers",
    "model.n_heads",
    "model.n_kv_heads",
    "model.tie_embeddings",
    "model.ffn.type",
    "model.ffn.activation",
    "model.ffn.hidden",
    "model.ffn.experts",
)
_MEANING_EXACT = ("model.vocab_size", "model.context_max", "safety.masks")


@dataclass(frozen=True)
class StartWeights:
    """``weights.json`` of a run."""

    source: str  # what was asked for: a run folder or one of its checkpoints, absolute
    checkpoint: str  # the checkpoint of it that is loaded, absolute
    step: int  # updates that the source had done
    config_hash: str  # of the source's configuration
    manifest_sha256: str  # of the checkpoint's manifest, which holds the hash of every file
    tokenizer: str | None  # digest; None where the source carries no tokenizer

    @classmethod
    def read(cls, folder: RunFolder) -> StartWeights | None:
        """What ``folder`` was started from; None for a run that starts from random weights."""
        if not folder.weights.exists():
            return None
        try:
            return cls(**json.loads(folder.weights.read_text()))
        except (ValueError, TypeError) as error:
            raise OutputError(f"{folder.weights} is damaged ({error}): start another run with --out.") from None

    @property
    def run(self) -> RunFolder:
        """The run that the checkpoint belongs to."""
        return run_of(Path(self.checkpoint))

    def __str__(self) -> str:
        return f"{self.checkpoint} (step {self.step}, config {self.config_hash})"


def run_of(checkpoint: Path) -> RunFolder:
    """The run folder around ``checkpoints/step_N``."""
    return RunFolder(checkpoint.parent.parent)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that ``path`` means: itself, or the newest complete one of a run folder.

    Raises:
        CheckpointError: there is none, or it lies outside a run folder, so that nothing says what shape it has.
    """
    if (path / checkpoints.MANIFEST).is_file():
        found = path
    else:
        complete = checkpoints.complete(RunFolder(path).checkpoints) or checkpoints.complete(path)
        if not complete:
            raise CheckpointError(
                f"--weights {path} holds no complete checkpoint: give a run folder or one of its checkpoint folders "
                "(other models' files become one with refractor convert --to megatron)."
            )
        found = complete[-1]
    found = found.resolve()
    if not run_of(found).config.is_file():
        raise CheckpointError(
            f"--weights {path}: {run_of(found).config} is missing, which says what shape the weights have: "
            "give a whole run folder."
        )
    return found


def tokenizer_file(run: RunFolder) -> Path | None:
    """The tokenizer that a run's tokens come from: its own file, else that of its dataset where it still lies there."""
    if run.tokenizer.is_file():
        return run.tokenizer
    try:
        dataset = Path(json.loads(run.data.read_text())["folder"]) / "tokenizer.json"
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dataset if dataset.is_file() else None


def adopt_weights(folder: RunFolder, cfg: RunConfig, path: Path | None) -> tuple[StartWeights | None, list[str]]:
    """Write down, or check, where the run in ``folder`` gets its first weights; returns that and notes for the user.

    A run that was stopped before its first checkpoint keeps the start that it was given: without ``path`` it would
    train from random weights otherwise, and nobody would notice.

    Raises:
        CheckpointError: ``path`` holds no checkpoint, or what was written down before is gone or altered.
        ConfigError: shapes or vocabularies disagree.
        OutputError: the run has checkpoints and was started from something else.
    """
    recorded = StartWeights.read(folder)
    if checkpoints.complete(folder.checkpoints):
        asked = None if path is None else str(path.resolve())
        if asked is not None and (recorded is None or recorded.source != asked):
            began = "random weights" if recorded is None else recorded.source
            raise OutputError(
                f"{folder.path} has trained already and began from {began}, not from {asked}: "
                "leave --weights out to go on, or start a new run with --out."
            )
        return recorded, []
    if path is None:
        return (None, []) if recorded is None else (recorded, _kept(folder, cfg, recorded))
    checkpoint = find_checkpoint(path)
    manifest = checkpoints.read(checkpoint)
    theirs = RunConfig.load(run_of(checkpoint).config)
    _same_shapes(theirs, cfg, path)
    _same_vocabulary(theirs, cfg, path)
    tokenizer = tokenizer_file(run_of(checkpoint))
    start = StartWeights(
        source=str(path.resolve()),
        checkpoint=str(checkpoint),
        step=manifest.step,
        config_hash=manifest.config_hash,
        manifest_sha256=hashlib.sha256((checkpoint / checkpoints.MANIFEST).read_bytes()).hexdigest(),
        tokenizer=None if tokenizer is None else Tokenizer.load(tokenizer).digest,
    )
    write_json(folder.weights, asdict(start))
    return start, _differences(theirs, cfg, path)


def _kept(folder: RunFolder, cfg: RunConfig, start: StartWeights) -> list[str]:
    """Notes about a start that an earlier command wrote down."""
    way_out = "give --weights again, or start another run with --out."
    manifest, config = Path(start.checkpoint) / checkpoints.MANIFEST, start.run.config
    if not manifest.is_file() or not config.is_file():
        raise CheckpointError(f"{folder.path} was to begin from {start.checkpoint}, which is gone: {way_out}")
    if hashlib.sha256(manifest.read_bytes()).hexdigest() != start.manifest_sha256:
        raise CheckpointError(f"{folder.path} was to begin from {start.checkpoint}, which is another now: {way_out}")
    theirs = RunConfig.load(config)
    _same_vocabulary(theirs, cfg, Path(start.source))
    note = f"{folder.path} begins from {start.checkpoint}, as --weights said before (for random weights choose --out)."
    return [note, *_differences(theirs, cfg, Path(start.source))]


def check_tokenizer(start: StartWeights | None, data: Mapping[str, Any]) -> list[str]:
    """Notes about the tokenizer of a run's dataset (its ``data.json``) beside that of its first weights.

    Raises:
        ConfigError: both are known and they differ.
    """
    if start is None:
        return []
    if start.tokenizer is None:
        return [
            f"{start.source} carries no tokenizer, so it is not checked that its tokens are those of {data['folder']}; "
            "give its own with --tokenizer."
        ]
    if data["tokenizer"] != start.tokenizer:
        raise ConfigError(
            f"{data['folder']} was made by tokenizer {data['tokenizer'][:12]} and the weights in {start.source} know "
            f"the tokens of {start.tokenizer[:12]}: leave --tokenizer out, or give that one."
        )
    return []


def _same_shapes(theirs: RunConfig, cfg: RunConfig, path: Path) -> None:
    """Whatever differs is named at once and before any data is built; the ranks compare the tensors themselves."""
    before, now = theirs.values(), cfg.values()
    dense = before["model.ffn.type"] == now["model.ffn.type"] == "dense"
    differing = [key for key in _SHAPES if before[key] != now[key] and not (dense and key == "model.ffn.experts")]
    if not differing:
        return
    if now["model.vocab_size"] < before["model.vocab_size"]:
        differing.append("model.vocab_size")
    if before["model.rope.dim"] != now["model.rope.dim"]:
        differing.append("model.rope.dim")
    overrides = " ".join(f"{key}={as_text(before[key])}" for key in differing)
    raise ConfigError(
        f"the weights in {path} have other shapes than this model: add {overrides} to the command, or give "
        f"--config {run_of(find_checkpoint(path)).config}."
    )


def _same_vocabulary(theirs: RunConfig, cfg: RunConfig, path: Path) -> None:
    """Fewer ids would drop tokens that the weights know. Rows that the padding has anyway may be taken for more ids."""
    known, asked = theirs.values()["model.vocab_size"], cfg.values()["model.vocab_size"]
    if asked < known:
        raise ConfigError(
            f"model.vocab_size={asked}, and embedding.word_embeddings.weight of the weights in {path} has {known} "
            f"tokens: set model.vocab_size={known} and use their tokenizer."
        )


def _differences(theirs: RunConfig, cfg: RunConfig, path: Path) -> list[str]:
    """Keys under which the same weights compute something else. Often wanted (a longer context), never unsaid."""
    before, now = theirs.values(), cfg.values()
    changed = [
        f"{key} {_text(key, before[key])} -> {_text(key, now[key])}"
        for key in now
        if (key.startswith(_MEANING) or key in _MEANING_EXACT) and key != "relation.backend" and before[key] != now[key]
    ]
    return [f"the weights in {path} were trained with other settings: {', '.join(changed)}."] if changed else []


def _text(key: str, value: Any) -> str:
    return brief(value) if key == "safety.masks" else as_text(value)
