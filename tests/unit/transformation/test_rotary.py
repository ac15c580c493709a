"""Rotary positions: parity with HF and Megatron, scores that depend on distances alone, angles that stay exact."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import refractor_megatron.compat.megatron  # noqa: F401  # quiets what Megatron says about itself
from refractor_megatron.compat import cpu_runtime
from refractor_megatron.transformation.rotary import RotaryAngles, inv_freq_and_scale, rotary_angles

GOLDEN = json.loads((Path(__file__).parent / "golden" / "rotary_scores.json").read_text())
SCALINGS = ["linear", "yarn"]
SHAPES = [(1e6, 0.75, 128, 262144), (1e6, 0.75, 32, 65536), (1e4, 0.75, 64, 131072), (5e5, 1.0, 96, 131072)]


@dataclass(frozen=True)
class Place:
    """What this code asks of a process group."""

    place: int = 0
    of: int = 1

    def rank(self) -> int:
        return self.place

    def size(self) -> int:
        return self.of


def stock(scaling: str, theta: float, alpha: float, dim: int, context_max: int) -> Any:
    """Megatron's module with our settings."""
    cpu_runtime.install()
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

    common = {"rotary_base": theta, "use_cpu_initialization": True, "cp_group": Place()}
    if scaling == "linear":
        return RotaryEmbedding(dim, 1.0, seq_len_interpolation_factor=1 / alpha, **common)
    return YarnRotaryEmbedding(
        dim, scaling_factor=1 / alpha, original_max_position_embeddings=int(context_max * alpha), **common
    )


def angles_of(module: Any, length: int, offset: int = 0) -> torch.Tensor:
    emb = module.get_emb(length, offset)
    return (emb[0] if isinstance(emb, tuple) else emb)[:, 0, 0].double()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference of two sets of angles, whole turns aside."""
    difference = a.double() - b.double()
    return float((difference - 2 * math.pi * torch.round(difference / (2 * math.pi))).abs().max())


def turned(x: torch.Tensor, angles: torch.Tensor, scale: float) -> torch.Tensor:
    """A vector [d] rotated by Megatron's own function with angles [1, 1, 1, d]."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    rotated: torch.Tensor = _apply_rotary_pos_emb_bshd(x[None, None, None], angles, mscale=scale)
    return rotated[0, 0, 0]


