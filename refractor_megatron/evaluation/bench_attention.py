"""``refractor bench attention``: time, visited pairs and memory by length, beside dense flash attention.

Imports no torch: every measurement runs in a process of its own (``bench_measure``).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..errors import CapabilityError, ConfigError, OutputError
from ..telemetry.console import format_duration
from ..training.folder import write_json
from .bench_measure import LONG, Request, Subject
from .bench_report import Row, aligned, body, keys_per_query, laws, mebibytes, parse_lengths, plot, rows_of, short
from .evidence import commit, processor, record

#: Longest backward pass on a CPU: dense attention takes minutes beyond.
LONGEST_BACKWARD = 65536
#: Nanoseconds per pair and head of a forward pass, and forward plus backward, for the first estimate of the time left.
_PAIR = (2.5, 9.0)
_START = 4.0
NUMBERS = (
    "heads", "kv_heads", "head_dim", "window", "block", "summaries", "levels", "fanout", "retrieved", "repeats",
    "threads",
)  # fmt: skip


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``bench``."""
    parser = subparsers.add_parser("bench", help="measure attention beside dense flash attention")
    actions = parser.add_subparsers(metavar="WHAT", required=True)
    attention = actions.add_parser(
        "attention",
        help="time, visited pairs and memory by length",
        description="Measure tri-tier attention and torch's dense flash attention by length; write a Markdown record "
        "with JSON and a plot beside it; exit 1 when a cost law fails. The default takes 5 to 20 minutes on a CPU "
        "core, most of them for dense attention at 64k and 128k; --lengths 4k,16k takes one or two.",
    )
    attention.add_argument(
        "--lengths", default="4k,16k,64k,128k", help="tokens, e.g. 4k,16k or 512; k is 1024 (default: %(default)s)"
    )
    for name, default, text in (
        ("heads", 4, "query heads"),
        ("kv-heads", 4, "key heads"),
        ("head-dim", 64, "width of a head"),
        ("window", 512, "keys of the sliding window"),
        ("block", 128, "tokens of a summarised block, and of a chunk that retrieves"),
        ("summaries", 2, "summaries of a block, 0 for none"),
        ("levels", 1, "levels of summaries, 1 or 2"),
        ("fanout", 16, "blocks of a group, which has summaries of its own with --levels 2"),
        ("retrieved", 20, "retrieved records that a query reads, 0 for none"),
        ("repeats", 3, f"runs after a warm-up, of which the median counts; one run where it takes {LONG:.0f} s"),
        ("threads", 1, "CPU threads"),
    ):
        attention.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: %(default)s)")
    attention.add_argument("--backend", default="auto", help="relation.backend (default: %(default)s)")
    attention.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    attention.add_argument("--note", help="a line for the record's head, e.g. what else ran on the machine")
    attention.add_argument("--out", type=Path, help="the record (default: attention_DEVICE.md in this folder)")
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
    args.out = out = _writable(args.out or Path(f"attention_{args.device}.md"))
    cases = list(_cases(template, lengths))
    _ask([asdict(case) for case in cases], cases[0])
    measured, found = commit(), []
    clock = _Eta([_estimate(case) for case in cases])
    for number, case in enumerate(cases, 1):
        found.append(answer := _ask(asdict(case), case))
        at = f"{number}/{len(cases)}".rjust(2 * len(str(len(cases))) + 1)
        print(f"[{at}] {_progress(case, answer)} · {clock.done(number)} left", flush=True)
    wall = template.device == "cpu" and template.threads > 1
    rows = rows_of(found, wall)
    print("\n" + aligned(rows) + "\n")
    print("\n".join(map(str, verdicts := laws(rows))))
    _write(out, rows, found, measured, args, wall)
    return int(any(law.holds is False for law in verdicts))


