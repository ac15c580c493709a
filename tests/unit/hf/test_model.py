"""The exported model as its users meet it: loading by name, generate, ids without records, going back, memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from refractor_megatron.hf import masking_refractor
from refractor_megatron.hf.configuration_refractor import RefractorConfig
from refractor_megatron.hf.masking_refractor import RefractorCache, derived_records
from refractor_megatron.hf.modeling_refractor import RefractorForCausalLM

USER, ASSISTANT, END, EOD, PAD = 90, 91, 92, 93, 94
SUMMARIES = {"block_size": 8, "per_block": 2, "levels": 2, "fanout": 2, "pooling": "attn_pool"}
RULES = [{"name": "hidden", "when": {"bits": ["SAFETY_SCOPE"]}, "allow_write_to": [], "causal": True}]


def config(**changes: object) -> RefractorConfig:
    settings: dict[str, object] = {
        "architectures": ["RefractorForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_refractor.RefractorConfig",
            "AutoModelForCausalLM": "modeling_refractor.RefractorForCausalLM",
        },
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.2,
        "local_attention": {"window": 12},
        "summaries": SUMMARIES,
        "mask_rules": RULES,
        "role_token_ids": {"user": USER, "assistant": ASSISTANT},
        "end_token_id": END,
        "eos_token_id": EOD,
        "pad_token_id": PAD,
    }
    return RefractorConfig(**(settings | changes))


def model_of(**changes: object) -> RefractorForCausalLM:
    torch.manual_seed(0)
    return RefractorForCausalLM(config(**changes)).eval()


def ids_of(length: int, samples: int = 1) -> Tensor:
    return torch.randint(0, 90, (samples, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model() -> RefractorForCausalLM:
    return model_of()


@pytest.fixture(scope="module")
def folder(model: RefractorForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    model.save_pretrained(folder)
    for file in Path(masking_refractor.__file__).parent.glob("*_refractor.py"):
        shutil.copy(file, folder)
    return folder


@torch.no_grad()
def test_loads_by_name_from_its_folder(model: RefractorForCausalLM, folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(loaded) is not RefractorForCausalLM  # the code beside the weights, not ours
    ids = ids_of(60)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def greedy(model: RefractorForCausalLM, ids: Tensor, count: int) -> Tensor:
    for _ in range(count):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


@torch.no_grad()
def test_generate_equals_greedy_recomputation_in_a_padded_batch(model: RefractorForCausalLM) -> None:
    ids = ids_of(40, 2)
    ids[:, 0], ids[:, 15], ids[:, 16] = USER, END, ASSISTANT
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    made = model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False, eos_token_id=-1)
    assert torch.equal(made[1:], greedy(model, ids[1:], 40))
    assert torch.equal(made[:1, 13:], greedy(model, ids[:1, 13:], 40))


@torch.no_grad()
def test_beams_reorder_the_cache(model: RefractorForCausalLM) -> None:
    ids = ids_of(30, 2)
    options = {"max_new_tokens": 20, "num_beams": 3, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with_cache = model.generate(ids, **options)
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **options))


@torch.no_grad()
def test_given_records_are_the_prompts_and_go_on(model: RefractorForCausalLM) -> None:
    ids = ids_of(30)
    records = torch.zeros(1, 30, 4, dtype=torch.int)
    records[..., 2] = 1
    records[:, :20, 3] = masking_refractor.SCOPE_BITS["SAFETY_SCOPE"]
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    options["suppress_tokens"] = [USER, ASSISTANT, END, EOD]  # what changes the record of the tokens behind it
    made = model.generate(ids, records=records, **options)
    longer = torch.cat([records, records[:, -1:].expand(-1, 12, -1)], 1)
    whole = model(made, records=longer, use_cache=False).logits
    assert torch.equal(whole[:, 29:-1, :USER].argmax(-1), made[:, 30:])
    assert not torch.equal(made, model.generate(ids, **options))  # what nobody may read is not read


def test_records_follow_the_structure_of_the_ids() -> None:
    ids = torch.tensor([[USER, 1, END, 2, ASSISTANT, 3, END, EOD, USER, 4]])
    found = derived_records(config(), ids, torch.ones_like(ids, dtype=torch.bool), None)
    assert found[0, :, 2].tolist() == [1, 1, 1, 5, 2, 2, 2, 5, 1, 1]
    assert found[0, :, 0].tolist() == [0] * 8 + [1, 1]
    assert not found[0, :, [1, 3]].any()


@torch.no_grad()
def test_derived_records_do_not_depend_on_the_pieces(model: RefractorForCausalLM) -> None:
    ids = torch.cat([torch.tensor([[USER, 1, END, 2, ASSISTANT, 3, END, EOD, USER, 4]]), ids_of(20)], 1)
    cache = RefractorCache(model.config)
    for n in range(ids.shape[1]):
        model(ids[:, n : n + 1], past_key_values=cache, use_cache=True)
    whole = derived_records(model.config, ids, torch.ones_like(ids, dtype=torch.bool), None)
    assert torch.equal(cache.shared["history"][:, : ids.shape[1]].long(), whole)


@torch.no_grad()
@pytest.mark.parametrize(
    "changes", [{}, {"local_attention": {"window": None}, "summaries": None}], ids=["tiers", "full"]
)
def test_a_long_prompt_in_pieces_is_the_same(changes: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = model_of(**changes), ids_of(500, 2)
    whole = model(ids, use_cache=True).logits  # one piece
    monkeypatch.setattr("refractor_megatron.hf.modeling_refractor._PIECE_ELEMENTS", 1)  # the shortest: 64 tokens
    assert (model(ids, use_cache=True).logits - whole).abs().max() <= 1e-5
    assert (model(ids, use_cache=False).logits - whole).abs().max() <= 1e-5


@torch.no_grad()
def test_going_back_is_as_if_never_gone_on(model: RefractorForCausalLM) -> None:
    ids, other = ids_of(80, 2), ids_of(30, 2).flip(1)
    kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(2)]
    cache = RefractorCache(model.config, keep=8)
    for start in range(0, 80, 8):
        model(ids[:, start : start + 8], past_key_values=cache, use_cache=True)
        for layer in range(2):
            k, v = cache.tokens(layer, start, start + 8)
            kept[layer].append((k.clone(), v.clone()))

    def read(layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        k, v = (torch.cat(parts, 2) for parts in zip(*kept[layer], strict=True))
        return k[:, :, start:stop], v[:, :, start:stop]

    cache.rewind(45, read)
    again = model(other, past_key_values=cache, use_cache=True).logits
    fresh = RefractorCache(model.config)
    model(ids[:, :45], past_key_values=fresh, use_cache=True)
    assert (again - model(other, past_key_values=fresh, use_cache=True).logits).abs().max() <= 1e-5
    with pytest.raises(IndexError):
        cache.rewind(76, read)
    with pytest.raises(IndexError):
        cache.tokens(0, 0, 8)


def test_recomputed_activations_give_the_same_gradients() -> None:
    ids, found = ids_of(50), []
    for recompute in (False, True):
        model = model_of().train()
        if recompute:
            model.gradient_checkpointing_enable()
            assert all(layer.gradient_checkpointing for layer in model.model.layers)
        model(ids, labels=ids).loss.backward()
        found.append([weight.grad for weight in model.parameters()])
    for once, twice in zip(*found, strict=True):
        torch.testing.assert_close(once, twice)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"output_attentions": True}, "output_attentions"),
        ({"return_dict": False}, "return_dict"),
        ({"recrods": torch.zeros(1, 5, 4)}, "recrods"),
        ({"records": torch.zeros(1, 9, 4)}, "records"),
        ({"retrieved": (torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2))}, "without retrieval"),
        ({"attention_mask": torch.zeros(1, 5)}, "attention_mask"),
    ],
)
@torch.no_grad()
def test_what_it_would_silently_not_do_is_refused(
    model: RefractorForCausalLM, given: dict[str, object], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        model(ids_of(5), **given)


def test_no_gradient_is_lost_in_a_cache(model: RefractorForCausalLM) -> None:
    with pytest.raises(ValueError, match="no_grad"):
        model(ids_of(5), use_cache=True)


@torch.no_grad()
def test_states_that_are_gone_are_not_asked_for() -> None:
    model = model_of(linear_attention={"kernel": "elu+1", "features": 0, "seed": 0}, summaries=None)
    records = torch.zeros(1, 6, 4, dtype=torch.int)
    records[0, 2:4, 1] = 1
    with pytest.raises(ValueError, match="segment 0"):
        model(ids_of(6), records=records, use_cache=True)


def retrieving() -> tuple[RefractorForCausalLM, Tensor, Tensor]:
    model = model_of(retrieval={"chunk": 8, "fan_in": 2, "dim": 4, "layers": [1, 2]}, mask_rules=[])
    return model, torch.randn(1, 3, 2, 4, generator=torch.Generator().manual_seed(2)), torch.full((1, 3, 2), 3)


@torch.no_grad()
def test_chunks_beyond_the_given_ones_retrieved_nothing() -> None:
    model, vectors, policies = retrieving()
    ids = ids_of(20)
    few = model(ids, retrieved=(vectors[:, :2], policies[:, :2])).logits
    policies[:, 2] = -1
    assert torch.equal(few, model(ids, retrieved=(vectors, policies)).logits)
    assert not torch.equal(few, model(ids).logits)
    assert torch.equal(model(ids, retrieved=(vectors[:, :0], policies[:, :0])).logits, model(ids).logits)


@torch.no_grad()
def test_what_a_prompt_retrieved_is_not_read_again_later() -> None:
    model, vectors, policies = retrieving()
    ids = ids_of(20)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1, "attention_mask": torch.ones_like(ids)}
    made = model.generate(ids, retrieved=(vectors, policies), **options)
    logits = model(made, retrieved=(vectors, policies), use_cache=False).logits
    assert torch.equal(logits[:, 19:-1].argmax(-1), made[:, 20:])
    several = model.generate(
        ids, retrieved=(vectors, policies), **(options | {"num_beams": 3, "num_return_sequences": 2})
    )
    assert len(several) == 2


@torch.no_grad()
def test_a_conversation_goes_on_with_its_cache_though_every_prompt_was_padded(model: RefractorForCausalLM) -> None:
    ids, cache = ids_of(24, 2), RefractorCache(model.config)
    mask = torch.ones_like(ids)
    mask[0, :9], mask[1, :4] = 0, 0
    options = {"do_sample": False, "eos_token_id": -1, "past_key_values": cache}
    once = model.generate(ids, attention_mask=mask, max_new_tokens=6, **options)
    longer = torch.cat([once, ids_of(5, 2)], 1)
    mask = torch.cat([mask, torch.ones(2, 11, dtype=torch.long)], 1)
    twice = model.generate(longer, attention_mask=mask, max_new_tokens=6, **options)
    for row, start in ((0, 9), (1, 4)):
        assert torch.equal(twice[row : row + 1, start:], greedy(model, longer[row : row + 1, start:], 6))


def test_draft_models_are_refused_in_a_sentence(model: RefractorForCausalLM) -> None:
    with pytest.raises(ValueError, match="assisted"):
        model.generate(ids_of(5), assistant_model=model, max_new_tokens=2)


@torch.no_grad()
def test_the_cache_grows_by_summaries_and_token_numbers_only() -> None:
    model = model_of(summaries=SUMMARIES | {"levels": 1})
    sizes = []
    for length in (256, 1024):
        cache = RefractorCache(model.config)
        model(ids_of(length), past_key_values=cache, use_cache=True)
        sizes.append(cache.nbytes)
    key = 2 * 2 * 8 * 4 * model.config.num_hidden_layers  # keys and values of a token, 2 heads of 8, float32
    numbers = 4 * 4 + 8 + (8 + 8 + 48) / 8  # record, id, and the records of its block
    assert sizes[1] - sizes[0] == pytest.approx((1024 - 256) * (key * 2 / 8 + numbers), rel=0.02)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"combine": "average"}, "combine"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"local_attention": {"kind": "ring"}}, "local_attention.kind"),
        ({"local_attention": {"windw": 8}}, "windw"),
        ({"local_attention": {"window": -3}}, "window"),
        ({"summaries": SUMMARIES | {"levels": 3}}, "levels"),
        ({"summaries": SUMMARIES | {"pooling": "last"}}, "pooling"),
        ({"summaries": {"block_size": 8}}, "lacks"),
        ({"linear_attention": {"kernel": "relu", "features": 0, "seed": 0}}, "kernel"),
        ({"retrieval": {"chunk": 8, "fan_in": 2, "dim": 4, "layers": [9]}}, "layers"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type"),
        ({"mask_rules": [RULES[0] | {"causal": False}]}, "hidden"),
    ],
)
def test_impossible_configurations_are_named(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        config(**changes)
