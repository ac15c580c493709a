"""The attention part of ``gpu_check.py``: parity, speed beside dense flash attention, a whole layer, a diagnosis."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import gpu_diagnosis
import gpu_layer
import gpu_report
import numpy as np
import torch
from gpu_bench import Bench, Shape, both_ways, given, inputs_of, sample_of
from torch import Tensor

from refractor_megatron.distinction.generators import random_records, random_rules
from refractor_megatron.distinction.pattern import LocalPattern
from refractor_megatron.distinction.rules import CompiledRules, compile_rules
from refractor_megatron.evaluation.bench_report import parse_lengths
from refractor_megatron.evaluation.evidence import commit, processor
from refractor_megatron.fabric.backends.dense import dense_attention
from refractor_megatron.fabric.backends.flex import BLOCK, flex_backend
from refractor_megatron.fabric.backends.flex_mask import flex_mask
from refractor_megatron.fabric.backends.interface import AttentionInputs
from refractor_megatron.fabric.backends.selftest import TOLERANCE
from refractor_megatron.fabric.plan import MaskPlan, clear_plans, plan_for
from refractor_megatron.fabric.spec import MaskSpec, RetrievedSpec, SummarySpec
from refractor_megatron.fabric.summaries import pool

PLAIN = compile_rules([])
#: A length is diagnosed when flex reaches less than this share of the speed that its visited area allows.
SHORT = 0.5
#: Tokens; the variants of a longer diagnosis would not fit the time of one call.
LONGEST_DIAGNOSIS = 65536


def parity_cases(length: int) -> dict[str, tuple[Tensor, CompiledRules, MaskSpec, Any]]:
    """Masks of every kind and table, two samples each: (records, rules, spec, policies)."""
    rng = np.random.default_rng(0)
    packed = torch.cat([sample_of(length, fan_in=4, documents=3, seed=seed) for seed in (1, 2)])
    packed[:, : length // 4, 4:] = -1  # nothing was retrieved there
    random = torch.from_numpy(np.stack([random_records(rng, length * 15 // 16) for _ in range(2)]))
    rules = compile_rules(random_rules(rng, most=3))
    two_levels = MaskSpec(LocalPattern(window=400), SummarySpec(4, 2, levels=2, fanout=4), RetrievedSpec(64, 4))
    tokens = MaskSpec(LocalPattern("dilated", window=300, dilation=3, unit=1), SummarySpec(32, 1))
    return {
        "whole prefix": (sample_of(length).repeat(2, 1, 1), PLAIN, MaskSpec(), None),
        "packed documents, two levels, retrieved": (packed, PLAIN, two_levels, np.full(4, 3, dtype=np.uint8)),
        "random rules and records": (random, rules, MaskSpec(LocalPattern(window=40), SummarySpec(16, 2)), None),
        "dilation by single tokens": (random[:, : length * 3 // 4].contiguous(), PLAIN, tokens, None),
    }


def parity(bench: Bench, part: dict[str, Any]) -> None:
    """Flex against the oracle in float64: output, gradients where flex has them, rows without keys."""
    shape = Shape(heads=8, kv_heads=2, head_dim=64, window=0, block=0, per_block=0, fan_in=0)
    part["rows"] = [
        parity_row(bench, shape, dtype, name, plan_for(records, rules, spec, policies=policies))
        for dtype in (torch.float32, torch.bfloat16)
        for name, (records, rules, spec, policies) in parity_cases(2048 if bench.on_gpu else 512).items()
    ]
    part["holds"] = all(row["holds"] for row in part["rows"])


def parity_row(bench: Bench, shape: Shape, dtype: torch.dtype, name: str, plan: MaskPlan) -> dict[str, Any]:
    """One mask in one type: the largest error of each tensor, over the tensor's largest value."""
    narrow = inputs_of(bench, shape, plan, dtype)
    doubled: list[Any] = [x if x is None else x.detach().double().requires_grad_(bench.on_gpu) for x in narrow]
    wide = AttentionInputs(*doubled)
    results = []
    for attention, inputs in ((flex_backend(), narrow), (dense_attention, wide)):
        out = attention(inputs, plan, 0.125)
        gradient = torch.randn(out.shape, generator=torch.Generator(bench.device).manual_seed(9), device=bench.device)
        grads = torch.autograd.grad(out, given(inputs), gradient.to(dtype).to(out.dtype)) if bench.on_gpu else ()
        results.append([out.detach(), *grads])
    errors = {
        label: float((ours.double() - oracle).abs().max() / oracle.abs().max().clamp(min=1e-30))
        for label, ours, oracle in zip(
            ("output", "grad q", "grad k", "grad v", "grad k_far", "grad v_far"), *results, strict=False
        )
    }
    mask = flex_mask(plan, bench.device, BLOCK)
    dead = ~plan.dense(bench.device).any(-1)[:, None].expand(results[0][0].shape[:3])
    zero = not bool(results[0][0][dead].any())
    return {
        "mask": name,
        "dtype": str(dtype).removeprefix("torch."),
        "tables": " ".join(map(str, mask.shape_class[:2])),
        "tiles": {"partial": mask.partial_tiles, "full": mask.full_tiles},
        "rows_without_keys": int(dead[:, 0].sum()),
        "errors": errors,
        "tolerance": TOLERANCE[dtype],
        "holds": zero and all(error <= TOLERANCE[dtype] for error in errors.values()),
    }


