"""Block-sparse attention on the CPU: one autograd function whose cost follows the visited pairs, both ways.

Each visit of the plan's layout is one call of a fused kernel over a few contiguous key ranges. Several visits serve one
query row; the forward pass merges their results by log-sum-exp. The backward pass needs no merging: with the *joint*
output and log-sum-exp, exp(score - lse) is the joint softmax weight, so the visits' gradients simply add up.

A loop of ordinary attention calls over slices would be exact too, but autograd would give every slice a full-length
gradient: quadratic again. Query heads that share a key head are folded into rows, so keys are never repeated.

Two kernels: ATen's fused CPU flash attention (a private op, probed) and plain matrix products. Which one runs is
decided once, when the backend is registered, and shown by ``backends.describe()``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from refractor_megatron.distinction.intervals import IntArray
from refractor_megatron.distinction.rules import BoolTable
from refractor_megatron.fabric.backends.interface import Attention, AttentionInputs
from refractor_megatron.fabric.layout import Layout, Visit
from refractor_megatron.fabric.plan import MaskPlan

#: (q, k, v, bias | None, scale) -> (out, log-sum-exp); q [n, h_kv, rows, d], k, v [n, h_kv, keys, d].
ForwardKernel = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, float], tuple[torch.Tensor, torch.Tensor]
]
#: (grad_out, q, k, v, out, log-sum-exp, bias | None, scale) -> (grad_q, grad_k, grad_v)
BackwardKernel = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Kernel:
    """A fused attention call and its backward. Rows whose bias is -inf everywhere give zeros and zero gradients."""

    name: str
    forward: ForwardKernel
    backward: BackwardKernel


def _aten() -> Any:
    return torch.ops.aten


def flash_kernel() -> Kernel | None:
    """ATen's CPU flash attention, or None when this torch does not have the private op or its arguments changed."""
    aten = _aten()
    forward = getattr(aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    backward = getattr(aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
    wanted = {"attn_mask", "scale"}
    for op in (forward, backward):
        if op is None or not wanted <= {argument.name for argument in op.default._schema.arguments}:
            return None
    assert forward is not None and backward is not None
    forward_op, backward_op = forward.default, backward.default

    def run(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = forward_op(q, k, v, 0.0, False, attn_mask=bias, scale=scale)
        return out, lse

    def run_backward(
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        bias: torch.Tensor | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dq, dk, dv = backward_op(grad, q, k, v, out, lse, 0.0, False, attn_mask=bias, scale=scale)
        return dq, dk, dv

    return Kernel("ATen CPU flash attention", run, run_backward)


def matmul_kernel() -> Kernel:
    """The same function in matrix products; scores in float32 or wider, recomputed in the backward pass."""

    def scores(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, scale: float) -> torch.Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        s = (q @ k.transpose(-1, -2)).to(wide) * scale
        return s if bias is None else s + bias.to(wide)

    def run(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        s = scores(q, k, bias, scale)
        lse = torch.logsumexp(s, dim=-1)
        lse = lse.masked_fill(lse == float("-inf"), 0.0)
        return torch.exp(s - lse[..., None]).to(v.dtype) @ v, lse

    def run_backward(
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        bias: torch.Tensor | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weights = torch.exp(scores(q, k, bias, scale) - lse[..., None])
        delta = (grad * out).to(weights.dtype).sum(-1, keepdim=True)
        ds = (weights * ((grad @ v.transpose(-1, -2)).to(weights.dtype) - delta) * scale).to(q.dtype)
        return ds @ k, ds.transpose(-1, -2) @ q, weights.to(grad.dtype).transpose(-1, -2) @ grad

    return Kernel("matrix products", run, run_backward)


def _forward(x: AttentionInputs, layout: Layout, scale: float, kernel: Kernel) -> tuple[torch.Tensor, torch.Tensor]:
    """-> out [b, h, rows, d] in the dtype of q, log-sum-exp [b, h, rows] in float32 or wider, -inf without keys."""
    q, k, v, k_far, v_far = x
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    out = _rows_like(q, wide, layout)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=wide)
    for visit in layout.visits:
        o, total = kernel.forward(
            _fold(q, visit, group),
            _gather(k, k_far, visit),
            _gather(v, v_far, visit),
            _bias(layout, visit, q.dtype, group),
            scale,
        )
        idle = None if visit.mask is None else visit.mask.idle
        if idle is not None:
            total = total.masked_fill(idle.repeat(1, 1, group), float("-inf"))
        _merge(out, lse, o, total, visit, group)
    return out.to(q.dtype), lse


def _merge(
    out: torch.Tensor, lse: torch.Tensor, o: torch.Tensor, total: torch.Tensor, visit: Visit, group: int
) -> None:
    """Takes the visit's result into the softmax of its rows, in place; a row's first visit is a plain write."""
    shape = (o.shape[0], out.shape[1], visit.last - visit.first)
    o, total = o.reshape(*shape, o.shape[-1]), total.reshape(shape)
    if not visit.opens:
        # Every row of such a visit has keys here, so the joint sum is finite.
        before = _rows(lse, visit)
        joint = torch.logaddexp(before, total)
        o = (_rows(out, visit) * (before - joint).exp_()[..., None]).addcmul_(o, (total - joint).exp_()[..., None])
        total = joint
    _rows(out, visit).copy_(o)
    _rows(lse, visit).copy_(total)


class _BlockSparse(torch.autograd.Function):
    """All visits of a plan as one node of the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_far: torch.Tensor | None,
        v_far: torch.Tensor | None,
        layout: Layout,
        scale: float,
        kernel: Kernel,
    ) -> torch.Tensor:
        far = (None if x is None else _dense_rows(x) for x in (k_far, v_far))
        inputs = AttentionInputs(_dense_rows(q), _dense_rows(k), _dense_rows(v), *far)
        out, lse = _forward(inputs, layout, scale, kernel)
        # A row without keys: scores of -inf less any finite number give weights of zero.
        lse.masked_fill_(lse == float("-inf"), 0.0)
        ctx.save_for_backward(*inputs, out, lse)
        ctx.layout, ctx.scale, ctx.kernel = layout, scale, kernel
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, k_far, v_far, out, lse = ctx.saved_tensors
        layout: Layout = ctx.layout
        group = q.shape[1] // k.shape[1]
        grad = _dense_rows(grad)
        # Half precision runs its backward in float32: many visits add to one key, and small parts would be lost; the
        # fused op is also three times faster there on these block sizes.
        wide = torch.promote_types(q.dtype, torch.float32)
        dq = _rows_like(q, wide, layout)
        dk, dv, dk_far, dv_far = (None if x is None else torch.zeros_like(x, dtype=wide) for x in (k, v, k_far, v_far))
        for visit in layout.visits:
            a, b, c = ctx.kernel.backward(
                _fold(grad, visit, group).to(wide),
                _fold(q, visit, group).to(wide),
                _gather(k, k_far, visit).to(wide),
                _gather(v, v_far, visit).to(wide),
                _fold(out, visit, group).to(wide),
                _fold(lse[..., None], visit, group)[..., 0],
                _bias(layout, visit, wide, group),
                ctx.scale,
            )
            a = a.reshape(-1, q.shape[1], visit.last - visit.first, q.shape[3])
            _rows(dq, visit).copy_(a) if visit.opens else _rows(dq, visit).add_(a)
            _add_keys(dk, dk_far, b, visit)
            _add_keys(dv, dv_far, c, visit)
        narrow = (None if x is None else x.to(q.dtype) for x in (dq, dk, dv, dk_far, dv_far))
        return (*narrow, None, None, None)


def _dense_rows(x: torch.Tensor) -> torch.Tensor:
    """The fused kernels read whole rows: the last dimension must be contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows_like(q: torch.Tensor, dtype: torch.dtype, layout: Layout) -> torch.Tensor:
    """Memory for a result of every row, zeros where some row has no visit to write it."""
    return (torch.empty_like if layout.every_row_visited else torch.zeros_like)(q, dtype=dtype)


def _rows(x: torch.Tensor, visit: Visit) -> torch.Tensor:
    """View of the visit's rows of [b, h, rows, ...]."""
    return x[slice(*visit.samples), :, visit.first : visit.last]


def _fold(x: torch.Tensor, visit: Visit, group: int) -> torch.Tensor:
    """[b, h, rows, d] -> the visit's rows as [n, h / group, group * count, d]."""
    rows = _rows(x, visit)
    n, heads, count, d = rows.shape
    return rows.reshape(n, heads // group, group * count, d)


def _gather(tokens: torch.Tensor, far: torch.Tensor | None, visit: Visit) -> torch.Tensor:
    """The visited keys [n, h_kv, keys, d], in the order far, tokens; a view where one range is enough."""
    samples = slice(*visit.samples)
    parts = []
    if visit.far:
        assert far is not None
        parts = [far[samples, :, lo:hi] for lo, hi in visit.far]
    parts += [tokens[samples, :, lo:hi] for lo, hi in visit.tokens]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _add_keys(tokens: torch.Tensor | None, far: torch.Tensor | None, grad: torch.Tensor, visit: Visit) -> None:
    """Inverse of ``_gather`` for gradients: adds into the full-length accumulators."""
    at = 0
    for target, ranges in ((far, visit.far), (tokens, visit.tokens)):
        for lo, hi in ranges:
            assert target is not None
            target[slice(*visit.samples), :, lo:hi].add_(grad[:, :, at : at + hi - lo])
            at += hi - lo


def _bias(layout: Layout, visit: Visit, dtype: torch.dtype, group: int) -> torch.Tensor | None:
    if visit.mask is None:
        return None
    return layout.bias(visit.mask, dtype, group).expand(visit.samples[1] - visit.samples[0], -1, -1, -1)


def blocksparse_attention(kernel: Kernel) -> Attention:
    """The backend function over the given kernel."""

    def attention(x: AttentionInputs, plan: MaskPlan, scale: float) -> torch.Tensor:
        out: torch.Tensor = _BlockSparse.apply(*x, plan.layout, scale, kernel)  # type: ignore[no-untyped-call]
        return out

    return attention


def blocksparse_pairs(plan: MaskPlan, device: torch.device) -> int:
    """``Backend.visited_pairs``: those of the layout's visits."""
    return plan.layout.visited_pairs


def blocksparse_edges(plan: MaskPlan, sample: int, rows: IntArray, device: torch.device) -> BoolTable:
    """``Backend.executed``: read back from the layout's visits."""
    return plan.layout.edges(sample, rows)
