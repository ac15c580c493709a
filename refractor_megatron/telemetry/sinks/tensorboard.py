"""TensorBoard event files, written with the `tensorboard` package alone (neither torch nor TensorFlow is imported)."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..registry import MetricValue
from .base import flatten

#: Written through to the operating system at most this often; the event file is a view, `metrics.jsonl` is the record.
FLUSH_SECONDS = 5.0


class TensorBoardSink:
    """Writes scalars to ``folder``; a run that resumes tells TensorBoard to discard what a killed run wrote later."""

    name = "tensorboard"

    def __init__(self, folder: Path, resume_step: int) -> None:
        self._folder = folder
        self._resume_step = resume_step
        self._writer: Any = None
        self._proto: Any = None
        self._flushed = 0.0

    def open(self) -> None:
        """Create the event file and mark the session's first step, which purges orphaned later events."""
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        # The file name is TensorBoard's convention; it orders the files of successive launches by start time.
        name = f"events.out.tfevents.{time.time_ns() // 1000:016d}.{socket.gethostname()}.{os.getpid()}"
        self._writer = RecordWriter((self._folder / name).open("wb"))
        self._proto = event_pb2
        now = time.time()
        self._put(event_pb2.Event(wall_time=now, file_version="brain.Event:2"))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._put(event_pb2.Event(wall_time=now, step=self._resume_step + 1, session_log=start))
        self._writer.flush()

    def write(self, step: int, time_s: float, group: str, metrics: Mapping[str, MetricValue]) -> None:
        """Write one event that holds every scalar of the record."""
        event = self._proto.Event(wall_time=time_s, step=step)
        for tag, value in flatten(group, metrics).items():
            event.summary.value.add(tag=tag, simple_value=value)
        self._put(event)
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()

    def _put(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())