def benchmark(bench: Bench, shape: Shape, length: int, retrieved: bool) -> dict[str, Any]:
    """One length: preparation, times, memory, and what happens when masks change."""
    spec, fan_in = shape.spec(retrieved), shape.fan_in if retrieved else 0
    policies = np.full(fan_in, 3, dtype=np.uint8) if retrieved else None
    clear_plans()
    plans: list[MaskPlan] = []
    records = sample_of(length, fan_in)
    plan_s = bench.seconds(lambda: plans.append(plan_for(records, PLAIN, spec, policies=policies)))
    plan = plans[0]
    lowering_s = bench.seconds(lambda: flex_mask(plan, bench.device, BLOCK))
    inputs = inputs_of(bench, shape, plan, bench.dtype)
    scale, flex = shape.head_dim**-0.5, flex_backend()

    def step(plan: MaskPlan) -> object:
        out = flex(inputs, plan, scale)
        return torch.autograd.grad(out, given(inputs), torch.ones_like(out)) if bench.on_gpu else out

    compile_s = bench.seconds(lambda: step(plan))
    before, fresh = compiled_graphs(), []
    for seed in range(3):
        packed = sample_of(length, fan_in, documents=4, seed=seed)
        fresh.append(bench.seconds(lambda: step(plan_for(packed, PLAIN, spec, policies=policies))))  # noqa: B023
    mask = flex_mask(plan, bench.device, BLOCK)
    return {
        "length": length,
        "retrieved": retrieved,
        "visited_share": mask.visited_pairs / plan.stats.causal_pairs,
        "legal_share": plan.stats.legal_edges / plan.stats.causal_pairs,
        "tables": " ".join(map(str, mask.shape_class[:2])),
        "plan_ms": plan_s * 1e3,
        "lowering_ms": lowering_s * 1e3,
        "compile_s": compile_s,
        "recompiled": compiled_graphs() - before,
        "changed_mask_ms": sorted(fresh)[1] * 1e3,
        "flex": both_ways(bench, lambda: flex(inputs, plan, scale), inputs),
        "pooling": pooling(bench, shape, inputs.k, inputs.v),
        "dense": dense_flash(bench, inputs),
    }


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def pooling(bench: Bench, shape: Shape, k: Tensor, v: Tensor) -> dict[str, float | None]:
    """Times of making the summaries of k and v [1, h_kv, s, d], which dense attention does without."""
    queries = torch.randn(shape.kv_heads, shape.per_block, shape.head_dim, device=bench.device, dtype=bench.dtype)
    inv_freq = 1e4 ** (-torch.arange(0, shape.head_dim, 2, device=bench.device, dtype=torch.float64) / shape.head_dim)

    def pooled() -> Tensor:
        return torch.stack(pool("attn_pool", k, v, queries, shape.per_block, shape.block, inv_freq))

    def both() -> object:
        out = pooled()
        return torch.autograd.grad(out, [k, v], torch.ones_like(out))

    forward = bench.median_ms(pooled)
    return {"forward_ms": forward, "both_ms": bench.median_ms(both) if bench.on_gpu else None}


