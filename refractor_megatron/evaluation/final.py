"""What a finished run is judged by: ``python -m refractor_megatron.evaluation.final RUN_FOLDER`` (one process).

Reads the newest checkpoint, whatever grid wrote it, and writes ``final.json``, ``baselines.json`` and ``samples.json``.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_pipeline.retrieval.neighbours import Neighbours
from data_pipeline.stream import SampleStream

from ..config import RunConfig
from ..engines.megatron import MegatronEngine, stop_distributed
from ..errors import RefractorError
from ..tokenizer import Tokenizer
from ..training.batches import stack
from ..training.dataset import heldout_stream, training_stream
from ..training.folder import RunFolder, write_json
from .baselines import measure_baselines
from .heldout import measure
from .sampling import SamplingOptions, continue_prompts
from .trained import load_trained


def evaluate(path: Path) -> dict[str, Any]:
    """Evaluate the newest checkpoint of the run in ``path``.

    Raises:
        CheckpointError: there is none.
    """
    folder = RunFolder(path)
    trained = load_trained(folder)
    cfg, engine, state, neighbours = trained.cfg, trained.engine, trained.state, trained.neighbours
    stream, train = heldout_stream(folder, cfg), training_stream(folder, cfg)
    final: dict[str, Any] = {"step": state.progress.step, "config_hash": cfg.hash, "data_digest": stream.digest}
    final["raw"] = asdict(measure(engine, stream, cfg.train.micro_batch, neighbours))
    if neighbours is not None:
        final["retrieval"] = {"digest": state.identity["retrieval_digest"], **neighbours.take_counts().summary()}
    ema = state.ema
    if ema is not None:
        with ema.swapped_in():
            final["ema"] = asdict(measure(engine, stream, cfg.train.micro_batch, neighbours))
    baselines = measure_baselines(train, stream)
    final |= {
        "unigram": baselines["unigram"]["loss"],
        "bigram": baselines["bigram"]["loss"],
        "below_unigram": 1.0 - final["raw"]["loss"] / baselines["unigram"]["loss"],
    }
    with ema.swapped_in() if ema is not None else contextlib.nullcontext():
        samples = _samples(cfg, engine, stream, neighbours)
    write_json(folder.baselines, {"config_hash": cfg.hash, **baselines})
    write_json(folder.samples, samples)
    write_json(folder.final, final)
    return final


def _samples(
    cfg: RunConfig, engine: MegatronEngine, stream: SampleStream, neighbours: Neighbours | None
) -> list[dict[str, Any]]:
    """Continuations of held-out prompts, drawn with the averaged weights where there are any."""
    tokenizer = Tokenizer.load(stream.folder / "tokenizer.json")
    options = SamplingOptions(seed=cfg.train.seed)
    prompt, count = cfg.train.seq_len // 4, min(cfg.evaluation.sample_tokens, cfg.train.seq_len // 2)
    samples = []
    for index in range(min(cfg.evaluation.samples, stream.samples_per_epoch)):
        batch = stack([stream.sample(index)], neighbours)
        tokens, records = batch.tokens[:, :prompt], batch.records[:, :prompt]
        new = continue_prompts(engine, tokens, records, count, tokenizer.vocab_size, options, neighbours)
        samples.append(
            {
                "prompt": tokenizer.decode(batch.tokens[0, :prompt].tolist()).decode("utf-8", "replace"),
                "continuation": tokenizer.decode(new[0].tolist()).decode("utf-8", "replace"),
                **asdict(options),
                "config_hash": cfg.hash,
            }
        )
    return samples


def main(path: Path) -> int:
    """Evaluate, and turn a user's mistake into one sentence and an exit code."""
    try:
        evaluate(path)
        stop_distributed()
        return 0
    except RefractorError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
