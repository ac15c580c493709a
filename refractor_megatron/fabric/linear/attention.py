"""Linear attention over a whole sequence: chunked form, and the masked quadratic form as its oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from refractor_megatron.distinction.lowerings import dense_legal
from refractor_megatron.fabric.linear.features import FeatureMap
from refractor_megatron.fabric.linear.plan import CHUNK, LinearPlan, Panel


def linear_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: LinearPlan, feature_map: FeatureMap
) -> torch.Tensor:
    """out[i] = sum of phi(q_i) . phi(k_j) v_j over the legal j <= i, divided by the sum of phi(q_i) . phi(k_j).

    q: [b, h, L, d]; k, v: [b, h_kv, L, d] with h % h_kv == 0 (query head i reads key head i // (h / h_kv)); returns
    [b, h, L, d]. Computed in float32 at least. Rows without a legal key (padding) are zero, and so are rows of which
    every key underflows (see ``PositiveRandomFeatures``). Time and memory are linear in L: each panel is recomputed in
    the backward pass, so that only the states between panels are kept. Differentiable in q, k and v.
    """
    _check(q, k, v, plan)
    sizes = [panel.tokens for panel in plan.panels]
    state = k.new_zeros(*k.shape[:2], 0, 0, dtype=_working_dtype(q))
    recompute = len(sizes) > 1 and torch.is_grad_enabled()
    outs = []
    # split, not slices: the gradient of a slice is a tensor of full length for every panel.
    parts = zip(*(torch.split(x, sizes, 2) for x in (q, k, v)), strict=True)
    for panel, (q_part, k_part, v_part) in zip(plan.panels, parts, strict=True):
        args = (state, q_part, k_part, v_part, panel, feature_map)
        if recompute:
            out, state = checkpoint(_attend_panel, *args, use_reentrant=False, preserve_rng_state=False)
        else:
            out, state = _attend_panel(*args)
        outs.append(out)
    return torch.cat(outs, dim=2)


def quadratic_linear_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: LinearPlan, feature_map: FeatureMap
) -> torch.Tensor:
    """The same attention as an L x L product with the dense mask: the oracle, for at most 2048 tokens."""
    _check(q, k, v, plan)
    group = q.shape[1] // k.shape[1]
    dtype = _working_dtype(q)
    fq = feature_map.query(torch.unflatten(q.to(dtype), 1, (k.shape[1], group)))
    fk = feature_map.key(k.to(dtype))
    legal = torch.stack([dense_legal(sample[:, :4], plan.rules) for sample in plan.records.to(q.device)])
    weights = (fq @ fk.transpose(-1, -2).unsqueeze(2)) * legal[:, None, None].to(dtype)
    out = normalised(weights @ with_ones(v.to(dtype)).unsqueeze(2))
    return out.flatten(1, 2).to(q.dtype)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: LinearPlan) -> None:
    b, heads, length, d = q.shape
    assert k.shape == v.shape and k.shape[0] == b and k.shape[2:] == (length, d), (tuple(q.shape), tuple(k.shape))
    assert heads % k.shape[1] == 0, f"{heads} query heads over {k.shape[1]} key heads"
    assert (b, length) == tuple(plan.records.shape[:2]), ((b, length), tuple(plan.records.shape))


def _working_dtype(q: torch.Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def with_ones(v: torch.Tensor) -> torch.Tensor:
    """[..., d] -> [..., d + 1]: the column of ones sums up the normaliser."""
    return torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)


def normalised(sums: torch.Tensor) -> torch.Tensor:
    """[..., d + 1] weighted sums of values and of ones -> [..., d] averages; zero where there is no weight.

    A weight that is not a number stays one: the step is skipped then, and nobody trains on a silent zero.
    """
    weight = sums[..., -1:]
    # Below this floor the reciprocal overflows in the backward pass.
    dead = weight <= torch.finfo(weight.dtype).tiny * 1e8
    return torch.where(dead, 0, sums[..., :-1]) / torch.where(dead, 1, weight)


def _attend_panel(
    state: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, panel: Panel, feature_map: FeatureMap
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries of one panel and the states behind it.

    state: [b, h_kv, G, m * (d + 1)] carried states; q [b, h, n, d]; k, v [b, h_kv, n, d]. Every choice of what a query
    reads is a product with a table of zeros and ones, and zero times any finite number adds nothing, not even rounding.
    """
    b, kv_heads, tokens, d = k.shape
    chunks, slots, group = panel.slot.shape[1], panel.within.shape[-1], q.shape[1] // kv_heads
    dtype = _working_dtype(q)
    missing = (0, 0, 0, chunks * CHUNK - tokens)
    q, k, v = (torch.unflatten(F.pad(x, missing), 2, (chunks, CHUNK)) for x in (q, k, v))
    # A chunk's queries of all heads that read one key head are rows of one matrix: [b, h_kv, K, group * C, d].
    q = torch.unflatten(q, 1, (kv_heads, group)).transpose(2, 3).flatten(3, 4)
    fq, fk, v1 = feature_map.query(q.to(dtype)), feature_map.key(k.to(dtype)), with_ones(v.to(dtype))

    member = (panel.slot.unsqueeze(-1) == torch.arange(slots, device=q.device)).to(dtype).unsqueeze(1)  # [b,1,K,C,U]
    sums = _by_slot(fk, member).transpose(-1, -2) @ v1  # [b, h_kv, K, U * m, d + 1]
    own = sums.reshape(b, kv_heads, chunks * slots, -1)
    reach = torch.cat([own, state], dim=2) if state.shape[2] else own
    read = (panel.reads.to(dtype).unsqueeze(1) @ reach).reshape(sums.shape)
    out = _by_slot(fq, member.repeat(1, 1, 1, group, 1)) @ read
    scores = torch.unflatten(fq @ fk.transpose(-1, -2), 3, (group, CHUNK))
    scores = scores * _within_chunk(panel).to(dtype)[:, None, :, None]
    out = normalised(out + scores.flatten(3, 4) @ v1)  # [b, h_kv, K, group * C, d]
    out = torch.unflatten(out, 3, (group, CHUNK)).transpose(2, 3).reshape(b, kv_heads * group, chunks * CHUNK, d)
    return out[:, :, :tokens].to(q.dtype), panel.carry.to(dtype).unsqueeze(1) @ reach


def _by_slot(features: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
    """Features [..., n, m] and membership [..., n, U] -> [..., n, U * m]: each token's features at its slot, else 0."""
    return (features.unsqueeze(-2) * member.unsqueeze(-1)).flatten(-2)


def _within_chunk(panel: Panel) -> torch.Tensor:
    """bool [b, K, C, C]: legal edges inside each chunk."""
    slots = panel.within.shape[-1]
    slot = panel.slot.clamp(min=0)
    pair = slot.unsqueeze(-1) * slots + slot.unsqueeze(-2)
    legal = panel.within.flatten(2).gather(2, pair.flatten(2)).reshape(pair.shape).tril()
    real = panel.slot >= 0
    # A token reads itself, whatever its bucket may read.
    legal = legal | torch.eye(CHUNK, dtype=torch.bool, device=slot.device)
    return legal & real.unsqueeze(-1) & real.unsqueeze(-2)
