"""Block-sparse attention on the CPU: one autograd function whose cost follows the visited pairs, both ways.

Each visit of the plan is one call of a fused kernel over a few contiguous key ranges. A loop of ordinary attention
calls over slices would be exact too, but autograd would give every slice a full-length gradient: quadratic again.
Query heads that share a key head are folded into rows, so keys are never repeated.

Two kernels: ATen's fused CPU flash attention (a private op, probed) and plain matrix products. Which one runs is
decided once, when the backend is registered, and shown by ``backends.describe()``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from refractor_megatron.fabric.backends.interface import Attention
from refractor_megatron.fabric.layout import Visit
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


class _BlockSparse(torch.autograd.Function):
    """All visits of a plan as one node of the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_s: torch.Tensor | None,
        v_s: torch.Tensor | None,
        plan: MaskPlan,
        scale: float,
        kernel: Kernel,
    ) -> torch.Tensor:
        layout = plan.layout
        group = q.shape[1] // k.shape[1]
        q, k, v = _dense_rows(q), _dense_rows(k), _dense_rows(v)
        k_s, v_s = (None if x is None else _dense_rows(x) for x in (k_s, v_s))
        out = torch.zeros_like(q) if layout.fully_masked_rows else torch.empty_like(q)
        lse = []
        for i, visit in enumerate(layout.visits):
            o, total = kernel.forward(
                _fold(q, visit, group),
                _gather(k, k_s, visit),
                _gather(v, v_s, visit),
                _expanded(layout.bias(i, q.dtype, group), visit, layout.batch),
                scale,
            )
            _scatter_rows(out, o, visit, group)
            lse.append(total)
        ctx.save_for_backward(q, k, v, k_s, v_s, out, *lse)
        ctx.plan, ctx.scale, ctx.kernel = plan, scale, kernel
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, k_s, v_s, out, *lse = ctx.saved_tensors
        layout = ctx.plan.layout
        group = q.shape[1] // k.shape[1]
        dq = torch.zeros_like(q) if layout.fully_masked_rows else torch.empty_like(q)
        # Half precision runs its backward in float32: many visits add to one key, and small parts would be lost; the
        # fused op is also three times faster there on these block sizes.
        wide = torch.promote_types(q.dtype, torch.float32)
        dk, dv, dk_s, dv_s = (None if x is None else torch.zeros_like(x, dtype=wide) for x in (k, v, k_s, v_s))
        for i, visit in enumerate(layout.visits):
            a, b, c = ctx.kernel.backward(
                _fold(grad, visit, group).to(wide),
                _fold(q, visit, group).to(wide),
                _gather(k, k_s, visit).to(wide),
                _gather(v, v_s, visit).to(wide),
                _fold(out, visit, group).to(wide),
                lse[i],
                _expanded(layout.bias(i, wide, group), visit, layout.batch),
                ctx.scale,
            )
            _scatter_rows(dq, a, visit, group)
            _add_keys(dk, dk_s, b, visit)
            _add_keys(dv, dv_s, c, visit)
        narrow = (None if x is None else x.to(q.dtype) for x in (dk, dv, dk_s, dv_s))
        return (dq, *narrow, None, None, None)


def _dense_rows(x: torch.Tensor) -> torch.Tensor:
    """The fused kernels read whole rows: the last dimension must be contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _fold(x: torch.Tensor, visit: Visit, group: int) -> torch.Tensor:
    """[b, h, L, d] -> the visit's rows as [n, h / group, group * rows, d]."""
    rows = x[:, :, visit.first : visit.last]
    if visit.samples is not None:
        rows = rows[list(visit.samples)]
    n, heads, count, d = rows.shape
    return rows.reshape(n, heads // group, group * count, d)


def _scatter_rows(x: torch.Tensor, rows: torch.Tensor, visit: Visit, group: int) -> None:
    """Inverse of ``_fold``: writes the visit's rows into [b, h, L, d]."""
    n, heads, _, d = rows.shape
    count = visit.last - visit.first
    shaped = rows.view(n, heads, group, count, d)
    target = x[:, :, visit.first : visit.last].view(x.shape[0], heads, group, count, d)
    if visit.samples is None:
        target.copy_(shaped)
    else:
        target[list(visit.samples)] = shaped.to(x.dtype)


def _gather(tokens: torch.Tensor, summaries: torch.Tensor | None, visit: Visit) -> torch.Tensor:
    """The visited keys [n, h_kv, keys, d], in the order summaries, tokens; a view where one range is enough."""
    parts = []
    if visit.summaries:
        assert summaries is not None
        parts = [summaries[:, :, lo:hi] for lo, hi in visit.summaries]
    parts += [tokens[:, :, lo:hi] for lo, hi in visit.tokens]
    if visit.samples is not None:
        parts = [part[list(visit.samples)] for part in parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _add_keys(tokens: torch.Tensor | None, summaries: torch.Tensor | None, grad: torch.Tensor, visit: Visit) -> None:
    """Inverse of ``_gather`` for gradients: adds into the full-length accumulators."""
    at = 0
    for target, ranges in ((summaries, visit.summaries), (tokens, visit.tokens)):
        for lo, hi in ranges:
            assert target is not None
            part = grad[:, :, at : at + hi - lo]
            at += hi - lo
            if visit.samples is None:
                target[:, :, lo:hi] += part
            else:
                target[list(visit.samples), :, lo:hi] += part


def _expanded(bias: torch.Tensor | None, visit: Visit, batch: int) -> torch.Tensor | None:
    n = visit.size(batch)
    return bias if bias is None or bias.shape[0] == n else bias.expand(n, -1, -1, -1)


def blocksparse_attention(kernel: Kernel) -> Attention:
    """The backend function over the given kernel."""

    def attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_s: torch.Tensor | None,
        v_s: torch.Tensor | None,
        plan: MaskPlan,
        scale: float,
    ) -> torch.Tensor:
        out: torch.Tensor = _BlockSparse.apply(q, k, v, k_s, v_s, plan, scale, kernel)  # type: ignore[no-untyped-call]
        return out

    return attention
