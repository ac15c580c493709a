"""Checks that need a GPU: ``python tools/gpu_check.py train`` and ``python tools/gpu_check.py attention``.

train: upstream untouched and the CPU runtime inert; 20 fp32 steps whose losses follow the CPU's within 1e-4; then bf16
tokens/s, MFU and peak memory of a preset.

attention: the flex backend against the dense oracle; its speed at 4k to 128k tokens beside the fastest dense flash
attention of the device; a whole layer; and a diagnosis where it is slower than its visited area allows. Writes
gpu_attention.json, .md and .png. One call fits ten minutes: what finds no time left is named in the result.

``--device cpu`` rehearses the same paths where there is no GPU, at sizes given for it (flex: forward only).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LOSS_TOLERANCE = 1e-4


def losses(preset: str, steps: int, overrides: list[str], data: Path, measure: bool) -> dict[str, Any]:
    """Train ``steps`` steps in this process on its own device; returns losses and, with ``measure``, speed."""
    import torch

    from data_pipeline.stream import SampleStream
    from refractor_megatron.compat import cpu_runtime
    from refractor_megatron.config import compose
    from refractor_megatron.engines.megatron import MegatronEngine, start_distributed, stop_distributed
    from refractor_megatron.training.batches import rank_batches
    from refractor_megatron.training.schedule import schedule_of
    from refractor_megatron.training.utilisation import flops_per_token, peak_of

    cfg = compose([f"experiment={preset}", *overrides])
    device = start_distributed()
    on_gpu = device.type == "cuda"
    assert cpu_runtime.is_installed() == (not on_gpu), "the CPU runtime must be active exactly where there is no CUDA"
    if on_gpu:
        torch.backends.cuda.matmul.allow_tf32 = False
        for module, attribute, _ in cpu_runtime.PATCHES:
            owner, name = cpu_runtime.locate(module, attribute)
            assert getattr(owner, name).__module__.startswith("megatron."), f"{module}.{attribute} is not upstream's"
    engine = MegatronEngine(cfg, device)
    stream = SampleStream(data, cfg.train.seq_len, cfg.train.seed)
    schedule, found, seconds = schedule_of(cfg), [], []
    micro_batches = cfg.train.global_batch // cfg.train.micro_batch
    for step in range(1, steps + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        batches = rank_batches(stream, (step - 1) * cfg.train.global_batch, cfg.train.micro_batch, micro_batches, 0, 1)
        found.append(engine.train_step(batches, micro_batches, schedule(step), cfg.train.optimizer.wd).loss)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    result: dict[str, Any] = {"device": torch.cuda.get_device_name() if on_gpu else "cpu", "losses": found}
    if measure:
        peak = peak_of(engine)
        typical = sorted(seconds[len(seconds) // 4 :])[len(seconds[len(seconds) // 4 :]) // 2]
        rate = cfg.train.global_batch * cfg.train.seq_len / typical
        result |= {
            "tokens_per_s": rate,
            "mfu": rate * flops_per_token(engine) / peak.flops,
            "peak": f"{peak.flops / 1e12:.3g} TFLOP/s ({peak.name})",
            "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        }
    stop_distributed()
    return result


def apart(device: str, *arguments: str) -> dict[str, Any]:
    """``losses`` in a process of its own; ``device`` cpu hides every GPU from it."""
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})}
    command = [sys.executable, "-W", "ignore", __file__, "_losses", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def train(args: argparse.Namespace) -> int:
    """The whole check; exit 1 when a loss is out of tolerance."""
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("error: no CUDA device here, so nothing was measured; --device cpu rehearses.", file=sys.stderr)
            return 5
    from data_pipeline.build import build
    from refractor_megatron.config import compose
    from refractor_megatron.training.data_options import options_of

    with tempfile.TemporaryDirectory() as scratch:
        data = {}
        for preset in {args.preset, args.speed_preset}:
            data[preset] = build(
                args.corpus,
                Path(scratch) / preset,
                options_of(compose([f"experiment={preset}", f"data.max_mb={args.max_mb}", "data.seed=0"]), "check"),
                cache=Path(scratch) / "cache",
            ).folder
        same = ["train.mixed_precision=fp32"]
        arguments = (args.preset, str(args.steps), str(data[args.preset]), "0", *same)
        reference, found = apart("cpu", *arguments), apart(args.device, *arguments)
        worst = max(abs(a - b) for a, b in zip(reference["losses"], found["losses"], strict=True))
        speed_steps = str(max(8, args.steps))
        fast = apart(
            args.device, args.speed_preset, speed_steps, str(data[args.speed_preset]), "1", "train.mixed_precision=bf16"
        )
    holds = worst <= LOSS_TOLERANCE
    fast.pop("losses")
    report = {"fp32_max_loss_difference": worst, "tolerance": LOSS_TOLERANCE, "holds": holds, "bf16": fast}
    print(json.dumps(report, indent=1))
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if holds else 1


def _add_attention(checks: Any) -> None:
    def run(args: argparse.Namespace) -> int:
        from gpu_attention import attention

        return attention(args)

    check = checks.add_parser("attention", help="flex attention: parity, speed, a whole layer, diagnosis")
    check.add_argument("--lengths", default="4k,16k,64k,128k", help="tokens, e.g. 4k,16k or 512")
    for name, size in (("heads", 32), ("kv-heads", 8), ("head-dim", 128), ("window", 512), ("block", 128)):
        check.add_argument(f"--{name}", type=int, default=size)
    check.add_argument("--per-block", type=int, default=2, help="summaries of a block")
    check.add_argument("--fan-in", type=int, default=8, help="retrieved records of a chunk")
    check.add_argument("--d-model", type=int, default=4096, help="width of the whole layer")
    check.add_argument("--layer-length", type=int, default=65536, help="tokens of the whole layer")
    check.add_argument("--repeats", type=int, default=20, help="most timed calls of one measurement")
    check.add_argument("--budget", type=float, default=540.0, help="seconds after which nothing new is measured")
    check.add_argument("--diagnose", action="store_true", help="the diagnosis table in any case")
    check.add_argument("--commit", help="what is measured, where the checkout has no .git")
    check.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    check.add_argument("--out", type=Path, help="folder of the results (default: $OUT, else none are written)")
    check.set_defaults(run=run)


def main() -> int:
    """Parse and run."""
    if sys.argv[1:2] == ["_losses"]:
        preset, steps, data, measure, *overrides = sys.argv[2:]
        print(json.dumps(losses(preset, int(steps), overrides, Path(data), measure == "1")))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    checks = parser.add_subparsers(metavar="CHECK", required=True)
    check = checks.add_parser("train", help="losses follow the CPU's; bf16 speed")
    check.add_argument("--preset", default="nano", help="preset of the fp32 comparison")
    check.add_argument("--speed-preset", default="small", help="preset of the bf16 measurement")
    check.add_argument("--steps", type=int, default=20)
    check.add_argument("--corpus", type=Path, help="text (default: the default corpus)")
    check.add_argument("--max-mb", type=float, default=8.0)
    check.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    check.add_argument("--out", type=Path, help="also write the result as JSON")
    check.set_defaults(run=train)
    _add_attention(checks)
    args = parser.parse_args()
    from refractor_megatron.errors import RefractorError

    try:
        code: int = args.run(args)
    except RefractorError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return code


if __name__ == "__main__":
    sys.exit(main())
