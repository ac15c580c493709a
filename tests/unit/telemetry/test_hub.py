"""A broken, slow or full sink never stops or delays training, and a resumed log has every step once."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from refractor_megatron.errors import CapabilityError, OutputError
from refractor_megatron.telemetry import hub
from refractor_megatron.telemetry.hub import SinkWorker, Telemetry
from refractor_megatron.telemetry.registry import MetricValue
from refractor_megatron.telemetry.sinks.jsonl import JsonlWriter, read_jsonl


class Recorder:
    """A sink that keeps what it gets; `gate` holds its writes back, `fail` names the method that raises."""

    name = "recorder"

    def __init__(self, fail: str = "", gate: threading.Event | None = None) -> None:
        self.fail, self.gate = fail, gate
        self.seen: list[tuple[int, str, dict[str, MetricValue]]] = []
        self.started = threading.Event()
        self.closed = False

    def open(self) -> None:
        self._maybe_fail("open")

    def write(self, step: int, time_s: float, group: str, metrics: Mapping[str, MetricValue]) -> None:
        self.started.set()
        if self.gate is not None:
            self.gate.wait(20)
        self._maybe_fail("write")
        self.seen.append((step, group, dict(metrics)))

    def close(self) -> None:
        self._maybe_fail("close")
        self.closed = True

    def _maybe_fail(self, where: str) -> None:
        if self.fail == where:
            raise RuntimeError(f"broken\nin {where}")


def _telemetry(folder: Path, *sinks: Recorder, resume_step: int = 0) -> tuple[Telemetry, list[str]]:
    warnings: list[str] = []
    telemetry = Telemetry(
        folder, tensorboard=False, wandb=False, config={}, resume_step=resume_step, warn=warnings.append,
        extra_sinks=sinks,
    )  # fmt: skip
    return telemetry, warnings


def test_records_reach_the_log_at_once_and_sinks_by_close(tmp_path: Path) -> None:
    sink = Recorder()
    telemetry, warnings = _telemetry(tmp_path, sink)
    telemetry.log(1, {"loss": 2.5, "expert_load": [0.5, 0.5]})
    assert read_jsonl(tmp_path / "metrics.jsonl")[0]["loss"] == 2.5
    telemetry.log_eval(1, "ema", {"loss": 2.0})
    telemetry.close()
    record = read_jsonl(tmp_path / "eval.jsonl")[0]
    assert (record["step"], record["weights"], record["loss"]) == (1, "ema", 2.0)
    assert [(step, group) for step, group, _ in sink.seen] == [(1, "train"), (1, "eval/ema")]
    assert sink.closed and warnings == [] and telemetry.dropped == {"recorder": 0}


def test_unregistered_metric_is_refused_and_not_written(tmp_path: Path) -> None:
    telemetry, _ = _telemetry(tmp_path)
    with pytest.raises(AssertionError, match="lossy"):
        telemetry.log(1, {"lossy": 1.0})
    with pytest.raises(AssertionError, match="raw or ema"):
        telemetry.log_eval(1, "mean", {"loss": 1.0})
    telemetry.close()
    assert read_jsonl(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("fail", ["open", "write", "close"])
def test_a_sink_that_raises_is_disabled_with_one_line(tmp_path: Path, fail: str) -> None:
    broken, healthy = Recorder(fail), Recorder()
    telemetry, warnings = _telemetry(tmp_path, broken, healthy)
    for step in range(1, 21):
        telemetry.log(step, {"loss": 1.0})
    telemetry.close()
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == len(healthy.seen) == 20
    assert warnings == [f"warning: telemetry sink recorder is disabled: RuntimeError: broken in {fail}"]
    assert len(broken.seen) == (20 if fail == "close" else 0)


def test_records_after_a_failure_are_counted_as_dropped() -> None:
    gate = threading.Event()
    worker = SinkWorker(Recorder("write", gate), 8, lambda text: None)
    for step in range(3):
        worker.put((step, 0.0, "train", {}))
    gate.set()
    worker.finish()
    worker.join(5)
    worker.put((9, 0.0, "train", {}))
    assert worker.dropped == 3, "two were queued behind the one that failed, one came after"


def test_full_queue_drops_the_oldest_and_never_blocks() -> None:
    gate = threading.Event()
    sink, warnings = Recorder(gate=gate), list[str]()
    worker = SinkWorker(sink, 4, warnings.append)
    worker.put((0, 0.0, "train", {}))
    assert sink.started.wait(5)  # record 0 is inside write, the queue is empty
    began = time.monotonic()
    for step in range(1, 11):
        worker.put((step, 0.0, "train", {}))
    assert time.monotonic() - began < 1.0
    gate.set()
    worker.finish()
    worker.join(5)
    assert [step for step, _, _ in sink.seen] == [0, 7, 8, 9, 10]
    assert worker.dropped == 6
    assert warnings == ["warning: telemetry sink recorder fell behind and lost 6 records"]


def test_a_hanging_sink_delays_neither_training_nor_close_nor_others(tmp_path: Path) -> None:
    gate = threading.Event()
    hanging, healthy = Recorder(gate=gate), Recorder()
    telemetry, warnings = _telemetry(tmp_path, hanging, healthy)
    began = time.monotonic()
    for step in range(1, 51):
        telemetry.log(step, {"loss": 1.0})
    telemetry.close(timeout=0.3)
    assert time.monotonic() - began < 3.0
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == len(healthy.seen) == 50
    assert len(warnings) == 1 and "recorder did not close in time; 49 records lost" in warnings[0]
    gate.set()


def test_disk_full_disables_the_log_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = Recorder()
    telemetry, warnings = _telemetry(tmp_path, sink)
    monkeypatch.setattr(telemetry._logs[hub.METRICS_FILE], "_writer", JsonlWriter(Path("/dev/full")))
    for step in (1, 2, 3):
        telemetry.log(step, {"loss": 1.0})
    telemetry.close()
    assert len(sink.seen) == 3
    assert len(warnings) == 1
    assert "metrics.jsonl is no longer written" in warnings[0] and "No space left" in warnings[0]


def test_resume_gives_every_step_once(tmp_path: Path) -> None:
    first, _ = _telemetry(tmp_path)
    for step in range(1, 8):
        first.log(step, {"loss": float(step)})
    first.log_eval(5, "raw", {"loss": 5.0})
    first.log_eval(7, "raw", {"loss": 7.0})
    with (tmp_path / "metrics.jsonl").open("ab") as file:  # killed in the middle of step 8's line
        file.write(b'{"step":8,"time":17')
    second, _ = _telemetry(tmp_path, resume_step=5)
    for step in range(6, 9):
        second.log(step, {"loss": 10.0 * step})
    second.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 8, "the file itself holds every step once, for readers that do not deduplicate"
    records = read_jsonl(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(1, 9)) and records[5]["loss"] == 60.0
    assert [r["step"] for r in read_jsonl(tmp_path / "eval.jsonl", ("step", "weights"))] == [5]


def test_missing_library_and_unwritable_folder_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OutputError, match="file"):
        _telemetry(blocked)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CapabilityError, match=r"telemetry\.wandb=true needs .* telemetry\.wandb=false"):
        Telemetry(tmp_path, tensorboard=False, wandb=True, config={})
