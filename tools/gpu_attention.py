"""The attention part of ``gpu_check.py``: parity, speed beside dense flash, a whole layer, and a diagnosis.

Every section leaves its result in one dictionary, which is written after each of them, so that a call cut short keeps
what it measured. A section that fails leaves its error there, and the check then fails.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gpu_report
import numpy as np
import torch
from torch import Tensor

from refractor_megatron.distinction.generators import random_records, random_rules
from refractor_megatron.distinction.pattern import LocalPattern
from refractor_megatron.distinction.roles import DOCUMENT_ROLE, ROLE_ID
from refractor_megatron.distinction.rules import CompiledRules, compile_rules
from refractor_megatron.fabric import attn_pool
from refractor_megatron.fabric.backends import describe
from refractor_megatron.fabric.backends.dense import dense_attention
from refractor_megatron.fabric.backends.flex import BLOCK, attend, flex_backend
from refractor_megatron.fabric.backends.flex_mask import FlexMask, flex_mask
from refractor_megatron.fabric.backends.selftest import TOLERANCE
from refractor_megatron.fabric.plan import MaskPlan, clear_plans, plan_for
from refractor_megatron.fabric.spec import MaskSpec, RetrievedSpec, SummarySpec

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("q", "k", "v", "k_far", "v_far")
PLAIN = compile_rules([])


@dataclass(frozen=True)
class Shape:
    """What is measured. ``fan_in`` retrieved records a chunk of 128 tokens in the pattern that has them."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    window: int = 512
    block: int = 128
    per_block: int = 2
    fan_in: int = 8

    def spec(self, retrieved: bool = False) -> MaskSpec:
        """Window and summaries; with ``retrieved`` also records."""
        summary = SummarySpec(self.block, self.per_block)
        return MaskSpec(LocalPattern(window=self.window), summary, RetrievedSpec(128, self.fan_in) if retrieved else None)


