"""Loss by position within the document: what a model gains from text that lies far behind.

Windows begin where a held-out document begins and lie inside it, so a token's position in the window is the length of
the context it could have used. Documents are the units of chance: confidence intervals resample documents, and two
models are compared document by document. Imports no torch; ``position_run`` measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError

Floats = npt.NDArray[np.float64]

#: Resamples of the documents behind a confidence interval, and their seed.
RESAMPLES, BOOTSTRAP_SEED = 4000, 20240229
#: Buckets of a window when none are asked for: 1/16 of it, then each as long as all before it.
_FINEST = 16


@dataclass(frozen=True)
class Bucket:
    """Mean loss over positions [first, last) with its 95 % confidence interval over documents."""

    first: int
    last: int
    loss: float  # nats per token
    low: float
    high: float
    tokens: int


def bucket_edges(asked: Sequence[int] | None, seq_len: int) -> list[int]:
    """Upper ends of the buckets, ascending. Raises `ConfigError` for ends that are not, or exceed the window."""
    if asked is None:
        edges = [seq_len]
        while edges[0] % 2 == 0 and edges[0] > seq_len // _FINEST:
            edges.insert(0, edges[0] // 2)
        return edges
    if not asked or any(b <= a for a, b in zip([0, *asked], asked, strict=False)):
        raise ConfigError(f"--buckets {','.join(map(str, asked))} must be ascending positions above 0.")
    if asked[-1] > seq_len:
        raise ConfigError(f"--buckets ends at {asked[-1]}, the run's windows at train.seq_len={seq_len}: end there.")
    return list(asked)


def bucket_means(token_losses: Floats, edges: Sequence[int]) -> Floats:
    """[documents, buckets] from the losses [documents, positions]."""
    starts = [0, *edges[:-1]]
    return np.stack([token_losses[:, a:b].mean(1) for a, b in zip(starts, edges, strict=True)], axis=1)


def confidence(by_document: Floats) -> tuple[Floats, Floats]:
    """(low, high) [k] of the mean over documents of each column of [documents, k]: percentile bootstrap, 95 %.

    The same documents are drawn for every column and, for equally many documents, in every call.
    """
    n = len(by_document)
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES)  # [resamples, documents]
    low, high = np.percentile(counts @ by_document / n, [2.5, 97.5], axis=0)
    return low, high


def buckets_of(by_document: Floats, edges: Sequence[int]) -> list[Bucket]:
    """Summary of the losses [documents, buckets]."""
    low, high = confidence(by_document)
    starts = [0, *edges[:-1]]
    columns = zip(starts, edges, by_document.mean(0), low, high, strict=True)
    return [Bucket(a, b, float(m), float(x), float(y), (b - a) * len(by_document)) for a, b, m, x, y in columns]


def summary(
    identity: dict[str, Any], by_document: Floats, edges: Sequence[int], starts: Sequence[int]
) -> dict[str, Any]:
    """Content of ``position.json``. ``starts``: first token of each document's window in the held-out split."""
    return {
        **identity,
        "documents": len(by_document),
        "interval": f"95 %, bootstrap of {RESAMPLES} resamples over documents",
        "buckets": [asdict(bucket) for bucket in buckets_of(by_document, edges)],
        "document_starts": list(starts),
        "loss_by_document": np.round(by_document, 6).tolist(),
    }


def table(result: dict[str, Any]) -> list[str]:
    """Lines for the console."""
    head = (
        f"{result['documents']} held-out documents of at least {result['seq_len'] + 1} tokens, {result['weights']} "
        f"weights, step {result['step']}"
    )
    lines = [head, f"{'positions':>12} {'nats/token':>11} {'95 % interval':>18} {'perplexity':>11} {'tokens':>10}"]
    for bucket in result["buckets"]:
        place = f"{bucket['first']}–{bucket['last'] - 1}"
        interval, perplexity = f"{bucket['low']:.4f} – {bucket['high']:.4f}", np.exp(bucket["loss"])
        lines.append(f"{place:>12} {bucket['loss']:>11.4f} {interval:>18} {perplexity:>11.2f} {bucket['tokens']:>10,}")
    return lines


def draw(result: dict[str, Any], out: Path, title: str) -> None:
    """Write the curve with its confidence band as a PNG of 1080 x 660 pixels."""
    from .report_plots import RAW, position_axis, styled_figure

    with styled_figure(9, 5.5, pad=0.1) as figure:
        axes = figure.add_subplot()
        buckets = [Bucket(**bucket) for bucket in result["buckets"]]
        position_axis(axes, [(bucket.first, bucket.last) for bucket in buckets])
        place = np.arange(len(buckets))
        axes.fill_between(
            place, [b.low for b in buckets], [b.high for b in buckets], color=RAW, alpha=0.14, linewidth=0,
            label="95 % interval over documents",
        )  # fmt: skip
        axes.plot(place, [b.loss for b in buckets], color=RAW, marker="o", markersize=5)
        for x, bucket in enumerate(buckets):
            axes.annotate(
                f"{bucket.loss:.3f}", (x, bucket.high), (0, 5), textcoords="offset points", ha="center", fontsize=9
            )
        axes.margins(y=0.09)
        axes.set_ylabel("loss, nats per token")
        axes.set_title(title)
        axes.legend(loc="upper right")
        figure.savefig(out, format="png", dpi=120, metadata={"Software": None})
