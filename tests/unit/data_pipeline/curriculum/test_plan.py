from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.mix.shares import PERIOD
from data_pipeline.options import Tasks
from data_pipeline.pack.packed import path_of, read_packed
from refractor_megatron.errors import ConfigError, DataError
from tests.unit.data_pipeline.staged import LENGTHS, NAMES, document_lengths, write_staged

DOCUMENTS = document_lengths(1500)


def plan(
    folder: Path, lengths: list[int] = DOCUMENTS, stages: tuple[int, ...] = LENGTHS, **more: Any
) -> dict[str, Any]:
    made: dict[str, Any] = write_staged(folder, lengths, stages, **more)["curriculum"]
    return made


def starts_of(lengths: list[int]) -> np.ndarray:
    return np.cumsum([0, *lengths])


def test_long_documents_go_to_the_long_stage(tmp_path: Path) -> None:
    """Every document too long for the first stage is in the second, whole or cut to fill it; a third is short ones."""
    many = [*DOCUMENTS, *[9] * 9000]
    made = plan(tmp_path / "d", many)
    starts, lengths = starts_of(many), np.array(many)
    first, second = (read_packed(path_of(tmp_path / "d", length)).pieces for length in LENGTHS)
    document = np.searchsorted(starts, second[:, 1], side="right") - 1
    whole = set(document[second[:, 2] == lengths[document]].tolist())
    between = np.flatnonzero((lengths > LENGTHS[0] + 1) & (lengths <= LENGTHS[1] + 1)).tolist()
    assert len(set(between) - whole) <= made["stages"][1]["documents_cut"] + len(NAMES) + 1
    long = second[second[:, 2] > LENGTHS[0] + 1, 2].sum() / second[:, 2].sum()
    assert made["stages"][1]["long_share"] == pytest.approx(long)
    assert abs(long - 0.65) < 0.01
    assert first[:, 2].max() <= LENGTHS[0] + 1


def test_counts_of_the_report_are_those_of_the_files(tmp_path: Path) -> None:
    made = plan(tmp_path / "d", temperature=3.0, weights=(1.0, 2.0, 0.5))
    starts, lengths = starts_of(DOCUMENTS), np.array(DOCUMENTS)
    total = 0
    for stage in made["stages"]:
        packed = read_packed(path_of(tmp_path / "d", stage["length"]))
        assert (len(packed), len(packed.pieces)) == (stage["sequences"], stage["pieces"])
        assert stage["tokens"] == packed.pieces[:, 2].sum()
        total += stage["tokens"]
        document = np.searchsorted(starts, packed.pieces[:, 1], side="right") - 1
        cut = {d for d, n in zip(document, packed.pieces[:, 2], strict=True) if n < lengths[d] <= stage["length"] + 1}
        assert stage["documents_cut"] == len(cut)
        wanted = np.array([1.0, 2.0, 0.5]) * (packed.sequences[:3] * (stage["length"] + 1)) ** (1 / 3)
        for row, share in zip(stage["domains"], wanted / wanted.sum(), strict=True):
            number = made["domains"].index(row["name"])
            assert row["target"] == pytest.approx(share)
            assert row["share"] == packed.slots[number] / PERIOD
            drawn = packed.slots[number] / PERIOD * len(packed)
            assert row["epochs_per_pass"] == pytest.approx(drawn / row["sequences"])
    assert total + made["tokens_left_over"] == sum(DOCUMENTS)
    json.dumps(made)


def test_sequences_are_of_one_domain(tmp_path: Path) -> None:
    plan(tmp_path / "d")
    starts = starts_of(DOCUMENTS)
    for length in LENGTHS:
        packed = read_packed(path_of(tmp_path / "d", length))
        domain = (np.searchsorted(starts, packed.pieces[:, 1], side="right") - 1) % 3
        assert np.array_equal(domain, np.repeat(packed.domains, np.diff(packed.starts)))


def test_a_stage_without_long_text_is_left_out_and_said_to_be(tmp_path: Path) -> None:
    lines: list[str] = []
    lengths = [min(n, 60) for n in DOCUMENTS]
    made = plan(tmp_path / "d", lengths, (16, 64, 300), log=lines.append)
    assert [stage["length"] for stage in made["stages"]] == [16, 64]
    assert made["left_out"] == [{"length": 300, "tokens": 0, "needs": 196}]
    assert any(
        re.match(r"data: stage 300 is left out: 0 tokens of documents that no shorter stage holds", x) for x in lines
    )
    assert not path_of(tmp_path / "d", 300).exists()
    # and the others are as if it had not been asked for
    plan(tmp_path / "e", lengths, (16, 64))
    for length in (16, 64):
        assert path_of(tmp_path / "d", length).read_bytes() == path_of(tmp_path / "e", length).read_bytes()


@pytest.mark.parametrize(("count", "stages"), [(1, [16]), (2, [16, 64])])
def test_a_stage_of_one_sequence_is_left_out(tmp_path: Path, count: int, stages: list[int]) -> None:
    """Documents i mod 3 are of one domain."""
    lengths = [60 if i < 3 * count and not i % 3 else 10 for i in range(900)]
    made = plan(tmp_path / "d", lengths)
    assert [stage["length"] for stage in made["stages"]] == stages
    if count == 1:
        assert made["left_out"] == [{"length": 64, "tokens": 60, "needs": 2 * 65}]
    else:
        assert made["stages"][1]["sequences"] == 2