@dataclass
class Bench:
    """Device, budget of seconds, repeats, and the clock. ``trains``: whether flex has a backward pass here."""

    device: torch.device
    dtype: torch.dtype
    repeats: int
    deadline: float
    out: Path | None
    result: dict[str, Any]

    @property
    def trains(self) -> bool:
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds left for measurements."""
        return self.deadline - time.monotonic()

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.trains:
            torch.cuda.synchronize()

    def median_ms(self, run: Callable[[], object]) -> float:
        """Median time of ``run`` after two warm-up calls; fewer repeats of what takes long."""
        run()
        self.synchronise()
        started = time.monotonic()
        run()
        self.synchronise()
        repeats = max(3, min(self.repeats, int(4.0 / max(time.monotonic() - started, 1e-6))))
        times = sorted(self._once(run) for _ in range(repeats))
        return times[len(times) // 2]

    def _once(self, run: Callable[[], object]) -> float:
        if not self.trains:
            started = time.perf_counter()
            run()
            return (time.perf_counter() - started) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    def peak_mib(self, run: Callable[[], object]) -> float | None:
        """Memory that ``run`` needs beyond what is held before it."""
        if not self.trains:
            return None
        self.synchronise()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.synchronise()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def save(self) -> None:
        """Write what there is by now."""
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "gpu_attention.json").write_text(json.dumps(self.result, indent=1) + "\n")

    @contextmanager
    def section(self, name: str) -> Iterator[dict[str, Any]]:
        """A named part of the result; its failure is part of the result too."""
        part: dict[str, Any] = self.result.setdefault(name, {})
        started = time.monotonic()
        try:
            yield part
        except Exception as error:  # other sections still measure; ``run`` fails in the end
            part["error"] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        part["seconds"] = round(time.monotonic() - started, 1)
        print(f"{name}: {part['seconds']} s, {self.left():.0f} s left", file=sys.stderr, flush=True)
        self.save()


def records_of(length: int, shape: Shape, documents: int = 1, seed: int = 0, fan_in: int = 0) -> Tensor:
    """Plain records int32 [1, L, 4 + fan_in] of ``documents`` documents; each chunk but the first reads ``fan_in``."""
    records = torch.zeros(1, length, 4 + fan_in, dtype=torch.int32)
    records[..., 2] = ROLE_ID[DOCUMENT_ROLE]
    cuts = np.sort(np.random.default_rng(seed).choice(np.arange(1, length), documents - 1, replace=False))
    for cut in cuts:
        records[:, cut:, 0] += 1
    if fan_in:
        records[..., 4:] = torch.arange(fan_in)
        records[:, :128, 4:] = -1
    return records


def leaves_of(bench: Bench, shape: Shape, plan: MaskPlan, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """q, k, v and, where the plan has far keys, theirs; as Megatron lays them out in memory, [s, b, h, d]."""
    sizes = [(shape.heads, plan.length), *[(shape.kv_heads, plan.n_tokens)] * 2, *[(shape.kv_heads, plan.n_far)] * 2]
    generator = torch.Generator(bench.device).manual_seed(seed)
    leaves = []
    for heads, length in sizes if plan.n_far else sizes[:3]:
        memory = (length, len(plan.samples), heads, shape.head_dim)
        x = torch.randn(memory, generator=generator, device=bench.device, dtype=torch.float32).to(dtype)
        leaves.append(x.permute(1, 2, 0, 3).requires_grad_(bench.trains))
    return leaves


def forward_backward(attention: Callable[..., Tensor], leaves: list[Tensor]) -> tuple[Callable[[], Any], ...]:
    """(forward, forward and backward) as functions without arguments."""
    with torch.no_grad():
        gradient = torch.randn_like(attention(*leaves))

    def both() -> Any:
        return torch.autograd.grad(attention(*leaves), leaves, gradient)

    return (lambda: attention(*leaves)), both


# ------------------------------------------------------------------------------------------------------------- parity


def parity_cases(shape: Shape) -> dict[str, tuple[Tensor, CompiledRules, MaskSpec, Any]]:
    """Masks of every kind, two samples each: (records, rules, spec, policies)."""
    rng = np.random.default_rng(0)
    local = LocalPattern(window=300)
    packed = torch.cat([records_of(2048, shape, 5, seed, fan_in=4) for seed in (1, 2)])
    random = torch.from_numpy(np.stack([random_records(rng, 1900) for _ in range(2)]))
    rules = compile_rules(random_rules(rng, most=3))
    two_levels = MaskSpec(local, SummarySpec(32, 2, levels=2, fanout=4), RetrievedSpec(64, 4))
    single_tokens = MaskSpec(LocalPattern("dilated", window=300, dilation=3, unit=1), SummarySpec(32, 1))
    return {
        "packed documents, two levels, retrieved": (packed, PLAIN, two_levels, np.full(4, 3, dtype=np.uint8)),
        "random rules, rows without keys": (random, rules, MaskSpec(local, SummarySpec(32, 2)), None),
        "dilation by single tokens (bit tiles)": (random[:, :1500].contiguous(), PLAIN, single_tokens, None),
    }


def parity(bench: Bench, shape: Shape, part: dict[str, Any]) -> None:
    """Flex against the oracle in float64: output and, where flex trains, all gradients."""
    narrow = Shape(heads=8, kv_heads=2, head_dim=min(64, shape.head_dim))
    rows = part["rows"] = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, (records, rules, spec, policies) in parity_cases(narrow).items():
            plan = plan_for(records, rules, spec, policies=policies)
            leaves = leaves_of(bench, narrow, plan, dtype)
            found, oracle = [], []
            for attention, inputs, results in (
                (flex_backend(), leaves, found),
                (dense_attention, [x.detach().double().requires_grad_(bench.trains) for x in leaves], oracle),
            ):
                given = [*inputs, *[None] * (5 - len(inputs))]
                out = attention(*given, plan, 0.125)
                results.append(out.detach())
                if bench.trains:
                    generator = torch.Generator(bench.device).manual_seed(9)
                    gradient = torch.randn(out.shape, generator=generator, device=bench.device)
                    results += torch.autograd.grad(out, inputs, gradient.to(dtype).to(out.dtype))
            errors = {
                label: float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30))
                for label, a, b in zip(("output", *(f"grad {n}" for n in NAMES)), found, oracle, strict=False)
            }
            dead = ~plan.dense(bench.device).any(-1)[:, None].expand(found[0].shape[:3])
            rows.append(
                {
                    "mask": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "tables": list(flex_mask(plan, bench.device, BLOCK).shape_class[:2]),
                    "rows_without_keys": int(dead[:, 0].sum()),
                    "their_outputs_are_zero": not bool(found[0][dead].any()),
                    "errors": errors,
                    "tolerance": TOLERANCE[dtype],
                    "holds": all(error <= TOLERANCE[dtype] for error in errors.values()),
                }
            )
    part["holds"] = all(row["holds"] and row["their_outputs_are_zero"] for row in rows)


# ---------------------------------------------------------------------------------------------------------- benchmark


def dense_flash(bench: Bench, leaves: list[Tensor]) -> dict[str, Any]:
    """Forward and forward-and-backward of dense causal attention, by each fused kernel of this device.

    A kernel that does not take grouped heads gets keys and values repeated beforehand, outside the clock.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = [SDPBackend.FLASH_ATTENTION, *([SDPBackend.CUDNN_ATTENTION] if bench.trains else [])]
    found: dict[str, Any] = {}
    q, k, v = (x.detach().requires_grad_(bench.trains) for x in leaves[:3])
    for kernel in kernels:
        for repeated in (False, True):
            inputs = [q, k, v]
            if repeated:
                inputs[1:] = [
                    x.detach().repeat_interleave(q.shape[1] // x.shape[1], 1).requires_grad_(bench.trains) for x in (k, v)
                ]

            def attention(q: Tensor, k: Tensor, v: Tensor, kernel: Any = kernel, gqa: bool = not repeated) -> Tensor:
                with sdpa_kernel(kernel):
                    out: Tensor = torch.nn.functional.scaled_dot_product_attention(
                        q, k, v, is_causal=True, enable_gqa=gqa
                    )
                return out

            try:
                forward, both = forward_backward(attention, inputs)
                found[kernel.name] = {
                    "forward_ms": bench.median_ms(forward),
                    "both_ms": bench.median_ms(both) if bench.trains else None,
                    "heads_repeated": repeated,
                }
                break
            except RuntimeError as error:  # this kernel does not take these inputs
                found[kernel.name] = {"refused": str(error).splitlines()[0]}
    return found


def fastest(kernels: dict[str, Any], key: str) -> tuple[str, float]:
    """(kernel, milliseconds) of the fastest one."""
    times = {name: found[key] for name, found in kernels.items() if found.get(key)}
    assert times, f"no dense flash kernel ran here: {kernels}"
    best = min(times, key=lambda name: times[name])
    return best, times[best]


def benchmark(bench: Bench, shape: Shape, length: int, retrieved: bool) -> dict[str, Any]:
    """One length: times, visited share, preparation, memory, compilations when masks change."""
    from torch._dynamo.utils import counters

    def graphs() -> int:
        return int(counters["stats"]["unique_graphs"])

    spec, fan_in = shape.spec(retrieved), shape.fan_in if retrieved else 0
    policies = np.full(shape.fan_in, 3, dtype=np.uint8) if retrieved else None
    clear_plans()
    records = records_of(length, shape, fan_in=fan_in)
    started = time.perf_counter()
    plan = plan_for(records, PLAIN, spec, policies=policies)
    planned = time.perf_counter()
    mask = flex_mask(plan, bench.device, BLOCK)
    bench.synchronise()
    lowered = time.perf_counter()
    leaves = leaves_of(bench, shape, plan, bench.dtype)
    scale = shape.head_dim**-0.5
    forward, both = forward_backward(lambda *x: attend(*x, mask=mask, scale=scale), leaves)
    before, started = graphs(), time.perf_counter()
    (both if bench.trains else forward)()
    bench.synchronise()
    row: dict[str, Any] = {
        "length": length,
        "retrieved": retrieved,
        "plan_ms": (planned - started_at) * 1e3 if (started_at := planned - (planned - started)) else None,
        "lowering_ms": (lowered - planned) * 1e3,
        "compile_s": time.perf_counter() - started,
    }
    return row
