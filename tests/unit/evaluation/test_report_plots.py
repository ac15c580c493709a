"""The panels draw what the run recorded, in the units that they name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from refractor_megatron.evaluation import report_plots as plots
from refractor_megatron.evaluation.report_data import RunData

MakeRun = Callable[..., Path]


@pytest.fixture
def axes() -> Axes:
    return Figure().add_subplot()


def test_loss_is_in_bits_per_byte_with_both_baselines(make_run: MakeRun, axes: Axes) -> None:
    run = RunData.load(make_run(60))
    assert plots.draw_loss(axes, run) and axes.get_ylabel() == "bits per byte"
    names = [line.get_label() for line in axes.lines if not str(line.get_label()).startswith("_")]
    assert names == ["training", "held-out, raw weights", "held-out, EMA weights"]
    (raw,) = [line for line in axes.lines if line.get_label() == "held-out, raw weights"]
    steps, bits = run.held_out("raw", "bits_per_byte")
    assert np.allclose(raw.get_xdata(), steps) and np.allclose(raw.get_ydata(), bits)
    assert [text.get_text() for text in axes.texts] == ["unigram 2.37", "bigram 1.62"]


def test_loss_without_any_byte_count_is_in_nats(make_run: MakeRun, axes: Axes) -> None:
    folder = make_run(5)
    for name in ("eval.jsonl", "baselines.json", "final.json"):
        (folder / name).unlink()
    assert plots.draw_loss(axes, RunData.load(folder)) and axes.get_ylabel() == "nats per token"


def test_expert_load_is_shown_against_an_even_share(make_run: MakeRun, axes: Axes) -> None:
    run = RunData.load(make_run(12))
    assert plots.draw_load(axes, run)
    (image,) = axes.images
    shown = np.asarray(image.get_array())
    assert shown.shape == (8, 12) and np.allclose(shown.mean(0), 1)
    assert list(image.get_extent()) == [0.5, 12.5, -0.5, 7.5]


def test_entropy_band(make_run: MakeRun, axes: Axes) -> None:
    assert plots.draw_entropy(axes, RunData.load(make_run(30)))
    assert any("0.4 to 0.8" in text.get_text() for text in axes.texts)


def test_log_scale_only_for_a_wide_range(make_run: MakeRun) -> None:
    folder = make_run(3)
    for largest, scale in ((2.0, "linear"), (200.0, "log")):
        lines = [f'{{"step": {i}, "grad_norm": {value}}}\n' for i, value in enumerate((1.0, largest, 1.5), 1)]
        (folder / "metrics.jsonl").write_text("".join(lines))
        axes = Figure().add_subplot()
        assert plots.draw_grad_norm(axes, RunData.load(folder)) and axes.get_yscale() == scale


@pytest.mark.parametrize(("largest", "label", "shown"), [(0.4, "clip 1", True), (0.1, "clip 1, above", False)])
def test_the_clipping_threshold_stays_in_the_picture(
    make_run: MakeRun, axes: Axes, largest: float, label: str, shown: bool
) -> None:
    """Caught once: its label lay outside the axes, and the layout of the whole figure was given up."""
    folder = make_run(3)
    lines = [f'{{"step": {i}, "grad_norm": {value}}}\n' for i, value in enumerate((largest / 2, largest), 1)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    assert plots.draw_grad_norm(axes, RunData.load(folder))
    assert [text.get_text() for text in axes.texts] == [label] and bool(axes.get_ylim()[1] > 1) is shown


def test_nothing_is_drawn_for_nothing(tmp_path: Path) -> None:
    run = RunData.load(tmp_path)
    for panel in (plots.LOSS, *plots.PANELS):
        axes = Figure().add_subplot()
        assert not panel.draw(axes, run) and not axes.has_data(), panel.name
        assert plots.panel_svg(panel, run, 4, 3) is None


def test_long_runs_are_averaged_down_without_losing_the_mean() -> None:
    steps, values = np.arange(1.0, 10_001), np.random.default_rng(0).normal(size=10_000)
    x, y = plots._reduce(steps, values, 500)
    assert len(x) == len(y) == 500 and y.mean() == pytest.approx(values.mean())
    _, rows = plots._reduce(steps, np.stack([values, 2 * values], axis=1), 500)
    assert rows.shape == (500, 2) and np.allclose(rows[:, 1], 2 * y)
    assert np.array_equal(plots._reduce(steps[:7], values[:7], 7)[1], values[:7])


def test_running_median_ignores_a_spike() -> None:
    values = np.ones(50)
    values[20] = 1000.0
    assert np.array_equal(plots._running_median(values, 5), np.ones(50))


def test_users_matplotlib_settings_neither_leak_in_nor_out(make_run: MakeRun) -> None:
    import matplotlib

    run = RunData.load(make_run(3))
    before = plots.panel_svg(plots.LOSS, run, 5, 3)
    with matplotlib.rc_context({"font.size": 40.0, "axes.grid": False}):
        assert plots.panel_svg(plots.LOSS, run, 5, 3) == before, "and the same run gives the same bytes"
        assert matplotlib.rcParams["font.size"] == 40.0
