"""What attention does with its keys: per-layer statistics on sampled query rows (spec section 11).

An ``AttentionProbe`` hangs on the core attentions of a model during one held-out evaluation (``probing``). For a few
query rows of a sample it computes the joint softmax over all their keys once more, explicitly and in float32 or wider,
and adds up sums only: the table of one rank plus that of another is the table of both, so one reduction at the end
serves every grid. Nothing is computed while no probe hangs there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from refractor_megatron.fabric.audit import audit_plan
from refractor_megatron.fabric.backends import AttentionInputs, visited_pairs
from refractor_megatron.fabric.sampling import sampled_rows, select_rows
from refractor_megatron.fabric.spec import Tier

if TYPE_CHECKING:
    from refractor_megatron.fabric.plan import MaskPlan

#: The tiers of the joint key space, in its order.
TIERS: tuple[Tier, ...] = ("summary", "retrieved", "local")
#: An edge is used where its probability is above this share of the row's uniform one.
USED_ABOVE = 0.1
#: Bins of the histogram of normalised entropy, over [0, 1].
BINS = 100

#: Sums over the (head, row) pairs of a layer; those of one tier run over pairs with at least two legal keys in it.
_SUMS = (
    "pairs", "legal", "used", "spread", "entropy", "entropy_squared",
    *(f"mass_{tier}" for tier in TIERS), *(f"spread_{tier}" for tier in TIERS), *(f"entropy_{tier}" for tier in TIERS),
)  # fmt: skip
#: Of a layer: sums of its mask, then sums over the plans that it executes.
_PLAN_SUMS = ("plan_rows", "plan_dead", "plan_legal", "plan_causal", "plan_visited", "plan_invalid")
_COLUMN = {name: i for i, name in enumerate((*_SUMS, *_PLAN_SUMS))}


class AttentionProbe:
    """Statistics of the first call of each layer while it hangs on a model.

    table: float64 [layers, sums + BINS]; additive over calls and ranks. Heads are spread over tensor-parallel ranks,
    rows over context-parallel ones, samples over data-parallel ones and layers over pipeline stages, so the plain sum
    over all ranks counts each (layer, sample, head, row) exactly once. Counters of plans, which ranks may share, are
    read as ratios only.
    """

    def __init__(self, layers: int, rows: int, seed: int) -> None:
        """``rows`` query rows are measured per sample, 0 = plans only; ``seed`` chooses the rows that are audited."""
        assert layers >= 1 and rows >= 0, (layers, rows)
        self.layers, self.rows, self.seed = layers, rows, seed
        self.table = torch.zeros(layers, len(_COLUMN) + BINS, dtype=torch.float64)
        self._seen: set[int] = set()
        self._audited: dict[tuple[object, ...], tuple[Sequence[MaskPlan], torch.Tensor]] = {}

    @torch.no_grad()
    def see(
        self,
        layer_number: int,
        x: AttentionInputs,
        plan: MaskPlan,
        executed: Sequence[MaskPlan],
        scale: float,
        backend: str = "auto",
    ) -> None:
        """Take in one attention call; only the first of each layer counts.

        Args:
            layer_number: 1-based, over all pipeline stages.
            x: what attention reads. plan: its whole mask, of all tiers. scale: of the logits.
            executed: the plans that attention runs by ``backend``: the same one, or one for each tier.

        Where the tiers have softmaxes of their own (``relation.combine`` gated or sum), entropies by tier are those of
        the attention that is computed, while overall entropy and masses are those that one softmax would give.
        """
        if layer_number in self._seen:
            return
        self._seen.add(layer_number)
        row = self.table[layer_number - 1]
        row[len(_SUMS) : len(_COLUMN)] += self._plan_sums(plan, executed, backend, x.q.device)
        if self.rows:
            keys = x.k if x.k_far is None else torch.cat([x.k_far, x.k], dim=2)
            sums, histogram = _statistics(x.q, keys, plan, scale, self.rows)
            row[: len(_SUMS)] += sums.cpu()
            row[len(_COLUMN) :] += histogram.cpu()

    def reduce(self, device: torch.device) -> None:
        """Add up the tables of all ranks; every rank gets the sum."""
        if dist.is_initialized():
            total = self.table.to(device)
            dist.all_reduce(total)
            self.table = total.cpu()

    def attention_metrics(self) -> dict[str, float | list[float]]:
        """Registered evaluation metrics of attention; empty where no row was measured."""
        of = self._of
        if not of("spread").any():
            return {}
        mean = of("entropy") / of("spread")
        spread = (of("entropy_squared") / of("spread") - mean**2).clamp_min(0).sqrt()
        total = self._total
        mean_all = total("entropy") / total("spread")
        metrics: dict[str, float | list[float]] = {
            "attention_entropy": mean_all,
            "attention_entropy_std": math.sqrt(max(0.0, total("entropy_squared") / total("spread") - mean_all**2)),
            "attention_entropy_median": self._median(),
            "attention_entropy_layer": mean.tolist(),
            "attention_entropy_std_layer": spread.tolist(),
            "attention_edges_used": total("used") / total("legal"),
        }
        for tier in TIERS:
            if total(f"mass_{tier}") == 0.0:
                continue  # the tier has no key in any layer
            metrics[f"attention_mass_{tier}"] = total(f"mass_{tier}") / total("pairs")
            metrics[f"attention_mass_{tier}_layer"] = (of(f"mass_{tier}") / of("pairs")).tolist()
            if total(f"spread_{tier}"):
                metrics[f"attention_entropy_{tier}"] = total(f"entropy_{tier}") / total(f"spread_{tier}")
        return metrics

    def plan_metrics(self, rows: int) -> dict[str, float]:
        """Registered evaluation metrics of the executed masks; ``rows``: query rows of one micro-batch."""
        total = self._total
        if not total("plan_rows"):
            return {}
        return {
            "edges_used_share": total("plan_legal") / total("plan_causal"),
            "visited_share": total("plan_visited") / total("plan_causal"),
            "masked_rows": total("plan_dead") / total("plan_rows") * rows,
            "invalid_edges": total("plan_invalid"),
        }

    def _of(self, name: str) -> torch.Tensor:
        """float64 [layers]."""
        return self.table[:, _COLUMN[name]]

    def _total(self, name: str) -> float:
        return float(self._of(name).sum())

    def _median(self) -> float:
        """Of the normalised entropy of all (layer, head, row), from the histogram: exact to 1 / BINS."""
        counts = self.table[:, len(_COLUMN) :].sum(0)
        below = torch.cumsum(counts, 0)
        half = float(below[-1]) / 2
        at = int(torch.searchsorted(below, half))
        return (at + (half - float(below[at] - counts[at])) / float(counts[at])) / BINS

    def _plan_sums(
        self, plan: MaskPlan, executed: Sequence[MaskPlan], backend: str, device: torch.device
    ) -> torch.Tensor:
        """float64 [len(_PLAN_SUMS)]; layers of one mask share their plans, which are audited once.

        Rows and legal edges are those of the whole mask: a row without keys in one tier may have some in another.
        """
        plans = (plan, *executed)
        key = (backend, device, *map(id, plans))
        if key not in self._audited:
            counts = (
                len(plan.samples) * plan.length,
                plan.stats.fully_masked_rows,
                plan.stats.legal_edges,
                plan.stats.causal_pairs,
                sum(visited_pairs(backend, each, device) for each in executed),
                sum(audit_plan(each, self.seed, backend, device) for each in executed),
            )
            self._audited[key] = plans, torch.tensor(counts, dtype=torch.float64)  # the plans, so their ids stay theirs
        return self._audited[key][1]


@contextmanager
def probing(model: torch.nn.Module, probe: AttentionProbe, device: torch.device) -> Iterator[AttentionProbe]:
    """Hang ``probe`` on every module of ``model`` that has a place for one (an attribute ``probe``).

    On leaving without an error the tables of all ranks are added up over ``device``: every rank must enter.
    """
    modules = [module for module in model.modules() if hasattr(module, "probe")]
    for module in modules:
        module.probe = probe  # type: ignore[assignment]  # not a sub-module: a plain attribute
    try:
        yield probe
    finally:
        for module in modules:
            module.probe = None  # type: ignore[assignment]
    probe.reduce(device)


def _statistics(
    q: torch.Tensor, keys: torch.Tensor, plan: MaskPlan, scale: float, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (sums float64 [len(_SUMS)], histogram float64 [BINS]) over all heads and ``count`` rows of every sample."""
    b, heads, _, d = q.shape
    kv_heads, n = keys.shape[1], keys.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    chosen = sampled_rows(count, plan.space)
    at = torch.from_numpy(chosen).to(q.device)
    sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=q.device)
    histogram = torch.zeros(BINS, dtype=torch.float64, device=q.device)
    for i in range(b):
        legal = torch.from_numpy(select_rows(plan.samples[i].rows, chosen).dense(len(chosen), 0, n)).to(q.device)
        grouped = q[i, :, at].view(kv_heads, heads // kv_heads, len(chosen), d)
        # One key head at a time: [group, rows, n] scores are all that is in memory, whatever the number of heads.
        for query, key in zip(grouped.to(wide), keys[i].to(wide), strict=True):
            scores = (query @ key.T * scale).masked_fill(~legal, float("-inf"))
            part, bins = _head_sums(scores, legal, plan.tiers)
            sums += part
            histogram += bins
    return sums, histogram


def _head_sums(
    scores: torch.Tensor, legal: torch.Tensor, tiers: Mapping[Tier, tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums and histogram of scores [group, rows, n], -inf where ``legal`` [rows, n] is False."""
    alive = legal.any(1)
    scores, legal = scores[:, alive], legal[alive]
    n_legal = legal.sum(1)  # [rows]
    total = torch.logsumexp(scores, 2)  # [group, rows]
    entropy = _entropy(scores, n_legal)
    p = torch.softmax(scores, 2)
    used = (p > USED_ABOVE / n_legal[:, None]) & legal
    found: dict[str, torch.Tensor | float] = {
        "pairs": total.numel(),
        "legal": n_legal.sum() * len(scores),
        "used": used.sum(),
        "spread": entropy.numel(),
        "entropy": entropy.double().sum(),
        "entropy_squared": entropy.double().square().sum(),
    }
    for tier in TIERS:
        lo, hi = tiers.get(tier, (0, 0))
        part, n_tier = scores[..., lo:hi], legal[:, lo:hi].sum(1)
        present = n_tier > 0
        mass = torch.exp(torch.logsumexp(part[:, present], 2) - total[:, present])
        tier_entropy = _entropy(part, n_tier)
        found |= {
            f"mass_{tier}": mass.double().sum(),
            f"spread_{tier}": tier_entropy.numel(),
            f"entropy_{tier}": tier_entropy.double().sum(),
        }
    sums = torch.stack([torch.as_tensor(found[name], dtype=torch.float64, device=scores.device) for name in _SUMS])
    return sums, torch.histc(entropy.float().clamp(0, 1), BINS, 0.0, 1.0).double()


def _entropy(scores: torch.Tensor, n_legal: torch.Tensor) -> torch.Tensor:
    """Entropy over ln(legal keys), in [0, 1]: [group, m] for the m rows with two legal keys or more."""
    several = n_legal >= 2
    p = torch.softmax(scores[:, several], 2)
    share: torch.Tensor = torch.special.entr(p).sum(2) / n_legal[several].to(p.dtype).log()
    return share