def dense_flash(bench: Bench, leaves: AttentionInputs) -> dict[str, Any]:
    """Dense causal attention by each fused kernel of this device.

    A kernel that does not take grouped heads gets keys and values repeated beforehand, outside the clock.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attention(kernel: Any, grouped: bool, x: AttentionInputs) -> Tensor:
        with sdpa_kernel(kernel):
            return torch.nn.functional.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=True, enable_gqa=grouped)

    q, k, v = (x.detach() for x in leaves[:3])
    found: dict[str, Any] = {}
    for kernel in (SDPBackend.FLASH_ATTENTION, *([SDPBackend.CUDNN_ATTENTION] if bench.on_gpu else [])):
        for grouped in (True, False):
            keys = [x if grouped else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v)]
            inputs = AttentionInputs(*(x.detach().requires_grad_(bench.on_gpu) for x in (q, *keys)))
            try:
                found[kernel.name] = both_ways(bench, lambda: attention(kernel, grouped, inputs), inputs)  # noqa: B023
                break
            except RuntimeError as error:  # "No available kernel": it does not take these inputs
                found[kernel.name] = {"refused": str(error).splitlines()[0]}
    return found


def compared(row: dict[str, Any]) -> dict[str, Any]:
    """Adds to a benchmark row, for each direction: the fastest dense kernel, the speed-up, the share of the ideal.

    The ideal takes the dense kernel's time times the visited share of its pairs.
    """
    for way in ("forward_ms", "both_ms"):
        times = {name: found[way] for name, found in row["dense"].items() if found.get(way)}
        if row["flex"][way] is None or not times:
            continue
        best = min(times, key=lambda name: times[name])
        speed_up = times[best] / row["flex"][way]
        row[way.replace("_ms", "_against_dense")] = {
            "kernel": best,
            "dense_ms": times[best],
            "speed_up": speed_up,
            "share_of_ideal": speed_up * row["visited_share"],
        }
    return row


def share_of_ideal(row: dict[str, Any]) -> float:
    """Of forward and backward, or of the forward pass alone where flex has no other; 1 where nothing was compared."""
    found = row.get("both_against_dense", row.get("forward_against_dense"))
    return 1.0 if found is None else float(found["share_of_ideal"])


def dense_kernel(rows: list[dict[str, Any]]) -> str:
    """The fastest dense kernel of the longest length."""
    found = [row.get("both_against_dense", row.get("forward_against_dense")) for row in rows]
    return next((each["kernel"] for each in reversed(found) if each is not None), "FLASH_ATTENTION")


def diagnosed(slow: Sequence[int], lengths: Sequence[int]) -> int:
    """Length to diagnose: the longest slow one, no longer than what there is time for."""
    return min(max(slow), max(LONGEST_DIAGNOSIS, min(lengths)))


def provenance(args: argparse.Namespace, bench: Bench, shape: Shape) -> dict[str, Any]:
    """Where, what and how."""
    versions = {}
    for package in ("torch", "triton", "megatron-core", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "hardware": processor(torch.cuda.get_device_name() if bench.on_gpu else None),
        "rehearsal": not bench.on_gpu,
        "versions": versions,
        "cuda": torch.version.cuda,
        "commit": args.commit or commit(),
        "command": shlex.join(["python", *sys.argv]),
        "shape": asdict(shape),
        "dtype": str(bench.dtype).removeprefix("torch."),
    }


def attention(args: argparse.Namespace) -> int:
    """The whole check; exit 1 when a section failed, parity does not hold, or a changed mask was compiled again.

    Raises:
        ConfigError: ``--lengths`` are no numbers of tokens.
    """
    lengths = parse_lengths(args.lengths)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device here, so nothing was measured; --device cpu rehearses.", file=sys.stderr)
        return 5
    on_gpu = args.device == "cuda"
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    torch.backends.cuda.matmul.allow_tf32 = False
    out = args.out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else None)
    bench = Bench(device, dtype, args.repeats, time.monotonic() + args.budget, out)
    shape = Shape(args.heads, args.kv_heads, args.head_dim, args.window, args.block, args.per_block, args.fan_in)
    bench.result["about"] = provenance(args, bench, shape)
    needs = 60.0 if on_gpu else 1.0  # seconds to compile and to measure one thing
    rows: list[dict[str, Any]] = bench.result.setdefault("benchmark", [])
    bench.section("parity", lambda part: parity(bench, part), needs)
    for length, retrieved in [*((length, False) for length in lengths), (lengths[:3][-1], True)]:
        name = f"benchmark {length}{' retrieved' if retrieved else ''}"
        bench.section(name, lambda part: rows.append(compared(benchmark(bench, shape, length, retrieved))), needs)  # noqa: B023
    bench.section(
        "layer",
        lambda part: gpu_layer.whole_layer(bench, shape, args.layer_length, args.d_model, dense_kernel(rows), part),
        needs,
    )
    slow = [row["length"] for row in rows if share_of_ideal(row) < SHORT]
    if args.diagnose or slow:
        chosen = slow or lengths
        bench.section(
            "diagnosis",
            lambda part: gpu_diagnosis.diagnose(bench, shape, diagnosed(chosen, lengths), part),
            needs,
        )
    failed = [name for name, part in bench.result.items() if isinstance(part, dict) and "error" in part]
    held = bench.result["parity"].get("holds", False) and not any(row["recompiled"] for row in rows)
    bench.result["failed"] = failed
    bench.save()
    text = gpu_report.markdown(bench.result)
    print(text)
    if out is not None:
        gpu_report.plot(bench.result, out / "gpu_attention.png")
        (out / "gpu_attention.md").write_text(text)
    return 0 if held and not failed else 1
