"""A sequence's state in one page: any schedule of sequences over pages gives what the whole sequences give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_megatron.errors import CheckpointError, ConfigError
from refractor_megatron.hf.configuration_refractor import RefractorConfig
from refractor_megatron.hf.masking_refractor import RefractorCache
from refractor_megatron.serving.state import Field, Pages, load_exactly, state_fields
from tests.unit.serving.models import LENGTH, VARIANTS, config_of, model_of


def pages_of(config: RefractorConfig, count: int, length: int = LENGTH) -> Pages:
    """Pages full of NaN, as memory that others have used may be."""
    fields = state_fields(config, length, torch.float32)
    tensors = []
    for field in fields:
        tensor = torch.empty(count, *field.shape, dtype=field.dtype)
        tensors.append(tensor.fill_(float("nan") if field.dtype.is_floating_point else 1))
    return Pages(config, fields, tensors)


MODELS = {name: model_of(config_of(**changes)) for name, changes in VARIANTS.items()}


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=20)
@given(data=st.data())
def test_any_schedule_equals_full_recompute(variant: str, data: st.DataObject) -> None:
    model = MODELS[variant]
    pages = pages_of(model.config, count=4)
    free = data.draw(st.permutations([1, 2, 3]))
    waiting = [
        torch.tensor(data.draw(st.lists(st.integers(0, 29), min_size=2, max_size=LENGTH)))
        for _ in range(data.draw(st.integers(1, 4)))
    ]
    running: list[tuple[torch.Tensor, int, list[torch.Tensor]]] = []
    with torch.no_grad():
        while waiting or running:
            while waiting and free:
                running.append((waiting.pop(), free.pop(), []))
            counts = [
                min(data.draw(st.sampled_from([1, 1, 5, 17])), len(ids) - sum(map(len, done)))
                for ids, _, done in running
            ]
            starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
            known = [sum(map(len, done)) for _, _, done in running]
            ids = torch.cat([x[k : k + n] for (x, _, _), k, n in zip(running, known, counts, strict=True)])
            padded = torch.cat([ids, torch.zeros(3, dtype=torch.long)])
            rows = torch.tensor([row for _, row, _ in running])
            hidden = pages.run_batch(model.model, padded, starts, known, rows)
            assert not hidden[len(ids) :].any()
            for (_, _, done), start, stop in zip(running, starts, starts[1:], strict=False):
                done.append(hidden[start:stop])
            for sequence in [x for x in running if sum(map(len, x[2])) == len(x[0])]:
                whole = model.model(sequence[0][None], use_cache=False).last_hidden_state[0]
                torch.testing.assert_close(torch.cat(sequence[2]), whole, rtol=0, atol=1e-5)
                free.append(sequence[1])
            running = [x for x in running if sum(map(len, x[2])) < len(x[0])]


@pytest.mark.parametrize("variant", VARIANTS)
def test_page_holds_what_the_cache_of_a_full_sequence_holds(variant: str) -> None:
    model = MODELS[variant]
    cache = RefractorCache(model.config)
    with torch.no_grad():
        model.model(torch.randint(0, 24, (1, LENGTH)), past_key_values=cache)
    fields = {(field.layer, field.name): field for field in state_fields(model.config, LENGTH, torch.float32)}
    parts = [(None, cache.shared), *enumerate(cache.layers)]
    held = {(layer, name): x for layer, part in parts for name, x in part.items() if x.numel()}
    assert held.keys() == fields.keys()
    for key, x in held.items():
        assert (tuple(x.shape[1:]), x.dtype) == (fields[key].shape, fields[key].dtype), key


def test_fields_are_aligned_wherever_they_lie() -> None:
    for length in (1, 5, 31, LENGTH):
        offset = 0
        for field in state_fields(config_of(), length, torch.bfloat16):
            assert offset % field.dtype.itemsize == 0, field
            offset += field.nbytes


def test_a_window_and_summaries_are_small_beside_every_key() -> None:
    summaries = {"block_size": 128, "per_block": 2, "levels": 1, "fanout": 16, "pooling": "attn_pool"}
    shape = {"num_hidden_layers": 12, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 65536}
    config = config_of(**shape, local_attention={"window": 512}, summaries=summaries)
    state = sum(field.nbytes for field in state_fields(config, 65536, torch.bfloat16))
    every_key = 65536 * 12 * 2 * 4 * 64 * 2
    assert state < every_key / 30


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"retrieval": {"chunk": 4, "fan_in": 2, "dim": 8, "layers": [1]}}, "retrieval"),
        ({"linear_attention": {"kernel": "elu+1", "features": 8, "seed": 0}}, "linear_attention"),
    ],
)
def test_what_a_page_cannot_hold_is_refused(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=f"^config.json: {key} is set, .*refractor generate"):
        state_fields(config_of(**changes), LENGTH, torch.float32)


@pytest.mark.parametrize("variant", ["two levels", "no window"])
def test_a_sequence_longer_than_its_page_is_caught(variant: str) -> None:
    model = MODELS[variant]
    pages = pages_of(model.config, 1, length=16)
    with pytest.raises(AssertionError, match="left its page"), torch.no_grad():
        pages.run(model.model, torch.zeros(1, 17, dtype=torch.long), [0], torch.tensor([0]))


def test_a_tensor_that_no_field_foresees_is_caught() -> None:
    model = MODELS["two levels"]
    pages = pages_of(model.config, 1)
    short = [i for i, field in enumerate(pages.fields) if field != Field(1, "group_k", (2, 12, 8), torch.float32)]
    assert len(short) == len(pages.fields) - 1
    pages = Pages(model.config, [pages.fields[i] for i in short], [pages.tensors[i] for i in short])
    with pytest.raises(AssertionError, match="the cache holds"), torch.no_grad():
        pages.run(model.model, torch.zeros(1, 16, dtype=torch.long), [0], torch.tensor([0]))


def test_weights_load_one_to_one() -> None:
    source = {name: torch.randn(2, 3) for name in "abc"}
    target = {name: torch.zeros(2, 3) for name in "abc"}
    assert load_exactly(target, source.items()) == set("abc")
    assert all(torch.equal(target[name], source[name]) for name in source)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([("a", (2, 3))], "lack b, c"),
        ([("a", (2, 3)), ("z", (2, 3))], "hold z, which"),
        ([("a", (3, 2))], r"a has shape \[3, 2\] in the weights and \[2, 3\]"),
        ([("a", (2, 3)), ("a", (2, 3))], "hold a twice"),
    ],
)
def test_weights_that_do_not_fit_are_named(weights: list[tuple[str, tuple[int, int]]], said: str) -> None:
    target = {name: torch.zeros(2, 3) for name in "abc"}
    with pytest.raises(CheckpointError, match=said):
        load_exactly(target, [(name, torch.ones(shape)) for name, shape in weights])
