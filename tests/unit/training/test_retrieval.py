"""Tier C's way from the configuration to a batch."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.build import BuiltData, build
from data_pipeline.options import Options
from data_pipeline.stream import Sample
from refractor_megatron.config import RunConfig, compose
from refractor_megatron.errors import DataError
from refractor_megatron.evaluation.sampling import SamplingOptions, continue_prompts
from refractor_megatron.training.batches import rank_batches, read_by_next, stack
from refractor_megatron.training.dataset import heldout_stream, open_index, prepared, training_stream
from refractor_megatron.training.folder import RunFolder, write_json
from refractor_megatron.training.retrieval import open_retrieval
from tests.corpus import write_corpus

CHUNK, FAN_IN = 16, 3
ON = ["relation.retrieval.enabled=true", f"relation.retrieval.chunk={CHUNK}", f"relation.retrieval.fan_in={FAN_IN}"]
ON += ["relation.retrieval.dim=64", "relation.retrieval.sigma_min=0.35"]


def config(*overrides: str) -> RunConfig:
    return compose(["experiment=nano", *overrides])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> BuiltData:
    root = tmp_path_factory.mktemp("retrieval")
    write_corpus(root / "text")
    return build(
        root / "text", root, Options("text", vocab_size=400, max_mb=0.1, heldout_fraction=0.2),
        cache=root / "cache", log=lambda line: None,
    )  # fmt: skip


@pytest.fixture
def folder(built: BuiltData, tmp_path: Path) -> RunFolder:
    """A run folder prepared with retrieval on."""
    folder = RunFolder(tmp_path)
    write_json(folder.data, prepared(config(*ON), built))
    return folder


def test_nothing_is_built_or_read_where_it_is_off(built: BuiltData, tmp_path: Path) -> None:
    cfg, folder = config(), RunFolder(tmp_path)
    assert set(prepared(cfg, built)) == {"folder", "digest"}
    found = open_retrieval(folder, cfg, torch.device("cpu"))  # there is not even a data.json
    assert (found.index, found.bank, found.digest, found.neighbours()) == (None, None, None, None)
    assert {key for key in cfg.read_keys() if ".retrieval." in key} == {"relation.retrieval.enabled"}


def test_every_key_of_the_data_side_is_read(built: BuiltData, folder: RunFolder) -> None:
    cfg = config(*ON)
    prepared(cfg, built)
    open_retrieval(folder, cfg, torch.device("cpu")).neighbours()
    keys = ("chunk", "dim", "fan_in", "sigma_min", "t_max_s", "trust_min", "sources", "enabled")
    assert {f"relation.retrieval.{key}" for key in keys} <= cfg.read_keys()


def test_another_index_than_prepared_is_refused(folder: RunFolder) -> None:
    data = json.loads(folder.data.read_text())
    data["retrieval"]["digest"] = "another"
    write_json(folder.data, data)
    with pytest.raises(DataError, match=r"has digest \w+, the run was prepared for another: restore that index"):
        open_index(folder, config(*ON))


def test_unknown_source_is_refused_before_training(folder: RunFolder) -> None:
    cfg = config(*ON, "relation.retrieval.sources=[web]")
    with pytest.raises(DataError, match=r"relation\.retrieval\.sources: no record is from 'web'; the sources are text"):
        open_retrieval(folder, cfg, torch.device("cpu")).neighbours()


def test_bank_holds_what_the_index_holds(folder: RunFolder) -> None:
    found = open_retrieval(folder, config(*ON), torch.device("cpu"))
    assert found.bank is not None and found.index is not None
    assert np.array_equal(found.bank.vectors.numpy(), found.index.vectors)
    assert np.array_equal(found.bank.policies, found.index.records["policy"])
    assert found.bank.digest == found.digest and not found.bank.vectors.requires_grad
    moved = found.bank.to(torch.device("cpu"))
    assert moved.digest == found.digest and torch.equal(moved.vectors, found.bank.vectors)


def test_ids_of_a_chunk_are_read_by_the_next() -> None:
    found = np.array([[[5, -1], [7, 8]]], dtype=np.int32)
    expected = [[-1, -1]] * 3 + [[5, -1]] * 3 + [[7, 8]] * 2
    assert read_by_next(found, 3, 8).tolist() == [expected]
    assert read_by_next(found[:, :0], 3, 3).tolist() == [[[-1, -1]] * 3]


def test_batches_carry_the_ids_behind_the_records(folder: RunFolder) -> None:
    cfg = config(*ON)
    neighbours = open_retrieval(folder, cfg, torch.device("cpu")).neighbours()
    assert neighbours is not None
    stream = training_stream(folder, cfg)
    plain = list(rank_batches(stream, 8, 2, 2, 0, 1))
    found = list(rank_batches(stream, 8, 2, 2, 0, 1, neighbours))
    for one, two in zip(plain, found, strict=True):
        assert two.records.shape == (2, stream.seq_len, 4 + FAN_IN) and two.records.dtype == torch.int32
        assert torch.equal(one.records, two.records[..., :4]) and torch.equal(one.tokens, two.tokens)
        chunks = two.records[..., 4:].reshape(2, -1, CHUNK, FAN_IN)
        assert (chunks == chunks[:, :, :1]).all() and (chunks[:, 0] == -1).all() and (chunks[:, 1:] >= 0).any()
    # a data-parallel rank of two sees what one rank sees in its place
    (second,) = rank_batches(stream, 8, 2, 1, 1, 2, neighbours)
    assert torch.equal(second.records, found[1].records)


def test_continuations_read_what_a_batch_of_the_whole_text_would(folder: RunFolder) -> None:
    """Every chunk that generation completes retrieves, exactly as if the text had been there from the start."""
    cfg = config(*ON)
    neighbours = open_retrieval(folder, cfg, torch.device("cpu")).neighbours()
    assert neighbours is not None
    stream = heldout_stream(folder, cfg)
    batch = stack([stream.window(0)], neighbours)
    vocabulary, prompt, count = 400, CHUNK + 5, 3 * CHUNK
    seen: list[torch.Tensor] = []

    def logits(tokens: torch.Tensor, records: torch.Tensor) -> torch.Tensor:
        assert records.shape[:2] == tokens.shape
        seen.append(records)
        generator = torch.Generator().manual_seed(int(tokens.sum()))
        return torch.randn(1, tokens.shape[1], vocabulary, generator=generator)

    engine: Any = SimpleNamespace(seq_len=128, logits=logits)
    start = batch.tokens[:, :prompt], batch.records[:, :prompt]
    new = continue_prompts(engine, *start, count, vocabulary, SamplingOptions(), neighbours)
    text = torch.cat([batch.tokens[:, :prompt], new], dim=1)[0].numpy()
    records = np.repeat(batch.records[:, prompt - 1, :4].numpy(), len(text), axis=0)
    records[:prompt] = batch.records[0, :prompt, :4]
    documents = records[:, 0] + 10**6  # in no index
    whole = stack([Sample(text, records, documents)], neighbours).records
    last = seen[-1]
    assert torch.equal(last, whole) and (last[0, 2 * CHUNK :, 4] >= 0).any()
