"""What each tier is worth: one model per arm, trained alike, compared by loss at each position in long documents.

python tools/tiers.py --arms dense,ABC,AB,A --tokens 3e6 --jobs 2      (longest first: jobs end together)

All arms see the same samples in the same order, as many tokens of them, from the same seed; they differ in what a query
may read. An arm whose run folder is finished is not trained again, one that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiers_report
from record import COMMIT, ROOT

from refractor_megatron.evaluation.evidence import processor
from refractor_megatron.evaluation.report_plots import INK
from refractor_megatron.telemetry.sinks.jsonl import read_jsonl

#: Seconds between two lines of progress.
STATUS_S = 60.0


@dataclass(frozen=True)
class Arm:
    """One way to attend: what the record and the picture call it, and its overrides.

    ``seed_shift`` trains the same model from another seed and another order of samples.
    """

    name: str
    title: str
    label: str
    color: str
    overrides: tuple[str, ...]
    seed_shift: int = 0


def arms_of(args: argparse.Namespace) -> dict[str, Arm]:
    """The arms by name, in the order of the record."""
    window, block, summaries = args.window, args.block, args.summaries
    local = f"relation.local.window={window}"
    pooled = (local, f"relation.global.block_size={block}", f"relation.global.summaries_per_block={summaries}")
    alone = (local, "relation.global.summaries_per_block=0")
    retrieval = ("relation.retrieval.enabled=true", f"relation.retrieval.sigma_min={args.sigma_min:g}")
    again = f"the last {window} tokens, another seed: what chance alone does"
    with_summaries = f"the last {window} tokens, {summaries} summaries per block of {block} before them"
    with_records = f"{with_summaries}, records of cosine {args.sigma_min:g} or more"
    return {
        arm.name: arm
        for arm in (
            Arm("dense", "every earlier token of the document", "dense", INK, ("relation=dense",)),
            Arm("A", f"the last {window} tokens", "A: window", "#8a97a5", alone),
            Arm("A2", again, "A2: window, other seed", "#c0a3c9", alone, seed_shift=1),
            Arm("AB", with_summaries, "AB: with summaries", "#2458b3", pooled),
            Arm("ABC", with_records, "ABC: and retrieved records", "#c2410c", (*pooled, *retrieval)),
        )
    }


@dataclass(frozen=True)
class Plan:
    """What all arms share."""

    args: argparse.Namespace
    shared: tuple[str, ...]
    steps: int
    seed: int
    environment: dict[str, str]

    def folder(self, arm: Arm) -> Path:
        """Run folder of an arm."""
        return Path(self.args.runs) / arm.name

    def command(self, arm: Arm) -> list[str]:
        """``refractor pretrain`` of an arm."""
        corpus = ["--corpus", str(self.args.corpus)] if self.args.corpus else []
        flags = ["--preset", self.args.preset, "--out", str(self.folder(arm)), "--data-root", str(self.args.data_root)]
        seed = f"train.seed={self.seed + arm.seed_shift}"
        overrides = [*self.shared, *arm.overrides, f"train.steps={self.steps}", seed, *self.args.overrides]
        return ["refractor", "pretrain", *flags, *corpus, *overrides]


def make_plan(args: argparse.Namespace) -> Plan:
    """Steps and overrides from the preset: its tokens per step in longer sequences, all else as it is."""
    from refractor_megatron.config import compose

    preset = compose([f"experiment={args.preset}"]).train
    batch = args.batch or max(1, preset.global_batch * preset.seq_len // args.seq_len)
    steps = max(1, round(args.tokens / (batch * args.seq_len)))
    shared = (
        f"model.context_max={args.seq_len}",
        f"train.seq_len={args.seq_len}",
        f"train.global_batch={batch}",
        f"train.micro_batch={min(batch, preset.micro_batch)}",
        f"train.schedule.warmup_steps={min(preset.schedule.warmup_steps, steps // 2)}",
        f"data.max_mb={args.max_mb:g}",
        f"data.heldout_fraction={args.heldout_fraction:g}",
        f"checkpoint.every={max(1, steps // 4)}",
        f"evaluation.every={max(1, steps // 4)}",
        "telemetry.tensorboard=false",
        "telemetry.wandb=false",
    )
    environment = {"OMP_NUM_THREADS": str(args.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    return Plan(args, shared, steps, preset.seed if args.seed is None else args.seed, environment)


def call(command: list[str], plan: Plan, log: Path) -> None:
    """Run a command with its output appended to ``log``; on failure say its last line and stop."""
    with log.open("a") as out:
        out.write(f"$ {shlex.join(command)}\n")
        out.flush()
        environment = {**os.environ, **plan.environment}
        done = subprocess.run(command, env=environment, stdout=out, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} ended with exit code {done.returncode}; see {log}:\n{tail(log)}")


def tail(log: Path, lines: int = 5) -> str:
    """The end of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def python(*arguments: str) -> list[str]:
    """This interpreter's command line, quiet about libraries' warnings."""
    return [sys.executable, "-W", "ignore", *arguments]


