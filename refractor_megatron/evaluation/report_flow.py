"""Masks and attention in a report: what the rules take away, what was executed, which tier the model reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..distinction.roles import ROLES
from .report_data import Floats, RunData, number
from .report_plots import AMBER, EMA, MUTED, RAW, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Up to so many layers have a line each; more are shown as a band.
MAX_LINES = 8
#: Median attention entropy below this raises an alert (specification, section 11).
ALERT_BELOW = 0.1
_TIERS = (("local", "local tokens", MUTED), ("summary", "summaries", RAW), ("retrieved", "retrieved records", EMA))


def draw_tiers(axes: Axes, run: RunData) -> bool:
    """Share of attention probability that each tier gets, by layer and on average."""
    drawn = False
    for tier, name, color in _TIERS:
        steps, layers = run.held_out_lists(f"attention_mass_{tier}_layer")
        if len(steps):
            _layers(axes, steps, layers, color, name)
            drawn = True
    if drawn:
        axes.set_ylim(0, 1.02)
        axes.set_ylabel("share of attention")
        axes.legend(loc="center right")
    return drawn


def draw_attention_entropy(axes: Axes, run: RunData) -> bool:
    """Entropy of attention over ln(legal keys), by layer and on average, with the level of the alert."""
    steps, layers = run.held_out_lists("attention_entropy_layer")
    if not len(steps):
        return False
    _layers(axes, steps, layers, RAW, "mean of layers")
    axes.axhline(ALERT_BELOW, color=AMBER, linewidth=1.1, dashes=(5, 3))
    axes.annotate(
        "alert below 0.1", (0, ALERT_BELOW), (5, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
        color=AMBER, fontsize=9,
    )  # fmt: skip
    axes.set_ylim(0, 1.02)
    axes.legend(loc="upper right")
    return True


def _layers(axes: Axes, steps: Floats, layers: Floats, color: str, label: str) -> None:
    """The mean of layers [n, layers] as a bold line over its layers."""
    if layers.shape[1] <= MAX_LINES:
        axes.plot(steps, layers, color=color, linewidth=0.9, alpha=0.4)
    else:
        axes.fill_between(steps, layers.min(1), layers.max(1), color=color, alpha=0.14, linewidth=0)
    axes.plot(steps, layers.mean(1), color=color, linewidth=2.0, marker="o", markersize=3.4, label=label)


FLOW_PANELS = (
    Panel(
        "tiers", "Attention by tier", "Share of the attention probability that goes to each tier on held-out text: "
        "mean of layers (bold), each layer or their span (faint).", draw_tiers,
    ),
    Panel(
        "attention_entropy", "Attention entropy", "Entropy of a row's attention over log(its legal keys): 0 is one "
        "key, 1 is all keys alike.", draw_attention_entropy,
    ),
)  # fmt: skip


def flow_facts(run: RunData) -> list[tuple[str, str]]:
    """Label and value of the masks of the newest evaluation; empty where none were measured."""
    last = run.last_evaluation()
    rows = [
        ("mask entropy, mean", _plain(number(last, "mask_entropy"), "{:.3f} (1: the rules take nothing away)")),
        ("mask entropy, median", _plain(number(last, "mask_entropy_median"), "{:.3f}")),
        ("illegal edges found by the audit", _plain(number(last, "invalid_edges"), "{:,.0f}")),
        ("fully masked rows of a micro-batch", _plain(number(last, "masked_rows"), "{:,.0f}")),
        ("legal edges over dense causal pairs", _plain(number(last, "edges_used_share"), "{:.1%}")),
        ("computed pairs over dense causal pairs", _plain(number(last, "visited_share"), "{:.1%}")),
        ("roles of held-out tokens", _roles(run)),
    ]
    return [(label, value) for label, value in rows if value]


def attention_facts(run: RunData) -> list[tuple[str, str]]:
    """Label and value of the attention of the newest evaluation; empty where none was measured."""
    last = run.last_evaluation()
    mean, std = number(last, "attention_entropy"), number(last, "attention_entropy_std")
    rows = [
        ("entropy, mean ± standard deviation", "" if mean is None or std is None else f"{mean:.3f} ± {std:.3f}"),
        ("entropy, median", _plain(number(last, "attention_entropy_median"), "{:.3f}")),
        ("legal edges that are used", _plain(number(last, "attention_edges_used"), "{:.1%}")),
    ]
    for tier, name, _ in _TIERS:
        share, entropy = (number(last, f"attention_{what}_{tier}") for what in ("mass", "entropy"))
        if share is not None:
            inside = "" if entropy is None else f", entropy among them {entropy:.3f}"
            rows.append((f"attention to {name}", f"{share:.1%}{inside}"))
    return [(label, value) for label, value in rows if value]


def _plain(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _roles(run: RunData) -> str:
    steps, shares = run.held_out_lists("role_share")
    if not len(steps):
        return ""
    held = sorted(zip(shares[-1], ROLES, strict=False), reverse=True)
    return ", ".join(f"{role} {share:.1%}" for share, role in held if share > 0)
