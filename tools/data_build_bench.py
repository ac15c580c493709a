"""The whole build of a dataset: speed, memory, and kills that change no byte; writes outbox/benchmarks/data_build.*.

python tools/data_build_bench.py --shards 'WORK/ingest-*/*/*.arrow' --packages CACHE/debian --work SCRATCH

Every build is ``data_pipeline.build.build`` in a fresh process on two cores, with the options of ``data=multilingual``:
filters, perplexity, near-duplicates, paragraphs, decontamination, tokenizer, made tasks, four stages. Text already
extracted is read from .jsonl.zst, made here once from shards that an ingest stage wrote; with ``--packages``, the
folder of fetched .deb files, also from those, most of which is extracting main text from HTML.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from data_build_text import text_of

from refractor_megatron.evaluation.evidence import commit, processor

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("speed", "memory", "kills")
PRESET = "data=multilingual"
NAME = "build-bench"
CORES = 2
#: Seconds between looks at the memory of all processes of a build.
LOOK = 0.25
#: Of a build's last stretch, which has no stages, kills fall into this much, so that it is not done before them.
LAST_STRETCH = 0.6
MOST_ATTEMPTS = 5


def main() -> int:
    args = arguments()
    if args.one:
        return one_build(json.loads(args.one))
    from data_build_report import write

    cores = set(sorted(os.sched_getaffinity(0))[:CORES])
    os.sched_setaffinity(0, cores)
    args.work.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "commit": commit(),
        "hardware": processor(),
        "cores": len(cores),
        "command": shlex.join(["python", "tools/data_build_bench.py", *sys.argv[1:]]),
        "options": [PRESET, *args.set],
        "load_average": os.getloadavg()[0],
    }
    warm(args)
    paths: list[Path] = []
    for part, measure in (("speed", speed), ("memory", memory), ("kills", kills)):
        if part in args.parts:
            result[part] = measure(args)
            paths = write(result, args.out)  # each time: a later part may fail
    print(*paths, sep="\n")
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", help="pattern of the .arrow files of an ingest stage: text of the corpus")
    parser.add_argument("--packages", type=Path, help="folder of fetched packages, with their receipt")
    parser.add_argument("--work", type=Path, help="scratch folder; several times the text")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), help=",".join(PARTS))
    parser.add_argument("--share", type=float, default=1.0, help="of every shard's documents, for a trial")
    parser.add_argument("--rounds", type=int, default=3, help="builds from text whose median is the speed")
    parser.add_argument("--copies", type=int, default=4, help="times the text for the second peak of memory")
    parser.add_argument("--kill-mb", type=float, default=30.0, help="text of the build that is killed")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the delays until a kill")
    parser.add_argument("--set", nargs="*", default=[], help="options beside the preset: data.KEY=VALUE")
    parser.add_argument("--out", type=Path, default=ROOT / "outbox" / "benchmarks" / "data_build.md")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown parts {sorted(unknown)}; choose from {', '.join(PARTS)}")
    if not args.one and not (args.shards and args.work):
        parser.error("--shards and --work are needed")
    return args


# One build.


@dataclass
class Build:
    """A build under way in a process of its own; ``events`` are what it has said so far."""

    folder: Path
    corpus: Path | None
    options: list[str]
    began: float = 0.0
    peaks: list[tuple[float, float, float]] = field(default_factory=list)  # seconds, MB, MB that no file backs

    def start(self) -> Build:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._events = self.folder / "events.jsonl"
        self._events.write_text("")
        told = {"folder": str(self.folder), "corpus": self.corpus and str(self.corpus), "options": self.options}
        command = [sys.executable, __file__, "--one", json.dumps(told)]
        with (self.folder / "log").open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        return self

    @property
    def events(self) -> list[dict[str, Any]]:
        lines = self._events.read_text().split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def wait(self) -> dict[str, Any]:
        """Until it is done: seconds, bytes, steps. Stops the benchmark if the build fails."""
        if self.process.wait():
            raise SystemExit(f"a build failed; see {self.folder / 'log'}")
        return summary(self.events)

    def watched(self) -> dict[str, Any]:
        """``wait``, looking at the memory of all its processes."""
        done = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(done,))
        watcher.start()
        try:
            return self.wait()
        finally:
            done.set()
            watcher.join()

    def _watch(self, done: threading.Event) -> None:
        while not done.wait(LOOK):
            held = [proportional(pid) for pid in tree(self.process.pid)]
            self.peaks.append((time.monotonic(), sum(one[0] for one in held), sum(one[1] for one in held)))


def tree(pid: int) -> list[int]:
    """A process, then all below it, those that lead sessions of their own included."""
    try:
        return [pid, *(one.pid for one in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def proportional(pid: int) -> tuple[float, float]:
    """MB of a process: all, and what no file backs. Pages that n processes share count an n-th in each (PSS)."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0, 0.0
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("Pss")}
    return found.get("Pss", 0.0), found.get("Pss_Anon", 0.0)


