"""The global batch is the same set of micro-batches on every data-parallel grid."""

from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from refractor_megatron.training.batches import rank_batches


def sample(index: int) -> Any:
    tokens = np.array([index, index, index])
    return SimpleNamespace(tokens=tokens, records=np.zeros((3, 4), np.int32))


@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 2, 4]))
def test_ranks_share_out_the_micro_batches_of_one_rank(first: int, micro: int, each: int, ranks: int) -> None:
    stream: Any = SimpleNamespace(sample=sample)
    alone = [b.tokens[:, 0].tolist() for b in rank_batches(stream, first, micro, each * ranks, 0, 1)]
    shared = [
        [b.tokens[:, 0].tolist() for b in rank_batches(stream, first, micro, each, r, ranks)] for r in range(ranks)
    ]
    assert [b for turn in zip(*shared, strict=True) for b in turn] == alone
    assert [i for b in alone for i in b] == list(range(first, first + micro * each * ranks))


def test_inputs_labels_and_records_line_up() -> None:
    stream: Any = SimpleNamespace(
        sample=lambda i: SimpleNamespace(tokens=np.arange(5), records=np.arange(20, dtype=np.int32).reshape(5, 4))
    )
    (batch,) = rank_batches(stream, 0, 1, 1, 0, 1)
    assert batch.tokens.tolist() == [[0, 1, 2, 3]] and batch.labels.tolist() == [[1, 2, 3, 4]]
    assert batch.records[0, :, 0].tolist() == [0, 4, 8, 12]
