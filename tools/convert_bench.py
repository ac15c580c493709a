"""Speed and memory of ``refractor convert`` beside a plain copy of the same bytes, on the same disk, in turns.

python tools/convert_bench.py --folder /tmp/bench --gigabytes 1.5 --rounds 5 --out outbox/benchmarks/convert.md

Made-up weights of a mixture-of-experts model; logits are not compared here. Copy and conversion end with everything on
the disk (fsync). "convert" counts from the first read to the rename, all checks of bytes included; importing torch and
transformers, some three seconds whatever the size, is left out. Each conversion runs in a process of its own, so the
peak is its alone; ``base`` is what the imports hold.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Shard size of the measurement: well below the model, so that a converter that gathers it would show.
SHARD = 250_000_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder on the disk to measure")
    parser.add_argument("--gigabytes", type=float, default=1.5, help="size of the weights (default: 1.5)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="the record, Markdown; JSON stands beside it")
    parser.add_argument("--one", choices=("hf", "megatron"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(convert(args.folder, args.one)))
        return 0
    args.folder.mkdir(parents=True)
    try:
        result = measure(args)
    finally:
        shutil.rmtree(args.folder)
    print(json.dumps(result, indent=1))
    if args.out:
        data = args.out.with_suffix(".json")
        data.write_text(json.dumps(result, indent=1) + "\n")
        args.out.write_text(markdown(result, data.name))
    return 0


def markdown(result: dict[str, Any], data: str) -> str:
    """The record."""
    from refractor_megatron.evaluation.evidence import record, table

    names = {"copy": "plain copy", "hf": "Megatron to HF", "megatron": "HF to Megatron"}
    speeds, memory = result["mb_per_s"], result["memory_mb"]
    copied = speeds["copy"]["median"]
    rows = [
        [
            name,
            f"{speeds[key]['median']:.0f}",
            f"{min(speeds[key]['all']):.0f} – {speeds[key]['best']:.0f}",
            f"{speeds[key]['median'] / copied:.0%}",
            f"{memory[key]['cpu_seconds']:.1f} s" if key in memory else "-",
            f"{memory[key]['peak'] - memory[key]['base']:.0f} MB" if key in memory else "-",
        ]
        for key, name in names.items()
    ]
    target = min(500.0, 0.7 * copied)
    verdicts = [
        f"- {'holds' if speeds[key]['median'] >= target else 'falls short'}: {names[key]} at 500 MB/s or 70 % of the "
        f"copy, whichever is lower ({target:.0f} MB/s)"
        for key in ("hf", "megatron")
    ]
    text = (
        f"{result['weights_mb']:.0f} MB of fp32 weights of a mixture-of-experts model, shards of "
        f"{result['shard_mb']:.0f} MB, without the comparison of logits. Everything is on the disk at the end (fsync). "
        "A conversion counts from the first read to the rename: hashes of source and target, and both sides read again "
        f"and compared bit for bit. Copy, export and import take turns, {len(speeds['copy']['all'])} rounds, medians. "
        f"Peak: above what the imports hold. Load of the machine at the end: {result['load_average']:.1f}.\n\n"
    )
    head = ["", "MB/s", "slowest – fastest", "of the copy", "processor time", "peak memory"]
    body = text + table(head, rows) + "\n" + "\n".join(verdicts)
    return record(
        "Conversion beside a plain copy", result["commit"], result["machine"], [result["command"]], [data], body
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Rounds of copy, export, import; the best and the median of each, MB/s of weights."""
    size = make_run(args.folder / "run", args.gigabytes)
    found: dict[str, list[float]] = {"copy": [], "hf": [], "megatron": []}
    memory: dict[str, dict[str, float]] = {}
    for _ in range(args.rounds):
        found["copy"].append(size / 1e6 / timed(lambda: copy(args.folder / "run", args.folder / "copy")))
        shutil.rmtree(args.folder / "copy")
        for target in ("hf", "megatron"):
            command = [sys.executable, "-W", "ignore", __file__, "--folder", str(args.folder), "--one", target]
            one = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            found[target].append(size / 1e6 / one.pop("seconds"))
            memory[target] = one
        for name in ("served", "back"):
            shutil.rmtree(args.folder / name)
    from refractor_megatron.evaluation.evidence import commit, processor

    return {
        "commit": commit(),
        "machine": processor(),
        "command": "python tools/convert_bench.py --folder FOLDER "
        f"--gigabytes {args.gigabytes:g} --rounds {args.rounds} --out outbox/benchmarks/convert.md",
        "weights_mb": size / 1e6,
        "shard_mb": SHARD / 1e6,
        "mb_per_s": {k: {"best": max(v), "median": statistics.median(v), "all": v} for k, v in found.items()},
        "memory_mb": memory,
        "load_average": os.getloadavg()[0],
        "cpus": os.cpu_count(),
    }


