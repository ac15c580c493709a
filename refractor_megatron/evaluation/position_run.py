"""Measures loss by position: ``python -m refractor_megatron.evaluation.position_run RUN_FOLDER OPTIONS`` (one process).

OPTIONS is a JSON object: weights ("raw" or "ema"), documents (at most so many, null = all) and buckets (upper ends,
null = the default).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.retrieval.neighbours import Neighbours
from data_pipeline.stream import SampleStream

from ..config import RunConfig
from ..engines.megatron import MegatronEngine, stop_distributed
from ..errors import DataError, RefractorError
from ..training.batches import stack
from ..training.dataset import heldout_stream
from ..training.folder import RunFolder, write_json
from .position import Floats, bucket_edges, bucket_means, draw, summary, table
from .trained import load_trained


def evaluate(path: Path, weights: str, documents: int | None, buckets: list[int] | None) -> dict[str, Any]:
    """Measure the newest checkpoint of the run in ``path``; writes ``position.json`` and ``position.png``.

    Raises:
        CheckpointError: there is none. ConfigError: no averaged weights, or wrong buckets. DataError: no document of
        the held-out split is long enough.
    """
    folder = RunFolder(path)
    cfg = RunConfig.load(folder.config)
    edges = bucket_edges(buckets, cfg.train.seq_len)
    stream = heldout_stream(folder, cfg)
    starts = long_documents(stream)[:documents]
    if not len(starts):
        raise DataError(
            f"no held-out document of {stream.folder} has the {stream.seq_len + 1} tokens of a window: build from "
            "longer documents, raise data.heldout_fraction, or train with a smaller train.seq_len."
        )
    trained = load_trained(folder)
    engine, state = trained.engine, trained.state
    with trained.weights(weights):
        by_document = measure(engine, stream, trained.neighbours, starts, edges, cfg.train.micro_batch)
    identity = {
        "step": state.progress.step,
        "weights": weights,
        "seq_len": stream.seq_len,
        "config_hash": cfg.hash,
        "data_digest": stream.digest,
        "parameters": sum(parameter.numel() for parameter in engine.model.parameters()),
    }
    result = summary(identity, by_document, edges, starts)
    write_json(path / "position.json", result)
    draw(result, path / "position.png", f"{path.resolve().name}: loss by position in the document")
    return result


def long_documents(stream: SampleStream) -> list[int]:
    """First tokens of the documents that a whole window fits into, in the order of the split."""
    starts = stream.document_starts
    return [int(start) for start in starts[:-1][np.diff(starts) > stream.seq_len]]


def measure(
    engine: MegatronEngine,
    stream: SampleStream,
    neighbours: Neighbours | None,
    starts: list[int],
    edges: list[int],
    micro_batch: int,
) -> Floats:
    """Mean loss [documents, buckets] of the windows that begin at ``starts``."""
    parts = []
    for first in range(0, len(starts), micro_batch):
        batch = stack([stream.at(start) for start in starts[first : first + micro_batch]], neighbours)
        parts.append(bucket_means(engine.token_losses(batch).double().cpu().numpy(), edges))
    return np.concatenate(parts)


def main(path: Path, options: dict[str, Any]) -> int:
    """Measure and print; turn a user's mistake into one sentence and an exit code."""
    try:
        result = evaluate(path, options["weights"], options["documents"], options["buckets"])
        stop_distributed()
    except RefractorError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    print("\n".join(table(result)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), json.loads(sys.argv[2])))