def _command(args: argparse.Namespace) -> str:
    """The command that measures this again."""
    flags = ("lengths", *NUMBERS, "backend", "device", *(["note"] if args.note else []), "out")
    parts = [part for name in flags for part in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    return shlex.join(["refractor", "bench", "attention", *parts])


def _template(args: argparse.Namespace) -> Request:
    """The request of every case but for its subject, length and mode."""
    least = {"summaries": 0, "retrieved": 0, "fanout": 2}
    for name in NUMBERS:
        value, floor = getattr(args, name), least.get(name, 1)
        if value < floor:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least {floor}.")
    if args.heads % args.kv_heads:
        raise ConfigError(f"--heads {args.heads} is not a multiple of --kv-heads {args.kv_heads}; change one of them.")
    if args.head_dim % 2:
        raise ConfigError(f"--head-dim is {args.head_dim}; rotary positions need an even number.")
    if args.levels > 2 or (args.levels == 2 and not args.summaries):
        raise ConfigError(f"--levels is {args.levels}; it is 1 or 2, and 2 needs --summaries of at least 1.")
    chosen = {name: getattr(args, name) for name in (*NUMBERS, "backend", "device")}
    return Request(subject="tri-tier", length=0, backward=False, **chosen)


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


def _cases(template: Request, lengths: Sequence[int]) -> Iterator[Request]:
    subjects: tuple[Subject, ...] = ("tri-tier", "dense")
    for length in lengths:
        for backward in (False, True):
            if backward and template.device == "cpu" and length > LONGEST_BACKWARD:
                continue
            for subject in subjects:
                yield replace(template, subject=subject, length=length, backward=backward)


def _ask(question: object, request: Request) -> dict[str, Any]:
    """One process of ``bench_measure``; request: what it is about. Raises: CapabilityError."""
    command = [sys.executable, "-W", "ignore", "-m", "refractor_megatron.evaluation.bench_measure"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(request.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    text = json.dumps(question)
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
    if request.subject == "tri-tier":
        keys = min(keys, request.window / 4 + keys_per_query(request))
    run = keys * request.length * request.heads * _PAIR[request.backward] * 1e-9
    return _START + run * (1 if run > LONG else 1 + request.repeats)


def _progress(request: Request, answer: dict[str, Any]) -> str:
    cpu, wall = sorted(answer["laps"])[len(answer["laps"]) // 2]
    mode = "forward + backward" if request.backward else "forward"
    seconds = f"{cpu:.3g} s CPU, {wall:.3g} s wall" if request.device == "cpu" else f"{wall:.3g} s"
    return f"{short(request.length)} {request.subject} {mode}: {seconds}, {mebibytes(answer['memory']):.0f} MiB"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _write(
    out: Path, rows: Sequence[Row], found: Sequence[dict[str, Any]], measured: str, args: argparse.Namespace, wall: bool
) -> None:
    """The record, its JSON and its plot."""
    first = found[0]
    request = Request(**first["request"])
    backend = first["backend"]
    groups = f" and per group of {request.fanout} blocks" if request.levels == 2 else ""
    settings = (
        f"Batch 1, {_count(request.heads, 'head')} of {request.head_dim} over {_count(request.kv_heads, 'key head')}, "
        f"{first['dtype']}; one plain document, window {request.window}, "
        f"{_count(request.summaries, 'summary', 'summaries')} per block of {request.block}{groups}, "
        f"{_count(request.retrieved, 'retrieved record')} for each query; tri-tier backend {backend}, "
        f"torch {first['torch']}, {_count(request.threads, 'thread')}."
    )
    kind = "the device's" if request.device == "cuda" else f"{'wall' if wall else 'CPU'} seconds"
    runs = f"the median of {request.repeats} runs" if request.repeats > 1 else "one run"
    clock = f"Times are {kind}, {runs} after a warm-up."
    beside = [out.with_suffix(".json"), out.with_suffix(".png")]
    command, machine = _command(args), processor(first["gpu"])
    write_json(beside[0], {"commit": measured, "command": command, "measurements": found})
    plot(rows, f"Attention by length: tri-tier ({backend}) beside dense, {machine}", beside[1])
    text = body(rows, request, settings, clock, beside[1].name)
    title = f"Attention by length, {request.device.upper()}"
    extra = [f"note: {args.note}"] if args.note else []
    out.write_text(record(title, measured, machine, [command], [path.name for path in beside], text, extra))
    print(f"wrote {out}, {beside[0].name}, {beside[1].name}")
