"""The one table of metric names: what a run may log, in which unit, and what each number means.

Logging a name that is not in the table is a mistake of ours, so it is an assertion: dashboards, alerts and reports are
generated from the table and must not meet names they do not know.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

#: A metric's value: a plain number, or a flat list of numbers where the spec's kind is ``list``.
MetricValue = float | list[float]
Kind = Literal["gauge", "counter", "list"]


@dataclass(frozen=True)
class MetricSpec:
    """One metric. ``counter`` values never fall within a run; ``list`` values hold one number per ``axis`` member."""

    name: str
    unit: str
    kind: Kind
    meaning: str
    axis: str = ""

    def __post_init__(self) -> None:
        assert self.name.isidentifier(), f"metric name {self.name!r} must be an identifier"
        assert (self.kind == "list") == bool(self.axis), f"metric {self.name}: an axis is named exactly for lists"


class MetricRegistry:
    """A set of `MetricSpec` by name; rooms above add their own with `register`."""

    def __init__(self, specs: Iterable[MetricSpec]) -> None:
        self._specs: dict[str, MetricSpec] = {}
        for spec in specs:
            self.register(spec)

    def register(self, spec: MetricSpec) -> MetricSpec:
        """Add ``spec``; the same name twice is an assertion."""
        assert spec.name not in self._specs, f"metric {spec.name} is registered twice"
        self._specs[spec.name] = spec
        return spec

    def check(self, metrics: Mapping[str, MetricValue]) -> None:
        """Assert that every name is registered and every value has the shape its kind asks for."""
        for name, value in metrics.items():
            spec = self._specs.get(name)
            assert spec is not None, f"metric {name} is not registered in refractor_megatron/telemetry/registry.py"
            if spec.kind == "list":
                valid = isinstance(value, list) and all(_is_number(item) for item in value)
            else:
                valid = _is_number(value)
            assert valid, f"metric {name} is a {spec.kind} and cannot hold {type(value).__name__} {value!r}"

    def __getitem__(self, name: str) -> MetricSpec:
        return self._specs[name]

    def __contains__(self, name: object) -> bool:
        return name in self._specs

    def __iter__(self) -> Iterator[MetricSpec]:
        return iter(self._specs.values())

    def __len__(self) -> int:
        return len(self._specs)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


#: Logged with every step and evaluation where tier C is on.
_RETRIEVAL = (
    MetricSpec("retrieval_kept", "record/chunk", "gauge", "retrieved records that a chunk may read, mean over chunks"),
    MetricSpec(
        "retrieval_rejected",
        "record",
        "list",
        "candidates left out, under the first reason: own document, similarity, age, source, trust",
        axis="predicate",
    ),
)

#: Logged once per optimizer step (`metrics.jsonl`).
STEP_METRICS = MetricRegistry(
    [
        MetricSpec("loss", "nat/token", "gauge", "training loss: lm_loss plus weighted auxiliary losses"),
        MetricSpec("lm_loss", "nat/token", "gauge", "mean next-token cross-entropy of the global batch"),
        MetricSpec("lb_loss", "nat", "gauge", "KL of expert usage from uniform, unweighted, mean over layers"),
        MetricSpec("lr", "1/step", "gauge", "learning rate of this step"),
        MetricSpec("grad_norm", "1", "gauge", "global gradient L2 norm before clipping"),
        MetricSpec("step_ms", "ms", "gauge", "wall time of the step"),
        MetricSpec("tokens_per_s", "token/s", "gauge", "global batch tokens over the step's wall time"),
        MetricSpec("mfu", "1", "gauge", "model FLOP utilisation: FLOP/s over the named peak, without recompute"),
        MetricSpec("hfu", "1", "gauge", "hardware FLOP utilisation: as mfu, with recompute"),
        MetricSpec("router_entropy", "1", "gauge", "mean per-token router entropy over log(experts), mean over layers"),
        MetricSpec("router_entropy_layer", "1", "list", "per-token router entropy over log(experts)", axis="layer"),
        MetricSpec(
            "expert_load",
            "1",
            "list",
            "routed tokens over an even share, mean over layers",
            axis="expert",
        ),
        MetricSpec("expert_load_max", "1", "gauge", "largest expert_load of any expert and layer"),
        *_RETRIEVAL,
        MetricSpec("epoch", "epoch", "gauge", "data position: passes over the training split"),
        MetricSpec("tokens_seen", "token", "counter", "training tokens consumed since step 0"),
        MetricSpec("samples_seen", "sample", "counter", "training samples consumed since step 0"),
        MetricSpec("skipped_steps", "step", "counter", "steps skipped for a non-finite gradient since step 0"),
        MetricSpec("peak_rss_mb", "MB", "gauge", "peak resident memory of the rank that logs"),
        MetricSpec("peak_gpu_mb", "MB", "gauge", "peak accelerator memory allocated on the rank that logs"),
    ]
)

#: Logged once per evaluation and weight set (`eval.jsonl`).
EVAL_METRICS = MetricRegistry(
    [
        MetricSpec("loss", "nat/token", "gauge", "mean next-token cross-entropy on held-out documents"),
        MetricSpec("bits_per_byte", "bit/byte", "gauge", "held-out code length over the bytes of the predicted tokens"),
        MetricSpec("tokens", "token", "gauge", "held-out tokens predicted"),
        *_RETRIEVAL,
        MetricSpec(
            "retrieval_similarity",
            "record",
            "list",
            "candidates before the guard by cosine similarity; the outermost bins hold what lies outside 0 to 1",
            axis="tenth",
        ),
        # The mask: what the rules take away, and what was executed (distinction.measure, fabric.audit).
        MetricSpec(
            "mask_entropy",
            "1",
            "gauge",
            "ln(keys the rules allow) over ln(keys causality and document allow), mean over query rows",
        ),
        MetricSpec("mask_entropy_median", "1", "gauge", "as mask_entropy, median over query rows"),
        MetricSpec("role_share", "1", "list", "share of each role in the tokens, padding left out", axis="role"),
        MetricSpec(
            "invalid_edges",
            "edge",
            "gauge",
            "illegal edges that the kernel's own tables let through on sampled rows: 0",
        ),
        MetricSpec("masked_rows", "row", "gauge", "query rows of a micro-batch without any key, whose output is zero"),
        MetricSpec("edges_used_share", "1", "gauge", "legal edges, far keys included, over pairs of dense causal"),
        MetricSpec("visited_share", "1", "gauge", "pairs that the kernel computes over pairs of dense causal"),
        # Attention on sampled query rows of one micro-batch (fabric.measure).
        MetricSpec(
            "attention_entropy",
            "1",
            "gauge",
            "entropy of attention over ln(legal keys), mean of rows, heads and layers",
        ),
        MetricSpec("attention_entropy_std", "1", "gauge", "as attention_entropy, standard deviation"),
        MetricSpec("attention_entropy_median", "1", "gauge", "as attention_entropy, median"),
        MetricSpec("attention_entropy_layer", "1", "list", "as attention_entropy, mean of each layer", axis="layer"),
        MetricSpec(
            "attention_entropy_std_layer", "1", "list", "as attention_entropy, standard deviation", axis="layer"
        ),
        MetricSpec(
            "attention_edges_used", "1", "gauge", "legal edges that get more than a tenth of their row's uniform share"
        ),
        *(
            spec
            for tier, keys in (("summary", "summaries"), ("retrieved", "retrieved records"), ("local", "local tokens"))
            for spec in (
                MetricSpec(f"attention_mass_{tier}", "1", "gauge", f"attention probability that {keys} get, mean"),
                MetricSpec(
                    f"attention_mass_{tier}_layer", "1", "list", f"attention probability that {keys} get", axis="layer"
                ),
                MetricSpec(
                    f"attention_entropy_{tier}", "1", "gauge", f"entropy within the {keys} over ln(legal ones), mean"
                ),
            )
        ),
    ]
)
