"""Masks and attention in the report: what is drawn, what is said, and nothing where nothing was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from refractor_megatron.evaluation import report_flow as flow
from refractor_megatron.evaluation.report import render
from refractor_megatron.evaluation.report_data import RunData
from refractor_megatron.telemetry.registry import EVAL_METRICS

MakeRun = Callable[..., Path]


@pytest.fixture
def axes() -> Axes:
    return Figure().add_subplot()


def test_each_tier_is_a_mean_over_a_line_for_each_layer(make_run: MakeRun, axes: Axes) -> None:
    run = RunData.load(make_run(100))
    assert flow.draw_tiers(axes, run)
    labelled = {line.get_label(): line for line in axes.lines if not str(line.get_label()).startswith("_")}
    assert list(labelled) == ["local tokens", "summaries"] and len(axes.lines) == 2 + 2 * 4
    means = [np.asarray(line.get_ydata(), float) for line in labelled.values()]
    assert np.allclose(means[0] + means[1], 1)
    steps, layers = run.held_out_lists("attention_mass_summary_layer")
    assert np.allclose(means[1], layers.mean(1)) and list(steps) == [25, 50, 75, 100]


def test_many_layers_become_a_band(make_run: MakeRun, axes: Axes) -> None:
    folder = make_run(5)
    (folder / "eval.jsonl").write_text(
        "".join(
            json.dumps({"step": step, "weights": "raw", "attention_entropy_layer": [0.5 + 0.01 * i for i in range(48)]})
            + "\n"
            for step in (1, 2)
        )
    )
    assert flow.draw_attention_entropy(axes, RunData.load(folder))
    assert len(axes.collections) == 1 and len(axes.lines) == 2  # mean and alert


def test_the_facts_are_those_of_the_newest_evaluation(make_run: MakeRun) -> None:
    run = RunData.load(make_run(60))
    facts = dict(flow.flow_facts(run) + flow.attention_facts(run))
    assert facts["illegal edges found by the audit"] == "0"
    assert facts["computed pairs over dense causal pairs"] == "36.0%"
    assert facts["roles of held-out tokens"] == "data 96.0%, code 4.0%"
    last = run.last_evaluation()
    assert last["step"] == 60 and facts["attention to summaries"].startswith(f"{last['attention_mass_summary']:.1%}")
    assert "retrieved" not in "".join(facts)
    EVAL_METRICS.check({k: v for k, v in last.items() if k not in ("step", "time", "weights")})


def test_a_run_without_measurements_says_so(make_run: MakeRun, axes: Axes, tmp_path: Path) -> None:
    folder = make_run(5)
    (folder / "eval.jsonl").write_text('{"step": 5, "weights": "raw", "loss": 3.5}\n')
    run = RunData.load(folder)
    assert flow.flow_facts(run) == [] == flow.attention_facts(run)
    assert not any(panel.draw(axes, run) for panel in flow.FLOW_PANELS) and not axes.has_data()
    assert "Who may read whom" in render(run)