def prepare(plan: Plan, arm: Arm) -> None:
    """Data and configuration of an arm, in its run folder; refuses a folder of another experiment."""
    plan.folder(arm).mkdir(parents=True, exist_ok=True)
    module = python("-m", "refractor_megatron.cli", *plan.command(arm)[1:], "--prepare-only")
    call(module, plan, plan.folder(arm) / "tiers.log")


def train_and_measure(plan: Plan, arm: Arm) -> None:
    """Train what is left to train, then measure by position."""
    folder = plan.folder(arm)
    log = folder / "tiers.log"
    if last_step(folder) < plan.steps or not has_checkpoint(folder, plan.steps):
        call(python("-m", "refractor_megatron.training.worker", str(folder)), plan, log)
    if not is_measured(plan, folder):
        options = ["--weights", plan.args.weights]
        options += ["--documents", str(plan.args.documents)] if plan.args.documents else []
        options += ["--buckets", plan.args.buckets] if plan.args.buckets else []
        call(python("-m", "refractor_megatron.cli", "eval", "position", str(folder), *options), plan, log)


def has_checkpoint(folder: Path, step: int) -> bool:
    """Whether the run has a whole checkpoint of ``step`` or later."""
    from refractor_megatron.checkpoint.manifest import latest_step

    return latest_step(folder / "checkpoints") >= step


def last_step(folder: Path) -> int:
    """Last step in the run's metrics, 0 where there is none."""
    return max((int(record["step"]) for record in read_jsonl(folder / "metrics.jsonl")), default=0)


def is_measured(plan: Plan, folder: Path) -> bool:
    """Whether ``position.json`` holds what is asked for."""
    path = folder / "position.json"
    if not path.exists():
        return False
    found = json.loads(path.read_text())
    edges = [bucket["last"] for bucket in found["buckets"]]
    asked = [int(edge) for edge in plan.args.buckets.split(",")] if plan.args.buckets else edges
    enough = plan.args.documents is None or found["documents"] == plan.args.documents
    return found["step"] == plan.steps and found["weights"] == plan.args.weights and edges == asked and enough


def watch(plan: Plan, arms: list[Arm], stop: threading.Event) -> None:
    """Say every minute how far the arms are."""
    while not stop.wait(STATUS_S):
        steps = " | ".join(f"{arm.name} {last_step(plan.folder(arm))}" for arm in arms)
        print(f"step of {plan.steps}: {steps}", flush=True)


def run_all(plan: Plan, arms: list[Arm]) -> None:
    """Every arm to its end, ``--jobs`` at a time; the data is built before the first."""
    for arm in arms:
        prepare(plan, arm)
    stop = threading.Event()
    threading.Thread(target=watch, args=(plan, arms, stop), daemon=True).start()
    started = time.monotonic()
    try:
        each(arms, lambda arm: train_and_measure(plan, arm), plan.args.jobs)
    finally:
        stop.set()
    print(f"all arms: {time.monotonic() - started:.0f} s")


