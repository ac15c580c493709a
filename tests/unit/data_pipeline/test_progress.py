"""Progress: silence for short steps, lines in a pipe, a bar on a terminal, both with rate and time left."""

from __future__ import annotations

import os
import pty
import re
import sys

import pytest

from data_pipeline.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("data_pipeline.progress.time.monotonic", lambda: now[0])
    return now


def test_pipe_gets_a_line_every_five_seconds_with_rate_and_time_left(clock: list[float]) -> None:
    said: list[str] = []
    with Progress("ingest", 40.0, said.append) as progress:
        for _ in range(12):
            clock[0] += 1.0
            progress.advance(2.0)
    assert said == ["ingest: 10.0/40.0 MB, 2.0 MB/s, 15 s left", "ingest: 20.0/40.0 MB, 2.0 MB/s, 10 s left"]


def test_short_step_says_nothing(clock: list[float]) -> None:
    said: list[str] = []
    with Progress("ingest", 4.0, said.append) as progress:
        clock[0] += 4.9
        progress.advance(4.0)
    assert said == []


def test_waiting_is_told_too_and_tasks_are_whole_numbers(clock: list[float]) -> None:
    said: list[str] = []
    with Progress("sign", 3, said.append, unit="tasks") as progress:
        clock[0] += 5.0
        progress.tick()
        clock[0] += 1.0
        progress.advance(1)
        clock[0] += 4.0
        progress.tick()
    assert said == ["sign: 0/3 tasks, 0.0 tasks/s, no estimate yet", "sign: 1/3 tasks, 0.1 tasks/s, 20 s left"]


def test_terminal_gets_a_bar_once_the_step_is_long(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    said: list[str] = []
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with Progress("ingest", 40.0, said.append) as progress:
            clock[0] += 1.0
            progress.advance(2.0)
            os.set_blocking(ours, False)
            with pytest.raises(BlockingIOError):
                os.read(ours, 1)  # nothing yet
            clock[0] += 4.0
            progress.advance(8.0)
            progress.advance(10.0)
        terminal.flush()
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", os.read(ours, 1 << 16).decode())
    os.close(ours)
    assert said == []
    assert "ingest" in shown and "20.0/40.0 MB, 4.0 MB/s, 5 s left" in shown
