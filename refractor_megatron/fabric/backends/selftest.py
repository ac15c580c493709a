"""A backend proves itself against the dense oracle on a 256-token probe before its first use."""

from __future__ import annotations

import numpy as np
import torch

from refractor_megatron.distinction.pattern import LocalPattern
from refractor_megatron.distinction.rules import compile_rules
from refractor_megatron.errors import CapabilityError
from refractor_megatron.fabric.backends.dense import dense_attention
from refractor_megatron.fabric.backends.interface import Attention, AttentionInputs
from refractor_megatron.fabric.plan import MaskPlan, plan_for
from refractor_megatron.fabric.spec import MaskSpec, RetrievedSpec, SummarySpec

#: Largest allowed error relative to the largest value, per dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}

_LENGTH, _FAN_IN, _WIDTH = 256, 2, 16
#: The window is wide enough for neighbouring query blocks to share unmasked keys: their visits must merge correctly.
_SPEC = MaskSpec(LocalPattern(window=127), SummarySpec(16, 2, levels=2, fanout=3), RetrievedSpec(32, _FAN_IN))
_POLICIES = np.array([3, 1], dtype=np.uint8)


def prove(
    name: str,
    attention: Attention,
    device: torch.device,
    dtype: torch.dtype,
    gqa: bool,
    backward: bool = True,
    way_out: str = "use another torch or device",
) -> dict[str, float]:
    """Compares outputs and, with ``backward``, all gradients: two samples, documents, a scope rule, summaries of two
    levels, retrieved records, GQA and rows without keys.

    The reference runs in float64. -> the largest error of each tensor, relative to its largest value. Errors:
    ``CapabilityError`` with the tensor that differs, by how much, and ``way_out``.
    """
    plan = _probe_plan(device)
    wide = torch.float64
    inputs = [x.to(device=device, dtype=dtype) for x in _probe_inputs(plan.n_far, 2 if gqa else 1)]
    grad = _normal(9, tuple(inputs[0].shape)).to(device=device, dtype=dtype)
    ours = _run(attention, inputs, grad if backward else None, plan)
    reference = _run(dense_attention, [x.to(wide) for x in inputs], grad.to(wide) if backward else None, plan)
    labels = ("output", "grad q", "grad k", "grad v", "grad k_far", "grad v_far")
    errors: dict[str, float] = {}
    for label, a, b in zip(labels[: len(ours)], ours, reference, strict=True):
        error = errors[label] = float((a.to(wide) - b).abs().max() / b.abs().max())
        if not error <= TOLERANCE[dtype]:
            raise CapabilityError(
                f"relation.backend {name} failed its self-test on {device.type} in {dtype}: {label} differs from the "
                f"dense oracle by {error:.1e} (allowed {TOLERANCE[dtype]:.0e}); {way_out}."
            )
    return errors


def _probe_plan(device: torch.device) -> MaskPlan:
    records = torch.zeros(2, _LENGTH, 4 + _FAN_IN, dtype=torch.int32)
    records[:, :, 4] = 1
    records[0, :, 5] = -1
    records[:, :, 2] = 1
    records[0, 40:, 0] = 1
    records[0, 150:170, 2] = 3
    records[0, 240:, 0] = -1
    records[1, 20:40, 3] = 8
    records[0, 128:, 0] = 2  # its second tile of 128 queries visits fewer tiles of keys than the other sample's
    rules = compile_rules(
        [
            {"name": "probe-safety", "when": {"bits": ["SAFETY_SCOPE"]}, "allow_write_to": []},
            {"name": "probe-tool", "when": {"role": "tool"}, "allow_write_to": ["user"]},
        ]
    )
    return plan_for(records.to(device), rules, _SPEC, policies=_POLICIES)


def _probe_inputs(n_far: int, group: int) -> list[torch.Tensor]:
    shapes = [(2, 2 * group, _LENGTH, _WIDTH)] + [(2, 2, _LENGTH, _WIDTH)] * 2 + [(2, 2, n_far, _WIDTH)] * 2
    return [_normal(seed, shape) for seed, shape in enumerate(shapes)]


def _normal(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Own generator: the probe must not move the training's random state."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _run(
    attention: Attention, inputs: list[torch.Tensor], grad: torch.Tensor | None, plan: MaskPlan
) -> list[torch.Tensor]:
    """-> the output, and the gradients of the inputs where ``grad``, that of the output, is given."""
    with torch.set_grad_enabled(grad is not None):
        leaves = [x.clone().requires_grad_(grad is not None) for x in inputs]
        out = attention(AttentionInputs(*leaves), plan, _WIDTH**-0.5)
        return [out.detach(), *(torch.autograd.grad(out, leaves, grad) if grad is not None else ())]
