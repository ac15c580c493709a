"""Mask entropy and role shares: by hand, against the dense oracle, and blind to what is not the rules' doing."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from refractor_megatron.distinction.generators import random_records, random_rules
from refractor_megatron.distinction.lowerings import dense_legal
from refractor_megatron.distinction.measure import earlier_in_document, measure_mask, row_entropy
from refractor_megatron.distinction.roles import ROLE_ID, ROLES
from refractor_megatron.distinction.rules import compile_rules

PLAIN = compile_rules([])


def plain(length: int) -> npt.NDArray[np.int32]:
    records = np.zeros((length, 4), dtype=np.int32)
    records[:, 2] = ROLE_ID["data"]
    return records


def test_plain_documents_lose_nothing_however_many_share_the_sample() -> None:
    records = plain(40)
    records[25:, 0] = records[25:, 1] = 1
    measure = measure_mask([records, plain(40)], PLAIN)
    assert (measure.entropy, measure.entropy_median) == (1.0, 1.0)
    assert measure.role_share == [float(role == "data") for role in ROLES]


def test_a_second_segment_is_measured_by_what_it_may_still_read() -> None:
    records = plain(8)
    records[4:, 1] = 1
    expected = [1, 1, 1, 0, np.log(2) / np.log(6), np.log(3) / np.log(7), np.log(4) / np.log(8)]
    assert np.allclose(row_entropy(records, PLAIN), expected)


def test_a_row_that_reads_itself_alone_has_entropy_zero() -> None:
    records = plain(6)
    records[2:, 2] = ROLE_ID["tool"]
    rules = compile_rules([{"name": "t", "when": {"role": "tool"}, "allow_read_from": []}])
    measure = measure_mask([records], rules)
    assert measure.entropy == pytest.approx(1 / 5) and measure.entropy_median == 0.0
    shares = dict(zip(ROLES, measure.role_share, strict=True))
    assert shares["tool"] == pytest.approx(4 / 6) and shares["data"] == pytest.approx(2 / 6)


def test_padding_is_no_row_no_key_and_no_role() -> None:
    records = plain(6)
    records[3:, 0], records[3:, 2] = -1, ROLE_ID["user"]
    measure = measure_mask([records], PLAIN)
    assert measure.entropy == 1.0 and measure.role_share[ROLE_ID["user"]] == 0.0
    records[:, 0] = -1
    nothing = measure_mask([records], PLAIN)
    assert nothing.entropy is None and nothing.entropy_median is None and sum(nothing.role_share) == 0


@pytest.mark.parametrize("seed", range(12))
def test_equals_the_dense_oracle_on_random_rules(seed: int) -> None:
    rng = np.random.default_rng(seed)
    records, rules = random_records(rng, 70), compile_rules(random_rules(rng))
    legal = np.tril(dense_legal(torch.from_numpy(records), rules).numpy()).sum(1)
    document = records[:, 0]
    every = np.tril((document[:, None] == document) & (document >= 0)).sum(1)
    assert (earlier_in_document(document) == every).all()
    asked = every >= 2
    entropy = row_entropy(records, rules)
    assert np.allclose(entropy, np.log(legal[asked]) / np.log(every[asked]))
    assert ((entropy >= 0) & (entropy <= 1)).all()