def each(arms: Sequence[Arm], work: Callable[[Arm], None], jobs: int) -> None:
    """``work`` on every arm, ``jobs`` at a time. A failure is printed when it happens; the other arms still end."""
    failed = []
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(work, arm): arm for arm in arms}
        for future in as_completed(running):
            error = future.exception()
            if error is None:
                continue
            failed.append(running[future].name)
            text = str(error) if isinstance(error, SystemExit) else "".join(traceback.format_exception(error))
            print(f"arm {failed[-1]} failed: {text}", file=sys.stderr, flush=True)
    if failed:
        sys.exit(f"no record: {', '.join(failed)} failed; the same command goes on with what is left to do")


def collect(plan: Plan, arms: list[Arm]) -> dict[str, Any]:
    """What the report needs, of all arms; their documents, tokens and data must be the same."""
    found = {name: read_arm(plan, arm) for name, arm in arms_of(plan.args).items() if arm in arms}
    for name in ("data_digest", "document_starts", "seq_len"):
        values = {json.dumps(one["position"][name]) for one in found.values()}
        assert len(values) == 1, f"the arms differ in {name}: {values}"
    return {
        "commit": COMMIT,
        "command": shlex.join(["python", *sys.argv]),
        "hardware": processor(),
        "threads": plan.args.threads,
        "jobs": plan.args.jobs,
        "preset": plan.args.preset,
        "steps": plan.steps,
        "seed": plan.seed,
        "arms": found,
    }


def read_arm(plan: Plan, arm: Arm) -> dict[str, Any]:
    """An arm's results from its run folder."""
    folder = plan.folder(arm)
    steps = read_jsonl(folder / "metrics.jsonl")
    return {
        "title": arm.title,
        "label": arm.label,
        "color": arm.color,
        "command": shlex.join(plan.command(arm)),
        "position": json.loads((folder / "position.json").read_text()),
        "tokens": steps[-1]["tokens_seen"],
        "seconds": sum(step["step_ms"] for step in steps) / 1e3,
        "tokens_per_s": sorted(step["tokens_per_s"] for step in steps)[len(steps) // 2],
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="pilot")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--arms", default="dense,ABC,AB,A", help="of dense, A, A2 (A from another seed), AB, ABC")
    parser.add_argument("--tokens", type=float, default=3e6, help="training tokens of each arm")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--summaries", type=int, default=2)
    parser.add_argument("--sigma-min", type=float, default=0.35, help="least cosine of a retrieved record")
    parser.add_argument("--batch", type=int, help="sequences per step (default: the preset's tokens per step)")
    parser.add_argument("--seed", type=int, help="seed of weights and order (default: the preset's)")
    parser.add_argument("--max-mb", type=float, default=24, help="text of the corpus, MB")
    parser.add_argument("--heldout-fraction", type=float, default=0.1, help="share of documents held out")
    parser.add_argument("--weights", choices=("raw", "ema"), default="raw")
    parser.add_argument("--documents", type=int, help="at most so many held-out documents")
    parser.add_argument("--buckets", help="upper ends of the position buckets (default: doubling up to --seq-len)")
    parser.add_argument("--corpus", type=Path, help="text in place of the preset's corpus")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--runs", type=Path, default=Path("runs/tiers"))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each arm")
    parser.add_argument("--jobs", type=int, default=1, help="arms trained at a time")
    parser.add_argument("--out", type=Path, default=ROOT / "outbox" / "benchmarks" / "tiers.md")
    parser.add_argument("overrides", nargs="*", help="further overrides of every arm, e.g. train.optimizer.lr=1e-3")
    args = parser.parse_args()
    known = arms_of(args)
    args.arms = args.arms.split(",")
    if unknown := [name for name in args.arms if name not in known]:
        parser.error(f"no such arm: {', '.join(unknown)}; arms are {', '.join(known)}")
    return args


def main() -> int:
    """Train, measure, write."""
    args = parse()
    known = arms_of(args)
    plan = make_plan(args)
    arms = [known[name] for name in args.arms]
    print(f"{len(arms)} arms of {plan.steps} steps, {args.jobs} at a time, in {args.runs}", flush=True)
    run_all(plan, arms)
    for path in tiers_report.write(collect(plan, arms), args.out):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
