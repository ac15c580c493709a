"""What MFU divides: the FLOPs of a training token, and the peak of this rank's device."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..distinction.generators import plain_records
from ..engines.megatron import MegatronEngine
from ..fabric.plan import plan_for
from ..telemetry import flops


def flops_per_token(engine: MegatronEngine) -> float:
    """Training FLOPs of a token of a plain document, counting only the pairs that the mask leaves.

    Retrieved records, at most fan_in keys a token, are left out. Linear attention counts as one key per feature: adding
    to a state and reading it costs what a score and a weighted value cost.
    """
    plan, length = engine.plan, engine.seq_len
    records = torch.from_numpy(plain_records(length))[None]
    pairs = 0
    for a in plan.attention:
        if a.linear is not None:
            pairs += length * (a.linear.features or a.head_dim)
        else:
            pairs += plan_for(records, engine.rules, replace(a.mask, retrieved=None)).stats.legal_edges
    head = plan.attention[0]
    return flops.train_flops_per_token(plan.active_parameters, pairs / length, head.heads, head.head_dim)


def peak_of(engine: MegatronEngine) -> flops.Peak:
    """Peak of this rank's device: from the data sheet, else measured with a matrix product."""
    dtype = torch.bfloat16 if engine.config.bf16 else torch.float32
    name = "bf16" if engine.config.bf16 else "fp32"
    if engine.device.type == "cuda":
        tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
        known = flops.known_peak(torch.cuda.get_device_name(), "tf32" if tf32 else name)
        if known is not None:
            return known
    n = 1024 if engine.device.type == "cpu" else 8192
    a = torch.ones(n, n, dtype=dtype, device=engine.device)

    def product() -> None:
        a @ a
        torch.cuda.synchronize()

    where = f"{torch.get_num_threads()} threads" if engine.device.type == "cpu" else torch.cuda.get_device_name()
    return flops.measure_peak(product, 2.0 * n**3, f"{name} GEMM, {where}")