def summary(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Seconds of the whole and of every step, and text that came in."""
    first, last = events[0], events[-1]
    assert first["event"] == "begin" and last["event"] == "done"
    seconds, steps = last["t"] - first["t"], dict[str, float]()
    for event in events:
        if event["event"] == "stage":
            steps[event["name"]] = steps.get(event["name"], 0.0) + event["seconds"]
    rest = seconds - sum(steps.values())
    return {"seconds": seconds, "steps": {**steps, "between stages": rest}, **{k: last[k] for k in ("bytes", "lines")},
            "mb_per_s": last["bytes"] / 1e6 / seconds, "dataset": last["dataset"]}  # fmt: skip


def one_build(told: dict[str, Any]) -> int:
    """In a process of its own: the build, saying into events.jsonl when each stage begins and ends."""
    from data_pipeline import build as room
    from data_pipeline.engine.local import LocalExecutor
    from refractor_megatron.config import compose
    from refractor_megatron.training.data_options import options_of

    folder, corpus = Path(told["folder"]), told["corpus"] and Path(told["corpus"])
    lines: list[str] = []
    with (folder / "events.jsonl").open("a", buffering=1) as out:

        def say(event: str, **more: Any) -> None:
            out.write(json.dumps({"event": event, "t": time.monotonic(), **more}) + "\n")

        def log(line: str) -> None:
            lines.append(line)
            print(line, flush=True)

        inner = LocalExecutor.run

        def run(self: LocalExecutor, stage: Any, work: Path, log: Any) -> Path:
            say("enter", name=stage.name)
            start = time.monotonic()
            done = inner(self, stage, work, log)
            say("stage", name=stage.name, seconds=time.monotonic() - start)
            return done

        LocalExecutor.run = run  # type: ignore[method-assign]
        options = options_of(compose([PRESET, *told["options"]]), None if corpus is None else NAME)
        say("begin")
        built = room.build(corpus, folder / "out", options, cache=folder / "cache", log=log)
        ledgers = (folder / "cache").glob("stages/*/ingest-*/*/ledger.json")
        size = sum(json.loads(path.read_bytes())["bytes"] for path in ledgers)
        said = [line for line in lines if re.fullmatch(r"data: .*: [0-9.]+ s", line)]
        say("done", bytes=size, lines=said, dataset=str(built.folder))
    return 0


def warm(args: argparse.Namespace) -> None:
    """A small build, so that compiled code is on the disk."""
    corpus = text_of(args.shards, args.work / "text-warm", min(args.share, 0.01))
    with_scratch = args.work / "warm"
    shutil.rmtree(with_scratch, ignore_errors=True)
    Build(with_scratch, corpus, args.set).start().wait()
    shutil.rmtree(with_scratch)


def fresh(args: argparse.Namespace, name: str) -> Path:
    folder: Path = args.work / name
    shutil.rmtree(folder, ignore_errors=True)
    return folder


# The three parts.


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Builds from text, the median of some, and one from packages."""
    corpus, rounds = text_of(args.shards, args.work / "text-1", args.share), []
    for number in range(args.rounds):
        rounds.append(Build(fresh(args, "speed"), corpus, args.set).start().wait())
        print(f"speed: round {number + 1}, {rounds[-1]['mb_per_s']:.1f} MB/s", file=sys.stderr)
    shutil.rmtree(args.work / "speed")
    median = sorted(rounds, key=lambda one: one["mb_per_s"])[(len(rounds) - 1) // 2]
    found: dict[str, Any] = {"text": {"median": median, "rounds": rounds}}
    if args.packages:
        folder = fresh(args, "packages")
        shutil.copytree(args.packages, folder / "cache" / "debian", copy_function=os.link)
        found["packages"] = Build(folder, None, args.set).start().wait()
        print(f"packages: {found['packages']['mb_per_s']:.1f} MB/s", file=sys.stderr)
        shutil.rmtree(folder)
    return found


def memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Peaks of a build from the text once, and from ``copies`` times as much."""
    found = []
    for copies in (1, args.copies):
        corpus = text_of(args.shards, args.work / f"text-{copies}", args.share, copies)
        cap = [] if copies == 1 else [f"data.max_mb={1024 * copies}"]
        build = Build(fresh(args, "memory"), corpus, [*args.set, *cap]).start()
        said = build.watched()
        begin = build.events[0]["t"]
        at, peak, _ = max(build.peaks, key=lambda one: one[1])
        entered = [one["name"] for one in build.events if one["event"] in ("enter", "stage") and one["t"] <= at]
        inside = [one["event"] for one in build.events if one["t"] <= at][-1] == "enter"
        found.append(
            {
                "copies": copies,
                "megabytes": said["bytes"] / 1e6,
                "seconds": said["seconds"],
                "mb_per_s": said["mb_per_s"],
                "peak_mb": peak,
                "peak_unbacked_mb": max(one[2] for one in build.peaks),
                "at": ("in " if inside else "after ") + entered[-1] if entered else "at the start",
                "options": cap,
                "curve": [[round(t - begin, 2), round(pss, 1), round(own, 1)] for t, pss, own in build.peaks],
            }
        )
        print(f"memory: {copies} times, {peak:.0f} MB", file=sys.stderr)
        shutil.rmtree(args.work / "memory")
    return found


def kills(args: argparse.Namespace) -> dict[str, Any]:
    """One build killed again and again and continued, beside one that was left alone."""
    whole = int((text_of(args.shards, args.work / "text-1", args.share) / "bytes.txt").read_text())
    share = min(1.0, args.kill_mb * 1e6 / whole) * args.share
    corpus = text_of(args.shards, args.work / f"text-kills-{share:.4f}", share)
    code = code_digest()
    reference = Build(fresh(args, "alone"), corpus, args.set).start()
    alone = reference.wait()
    random = np.random.default_rng(args.seed)
    attempts, said = 0, list[dict[str, Any]]()
    while len(said) < args.kills:
        if attempts == MOST_ATTEMPTS:
            raise SystemExit("a build was always done before its last kill; give more text (--kill-mb)")
        attempts += 1
        folder = fresh(args, "killed")
        said = list(killed(folder, corpus, args.set, instants(reference.events, random, args.kills)))
    last = Build(folder, corpus, args.set).start().wait()
    if code_digest() != code:
        raise SystemExit(
            "the code was edited while the builds ran, which says nothing about kills; run this part again"
        )
    ours, theirs = (contents(Path(one["dataset"])) for one in (alone, last))
    roots = [json.loads((Path(one["dataset"]) / "manifest.json").read_bytes())["merkle_root"] for one in (alone, last)]
    workers = {pid for kill in said for pid in kill.pop("workers")}
    left = still_there(workers)
    found = {
        "megabytes": alone["bytes"] / 1e6,
        "seconds_alone": alone["seconds"],
        "kills": said,
        "attempts": attempts,
        "seconds_last": last["seconds"],
        "roots": roots,
        "same_folder_name": Path(alone["dataset"]).name == Path(last["dataset"]).name,
        "files": len(ours),
        "differing": sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)),
        "workers_left": left,
    }
    for name in ("alone", "killed"):
        shutil.rmtree(args.work / name)
    return found


def instants(events: list[dict[str, Any]], random: np.random.Generator, count: int) -> list[tuple[int, float]]:
    """Instants drawn over the whole of a build, in order: how many events it has said by then, and seconds since."""
    times = [event["t"] - events[0]["t"] for event in events]
    drawn = np.sort(random.uniform(0, times[-1], count)).tolist()
    said = [int(np.searchsorted(times, one, "right")) for one in drawn]
    after = [one - times[number - 1] for number, one in zip(said, drawn, strict=True)]
    last = len(events) - 1  # all but "done"
    return [(n, LAST_STRETCH * delay if n == last else delay) for n, delay in zip(said, after, strict=True)]


def killed(
    folder: Path, corpus: Path, options: list[str], when: Sequence[tuple[int, float]]
) -> Iterator[dict[str, Any]]:
    """Starts the build once for each instant and kills it then: every other time all of its processes, else only the
    first, whose workers have to notice. Ends early if the build is done before its kill."""
    for number, (said, delay) in enumerate(when):
        build = Build(folder, corpus, options).start()
        while len(build.events) < said and build.process.poll() is None:
            time.sleep(0.01)
        try:
            build.process.wait(delay)
        except subprocess.TimeoutExpired:
            pids = tree(build.process.pid)
            for pid in pids if number % 2 == 0 else pids[:1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            build.process.wait()
            last = build.events[-1]
            if last["event"] == "done":
                return
            where = ("in " if last["event"] == "enter" else "after ") + last.get("name", "the start")
            whom = f"all of {len(pids)}" if number % 2 == 0 else f"the first of {len(pids)}"
            print(f"kills: {number + 1}, {where}, {delay:.1f} s, {whom}", file=sys.stderr)
            yield {"delay": delay, "where": where, "whom": whom, "workers": pids[1:]}
        else:
            if build.process.returncode:
                raise SystemExit(f"a continued build failed; see {folder / 'log'}")
            return


def still_there(pids: set[int], seconds: float = 10.0) -> int:
    """How many of these are, after some seconds, still workers of a build."""
    deadline = time.monotonic() + seconds
    while (alive := sum(map(is_worker, pids))) and time.monotonic() < deadline:
        time.sleep(0.1)
    return alive


def is_worker(pid: int) -> bool:
    """Whether there is such a process and it is a worker: numbers are given again."""
    try:
        return any("data_pipeline.engine.worker" in word for word in psutil.Process(pid).cmdline())
    except psutil.Error:
        return False


def code_digest() -> str:
    """Of all code that builds use."""
    state = hashlib.sha256()
    for path in sorted(
        path for room in ("data_pipeline", "refractor_megatron") for path in (ROOT / room).rglob("*.py")
    ):
        state.update(path.read_bytes())
    return state.hexdigest()


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file of a dataset, by name."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    sys.exit(main())