def convert(folder: Path, target: str) -> dict[str, float]:
    """One conversion in this process: seconds, CPU seconds, peak and base memory."""
    from refractor_megatron.checkpoint.convert.to_hf import ExportOptions, export
    from refractor_megatron.checkpoint.convert.to_megatron import ImportOptions, import_folder
    from refractor_megatron.hf import from_run, modeling_refractor

    assert from_run and modeling_refractor
    base = _memory("VmRSS")
    cpu = time.process_time()
    if target == "hf":
        options = ExportOptions(shard_size=SHARD, logits=False)
        seconds = timed(lambda: export(folder / "run", folder / "served", options, lambda text: None))
    else:
        back = ImportOptions(shard_size=SHARD, logits=False)
        seconds = timed(lambda: import_folder(folder / "served", folder / "back", back, lambda text: None))
    cpu = time.process_time() - cpu
    return {"seconds": seconds, "cpu_seconds": cpu, "base": base, "peak": _memory("VmHWM")}


def _memory(name: str) -> float:
    """MB that this process holds now (VmRSS), or has held at most (VmHWM). ``ru_maxrss`` would count its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024 / 1e6


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def copy(source: Path, target: Path) -> None:
    """A plain copy that reaches the disk."""
    shutil.copytree(source, target)
    for path in target.rglob("*"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def make_run(folder: Path, gigabytes: float) -> int:
    """A run folder with one checkpoint of about this size; returns the bytes of its weights."""
    import torch

    from refractor_megatron import __version__
    from refractor_megatron.checkpoint import manifest as manifests
    from refractor_megatron.checkpoint.convert.mapping import global_shapes, table
    from refractor_megatron.checkpoint.convert.megatron_writer import write_checkpoint
    from refractor_megatron.checkpoint.convert.shape import Shape
    from refractor_megatron.compat.megatron import MEGATRON_VERSION
    from refractor_megatron.config import compose
    from refractor_megatron.distinction.closure import compile_checked
    from refractor_megatron.tokenizer import Tokenizer
    from refractor_megatron.tokenizer.tokenizer import SPECIALS

    layers = max(1, round((gigabytes * 1e9 / 4 - 2 * 8192 * 1024) / 37.2e6))
    shapes = ["d_model=1024", "rope.dim=1024", "n_heads=16", "n_kv_heads=4", f"n_layers={layers}", "ffn.experts=8"]
    shapes += ["ffn.hidden=1408", "vocab_size=8192"]
    cfg = compose(["experiment=nano", "train.ema.enabled=false", *(f"model.{one}" for one in shapes)])
    shape = Shape.of_run(cfg)
    entries = table(shape)
    noise = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0))
    step = manifests.folder_of(folder / "checkpoints", 1)
    step.mkdir(parents=True)

    def weights(entry: Any) -> torch.Tensor:
        count = torch.Size(entry.shape).numel()
        start = len(entry.name) * 4096 + (entry.expert or 0) * 64
        return noise[start : start + count].reshape(entry.shape).clone()

    dtypes = {entry.key: torch.float32 for entry in entries}
    progress = {"step": 1, "skipped_steps": 0}
    write_checkpoint(step, shape, entries, dtypes, weights, ema=False, progress=progress, shard_size=SHARD)
    pairs = [bytes([a, b]) for a in range(256) for b in range(256)]
    singles = [bytes([b]) for b in range(256)]
    Tokenizer(singles + pairs[: 8192 - 256 - len(SPECIALS)]).save(folder / "tokenizer.json")
    cfg.save(folder / "config.yaml")
    manifests.write(
        step,
        manifests.Manifest(
            step=1,
            config_hash=cfg.hash,
            fixed_hash=cfg.fixed_hash,
            data_digest="",
            rules_hash=compile_checked(cfg.safety.masks)[0].digest,
            package_version=__version__,
            megatron_version=MEGATRON_VERSION,
            grid={"tp": 1, "pp": 1, "ep": 1, "cp": 1, "dp": 1},
            files={path.name: manifests.file_record(path) for path in sorted(step.iterdir())},
        ),
    )
    return sum(torch.Size(size).numel() * 4 for size in global_shapes(entries).values())


if __name__ == "__main__":
    sys.exit(main())
