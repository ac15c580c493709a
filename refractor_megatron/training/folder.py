"""The files of a run, by name. Imports no torch: launcher and report use it too."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunFolder:
    """``runs/<name>/``."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved, hashed configuration that every rank reads."""
        return self.path / "config.yaml"

    @property
    def data(self) -> Path:
        """Where the dataset lies, its digest, and its sources."""
        return self.path / "data.json"

    @property
    def environment(self) -> Path:
        """Commit, versions, device and command of the run."""
        return self.path / "environment.json"

    @property
    def device(self) -> Path:
        """Device of the ranks and the peak that MFU is measured against."""
        return self.path / "device.json"

    @property
    def weights(self) -> Path:
        """Where the first weights come from; absent where they are random."""
        return self.path / "weights.json"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer that was given to the run; absent where building the dataset has trained one."""
        return self.path / "tokenizer.json"

    @property
    def metrics(self) -> Path:
        """One JSON object for each step."""
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        """One JSON object for each evaluation."""
        return self.path / "eval.jsonl"

    @property
    def final(self) -> Path:
        """Result of the evaluation over the whole held-out split."""
        return self.path / "final.json"

    @property
    def baselines(self) -> Path:
        """Unigram and bigram losses of the held-out tokens."""
        return self.path / "baselines.json"

    @property
    def samples(self) -> Path:
        """Sampled continuations."""
        return self.path / "samples.json"

    @property
    def checkpoints(self) -> Path:
        """Checkpoint folders."""
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.path / "report.html"


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    os.replace(temporary, path)
