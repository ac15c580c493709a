"""Makes the files under ``outbox/benchmarks/``: one Markdown file a result, with hardware, commit and command.

python tools/record.py fresh        clone HEAD, install, train the pilot, then nano; times all of it
python tools/record.py grids        TP2, PP2, DP2, EP2 against one rank
python tools/record.py resume       SIGKILL and resume
python tools/record.py attention    our attention against Megatron's own; information flow
python tools/record.py lengths      time, visited pairs and memory of attention by length, beside dense
python tools/record.py context      context-parallel ranks: pairs and bytes beside ring attention, parity with one rank
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refractor_megatron.evaluation.evidence import commit, processor, record, table
from refractor_megatron.telemetry.sinks.jsonl import read_jsonl

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "outbox" / "benchmarks"
#: What is measured; taken before the first record makes the tree dirty.
COMMIT = commit()
#: Said in every record.
NOTE = "note: a shared machine: single times are upper bounds"

#: name -> (title, what it shows, tests)
TEST_RECORDS = {
    "resume": (
        "Killed and resumed",
        "Each row trains `nano` (14 steps, a save every 4), stops it as named, runs it again, and compares every loss "
        "with the uninterrupted run's, bit for bit.",
        ["tests/faults/test_kill_resume.py"],
    ),
    "attention_parity": (
        "Attention against Megatron's own, and information flow",
        "Our attention with the window over the whole prefix and summaries off, against Megatron's "
        "`DotProductAttention` inside the same model; and the largest change of a logit that no legal path reaches "
        "when a token changes (three layers with experts, the tiers named in the row, fp64), beside the changes that "
        "are legal.",
        ["tests/parity/test_stock_attention.py", "tests/parity/test_information_flow.py"],
    ),
}


def run(command: Sequence[str], cwd: Path = ROOT, **environment: str) -> float:
    """Run a command, its output shown; returns the seconds it took."""
    started = time.monotonic()
    subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, check=True)
    return time.monotonic() - started


def write(name: str, title: str, commands: Sequence[str], body: str, evidence: Sequence[str]) -> None:
    """Write ``outbox/benchmarks/NAME.md``; ``evidence`` are links relative to it."""
    BENCHMARKS.mkdir(parents=True, exist_ok=True)
    path = BENCHMARKS / f"{name}.md"
    path.write_text(record(title, COMMIT, processor(), commands, evidence, body, [NOTE]))
    print(f"wrote {path}")


def record_tests(name: str, argument: str) -> None:
    """Run the tests of one record and tabulate what they measured (pytest's ``record_property``)."""
    title, text, tests = TEST_RECORDS[name]
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        run([sys.executable, "-m", "pytest", "-q", *tests, f"--junitxml={report}"], OMP_NUM_THREADS="1")
        cases = list(ElementTree.parse(report).iter("testcase"))
    rows = []
    for case in cases:
        measured = ", ".join(f"{p.get('name')} {p.get('value')}" for p in case.iter("property"))
        faults = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        rows.append([f"`{case.get('name')}`", faults[0] if faults else "passed", measured or "-"])
    body = f"{text}\n\n{table(['test', 'result', 'measured'], rows)}"
    write(name, title, [f"python tools/record.py {argument}"], body, [f"../../{test}" for test in tests])


def parity_of(*arguments: str) -> dict[str, Any]:
    """Result of ``refractor parity`` on the default corpus."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "grids.json"
        command = [sys.executable, "-m", "refractor_megatron.cli", "parity", *arguments, "--out", str(out)]
        run([*command, "--data-root", str(Path(scratch) / "data")], OMP_NUM_THREADS="1")
        result: dict[str, Any] = json.loads(out.read_text())
    return result


def parity_table(result: dict[str, Any]) -> str:
    """Grids of one parity run, and how they were compared."""
    rows = [
        [
            name,
            str(r["ranks"]),
            f"{r['loss']:.1e}",
            f"{r['norm']:.1e}",
            f"{r['gradient']:.1e}",
            str(r["parameters"]),
            f"`{r['parameter']}`",
        ]
        for name, r in result["grids"].items()
    ]
    header = [
        "grid",
        "ranks",
        "max loss difference",
        "max error of the global norm",
        "max gradient error",
        "tensors",
        "worst tensor",
    ]
    text = (
        f"`nano`, fp32, {result['steps']} steps on the default corpus, every grid from its own initialisation (no "
        "checkpoint between them). The gradient error is the relative L2 difference of one parameter tensor's gradient "
        "before clipping, the largest over tensors and steps. Tolerances: 1e-5 and 1e-4.\n\n"
    )
    return text + table(header, rows)


def record_grids(steps: int) -> None:
    """Parity of the two-rank grids."""
    result = parity_of("--steps", str(steps))
    (BENCHMARKS / "grids.json").write_text(json.dumps(result, indent=1) + "\n")
    command = "python tools/record.py grids"
    write("grids", "Grids against one rank", [command], parity_table(result), ["grids.json"])


def record_context(length: int, steps: int) -> None:
    """Visited pairs and bytes of two and four context-parallel ranks, and their parity with one rank."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for size in (2, 4):
            out = Path(scratch) / f"{size}.json"
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
            run([*launch, "tools/context_traffic.py", f"--length={length}", f"--out={out}"], OMP_NUM_THREADS="1")
            found[f"cp{size}"] = json.loads(out.read_text())
    # a third of nano's learning rate, as in tests/parity: Adam turns rounding of near-zero gradients into weights
    settings = ["train.seq_len=256", "model.context_max=256", "train.optimizer.lr=1e-3"]
    settings += ["train.schedule.cosine.min_lr=1e-4"]
    parity = parity_of("--grids", "cp2,cp4,tp2cp2", "--steps", str(steps), *settings)
    body = (
        f"One attention of {length:,} tokens, four heads of 64, float32, window 512, two summaries per block of 128: "
        "forward and backward over gloo, one process a rank. Pairs are the (query, key) pairs that the block-sparse "
        "kernel computes for one head, masked ones included; bytes are the payload handed to other ranks, counted "
        "where it is sent. Ring attention on the same shape: keys and values go round once forward, and once more "
        "backward with their gradients (the gradients' last hop, home, is not counted); its pairs are those of dense "
        "causal attention over the same zig-zag chunks.\n\n"
        + traffic_table(found)
        + "\nImbalance of the visited pairs, max / mean - 1, in zig-zag shards and had each rank one contiguous "
        "stretch; the second row packs documents of 1k to 16k tokens (log-uniform), which no fixed sharding foresees. "
        "The first rank visits a little less: nothing stands before the first chunk.\n\n"
        + balance_table(found)
        + "\n## Against one rank\n\n"
        + parity_table(parity)
        + f"\nOverrides: `{' '.join(settings)}`\n"
    )
    kept = {"traffic": found, "parity": parity}
    (BENCHMARKS / "context_parallel.json").write_text(json.dumps(kept, indent=1) + "\n")
    command = "python tools/record.py context"
    write("context_parallel", "Context parallelism beside ring attention", [command], body, ["context_parallel.json"])


def record_lengths() -> None:
    """``refractor bench attention`` with its defaults, which writes its own record."""
    command = shlex.split("-m refractor_megatron.cli bench attention --out outbox/benchmarks/attention_cpu.md")
    run([sys.executable, *command, "--note", NOTE.removeprefix("note: ")])


def traffic_table(found: dict[str, Any]) -> str:
    """Pairs and bytes of every rank beside ring attention's."""
    rows = []
    for name, result in found.items():
        ring = result["ring"]
        for r in result["ranks"]:
            sent = [r["forward"], r["backward"], ring["forward"], ring["backward"]]
            pairs, ring_pairs = r["visited_pairs"], r["ring_pairs"]
            row = [name, str(r["rank"]), f"{pairs / 1e6:.1f}", f"{ring_pairs / 1e6:.1f}", f"{ring_pairs / pairs:.1f}"]
            rows.append([*row, *(f"{x / 1e6:.2f}" for x in sent), f"{sum(sent[2:]) / sum(sent[:2]):.1f}"])
    header = ["grid", "rank", "pairs visited, M", "ring: pairs, M", "ratio", "sent forward, MB", "backward, MB"]
    return table([*header, "ring: forward, MB", "backward, MB", "ratio"], rows)


def balance_table(found: dict[str, Any]) -> str:
    """Imbalance of zig-zag and of contiguous shards."""
    rows = [
        [name, text, f"{shares['zigzag']:.2%}", f"{shares['contiguous']:.2%}"]
        for name, result in found.items()
        for text, shares in result["balance"].items()
    ]
    return table(["grid", "sequence", "zig-zag", "contiguous"], rows)


def record_fresh() -> None:
    """From an empty folder to a report, as a stranger would do it; then again; then nano."""
    with tempfile.TemporaryDirectory() as scratch:
        clone = Path(scratch) / "clone"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        launch = ["bash", "launch/pretrain_local.sh"]
        clean = {"REFRACTOR_VENV": "", "PIP_NO_CACHE_DIR": "1", "VIRTUAL_ENV": "", "PYTHONPATH": ""}
        times = {
            "fresh clone to report, install and download included": run(launch, clone, **clean),
            "the same command again": run(launch, clone, **clean),
        }
        nano = run([*launch, "--preset", "nano", "--steps", "50"], clone, **clean)
        pilot = read_run(clone / "runs" / "pilot")
        small = read_run(clone / "runs" / "nano")
        python = clone / ".venv" / "bin" / "python"
        picture = BENCHMARKS / "pilot_cpu.png"
        BENCHMARKS.mkdir(parents=True, exist_ok=True)
        run([str(python), "-m", "refractor_megatron.cli", "report", "runs/pilot", "--png", str(picture)], clone)
        (ROOT / "docs").mkdir(exist_ok=True)
        shutil.copy(picture, ROOT / "docs" / "run.png")
    rows = [[what, f"{seconds:.0f} s"] for what, seconds in times.items()] + run_rows(pilot)
    command = "python tools/record.py fresh"
    body = table(["what", "result"], rows) + "\n![plots](pilot_cpu.png)\n\n" + samples(pilot)
    evidence = [keep(pilot, "pilot_cpu"), "pilot_cpu.png"]
    write("pilot_cpu", "The pilot, from a fresh clone", [command, shlex.join(launch)], body, evidence)
    rows = [["50 steps, data, evaluation and report included, after install", f"{nano:.0f} s"], *run_rows(small)]
    commands = [command, "bash launch/pretrain_local.sh --preset nano --steps 50"]
    write("nano_cpu", "nano, 50 steps", commands, table(["what", "result"], rows), [keep(small, "nano_cpu")])


def read_run(folder: Path) -> dict[str, Any]:
    """What a run folder says of itself."""
    names = ("final", "baselines", "environment", "device", "samples")
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in names}
    found["steps"] = read_jsonl(folder / "metrics.jsonl")
    return found


