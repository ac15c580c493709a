"""Interval form: exact intervals on hand-made records."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from refractor_megatron.distinction.intervals import Rows, compile_intervals, run_keys
from refractor_megatron.distinction.roles import ROLE_ID
from refractor_megatron.distinction.rules import compile_rules
from tests.masks import sliding

PLAIN = compile_rules([])


def plain(length: int) -> npt.NDArray[np.int32]:
    records = np.zeros((length, 4), dtype=np.int32)
    records[:, 2] = ROLE_ID["data"]
    return records


def test_one_document_is_one_run_whatever_its_roles() -> None:
    records = plain(100)
    records[10:20, 2] = ROLE_ID["user"]
    records[30:, 3] = 31
    assert len(run_keys(records, PLAIN)) == 1


def test_no_tokens_have_no_mask() -> None:
    with pytest.raises(AssertionError, match="a mask needs at least one token"):
        compile_intervals(plain(0), PLAIN, sliding(4))


def test_sliding_window() -> None:
    rows = compile_intervals(plain(10), PLAIN, sliding(4)).rows
    assert rows.of(0).tolist() == [[0, 1]]
    assert rows.of(9).tolist() == [[6, 10]]
    assert rows.dense(10, 0, 10).sum(1).tolist() == [1, 2, 3, 4, 4, 4, 4, 4, 4, 4]
    assert compile_intervals(plain(10), PLAIN, sliding(None)).rows.of(9).tolist() == [[0, 10]]


def test_documents_do_not_see_each_other_even_when_one_returns() -> None:
    records = plain(12)
    records[4:8, 0] = 1
    rows = compile_intervals(records, PLAIN, sliding(None)).rows
    assert rows.of(7).tolist() == [[4, 8]]
    assert rows.of(10).tolist() == [[0, 4], [8, 11]]


def test_segments_share_the_system_prefix_of_their_document() -> None:
    records = plain(12)
    records[:3, 2] = ROLE_ID["system"]
    records[6:, 1] = 1
    rows = compile_intervals(records, PLAIN, sliding(None)).rows
    assert rows.of(5).tolist() == [[0, 6]]
    assert rows.of(8).tolist() == [[0, 3], [6, 9]]
    records[6:, 0] = 1
    assert compile_intervals(records, PLAIN, sliding(None)).rows.of(8).tolist() == [[6, 9]]


def test_self_edge_survives_a_rule_against_itself() -> None:
    records = plain(6)
    records[2:5, 2] = ROLE_ID["tool"]
    rules = compile_rules([{"name": "t", "when": {"role": "tool"}, "allow_read_from": ["data"]}])
    assert compile_intervals(records, rules, sliding(None)).rows.of(4).tolist() == [[0, 2], [4, 5]]


def test_noncausal_prefix_reads_ahead_within_segment_and_window() -> None:
    records = plain(8)
    records[:4, 2] = ROLE_ID["system"]
    rules = compile_rules([{"name": "p", "when": {"role": "system"}, "causal": False}])
    rows = compile_intervals(records, rules, sliding(None)).rows
    assert rows.of(1).tolist() == [[0, 4]] and rows.of(5).tolist() == [[0, 6]]
    assert compile_intervals(records, rules, sliding(2)).rows.of(1).tolist() == [[0, 3]]
    records[2:, 1] = 1
    assert compile_intervals(records, rules, sliding(None)).rows.of(1).tolist() == [[0, 2]]


def test_padding_has_no_edges() -> None:
    records = plain(6)
    records[4:, 0] = -1
    rows = compile_intervals(records, PLAIN, sliding(None)).rows
    assert rows.dense(6, 0, 6).sum(1).tolist() == [1, 2, 3, 4, 0, 0]


def test_summary_staircase() -> None:
    """Block size 4, window 3, 16 tokens: complete, and not wholly inside the window."""
    seen = compile_intervals(plain(16), PLAIN, sliding(3)).summary_rows(4)
    # q = 5: block 0 ends at 3 < 5 and starts at 0 < 3. q = 4: also. q = 3: not complete.
    assert seen.of(3).tolist() == [] and seen.of(4).tolist() == [[0, 1]] and seen.of(5).tolist() == [[0, 1]]
    assert seen.of(15).tolist() == [[0, 3]]
    # Window 8 covers block 1 of q = 11 (tokens 4..11), not block 0.
    assert compile_intervals(plain(16), PLAIN, sliding(8)).summary_rows(4).of(11).tolist() == [[0, 1]]
    assert compile_intervals(plain(16), PLAIN, sliding(None)).summary_rows(4).count() == 0


def test_a_summary_with_one_illegal_token_is_invisible() -> None:
    records = plain(20)
    records[6, 3] = 8
    rules = compile_rules([{"name": "s", "when": {"bits": ["SAFETY_SCOPE"]}, "allow_write_to": []}])
    seen = compile_intervals(records, rules, sliding(2)).summary_rows(4)
    assert seen.of(19).tolist() == [[0, 1], [2, 4]]
    records[19, 3] = 8
    assert compile_intervals(records, rules, sliding(2)).summary_rows(4).of(19).tolist() == [[0, 4]]


def test_rows_dense_clips_to_the_asked_range() -> None:
    rows = Rows(np.array([0, 0, 1]), np.array([0, 5, 2]), np.array([2, 9, 4]))
    assert rows.dense(2, 1, 7).astype(int).tolist() == [[1, 0, 0, 0, 1, 1], [0, 1, 1, 0, 0, 0]]
    assert rows.scaled(2).of(1).tolist() == [[4, 8]]


def test_many_runs_are_processed_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    records = plain(60)
    records[:, 1] = np.arange(60) // 3 % 4
    whole = compile_intervals(records, PLAIN, sliding(20)).rows
    monkeypatch.setattr("refractor_megatron.distinction.intervals._SLICE", 50)
    sliced = compile_intervals(records, PLAIN, sliding(20)).rows
    for name in ("row", "lo", "hi"):
        assert (getattr(whole, name) == getattr(sliced, name)).all()


def test_roles_out_of_range_are_caught() -> None:
    records = plain(4)
    records[1, 2] = -1
    with pytest.raises(AssertionError, match="roles -1"):
        compile_intervals(records, PLAIN, sliding(None))


def test_compilation_is_linear_in_length() -> None:
    """64k tokens, window 512: intervals only (a length squared array would be 4 GB)."""
    intervals = compile_intervals(plain(65536), PLAIN, sliding(512))
    assert intervals.rows.count() == 512 * 513 // 2 + (65536 - 512) * 512
    assert len(intervals.rows.row) == 65536 and len(intervals.summary_rows(128).row) <= 65536
