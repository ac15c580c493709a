"""A synthetic run folder with every file that a real run leaves."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

MakeRun = Callable[..., Path]
EXPERTS, LAYERS, BITS = 8, 4, 1 / math.log(2) / 4.1


def step_record(step: int, steps: int, rng: np.random.Generator) -> dict[str, Any]:
    """A plausible training record."""
    share = step / steps
    loss = 3.6 + 5.4 * math.exp(-7 * share) + 0.08 * rng.normal()
    entropy = 0.95 - 0.33 * (1 - math.exp(-5 * share)) + 0.02 * rng.normal(size=LAYERS) + 0.04 * np.arange(LAYERS)
    load = np.exp(0.5 * np.sin(np.arange(EXPERTS)) * math.exp(-3 * share) + 0.12 * rng.normal(size=EXPERTS))
    return {
        "step": step,
        "time": 1.7e9 + 1.4 * step,
        "loss": loss + 0.01,
        "lm_loss": loss,
        "lr": 1e-3 * min(1, 20 * share) * (0.1 + 0.9 * math.cos(math.pi / 2 * share)),
        "grad_norm": 0.4 + 3 * math.exp(-9 * share) * abs(rng.normal()) + 0.1 * abs(rng.normal()),
        "step_ms": 1200 + 60 * rng.normal(),
        "tokens_per_s": 3400 + 180 * rng.normal(),
        "mfu": 0.31,
        "router_entropy": float(np.clip(entropy, 0, 1).mean()),
        "router_entropy_layer": np.clip(entropy, 0, 1).tolist(),
        "expert_load": (load / load.mean()).tolist(),
        "expert_load_max": float(load.max() / load.mean()),
        "lb_loss": 0.02,
        "epoch": 2.4 * share,
        "tokens_seen": 4096 * step,
        "samples_seen": 16 * step,
        "skipped_steps": 0,
        "peak_rss_mb": 2140.0,
    }


def eval_records(step: int, steps: int) -> list[dict[str, Any]]:
    """Raw and EMA results after ``step``."""
    losses = {"raw": 3.7 + 5.2 * math.exp(-7 * step / steps), "ema": 3.64 + 5.9 * math.exp(-6 * step / steps)}
    records: list[dict[str, Any]] = [
        {"step": step, "weights": weights, "time": 1.7e9, "loss": loss, "bits_per_byte": loss * BITS, "tokens": 8192}
        for weights, loss in losses.items()
    ]
    records[0] |= flow_metrics(step / steps)
    return records


def flow_metrics(share: float) -> dict[str, Any]:
    """Plausible masks and attention; summaries gain as training goes on."""
    far = [(0.3 - 0.03 * layer) * (1 - math.exp(-4 * share)) + 0.05 for layer in range(LAYERS)]
    entropy = [0.95 - (0.2 + 0.1 * layer) * (1 - math.exp(-5 * share)) for layer in range(LAYERS)]
    local = [1 - x for x in far]
    return {
        "mask_entropy": 0.991, "mask_entropy_median": 1.0, "role_share": [0, 0, 0, 0, 0.04, 0.96], "invalid_edges": 0,
        "masked_rows": 0, "edges_used_share": 0.31, "visited_share": 0.36, "attention_entropy": sum(entropy) / LAYERS,
        "attention_entropy_std": 0.14, "attention_entropy_median": entropy[2], "attention_entropy_layer": entropy,
        "attention_entropy_std_layer": [0.1] * LAYERS, "attention_edges_used": 0.42,
        "attention_mass_summary": sum(far) / LAYERS, "attention_mass_summary_layer": far,
        "attention_mass_local": sum(local) / LAYERS, "attention_mass_local_layer": local,
        "attention_entropy_local": 0.63, "attention_entropy_summary": 0.81,
    }  # fmt: skip


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """``make_run(steps, name="pilot")`` writes a run of ``steps`` steps and returns its folder."""

    def make(steps: int, name: str = "pilot") -> Path:
        folder, rng = tmp_path / name, np.random.default_rng(0)
        folder.mkdir()
        records = [step_record(step, max(steps, 100), rng) for step in range(1, steps + 1)]
        evals = [
            e for step in range(1, steps + 1) if step % 25 == 0 or step == steps for e in eval_records(step, steps)
        ]
        _lines(folder / "metrics.jsonl", records)
        _lines(folder / "eval.jsonl", evals)
        scores = {"unigram": 6.7336, "unigram_fitted": 6.9553, "bigram": 4.5994}
        baselines = {key: {"loss": loss, "bits_per_byte": loss * BITS} for key, loss in scores.items()}
        _json(folder / "baselines.json", baselines)
        final: dict[str, Any] = {"step": steps, "config_hash": "9f3c2a7e51b0d846", "data_digest": "81c0aa"}
        for weights, loss in (("raw", 3.712), ("ema", 3.655)):
            parts = [loss + 0.5 * math.exp(-i) for i in range(8)]
            result = {"loss": loss, "bits_per_byte": loss * BITS, "tokens": 126_976, "by_position": parts}
            final[weights] = result
        _json(folder / "final.json", final)
        _json(folder / "samples.json", SAMPLES)
        _json(folder / "data.json", {"digest": "81c0aa53e1f27d90c4", "sources": SOURCES})
        _json(folder / "environment.json", ENVIRONMENT)
        _json(folder / "device.json", DEVICE)
        (folder / "config.yaml").write_text(CONFIG.format(steps=max(1, steps)))
        return folder

    return make


def _lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


SAMPLES = [
    {
        "prompt": "The kernel keeps a list of registered devices. A driver asks for one with\n\n" + 12 * "see above, ",
        "continuation": ' the ``probe`` function,\nwhich returns 0 for <every> device & "name" that it binds.\n',
        "temperature": 0.8,
        "top_p": 0.95,
        "seed": 1234,
    },
    {"prompt": "def read(path):\n    ", "continuation": 'with open(path) as file:\n        return file.read()\n\n\n'},
    {"prompt": "NAME\n       ls - list directory", "continuation": " contents\n\nSYNOPSIS\n       ls [OPTION]..."},
]  # fmt: skip
SOURCES = [
    {"name": "linux-doc-6.1", "version": "6.1.140-1", "licence": "GPL-2", "documents": 3120, "bytes": 14_800_000},
    {"name": "python3-doc", "version": "3.11.2-1", "licence": "PSF-2", "documents": 512, "bytes": 6_400_000},
    {
        "name": "manpages-dev",
        "version": "6.03-2",
        "licence": "see copyright",
        "documents": 990,
        "bytes": 2.8e6,
    },
    {"name": "unused", "version": "1", "licence": "MIT", "documents": 0, "bytes": 0},
]
ENVIRONMENT = {
    "package": "0.1.0", "commit": "4be1d2c09a77", "python": "3.11.7", "machine": "x86_64, 2 cores", "ranks": 1,
    "command": "refractor pretrain --preset pilot", "torch": "2.13.0",
}  # fmt: skip
DEVICE = {"device": "cpu", "peak_name": "measured fp32 GEMM, 2 threads", "peak_flops": 0.118e12, "ranks": 1}
CONFIG = """# Resolved by refractor_megatron.
resolved:
  preset: pilot
  hash: 9f3c2a7e51b0d846
train:
  steps: {steps}
  seq_len: 256
  grad_clip: 1.0
  optimizer:
    lr: 1e-3
"""
