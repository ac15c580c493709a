"""The step line: content, alignment, moving ETA; plain text in a pipe, a pinned bar on a terminal."""

from __future__ import annotations

import io
import math

import pytest

from refractor_megatron.telemetry.console import (
    Console,
    EtaWindow,
    format_count,
    format_duration,
    format_flops,
    format_step,
)  # fmt: skip

METRICS = {
    "loss": 4.8123, "lr": 1.2e-3, "step_ms": 310.4, "tokens_per_s": 26_400.0, "mfu": 0.213, "router_entropy": 0.62,
    "router_entropy_layer": [0.6, 0.64], "epoch": 0.41, "skipped_steps": 0,
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_line_in_a_pipe() -> None:
    stream, clock = io.StringIO(), Clock()
    with Console(400, 119, "measured fp32 GEMM", 0.32e12, stream, clock) as console:
        clock.now = 0.31
        console.step(120, METRICS)
        console.message("saved checkpoints/step_00000120")
    assert stream.getvalue() == (
        "step 120/400  30.0% | loss  4.812 | lr 1.2e-03 |   310 ms | 26.4k tok/s | MFU 21.3% of 0.32 TF/s "
        "(measured fp32 GEMM) | h 0.62 | epoch 0.41 | ETA  1m 27s\nsaved checkpoints/step_00000120\n"
    )


def test_columns_stay_in_place() -> None:
    small = {**METRICS, "loss": 9.9, "step_ms": 12.0, "tokens_per_s": 950.0, "mfu": 0.04}
    large = {**METRICS, "loss": 11.25, "step_ms": 98_000.0, "tokens_per_s": 1.2e6, "mfu": 0.555}
    lines = [
        format_step(7, 20_000, small, "of 989 TF/s (H100)", 59),
        format_step(19_999, 20_000, large, "of 989 TF/s (H100)", 180_000),
    ]
    bars = [[i for i, c in enumerate(line) if c == "|"] for line in lines]
    assert bars[0] == bars[1] and len(lines[0]) == len(lines[1])


def test_absent_metrics_are_left_out_and_skipped_steps_shown() -> None:
    assert format_step(1, 10, {"loss": math.nan, "skipped_steps": 2}, "of 1 TF/s", math.nan) == (
        "step  1/10  10.0% | loss    nan | ETA      -- | skipped 2"
    )


def test_eta_forgets_a_slow_start() -> None:
    clock = Clock()
    eta = EtaWindow(1000, 0, clock)
    clock.now = 500.0
    assert eta.update(1) == pytest.approx(500.0 * 999)
    for step in range(2, 200):
        clock.now += 0.5
        left = eta.update(step)
    assert left == pytest.approx(0.5 * (1000 - 199))


def test_eta_counts_steps_that_were_not_logged() -> None:
    clock = Clock()
    eta = EtaWindow(100, 40, clock)
    clock.now = 20.0
    assert eta.update(50) == pytest.approx(2.0 * 50)


def test_terminal_gets_a_bar_and_the_same_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    console = Console(400, 0, "measured fp32 GEMM", 0.32e12, stream)
    console.step(120, METRICS)
    console.close()
    console.close()
    text = stream.getvalue()
    assert "(measured fp32 GEMM) | h 0.62 | epoch 0.41" in text and "━" in text and "120/400" in text


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (120, "26.4k tok/s | MFU 21.3% | h 0.62 | epoch 0.41 | ETA"),
        (108, "|   310 ms | 26.4k tok/s | MFU 21.3% | h 0.62 | epoch 0.41\n"),
        (80, "step 120/400  30.0% | loss  4.812 | 26.4k tok/s | MFU 21.3% | h 0.62\n"),
        (40, "step 120/400  30.0% | loss  4.812 | 26.4k tok/s | MFU 21.3% | h 0.62\n"),
    ],
)
def test_narrow_terminal_shortens_the_line_and_names_the_peak_once(
    monkeypatch: pytest.MonkeyPatch, columns: int, line: str
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    with Console(400, 0, "measured fp32 GEMM", 0.32e12, stream) as console:
        console.step(120, METRICS)
        console.step(121, METRICS)
        console.message("a [bold]path[/bold] stays as it is")
    text = stream.getvalue().replace("\r", "")
    assert line in text and "[bold]path[/bold]" in text
    assert text.count("MFU is the share of 0.32 TF/s (measured fp32 GEMM)") == 1


def test_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Console(10, 0, "peak", 1e12, stream) as console:
        console.step(1, {"loss": 1.0})
    assert stream.getvalue().count("\n") == 1 and "\x1b" not in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "     0s"), (59.4, "    59s"), (59.6, " 1m 00s"), (87, " 1m 27s"), (3599.7, " 1h 00m"), (11_100, " 3h 05m"),
     (86_399, "23h 59m"), (1_051_200, "12d 04h"), (math.inf, "     --")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (950, "950"),
        (999.6, "1.00k"),
        (26_400, "26.4k"),
        (999_600, "1.00M"),
        (1.234e9, "1.23G"),
        (5e14, "500T"),
    ],
)
def test_counts(value: float, text: str) -> None:
    assert format_count(value) == text


def test_flops() -> None:
    assert [format_flops(x) for x in (0.32e12, 66.9e12, 989e12)] == ["0.32 TF/s", "66.9 TF/s", "989 TF/s"]
