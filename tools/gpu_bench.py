"""What the attention checks share: device, clock, budget of seconds, result, and the tensors they run on."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refractor_megatron.distinction.generators import plain_records
from refractor_megatron.distinction.pattern import LocalPattern
from refractor_megatron.fabric.backends.interface import AttentionInputs
from refractor_megatron.fabric.plan import MaskPlan
from refractor_megatron.fabric.spec import MaskSpec, RetrievedSpec, SummarySpec

#: Tokens that retrieve together.
CHUNK = 128


@dataclass(frozen=True)
class Shape:
    """Heads, and the pattern: ``window`` tokens, ``per_block`` summaries for each ``block``, ``fan_in`` records."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int
    block: int
    per_block: int
    fan_in: int

    def spec(self, retrieved: bool) -> MaskSpec:
        """Window and summaries; with ``retrieved`` also records."""
        tier_c = RetrievedSpec(CHUNK, self.fan_in) if retrieved else None
        return MaskSpec(LocalPattern(window=self.window), SummarySpec(self.block, self.per_block), tier_c)


@dataclass
class Bench:
    """A device with its clock. ``repeats``: most timed calls; ``deadline``: of ``time.monotonic``; ``out``: folder."""

    device: torch.device
    dtype: torch.dtype
    repeats: int
    deadline: float
    out: Path | None
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        """Whether flex has a backward pass here, and the clock is the device's."""
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds left for measurements."""
        return self.deadline - time.monotonic()

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object]) -> float:
        """Wall-clock time of one call."""
        self.synchronise()
        started = time.perf_counter()
        run()
        self.synchronise()
        return time.perf_counter() - started

    def median_ms(self, run: Callable[[], object]) -> float:
        """Median time of ``run`` after two warm-up calls; what takes long is repeated three times only."""
        run()
        typical = self.seconds(run)
        repeats = max(3, min(self.repeats, int(2.0 / max(typical, 1e-6))))
        times = sorted(self._once(run) for _ in range(repeats))
        return times[len(times) // 2]

    def _once(self, run: Callable[[], object]) -> float:
        if not self.on_gpu:
            return self.seconds(run) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    def peak_mib(self, run: Callable[[], object]) -> float | None:
        """Memory that ``run`` needs beyond what is held before it; None where nobody counts it."""
        if not self.on_gpu:
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

    def section(self, name: str, work: Callable[[dict[str, Any]], None], needs_s: float = 0.0) -> None:
        """A named part of the result, filled by ``work``; a failure is part of it, and so is that no time was left."""
        part: dict[str, Any] = self.result.setdefault(name, {})
        started, left = time.monotonic(), max(0.0, self.left())
        try:
            if left < needs_s:
                part["error"] = f"{left:.0f} s left, {needs_s:.0f} s needed"
            else:
                work(part)
        except Exception as error:  # the other sections still measure; the check as a whole then fails
            part["error"] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        part["seconds"] = round(time.monotonic() - started, 1)
        print(f"{name}: {part.get('error', 'done')} ({part['seconds']} s)", file=sys.stderr, flush=True)
        self.save()


def sample_of(length: int, fan_in: int = 0, documents: int = 1, seed: int = 0) -> Tensor:
    """Plain records int32 [1, L, 4 + fan_in] of ``documents`` documents of random lengths."""
    cuts = np.sort(np.random.default_rng(seed).choice(np.arange(1, length), documents - 1, replace=False))
    return torch.from_numpy(plain_records(length, fan_in, np.diff([0, *cuts, length]).tolist()))[None]


def inputs_of(bench: Bench, shape: Shape, plan: MaskPlan, dtype: torch.dtype) -> AttentionInputs:
    """Normal leaves for a plan, in the memory order that Megatron has, [s, b, h, d]."""
    far = (shape.kv_heads, plan.n_far)
    generator = torch.Generator(bench.device).manual_seed(0)
    made: list[Any] = []
    for heads, length in ((shape.heads, plan.length), *[(shape.kv_heads, plan.n_tokens)] * 2, far, far):
        memory = (length, len(plan.samples), heads, shape.head_dim)
        x = torch.randn(memory, generator=generator, device=bench.device).to(dtype).permute(1, 2, 0, 3)
        made.append(x.requires_grad_(bench.on_gpu) if length else None)
    return AttentionInputs(*made)


def given(inputs: AttentionInputs) -> list[Tensor]:
    """The tensors that are there."""
    return [x for x in inputs if x is not None]


def both_ways(bench: Bench, attention: Callable[[], Tensor], inputs: AttentionInputs) -> dict[str, float | None]:
    """Median times of the forward pass, as training runs it, and of forward and backward; milliseconds."""
    gradient = torch.randn_like(inputs.q)

    def both() -> object:
        return torch.autograd.grad(attention(), given(inputs), gradient)

    return {
        "forward_ms": bench.median_ms(attention),
        "both_ms": bench.median_ms(both) if bench.on_gpu else None,
        "peak_mib": bench.peak_mib(both),
    }
