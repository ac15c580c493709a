"""The table against the model itself: the keys and shapes that Megatron writes, the names that transformers wants."""

from __future__ import annotations

import pytest
import torch

from refractor_megatron.checkpoint.convert.mapping import global_shapes, table, to_hf, to_megatron
from refractor_megatron.checkpoint.convert.shape import Shape
from refractor_megatron.errors import CheckpointError
from refractor_megatron.hf.from_run import hf_config
from refractor_megatron.hf.modeling_refractor import RefractorForCausalLM
from refractor_megatron.transformation.sharded import shards
from tests.convert.runs import VARIANTS, bank_of
from tests.engine import engine_of, tiny


@pytest.mark.parametrize("variant", VARIANTS)
def test_table_names_both_models_exactly(variant: str) -> None:
    cfg = tiny(*VARIANTS[variant])
    config = hf_config(cfg, None)
    shape = Shape.of_run(cfg)
    assert shape == Shape.of_hf(config)
    entries = table(shape)
    engine = engine_of(cfg, bank=bank_of(cfg))
    assert global_shapes(entries) == {shard.key: shard.global_shape for shard in shards(engine.model)}
    with torch.device("meta"):
        model = RefractorForCausalLM(config)
    names = {t.name: t.shape for entry in entries for t in entry.tensors if not t.padding}
    wanted = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    if shape.tied:
        wanted.pop("lm_head.weight")
    assert names == wanted
    assert len(names) == sum(not t.padding for entry in entries for t in entry.tensors), "every name stands once"


@pytest.mark.parametrize("variant", ["padded", "gated"])
def test_whole_models_go_both_ways_bit_for_bit(variant: str) -> None:
    entries = table(Shape.of_run(tiny(*VARIANTS[variant])))
    generator = torch.Generator().manual_seed(0)
    full = {key: torch.randn(shape, generator=generator) for key, shape in global_shapes(entries).items()}
    back = to_megatron(entries, to_hf(entries, full))
    assert back.keys() == full.keys()
    for key, value in full.items():
        assert torch.equal(back[key], value), key


def test_missing_padding_is_zeros() -> None:
    entries = table(Shape.of_run(tiny(*VARIANTS["padded"])))
    full = {key: torch.ones(shape) for key, shape in global_shapes(entries).items()}
    hf = {name: tensor for name, tensor in to_hf(entries, full).items() if not name.endswith(".padding")}
    back = to_megatron(entries, hf)["output_layer.weight"]
    assert back.shape[0] == 768 and back[:700].all() and not back[700:].any()


@pytest.mark.parametrize("side", ["hf", "megatron"])
def test_a_wrong_dictionary_is_refused_by_name(side: str) -> None:
    entries = table(Shape.of_run(tiny()))
    full = {key: torch.ones(shape) for key, shape in global_shapes(entries).items()}
    tensors, convert = (to_hf(entries, full), to_megatron) if side == "hf" else (full, to_hf)
    name = sorted(tensors)[5]
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        convert(entries, {key: value for key, value in tensors.items() if key != name})
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        convert(entries, {**tensors, name: tensors[name][..., :-1]})
