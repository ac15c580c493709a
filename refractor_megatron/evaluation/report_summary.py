"""The figures of a report in words: headline, result table and facts. Pure functions of `RunData`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..telemetry.console import format_count, format_duration, format_flops
from .report_data import RunData, number, text

MISSING = "not recorded"


@dataclass(frozen=True)
class Tile:
    """One headline figure."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class ResultRow:
    """One model's code length on the held-out tokens; None where it is not recorded."""

    name: str
    loss: float | None  # nats per token
    bits_per_byte: float | None
    below_unigram: float | None  # share of the unigram entropy saved; negative is worse
    below_bigram: float | None
    own: bool  # the run's own model, not a baseline


def result_rows(run: RunData) -> list[ResultRow]:
    """The run's weights and the baselines, one row each."""
    unigram, bigram = (number(run.baselines, name, "loss") for name in ("unigram", "bigram"))
    factor = run.bits_per_nat()

    def row(name: str, loss: float | None, bits: float | None, own: bool) -> ResultRow:
        if bits is None and loss is not None and factor is not None:
            bits = loss * factor
        return ResultRow(name, loss, bits, _saved(loss, unigram), _saved(loss, bigram), own)

    rows = [
        row(name, number(run.result(key), "loss"), number(run.result(key), "bits_per_byte"), own=True)
        for key, name in (("raw", "this run, raw weights"), ("ema", "this run, EMA weights"))
    ]
    for key, name in (("bigram", "bigram model"), ("unigram", "unigram entropy")):
        loss, bits = (number(run.baselines, key, unit) for unit in ("loss", "bits_per_byte"))
        rows.append(row(name, loss, bits, own=False))
    return rows


def headline(run: RunData) -> str:
    """One sentence: the held-out loss and how it stands to the baselines."""
    raw = result_rows(run)[0]
    if raw.loss is None:
        return "No held-out loss is recorded for this run yet."
    size = f" ({raw.bits_per_byte:.3f} bits per byte)" if raw.bits_per_byte is not None else ""
    sentence = f"Held-out loss {raw.loss:.3f} nats per token{size}"
    against = ((raw.below_unigram, "unigram entropy of the same tokens"), (raw.below_bigram, "bigram model"))
    standing = [
        f"{abs(share):.1%} {'below' if share >= 0 else 'above'} the {name}"
        for share, name in against
        if share is not None
    ]
    return f"{sentence}: {' and '.join(standing)}." if standing else f"{sentence}."


def tiles(run: RunData) -> list[Tile]:
    """The four figures on top of the page."""
    raw, ema, *_ = result_rows(run)
    _, rate = run.series("tokens_per_s")
    loss_note = "raw weights" if ema.bits_per_byte is None else f"raw weights; EMA weights {ema.bits_per_byte:.3f}"
    return [
        Tile("Held-out bits per byte", MISSING if raw.bits_per_byte is None else f"{raw.bits_per_byte:.3f}", loss_note),
        _standing("unigram entropy", raw.below_unigram),
        _standing("bigram model", raw.below_bigram),
        Tile(
            "Tokens per second, median",
            format_count(float(np.median(rate))) if len(rate) else MISSING,
            f"MFU {mfu}" if (mfu := _mfu(run)) else "",
        ),
    ]


def progress(run: RunData) -> str:
    """How far the run is, for example ``step 400 of 400``."""
    done = int(run.steps[-1]["step"]) if run.steps else 0
    total = number(run.config, "train", "steps")
    return f"step {done:,}" + (f" of {total:,.0f}" if total else "")


def facts(run: RunData) -> list[tuple[str, str]]:
    """Label and value of everything else that a reader asks first."""
    return [
        ("progress", progress(run)),
        ("tokens seen", _last(run, "tokens_seen", "{:,.0f}") + _epochs(run)),
        ("time in training steps", _wall(run)),
        ("MFU, median", _mfu(run) or MISSING),
        ("steps skipped", _last(run, "skipped_steps", "{:,.0f}")),
        ("peak memory", _last(run, "peak_rss_mb", "{:,.0f} MB resident on the logging rank")),
        ("preset", text(run.config, "resolved", "preset") or MISSING),
        ("configuration hash", text(run.config, "resolved", "hash") or text(run.final, "config_hash") or MISSING),
        ("data digest", (text(run.data, "digest") or text(run.final, "data_digest") or MISSING)[:16]),
        ("commit", text(run.environment, "commit") or MISSING),
    ]


def _saved(loss: float | None, baseline: float | None) -> float | None:
    return None if loss is None or not baseline or loss == baseline else 1.0 - loss / baseline


def _standing(name: str, share: float | None) -> Tile:
    side = "Above" if share is not None and share < 0 else "Below"
    return Tile(f"{side} {name}", MISSING if share is None else f"{abs(share):.1%}", "same held-out tokens")


def _last(run: RunData, name: str, form: str) -> str:
    _, values = run.series(name)
    return form.format(values[-1]) if len(values) else MISSING


def _epochs(run: RunData) -> str:
    _, values = run.series("epoch")
    return f" ({values[-1]:.2f} epochs)" if len(values) else ""


def _wall(run: RunData) -> str:
    _, milliseconds = run.series("step_ms")
    if not len(milliseconds):
        return MISSING
    spent = format_duration(float(milliseconds.sum()) / 1e3).strip()
    _, clock = run.series("time")
    if len(clock) < 2:
        return spent
    return f"{spent} ({format_duration(float(clock[-1] - clock[0])).strip()} from first to last)"


def _mfu(run: RunData) -> str:
    _, values = run.series("mfu")
    if not len(values):
        return ""
    share = f"{float(np.median(values)):.1%}"
    peak, name = number(run.device, "peak_flops"), text(run.device, "peak_name")
    if not peak or not name:
        return f"{share} (peak not recorded)"
    ranks = number(run.device, "ranks") or 1
    return f"{share} of {f'{ranks:.0f} × ' if ranks > 1 else ''}{format_flops(peak)} ({name})"
