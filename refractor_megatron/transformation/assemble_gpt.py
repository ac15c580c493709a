"""LayerPlan -> Megatron GPT model (megatron-core 0.16 layer specs)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..compat.megatron import (
    ModuleSpec,
    TransformerBlockSubmodules,
    TransformerConfig,
    get_gpt_layer_local_spec,
    get_num_layers_to_build,
    get_transformer_layer_offset,
    parallel_state,
)
from ..distinction.rules import CompiledRules
from ..fabric.retrieval import RetrievalBank
from .core_attention import TriTierCoreAttention
from .layer import RefractorTransformerLayer
from .layer_plan import FeedForwardPlan, LayerPlan
from .model import RefractorGPTModel
from .norm import RMSNorm
from .rotary import RotaryAngles
from .router import RefractorRouter


@dataclass(frozen=True)
class Grid:
    """Sizes of the parallel dimensions; data parallelism is what remains of the world."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    cp: int = 1

    @property
    def etp(self) -> int:
        """Tensor parallelism inside experts: whole experts when they are spread over ranks, else as elsewhere.

        (tp > 1, ep = 1, etp = 1) is not offered: upstream then reduces expert gradients over the wrong group.
        """
        return 1 if self.ep > 1 else self.tp


@dataclass(frozen=True)
class RouterPlan:
    """Router settings shared by all layers (spec section 8)."""

    gate_temperature: float
    renormalize_topk: bool
    lambda_kl: float
    lambda_entropy: float
    entropy_mode: str
    gate_features: bool


#: Options of Megatron that this model does without.
_OFF: dict[str, Any] = {
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "bias_dropout_fusion": False,
    "bias_activation_fusion": False,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "persist_layer_norm": False,
    "apply_rope_fusion": False,
}


def transformer_config(plan: LayerPlan, router: RouterPlan, grid: Grid, *, bf16: bool, recompute: str) -> Any:
    """Megatron's TransformerConfig for this plan and grid. It describes one layer: all must have the same shape."""
    shapes = {(one.heads, one.kv_heads, one.head_dim, one.rotary) for one in plan.attention}
    assert len(shapes) == len(set(plan.feed_forward)) == 1, "layers of unlike shape need a block spec of their own"
    dtype = torch.bfloat16 if bf16 else torch.float32
    attention, ffn = plan.attention[0], plan.feed_forward[0]
    rotary = attention.rotary
    settings = _OFF | {
        "num_layers": plan.n_layers,
        "hidden_size": plan.d_model,
        "num_attention_heads": attention.heads,
        "num_query_groups": attention.kv_heads,
        "kv_channels": attention.head_dim,
        "ffn_hidden_size": ffn.hidden,
        "gated_linear_unit": ffn.activation == "swiglu",
        "activation_func": F.silu if ffn.activation == "swiglu" else F.gelu,
        "normalization": "RMSNorm",
        "layernorm_epsilon": plan.norm_eps,
        "use_cpu_initialization": not torch.cuda.is_available(),
        # initialise.py overwrites every weight, but upstream marks tensor-parallel parameters only while it initialises
        # them, and without the mark the gradient norm counts one rank's share alone
        "perform_initialization": True,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": bf16,
        "tensor_model_parallel_size": grid.tp,
        "sequence_parallel": grid.tp > 1,
        "context_parallel_size": grid.cp,
        "pipeline_model_parallel_size": grid.pp,
        "expert_model_parallel_size": grid.ep,
    }
    if ffn.type == "moe":
        settings |= _moe_settings(ffn, router, grid)
    if recompute == "full":
        settings |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    config = TransformerConfig(**settings)
    if rotary.scaling == "yarn":
        # Megatron multiplies cosines and sines by YaRN's temperature when it finds the factor here.
        config.yarn_rotary_scaling_factor = 1.0 / rotary.alpha
    return config


def _moe_settings(ffn: FeedForwardPlan, router: RouterPlan, grid: Grid) -> dict[str, Any]:
    return {
        "num_moe_experts": ffn.experts,
        "moe_ffn_hidden_size": ffn.hidden,
        "moe_router_topk": ffn.topk,
        "moe_router_pre_softmax": not router.renormalize_topk,
        "moe_router_load_balancing_type": "aux_loss" if router.lambda_kl > 0 else "none",
        "moe_aux_loss_coeff": router.lambda_kl,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",  # dropless: a full expert never evicts another token
        "expert_tensor_parallel_size": grid.etp,
    }


def layer_specs(
    plan: LayerPlan, router: RouterPlan, rules: CompiledRules | None, bank: RetrievalBank | None
) -> list[Any]:
    """One ModuleSpec for each layer; ``rules=None`` keeps Megatron's own causal DotProductAttention (parity tests)."""
    specs = []
    for attention, ffn in zip(plan.attention, plan.feed_forward, strict=True):
        spec = get_gpt_layer_local_spec(num_experts=ffn.experts if ffn.type == "moe" else None, normalization="RMSNorm")
        spec.module = RefractorTransformerLayer
        layer = spec.submodules
        layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
        if rules is not None:
            layer.self_attention.submodules.core_attention = ModuleSpec(
                module=TriTierCoreAttention,
                params={"plan": attention, "rules": rules, "bank": bank},
            )
        if ffn.type == "moe":
            layer.mlp.submodules.router = ModuleSpec(
                module=RefractorRouter,
                params={
                    "gate_temperature": router.gate_temperature,
                    "lambda_entropy": router.lambda_entropy,
                    "entropy_mode": router.entropy_mode,
                    "gate_features": router.gate_features,
                },
            )
        specs.append(spec)
    return specs


def assemble(
    plan: LayerPlan,
    router: RouterPlan,
    rules: CompiledRules | None,
    config: Any,
    max_sequence_length: int,
    bank: RetrievalBank | None = None,
) -> RefractorGPTModel:
    """This rank's pipeline stage, uninitialised (see ``initialise``).

    Args:
        rules: None keeps Megatron's own attention. bank: vectors of retrieved records, where a layer reads them.
    """
    first, count = get_transformer_layer_offset(config), get_num_layers_to_build(config)
    block = TransformerBlockSubmodules(
        layer_specs=layer_specs(plan, router, rules, bank)[first : first + count], layer_norm=RMSNorm
    )
    model = RefractorGPTModel(
        config,
        block,
        plan.vocab_size,
        max_sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=plan.tie_embeddings,
        position_embedding_type="rope",
        role_embeddings=plan.role_embeddings,
    )
    model.rotary_pos_emb = RotaryAngles(plan.attention[0].rotary.frequencies()[0], model.pg_collection.cp)
    return model
