"""One whole transformer layer, built by the engine: our attention beside dense flash attention in the same layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_bench import Bench, Shape, sample_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


class DenseFlash(torch.nn.Module):
    """Causal attention over the whole prefix by one of torch's fused kernels, with the signature of Megatron's."""

    def __init__(self, kernel: str) -> None:
        super().__init__()
        self.kernel = getattr(SDPBackend, kernel)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **unused: Any) -> Tensor:
        """query [s, b, h, d], key and value [s, b, h_kv, d] -> [s, b, h · d]; the records are not read."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        grouped = q.shape[1] != k.shape[1]
        with sdpa_kernel(self.kernel):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return out.permute(2, 0, 1, 3).flatten(2)


def whole_layer(bench: Bench, shape: Shape, length: int, d_model: int, kernel: str, part: dict[str, Any]) -> None:
    """Forward, and forward and backward with the gradients of all weights, of both layers."""
    from refractor_megatron.config import compose
    from refractor_megatron.engines.megatron import MegatronEngine, start_distributed, stop_distributed

    hidden = max(128, d_model * 7 // 2 // 128 * 128)
    cfg = compose(
        [
            "experiment=nano",
            *(f"model.d_model={d_model}", f"model.n_heads={shape.heads}", f"model.n_kv_heads={shape.kv_heads}"),
            *("model.n_layers=1", "model.ffn.type=dense", f"model.ffn.hidden={hidden}", f"model.rope.dim={d_model}"),
            *(f"model.context_max={length}", f"train.seq_len={length}", "train.micro_batch=1", "train.global_batch=1"),
            f"train.mixed_precision={'bf16' if bench.on_gpu else 'fp32'}",
            f"relation.local.window={shape.window}",
            f"relation.global.block_size={shape.block}",
            f"relation.global.summaries_per_block={shape.per_block}",
        ]
    )
    part |= {
        "kernel": kernel,
        "length": length,
        "d_model": d_model,
        "ffn_hidden": hidden,
        "heads": [shape.heads, shape.kv_heads],
    }
    device = start_distributed()
    try:
        engine = MegatronEngine(cfg, device)
        layer = engine.model.decoder.layers[0]
        angles = engine.model.rotary_pos_emb(length)
        records = sample_of(length).to(bench.device)
        x = torch.randn(length, 1, d_model, device=bench.device, dtype=bench.dtype, requires_grad=True)
        part["ours"] = timed(bench, layer, x, records, angles)
        layer.self_attention.core_attention = DenseFlash(kernel)
        part["dense"] = timed(bench, layer, x, records, angles)
    finally:
        stop_distributed()
    for way in ("forward_ms", "both_ms"):
        part[way.replace("_ms", "_speed_up")] = part["dense"][way] / part["ours"][way]


def timed(bench: Bench, layer: Any, x: Tensor, records: Tensor, angles: Tensor) -> dict[str, float | None]:
    """Median times of a layer. Gradients are asked for directly, past the data-parallel hooks."""
    inputs = [x, *layer.parameters()]
    gradient = torch.randn_like(x)

    def forward() -> Tensor:
        out: Tensor = layer(x, attention_mask=records, rotary_pos_emb=angles)[0]
        return out

    def both() -> object:
        return torch.autograd.grad(forward(), inputs, gradient)

    calls: dict[str, Callable[[], object]] = {"forward_ms": forward, "both_ms": both}
    return {name: bench.median_ms(call) for name, call in calls.items()} | {"peak_mib": bench.peak_mib(both)}
