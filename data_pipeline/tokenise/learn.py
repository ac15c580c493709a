"""The tokenizer of a build: trained on the first documents of the training split in hash order, which is a sample."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.shards import Shard
from refractor_megatron.tokenizer import train_tokenizer


def learn_task(params: dict[str, Any], index: int, out: Path) -> None:
    """Writes ``tokenizer.json``.

    params: ``shards``: paths; ``sample``: path of int64 [m, 2], (shard, row) in order; ``vocab_size``; ``max_bytes``.
    """
    assert index == 0
    tokenizer = train_tokenizer(_texts(params), params["vocab_size"], params["max_bytes"])
    tokenizer.save(out / "tokenizer.json")


def _texts(params: dict[str, Any]) -> Iterator[bytes]:
    """The text of the sample, in its order. It is read shard by shard, and held: opening one for each document takes
    longer than the training."""
    sample = np.load(params["sample"])
    texts: list[list[bytes]] = [[]] * len(sample)
    for number in np.unique(sample[:, 0]).tolist():
        shard = Shard(Path(params["shards"][number]))
        for place in np.flatnonzero(sample[:, 0] == number).tolist():
            texts[place] = [part.data for part in shard.document(int(sample[place, 1])).parts]
    return itertools.chain.from_iterable(texts)