@pytest.mark.parametrize(("theta", "alpha", "dim", "context_max"), SHAPES)
def test_parity_with_hf(theta: float, alpha: float, dim: int, context_max: int) -> None:
    """Default, linear and YaRN, for heads that turn as a whole and by half."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    def config(kind: str, width: int) -> LlamaConfig:
        settings = {"rope_type": kind, "rope_theta": theta, "partial_rotary_factor": width / dim}
        settings |= {"factor": 1 / alpha} if kind != "default" else {}
        settings |= {"original_max_position_embeddings": int(context_max * alpha)} if kind == "yarn" else {}
        heads = {"hidden_size": 2 * dim, "num_attention_heads": 2, "head_dim": dim}
        return LlamaConfig(**heads, max_position_embeddings=context_max, rope_parameters=settings)

    def agree(theirs: tuple[torch.Tensor, float], ours: tuple[torch.Tensor, float]) -> None:
        assert torch.allclose(ours[0], theirs[0].double(), rtol=1e-6, atol=0)
        assert ours[1] == pytest.approx(theirs[1], abs=1e-9)

    plain = LlamaRotaryEmbedding.compute_default_rope_parameters(config("default", dim))
    agree(plain, inv_freq_and_scale(theta, 1.0, dim))
    for width in (dim, dim // 2):
        agree(ROPE_INIT_FUNCTIONS["linear"](config("linear", width)), inv_freq_and_scale(theta, alpha, width))
        yarn = inv_freq_and_scale(theta, alpha, width, "yarn", context_max)
        agree(ROPE_INIT_FUNCTIONS["yarn"](config("yarn", width)), yarn)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("theta", "alpha", "dim", "context_max"), SHAPES)
def test_parity_with_megatron(scaling: str, theta: float, alpha: float, dim: int, context_max: int) -> None:
    module = stock(scaling, theta, alpha, dim, context_max)
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
        _yarn_get_concentration_factor_from_config,
    )

    inv_freq, scale = inv_freq_and_scale(theta, alpha, dim, scaling, context_max)  # type: ignore[arg-type]
    assert torch.allclose(angles_of(module, 2)[1, : dim // 2], inv_freq, rtol=1e-6, atol=0)
    assert distance(angles_of(module, 64), rotary_angles(64, inv_freq)[:, 0, 0]) < 1e-5
    config = SimpleNamespace(**({"yarn_rotary_scaling_factor": 1 / alpha} if scaling == "yarn" else {}))
    assert scale == pytest.approx(_yarn_get_concentration_factor_from_config(config), abs=1e-12)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_scores_depend_on_distance_alone_up_to_256k(scaling: str) -> None:
    """Extrapolation regression: golden scores at ten distances, from query positions up to the end of the context.

    The golden values were computed from the formulas in float64 with Python's math module; rotation here is Megatron's,
    in float32.
    """
    cpu_runtime.install()
    dim, context = GOLDEN["dim"], GOLDEN["context_max"]
    inv_freq, scale = inv_freq_and_scale(GOLDEN["theta"], GOLDEN["alpha"], dim, scaling, context)  # type: ignore[arg-type]
    q = torch.sin(0.7 * torch.arange(dim, dtype=torch.float64) + 0.3).float()
    k = torch.cos(1.3 * torch.arange(dim, dtype=torch.float64)).float()
    for gap, expected in zip(GOLDEN["distance"], GOLDEN[scaling], strict=True):
        for query in {gap, max(gap, 4096), max(gap, 65535), max(gap, 131072), context - 1}:
            at_query, at_key = (rotary_angles(1, inv_freq, at) for at in (query, query - gap))
            score = turned(q, at_query, scale) @ turned(k, at_key, scale) / dim**0.5
            assert float(score) == pytest.approx(expected, abs=1e-5), (gap, query)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_angles_are_exact_where_float32_products_are_not(scaling: str) -> None:
    """The reason for RotaryAngles; bounds around what was measured (dim 128, theta 1e6, alpha 0.75)."""
    theta, alpha, dim, context = SHAPES[0]
    inv_freq, _ = inv_freq_and_scale(theta, alpha, dim, scaling, context)  # type: ignore[arg-type]
    module = stock(scaling, theta, alpha, dim, context)
    for end, least, most in ((65536, 2e-3, 8e-3), (262144, 8e-3, 3e-2)):
        at = torch.arange(end - 512, end, dtype=torch.float64)
        exact = torch.outer(at, torch.cat([inv_freq, inv_freq]))
        assert distance(rotary_angles(512, inv_freq, end - 512)[:, 0, 0], exact) < 2e-7
        assert least < distance(angles_of(module, 512, end - 512), exact) < most


def test_a_model_takes_it_in_place_of_its_own() -> None:
    """Same call, same shape, same shard of a context-parallel rank, same length of a stage's sequence as upstream."""
    module = stock("linear", *SHAPES[1])
    inv_freq, _ = inv_freq_and_scale(*SHAPES[1][:3])
    upstream, ours = module(96), RotaryAngles(inv_freq)(96, packed_seq=False, cp_group=None)
    assert ours.shape == upstream.shape and ours.dtype == upstream.dtype
    for rank in range(3):
        group = Place(rank, 3)
        assert distance(RotaryAngles(inv_freq, group)(96), module(96, cp_group=group)) < 1e-5
    config = SimpleNamespace(sequence_parallel=True, tensor_model_parallel_size=2, context_parallel_size=3)
    for stage in (torch.zeros(5, 1, 1), None):
        block = SimpleNamespace(input_tensor=stage)
        arguments = (None, block, torch.zeros(7, 1, 1), config, None)
        assert RotaryAngles(inv_freq).get_rotary_seq_len(*arguments) == module.get_rotary_seq_len(*arguments)


def test_it_survives_a_cast_to_bf16_and_holds_no_state() -> None:
    inv_freq, _ = inv_freq_and_scale(1e6, 0.75, 64)
    module = RotaryAngles(inv_freq)
    before = module(300)
    module.bfloat16()
    assert torch.equal(module(301)[:300], before) and not module.state_dict()


def test_yarn_keeps_fast_features_and_interpolates_slow_ones() -> None:
    plain, _ = inv_freq_and_scale(1e6, 1.0, 128)
    yarn, scale = inv_freq_and_scale(1e6, 0.25, 128, "yarn", 65536)
    ratio = yarn / plain
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(0.25) and bool((ratio.diff() <= 1e-12).all())
    assert scale == pytest.approx(0.1 * math.log(4) + 1)
    turns = plain * 65536 * 0.25 / (2 * math.pi)
    assert bool((ratio[turns > 40] > 0.999).all()) and bool((ratio[turns < 0.8] < 0.251).all())


def test_yarn_where_every_feature_turns_often_changes_none() -> None:
    """The ramp would begin behind the last feature; upstream formulas then run it backwards."""
    yarn, _ = inv_freq_and_scale(2.0, 0.5, 8, "yarn", 2**22)
    assert torch.equal(yarn, inv_freq_and_scale(2.0, 1.0, 8)[0])
