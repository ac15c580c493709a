"""TensorBoard and W&B files, read back with their own readers; neither library pulls in torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from refractor_megatron.telemetry.sinks.base import flatten
from refractor_megatron.telemetry.sinks.tensorboard import TensorBoardSink


def test_lists_become_indexed_scalars_in_order() -> None:
    flat = flatten("train", {"loss": 1, "expert_load": [0.0] * 101})
    assert flat["train/loss"] == 1.0
    assert list(flat)[1:] == sorted(flat, key=str)[: len(flat) - 1] and "train/expert_load/007" in flat


def test_tensorboard_events_and_purge_after_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume, steps in ((0, range(1, 6)), (3, range(4, 7))):
        sink = TensorBoardSink(tmp_path, resume)
        sink.open()
        for step in steps:
            sink.write(step, 1000.0 + step, "train", {"loss": step + resume / 10, "expert_load": [0.25, 0.75]})
        sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["train/loss", "train/expert_load/00", "train/expert_load/01"]
    scalars = [(e.step, round(e.value, 3), e.wall_time) for e in events.Scalars("train/loss")]
    assert scalars == [
        (1, 1.0, 1001.0), (2, 2.0, 1002.0), (3, 3.0, 1003.0),
        (4, 4.3, 1004.0), (5, 5.3, 1005.0), (6, 6.3, 1006.0),
    ]  # fmt: skip


_SCRIPT = """
import sys
from pathlib import Path
from refractor_megatron.telemetry.hub import Telemetry
telemetry = Telemetry(Path(sys.argv[1]), tensorboard=True, wandb=True, config={"train": {"steps": 2}}, resume_step=0)
telemetry.log(1, {"loss": 2.5})
telemetry.log_eval(1, "raw", {"loss": 2.25})
telemetry.close(timeout=60)
assert telemetry.dropped == {"tensorboard": 0, "wandb": 0}, telemetry.dropped
assert "torch" not in sys.modules and "tensorflow" not in sys.modules
"""


def test_both_sinks_for_real_offline_and_quiet(tmp_path: Path) -> None:
    """In a process of its own: W&B starts a service and keeps global state. WANDB_MODE=online must not win."""
    import os

    env = {**os.environ, "WANDB_MODE": "online", "WANDB_SILENT": "false"}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(tmp_path)], env=env, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (offline,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert len(list(tmp_path.glob("tensorboard/events.out.tfevents.*"))) == 1
    shown = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(offline)], capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    items = [
        record["history"]["item"] for line in shown.stdout.splitlines() if (record := json.loads(line)).get("history")
    ]
    assert [(i["step"], i.get("train/loss"), i.get("eval/raw/loss")) for i in items] == [
        (1, 2.5, None),
        (1, None, 2.25),
    ]
