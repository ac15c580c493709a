"""The files of a run as one value, read so that nothing missing or damaged stops the report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import OutputError
from ..telemetry.sinks.jsonl import Record, read_jsonl
from ..training.folder import RunFolder

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RunData:
    """What a run recorded; a file that is not there is an empty mapping or list."""

    folder: Path
    steps: list[Record]  # metrics.jsonl, by step
    evals: list[Record]  # eval.jsonl, by step
    final: Mapping[str, Any]
    baselines: Mapping[str, Any]
    samples: list[Mapping[str, Any]]
    data: Mapping[str, Any]
    sources: list[Mapping[str, Any]]
    environment: Mapping[str, Any]  # environment.json of the launcher
    device: Mapping[str, Any]  # device.json of the rank that logs: device, peak_flops of a rank, peak_name, ranks
    config: Mapping[str, Any]
    config_text: str

    @classmethod
    def load(cls, run_dir: Path) -> RunData:
        """Read ``run_dir``. Raises `OutputError` where it is no folder."""
        if not run_dir.is_dir():
            raise OutputError(f"{run_dir} is not a folder: give the folder of a run, for example runs/pilot")
        files = RunFolder(run_dir)
        data = _mapping(_json(files.data))
        config_text = files.config.read_text(errors="replace") if files.config.is_file() else ""
        return cls(
            folder=run_dir,
            steps=_by_step(read_jsonl(files.metrics)),
            evals=_by_step(read_jsonl(files.evaluations, ("step", "weights"))),
            final=_mapping(_json(files.final)),
            baselines=_mapping(_json(files.baselines)),
            samples=_mappings(_json(files.samples)),
            data=data,
            sources=_sources(data),
            environment=_mapping(_json(files.environment)),
            device=_mapping(_json(run_dir / "device.json")),
            config=_yaml(config_text),
            config_text=config_text,
        )

    def series(self, name: str) -> tuple[Floats, Floats]:
        """Steps and finite values of a scalar training metric."""
        return _series(self.steps, name)

    def held_out(self, weights: str, name: str = "loss") -> tuple[Floats, Floats]:
        """Steps and values of an evaluation metric for ``raw`` or ``ema`` weights."""
        return _series([record for record in self.evals if record.get("weights") == weights], name)

    def lists(self, name: str) -> tuple[Floats, Floats]:
        """Steps [n] and rows [n, k] of a list metric; records of another length than the last one are left out."""
        return _rows(self.steps, name)

    def held_out_lists(self, name: str) -> tuple[Floats, Floats]:
        """As ``lists``, of a list metric of evaluations with the raw weights."""
        return _rows([record for record in self.evals if record.get("weights") == "raw"], name)

    def last_evaluation(self) -> Mapping[str, Any]:
        """The newest evaluation during training with the raw weights."""
        return next((record for record in reversed(self.evals) if record.get("weights") == "raw"), {})

    def result(self, weights: str) -> Mapping[str, Any]:
        """The newest held-out result of ``raw`` or ``ema`` weights: of the whole split if ``final.json`` has it."""
        final = self.final.get(weights)
        if isinstance(final, Mapping):
            return final
        records = [record for record in self.evals if record.get("weights") == weights]
        return records[-1] if records else {}

    def bits_per_nat(self) -> float | None:
        """Factor from nats per token to bits per byte on this data, from whichever record has both."""
        for record in (self.result("raw"), *self.evals, *map(_mapping, self.baselines.values())):
            loss, bits = number(record, "loss"), number(record, "bits_per_byte")
            if loss and bits:
                return bits / loss
        return None


def number(mapping: Any, *path: str) -> float | None:
    """The finite number at ``path`` of nested mappings, else None. Accepts ``2e-4``, which YAML reads as text."""
    for key in path:
        mapping = mapping.get(key) if isinstance(mapping, Mapping) else None
    if isinstance(mapping, bool) or not isinstance(mapping, int | float | str):
        return None
    try:
        value = float(mapping)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def text(mapping: Any, *path: str) -> str | None:
    """The text or number at ``path`` of nested mappings as text, else None."""
    for key in path:
        mapping = mapping.get(key) if isinstance(mapping, Mapping) else None
    return str(mapping) if isinstance(mapping, str | int | float) and str(mapping) else None


def _series(records: list[Record], name: str) -> tuple[Floats, Floats]:
    pairs = [(record["step"], value) for record in records if (value := number(record, name)) is not None]
    return np.array([step for step, _ in pairs], float), np.array([value for _, value in pairs], float)


def _rows(records: list[Record], name: str) -> tuple[Floats, Floats]:
    rows = [(record["step"], record[name]) for record in records if _is_list(record.get(name))]
    rows = [(step, values) for step, values in rows if len(values) == len(rows[-1][1])]
    return np.array([step for step, _ in rows], float), np.array([values for _, values in rows], float)


def _is_list(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, int | float) for item in value)


def _by_step(records: list[Record]) -> list[Record]:
    return sorted((record for record in records if number(record, "step") is not None), key=lambda r: float(r["step"]))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _yaml(content: str) -> Mapping[str, Any]:
    import yaml

    try:
        return _mapping(yaml.safe_load(content))
    except yaml.YAMLError:
        return {}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _sources(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Sources that contributed documents, largest first: kept in ``data.json``, else in the dataset folder it names."""
    table = data.get("sources")
    if table is None and (folder := text(data, "folder")):
        table = _json(Path(folder) / "sources.json")
    used = [row for row in _mappings(table) if number(row, "documents") != 0]
    return sorted(used, key=lambda row: -(number(row, "bytes") or 0))
