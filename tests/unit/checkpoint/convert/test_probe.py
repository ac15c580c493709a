"""The probe makes every part of a model speak: without it, a wrong part could pass unseen."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from refractor_megatron.checkpoint.convert.mapping import table
from refractor_megatron.checkpoint.convert.probe import (
    PARITY,
    Probe,
    check_fingerprint,
    compare,
    fingerprint,
    probe_length,
)
from refractor_megatron.checkpoint.convert.shape import Shape
from refractor_megatron.checkpoint.convert.to_hf import code_files
from refractor_megatron.checkpoint.convert.verify import check_parity, is_own_code, load_probe, save_probe
from refractor_megatron.errors import CheckpointError
from refractor_megatron.hf.from_run import hf_config
from refractor_megatron.hf.modeling_refractor import RefractorForCausalLM
from tests.convert.runs import VARIANTS
from tests.engine import tiny


def logits_of(model: RefractorForCausalLM, batch: Probe) -> torch.Tensor:
    with torch.no_grad():
        out = model(input_ids=batch.tokens, records=batch.records, retrieved=batch.retrieved(), use_cache=False)
    return out.logits[0]


@pytest.mark.parametrize("variant", ["moe", "tied", "dense gelu", "two levels", "gated", "separate", "linear"])
def test_every_tensor_moves_the_logits(variant: str) -> None:
    """A tensor that the probe does not reach would be compared by nobody."""
    cfg = tiny(*VARIANTS[variant], "model.ffn.hidden=16")
    config = hf_config(cfg, None)
    torch.manual_seed(0)
    model = RefractorForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    batch = Probe.of(config)
    before = logits_of(model, batch)
    state = model.state_dict()
    for entry in table(Shape.of_run(cfg)):
        for tensor in (t for t in entry.tensors if not t.padding):
            kept = state[tensor.name].clone()
            state[tensor.name].mul_(1.5).add_(0.05)
            difference, bound = compare(before, logits_of(model, batch), PARITY)
            state[tensor.name].copy_(kept)
            idle = config.num_experts == 1 and tensor.name.endswith("gate.weight")  # there is nothing to choose
            assert difference > bound or idle, f"{tensor.name} changes nothing"


def test_the_batch_is_the_same_every_time_and_survives_the_disk(tmp_path: Path) -> None:
    config = hf_config(tiny(*VARIANTS["gated"]), None)
    one, other = Probe.of(config), Probe.of(config)
    save_probe(tmp_path, one)
    for again in (other, load_probe(tmp_path)):
        for name in ("tokens", "records", "vectors", "policies", "ids"):
            assert torch.equal(getattr(one, name), getattr(again, name)), name
    assert {int(role) for role in one.records[0, :, 2]} == set(range(6))
    assert len(set(one.records[0, :, 0].tolist())) == 2 and one.records[0, :, 3].any()


def test_length_is_bounded() -> None:
    config = hf_config(tiny("model.context_max=60000", "relation.local.window=50000", "train.seq_len=60000"), None)
    assert probe_length(config) == 4096


def test_whose_code_a_folder_carries(tmp_path: Path) -> None:
    assert not is_own_code(tmp_path)
    for path in code_files():
        shutil.copyfile(path, tmp_path / path.name)
    assert is_own_code(tmp_path)
    changed = bytearray((tmp_path / "masking_refractor.py").read_bytes())
    changed[5] ^= 1
    (tmp_path / "masking_refractor.py").write_bytes(changed)
    assert not is_own_code(tmp_path), "of the same size, and yet another"


def test_fingerprint_and_parity() -> None:
    logits = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    stored = fingerprint(logits, 0.0)
    assert check_fingerprint(logits, stored) == 0.0
    changed = logits.clone()
    changed[stored["positions"][3], stored["tokens"][2]] += 1.0
    assert check_fingerprint(changed, stored) > stored["tolerance"]
    for fewer in (logits[:-1], logits[:, :-1]):
        with pytest.raises(CheckpointError, match="outside of its probe's"):
            check_fingerprint(fewer, stored)
    assert check_parity(logits, logits + 1e-6) < 2e-6
    for wrong in (logits + 1e-3, torch.full_like(logits, float("nan"))):
        with pytest.raises(CheckpointError, match="differ"):
            check_parity(logits, wrong)
