"""``refractor bench attention``: time, visited pairs and memory by length, beside dense flash attention.

Imports no torch: every measurement runs in a process of its own (``bench_measure``).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import CapabilityError, ConfigError, OutputError
from ..telemetry.console import format_duration
from ..training.folder import write_json
from .bench_measure import LONG, Request
from .bench_report import Row, aligned, body, laws, plot, rows_of, short
from .evidence import commit, processor, record

#: Longest backward pass on a CPU: dense attention takes minutes beyond.
LONGEST_BACKWARD = 65536
#: Tokens of the processes whose peak memory is subtracted.
BASELINE = 16
#: Nanoseconds per pair and head of a forward pass, and forward plus backward, for the first estimate of the time left.
_PAIR = (2.5, 9.0)
_START = 4.0
NUMBERS = ("heads", "kv_heads", "head_dim", "window", "block", "summaries", "retrieved", "repeats", "threads")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``bench``."""
    parser = subparsers.add_parser("bench", help="measure attention beside dense flash attention")
    actions = parser.add_subparsers(metavar="WHAT", required=True)
    attention = actions.add_parser(
        "attention",
        help="time, visited pairs and memory by length",
        description="Measure tri-tier attention and torch's dense flash attention by length; write a Markdown record "
        "with JSON and a plot beside it; exit 1 when a cost law fails.",
    )
    attention.add_argument(
        "--lengths", default="4k,16k,64k,128k", help="tokens, e.g. 4k,16k or 512 (default: %(default)s)"
    )
    for name, default, text in (
        ("heads", 4, "query heads"),
        ("kv-heads", 4, "key heads"),
        ("head-dim", 64, "width of a head"),
        ("window", 512, "keys of the sliding window"),
        ("block", 128, "tokens of a summarised block, and of a chunk that retrieves"),
        ("summaries", 2, "summaries of a block, 0 for none"),
        ("retrieved", 20, "retrieved records that a query reads, 0 for none"),
        ("repeats", 3, f"runs after a warm-up, of which the median counts; one run where it takes {LONG:.0f} s"),
        ("threads", 1, "CPU threads"),
    ):
        attention.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: %(default)s)")
    attention.add_argument("--backend", default="auto", help="relation.backend (default: %(default)s)")
    attention.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    default_out = Path("outbox/benchmarks/attention_cpu.md")
    attention.add_argument("--out", type=Path, default=default_out, help="the record (default: %(default)s)")
    attention.set_defaults(run=bench)


def bench(args: argparse.Namespace) -> int:
    """Measure, print, write; 1 when a cost law fails.

    Raises:
        ConfigError: a length or number that makes no sense.
        OutputError: the record cannot be written.
        CapabilityError: the device, the backend or the memory is not there.
    """
    lengths = parse_lengths(args.lengths)
    template = _template(args)
    out = _writable(args.out)
    measured, found = commit(), []
    cases = list(_cases(template, lengths))
    clock = _Eta([_estimate(case.request) for case in cases])
    for number, case in enumerate(cases, 1):
        answer = _measure(case.request)
        found.append({**answer, "baseline": case.baseline})
        print(f"[{number:>2}/{len(cases)}] {_progress(case, answer)} · {clock.done(number)} left", flush=True)
    wall = template.device == "cpu" and template.threads > 1
    rows = rows_of(found, wall)
    print("\n" + aligned(rows) + "\n")
    print("\n".join(map(str, verdicts := laws(rows))))
    _write(out, rows, found, measured, _command(args), wall)
    return int(any(law.holds is False for law in verdicts))


