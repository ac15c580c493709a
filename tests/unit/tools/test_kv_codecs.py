"""``tools/kv_codecs.py``: its points of reference by their definitions, and the whole on a small trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from refractor_megatron.cli import main
from tests.corpus import ROOT, write_corpus
from tests.runs import pretrain, python
from tests.warm import warm_ranks


@pytest.fixture
def kv_codecs(tools: None) -> Any:
    import kv_codecs

    return kv_codecs


def test_e3m7_rounds_as_its_bits_say(kv_codecs: Any) -> None:
    """Under a shared exponent of 2^3: normal down to 2^-3, then steps of 2^-10."""
    x = torch.zeros(64)
    x[:8] = torch.tensor([8.0, 15.97, 1.0, 1.00390625, 1.005, -0.125, 0.0629, 2**-10.5])
    back, bits = kv_codecs.e3m7(x)
    # The last value is 0.707 steps; 1.00390625 is a tie and goes to the even side; 15.97 is below the largest, 15.9375.
    expected = [8.0, 15.9375, 1.0, 1.0, 1.0078125, -0.125, 64 / 1024, 1 / 1024]
    assert back[:8].tolist() == expected and not back[8:].any()
    assert bits == 64 * 11 + 8


def test_e3m7_keeps_bf16_values_of_seven_octaves(kv_codecs: Any) -> None:
    x = (torch.rand(2, 3, 5, 32, generator=torch.Generator().manual_seed(0)) * 0.99 + 0.01).bfloat16()
    assert torch.equal(kv_codecs.e3m7(x)[0], x)


def test_the_other_points_of_reference(kv_codecs: Any) -> None:
    x = torch.linspace(-1, 1, 255).reshape(1, 1, 15, 17)
    for round_trip, levels, per_value in ((kv_codecs.int8_per_tensor, 127, 8), (kv_codecs.int11_unturned, 1023, 11)):
        back, bits = round_trip(x)
        assert (back - x).abs().max() <= 0.53 / levels and 0 <= bits - per_value * x.numel() < 100
    back, bits = kv_codecs.cast(torch.bfloat16)(x)
    assert torch.equal(back, x.bfloat16().float()) and bits == 16 * x.numel()


def test_outlier_channels_leave_logits_alone(kv_codecs: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(5, 2, heads, 32, generator=draw) for heads in (4, 2, 2))
    q, k, v, records = kv_codecs.with_outliers([query, key, value, torch.zeros(1)])
    grouped = [x.repeat_interleave(2, 2) for x in (key, k)]
    before, after = (torch.einsum("sbhd,tbhd->bhst", a, b) for a, b in zip((query, q), grouped, strict=True))
    torch.testing.assert_close(before, after)
    assert torch.equal(v[..., ::8], 12 * value[..., ::8]) and torch.equal(k[..., 1:8], key[..., 1:8])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_record_of_a_small_run(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text")
    settings = ["train.steps=4", "train.schedule.warmup_steps=2", "checkpoint.every=4", "evaluation.every=4"]
    settings += ["evaluation.samples=1", "memory.kv.chunk=48"]
    with warm_ranks():
        assert main(pretrain(tmp_path, tmp_path / "run", *settings)) == 0
    tool, out = str(ROOT / "tools" / "kv_codecs.py"), tmp_path / "out" / "kv.md"
    done = python(tool, "run", "--documents", "2", "--out", "out/kv.md", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.with_suffix(".json").read_text())
    layers = result["attention"]["layers"]
    for kind, forms in result["kinds"].items():
        for name, one in forms.items():
            assert one["chunks"] == layers * 2 * 2 * 3, (kind, name)  # K and V, documents, chunks of 48 in 128 tokens
            assert len(one["output"]["layers"]) == layers and (one["loss"] is None) == ("outliers" in kind)
        exact, tight, rough = forms["**exact**"], forms["**tight**"], forms["int8, a scale per tensor"]
        assert exact["output"]["all"] == exact["frobenius"]["K"]["worst"] == exact["bound_missed"] == 0
        assert 0 < tight["output"]["all"] < 0.2 * rough["output"]["all"]
        assert 11.1 < tight["bits_per_value"] < 11.7 and tight["bound_missed"] == 0
    assert (
        result["kinds"]["bf16"]["bf16"]["loss"]["mean_absolute"] == 0 < result["kinds"]["fp32"]["bf16"]["output"]["all"]
    )
    assert result["kinds"]["bf16"]["**exact**"]["loss"]["mean_absolute"] == 0
    text = out.read_text()
    assert "2 held-out documents" in text and "| **tight** |" in text and result["commit"] in text

    again = python(str(ROOT / "tools" / "kv_codecs_report.py"), "out/kv.json", cwd=tmp_path)
    assert again.returncode == 0 and out.read_text() == text
    many = python(tool, "run", "--documents", "9999", cwd=tmp_path)
    assert many.returncode == 3 and "give --documents" in many.stderr and "Traceback" not in many.stderr