def keep(run_data: dict[str, Any], name: str) -> str:
    """Keep a run's results beside its record, losses of every step included; returns the file's name."""
    losses = {step["step"]: step["loss"] for step in run_data["steps"]}
    kept = {**{k: run_data[k] for k in ("final", "baselines", "environment", "device")}, "loss": losses}
    (BENCHMARKS / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")
    return f"{name}.json"


def run_rows(run_data: dict[str, Any]) -> list[list[str]]:
    """Rows about one run."""
    final, baselines, steps, device = (run_data[k] for k in ("final", "baselines", "steps", "device"))
    middle = sorted(steps, key=lambda s: s["tokens_per_s"])[len(steps) // 2]
    peak = f"{device['peak_flops'] * device['ranks'] / 1e12:.2f} TFLOP/s, {device['peak_name']}"

    def loss(entry: dict[str, Any]) -> str:
        return f"{entry['loss']:.4f} nats/token, {entry['bits_per_byte']:.3f} bits/byte"

    rows = [
        ["steps, tokens seen", f"{final['step']}, {steps[-1]['tokens_seen']:,}"],
        ["training time (sum of steps)", f"{sum(s['step_ms'] for s in steps) / 1e3:.0f} s"],
        ["median tokens/s, MFU", f"{middle['tokens_per_s']:.0f}, {middle['mfu']:.1%} of {peak}"],
        [f"held-out loss, raw weights ({final['raw']['tokens']:,} tokens)", loss(final["raw"])],
        *([["held-out loss, EMA weights", loss(final["ema"])]] if "ema" in final else []),
        ["unigram entropy of the same tokens", loss(baselines["unigram"])],
        ["bigram (Kneser-Ney, fitted on the training split), same tokens", loss(baselines["bigram"])],
        ["raw loss below the unigram entropy", f"{final['below_unigram']:.1%}"],
        ["router entropy, largest expert load (last step)",
         f"{steps[-1]['router_entropy']:.2f}, {steps[-1]['expert_load_max']:.2f} × balance"],
        ["peak memory", f"{max(s['peak_rss_mb'] for s in steps):.0f} MB"],
        ["config, data", f"`{final['config_hash']}`, `{final['data_digest'][:12]}`"],
    ]  # fmt: skip
    return rows


def samples(run_data: dict[str, Any]) -> str:
    """Sampled continuations as quoted text."""
    parts = [
        "Sampled continuations of held-out prompts (the prompt's last 200 characters, then what the model wrote):\n"
    ]
    for sample in run_data["samples"]:
        text = f"{sample['prompt'][-200:]}⟨model⟩{sample['continuation']}".replace("```", "'''")
        parts.append(f"```text\n{text}\n```\n")
    return "\n".join(parts)


def main() -> int:
    """Parse and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["fresh", "grids", "resume", "attention", "lengths", "context"])
    what = parser.parse_args().what
    if what == "fresh":
        record_fresh()
    elif what == "grids":
        record_grids(20)
    elif what == "lengths":
        record_lengths()
    elif what == "context":
        record_context(65536, 20)
    else:
        record_tests("resume" if what == "resume" else "attention_parity", what)
    return 0


if __name__ == "__main__":
    sys.exit(main())
