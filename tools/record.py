"""Makes the files under ``outbox/benchmarks/``: one Markdown file a result, with hardware, commit and command.

python tools/record.py fresh        clone HEAD, install, train the pilot, then nano; times all of it
python tools/record.py grids        TP2, PP2, DP2, EP2 against one rank
python tools/record.py resume       SIGKILL and resume
python tools/record.py attention    our attention against Megatron's own; information flow
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
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

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "outbox" / "benchmarks"
#: What is measured; taken before the first record makes the tree dirty.
COMMIT = subprocess.run(
    ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True, check=True
).stdout.strip()

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
        "when a token changes (three layers, experts and summaries on, fp64), beside the changes that are legal.",
        ["tests/parity/test_stock_attention.py", "tests/parity/test_information_flow.py"],
    ),
}


def run(command: Sequence[str], cwd: Path = ROOT, **environment: str) -> float:
    """Run a command, its output shown; returns the seconds it took."""
    started = time.monotonic()
    subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, check=True)
    return time.monotonic() - started


def processor() -> str:
    """Model name of the processor, with its count."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores, {memory:.0f} GiB, no GPU"


def write(name: str, title: str, commands: Sequence[str], body: str, evidence: Sequence[str]) -> None:
    """Write ``outbox/benchmarks/NAME.md``; ``evidence`` are links relative to it."""
    BENCHMARKS.mkdir(parents=True, exist_ok=True)
    head = [
        f"# {title}",
        "",
        f"- date: {datetime.date.today().isoformat()}",
        f"- commit: `{COMMIT}`",
        f"- hardware: {processor()} (a shared machine: single times are upper bounds)",
        *(f"- command: `{command}`" for command in commands),
        "- evidence: " + ", ".join(f"[{Path(link).name}]({link})" for link in evidence),
        "",
    ]
    path = BENCHMARKS / f"{name}.md"
    path.write_text("\n".join(head) + "\n" + body.rstrip() + "\n")
    print(f"wrote {path}")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


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


def record_grids(steps: int) -> None:
    """Parity of the two-rank grids."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "grids.json"
        command = [sys.executable, "-m", "refractor_megatron.cli", "parity", "--steps", str(steps), "--out", str(out)]
        run([*command, "--data-root", str(Path(scratch) / "data")], OMP_NUM_THREADS="1")
        result = json.loads(out.read_text())
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
    (BENCHMARKS / "grids.json").write_text(json.dumps(result, indent=1) + "\n")
    command = "python tools/record.py grids"
    write("grids", "Grids against one rank", [command], text + table(header, rows), ["grids.json"])


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
    found["steps"] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
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
    parser.add_argument("what", choices=["fresh", "grids", "resume", "attention"])
    what = parser.parse_args().what
    if what == "fresh":
        record_fresh()
    elif what == "grids":
        record_grids(20)
    else:
        record_tests("resume" if what == "resume" else "attention_parity", what)
    return 0


if __name__ == "__main__":
    sys.exit(main())