def _command(args: argparse.Namespace) -> str:
    """The command that measures this again."""
    flags = ("lengths", *NUMBERS, "backend", "device", "out")
    parts = [part for name in flags for part in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    return shlex.join(["refractor", "bench", "attention", *parts])


def parse_lengths(text: str) -> list[int]:
    """``4k,512`` -> [512, 4096]. Raises: ConfigError."""
    lengths = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(k?)\s*", part)
        if match is None or int(match[1]) == 0:
            raise ConfigError(f"--lengths: '{part}' is not a number of tokens; write for example 4k,16k or 512.")
        lengths.add(int(match[1]) * (1024 if match[2] else 1))
    return sorted(lengths)


def _template(args: argparse.Namespace) -> Request:
    """The request of every case but for its subject, length and mode."""
    least = {"summaries": 0, "retrieved": 0}
    for name in NUMBERS:
        value, floor = getattr(args, name), least.get(name, 1)
        if value < floor:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least {floor}.")
    if args.heads % args.kv_heads:
        raise ConfigError(f"--heads {args.heads} is not a multiple of --kv-heads {args.kv_heads}; change one of them.")
    if args.head_dim % 2:
        raise ConfigError(f"--head-dim is {args.head_dim}; rotary positions need an even number.")
    chosen = {name: getattr(args, name) for name in (*NUMBERS, "backend", "device")}
    return Request(subject="fabric", length=0, backward=False, **chosen)


def _writable(out: Path) -> Path:
    """Checked before anything is measured."""
    if out.suffix != ".md":
        raise ConfigError(f"--out {out} does not end in .md; the record is Markdown, with .json and .png beside it.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for path in (out, out.with_suffix(".json"), out.with_suffix(".png")):
            path.open("ab").close()
            if path.stat().st_size == 0:
                path.unlink()
    except OSError as error:
        raise OutputError(f"--out {out} cannot be written ({error.strerror}); name a file elsewhere.") from None
    return out


@dataclass(frozen=True)
class _Case:
    request: Request
    baseline: bool


def _cases(template: Request, lengths: Sequence[int]) -> Iterator[_Case]:
    for length in (BASELINE, *lengths):
        for backward in (False, True):
            if backward and template.device == "cpu" and length > LONGEST_BACKWARD:
                continue
            for subject in ("fabric", "sdpa"):
                request = replace(template, subject=subject, length=length, backward=backward)
                yield _Case(request, baseline=length == BASELINE)


def _measure(request: Request) -> dict[str, Any]:
    """One process. Raises: CapabilityError."""
    command = [sys.executable, "-W", "ignore", "-m", "refractor_megatron.evaluation.bench_measure"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(request.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    text = json.dumps(asdict(request))
    done = subprocess.run([*command, text], env=environment, stdout=subprocess.PIPE, text=True, check=False)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}
    if "error" in answer:
        raise CapabilityError(answer["error"])
    if done.returncode < 0:
        raise CapabilityError(
            f"measuring {request.subject} at {short(request.length)} was ended by signal {-done.returncode}, probably "
            "for want of memory; leave the longest of --lengths out."
        )
    assert done.returncode == 0, f"bench_measure {text} ended with {done.returncode}"
    return answer


class _Eta:
    """Time left, from estimates of all cases scaled by how the finished ones went."""

    def __init__(self, estimates: Sequence[float]) -> None:
        self.estimates, self.started = estimates, time.monotonic()

    def done(self, cases: int) -> str:
        """Text for the time left after the first ``cases`` cases."""
        scale = (time.monotonic() - self.started) / sum(self.estimates[:cases])
        return format_duration(scale * sum(self.estimates[cases:])).strip()


def _estimate(request: Request) -> float:
    """Seconds that a case may take."""
    keys = request.length / 2
    if request.subject == "fabric":
        summaries = keys / request.block * request.summaries
        keys = min(keys, 1.25 * request.window + summaries + request.retrieved)
    run = keys * request.length * request.heads * _PAIR[request.backward] * 1e-9
    return _START + run * (1 if run > LONG else 1 + request.repeats)


def _progress(case: _Case, answer: dict[str, Any]) -> str:
    request = case.request
    cpu, wall = sorted(answer["laps"])[len(answer["laps"]) // 2]
    mode = "forward + backward" if request.backward else "forward"
    what = "baseline of memory" if case.baseline else short(request.length)
    return f"{what} {request.subject} {mode}: {cpu:.3g} s CPU, {wall:.3g} s wall, peak {answer['peak'] / 2**20:.0f} MiB"


def _write(
    out: Path, rows: Sequence[Row], found: Sequence[dict[str, Any]], measured: str, command: str, wall: bool
) -> None:
    """The record, its JSON and its plot."""
    first = found[0]
    request = Request(**first["request"])
    backend = first["backend"]
    settings = (
        f"Batch 1, {request.heads} heads of {request.head_dim} over {request.kv_heads} key heads, {first['dtype']}; "
        f"one plain document, window {request.window}, {request.summaries} summaries per block of {request.block}, "
        f"{request.retrieved} retrieved records for each query; backend {backend}, torch {first['torch']}, "
        f"{request.threads} thread{'s' * (request.threads > 1)}."
    )
    if request.device == "cuda":
        clock = f"Times are the device's, the median of {request.repeats} runs after a warm-up."
    else:
        kind = "wall" if wall else "CPU"
        clock = (
            f"Times are {kind} seconds, the median of {request.repeats} runs after a warm-up; one run where it takes "
        )
        clock += f"more than {LONG:.0f} s."
    beside = [out.with_suffix(".json"), out.with_suffix(".png")]
    write_json(beside[0], {"commit": measured, "command": command, "measurements": found})
    plot(rows, f"Attention by length: {backend} beside dense flash attention, {processor(first['gpu'])}", beside[1])
    machine = processor(first["gpu"]) + " (a shared machine: single times are upper bounds)"
    text = body(rows, settings, clock, beside[1].name)
    title = f"Attention by length, {request.device.upper()}"
    out.write_text(record(title, measured, machine, [command], [path.name for path in beside], text))
    print(f"wrote {out}, {beside[0].name}, {beside[1].name}")