def test_a_first_stage_of_one_sequence_is_left_out(tmp_path: Path) -> None:
    made = plan(tmp_path / "d", [60] * 300 + [9, 9, 9, 9], short_share=0.0)
    assert [stage["length"] for stage in made["stages"]] == [16, 64]  # rests of the longer stage fill it
    made = plan(tmp_path / "e", [65] * 297 + [9, 1, 1, 9], short_share=0.0)
    assert [stage["length"] for stage in made["stages"]] == [64]
    assert made["left_out"] == [{"length": 16, "tokens": 17, "needs": 34}]


def test_a_stage_in_the_middle_may_be_left_out(tmp_path: Path) -> None:
    lengths = [10] * 400 + [150] * 30
    made = plan(tmp_path / "d", lengths, (16, 64, 160))
    assert [stage["length"] for stage in made["stages"]] == [16, 160]
    assert [one["length"] for one in made["left_out"]] == [64]


def test_a_first_stage_without_short_text_is_left_out(tmp_path: Path) -> None:
    made = plan(tmp_path / "d", [161] * 60, (16, 64, 160))
    assert [stage["length"] for stage in made["stages"]] == [160]
    assert [one["length"] for one in made["left_out"]] == [64, 16]


def test_documents_beyond_the_last_stage_are_cut_at_it(tmp_path: Path) -> None:
    made = plan(tmp_path / "d", [65 * 4] * 9 + [5] * 300)
    packed = read_packed(path_of(tmp_path / "d", 64))
    assert np.count_nonzero(packed.pieces[:, 2] == 65) == 36
    assert made["stages"][1]["documents_longer"] == 9
    assert made["stages"][1]["documents_cut"] <= 3  # one short document may be cut in each domain


def test_a_short_share_of_zero_takes_no_short_documents(tmp_path: Path) -> None:
    made = plan(tmp_path / "d", [60] * 300 + [5] * 300, short_share=0.0)
    packed = read_packed(path_of(tmp_path / "d", 64))
    assert packed.pieces[:, 1].max() < 60 * 300
    assert made["stages"][0]["sequences"] >= 300 * 5 // 17 - 3


def test_short_stages_keep_half_of_their_text(tmp_path: Path) -> None:
    lengths = [10] * 600 + [60] * 900
    made = plan(tmp_path / "d", lengths, short_share=0.9)
    assert made["stages"][0]["tokens"] >= 6000 / 2 - 3 * 17
    assert made["stages"][1]["long_share"] > 0.9


def test_a_weight_of_zero_leaves_a_domain_out(tmp_path: Path) -> None:
    made = plan(tmp_path / "d", weights=(1.0, 0.0, 1.0))
    assert made["tokens_of_weight_0"] == sum(DOCUMENTS[1::3])
    for stage in made["stages"]:
        assert {row["name"] for row in stage["domains"]} == {"web", "code"}
        assert stage["domains_without_sequence"] == ["books"]


def test_tasks_have_their_share_in_every_stage_or_are_said_to_lack(tmp_path: Path) -> None:
    lines: list[str] = []
    tasks = Tasks(retrieval=0.1, long_range=0.05)
    made = plan(
        tmp_path / "d", tasks=tasks, made=[(0, 16, 12), (0, 64, 20), (1, 64, 65), (0, 32, 20)], log=lines.append
    )
    short, long = made["stages"]
    shares = {row["name"]: row["share"] for row in long["domains"]}
    assert (shares["tasks/retrieval"], shares["tasks/long_range"]) == (0.1, 0.05)
    assert sum(shares.values()) == pytest.approx(1)
    assert short["tasks_without_sequence"] == ["tasks/long_range"]
    assert sum(row["share"] for row in short["domains"]) == pytest.approx(1)
    assert made["tasks_of_no_stage"] == 1
    assert any("1 made tasks are for stages that were left out" in line for line in lines)
    assert any("no tasks/long_range here" in line for line in lines)


def test_no_task_that_could_be_made_is_said(tmp_path: Path) -> None:
    """Shares asked for, nothing made: the text has all samples, and the report names what lacks."""
    made = plan(tmp_path / "d", tasks=Tasks(retrieval=0.1, long_range=0.05))
    for stage in made["stages"]:
        assert stage["tasks_without_sequence"] == ["tasks/retrieval", "tasks/long_range"]
        assert sum(row["share"] for row in stage["domains"]) == pytest.approx(1)


def test_the_seed_decides_which_short_documents_go_where(tmp_path: Path) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        plan(tmp_path / name, seed=seed)
    one, two, three = (read_packed(path_of(tmp_path / name, 64)).pieces for name in "abc")
    assert np.array_equal(one, two)
    assert set(one[:, 1].tolist()) != set(three[:, 1].tolist())


@pytest.mark.parametrize(
    ("stages", "more", "message"),
    [
        ((64, 16), {}, "data.curriculum.lengths must be positive and rise, not [64, 16]"),
        ((16, 16), {}, "data.curriculum.lengths must be positive and rise"),
        ((0, 16), {}, "data.curriculum.lengths must be positive"),
        ((), {}, "data.curriculum.lengths must be positive"),
        ((16,), {"short_share": 1.0}, "data.curriculum.short_share must be at least 0 and below 1, not 1"),
        ((16,), {"tasks": Tasks(retrieval=0.6, long_range=0.4)}, "shares of data.tasks (0.6, 0.4) must be at least 0"),
        ((100_000,), {}, "No domain has 100001 tokens, one sequence of data.curriculum.lengths 100000"),
        ((16,), {"weights": (0.0, 0.0, 0.0)}, "No domain has 17 tokens"),
    ],
)
def test_impossible_options_are_named(tmp_path: Path, stages: tuple[int, ...], more: Any, message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=re.escape(message)):
        plan(tmp_path / "d", DOCUMENTS[:300], stages, **more)
