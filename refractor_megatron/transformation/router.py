"""The expert router: Megatron's ``TopKRouter`` with gating features, temperature, an entropy band, exact counters.

Entropy is per token, over the full softmax before top-k, divided by ln E (reference definitions 6.1): the entropy of
the usage would be 1 at perfect balance, and that of the k chosen weights could not exceed ln k / ln E.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..compat.megatron import MoEAuxLossAutoScaler, TopKRouter
from ..distinction.gating import GATE_FEATURES, gate_features

#: Band of the mean normalised gate entropy in which no penalty acts (spec section 17).
ENTROPY_BAND = (0.4, 0.8)


def gate_entropy(logits: Tensor) -> Tensor:
    """Normalised entropy of softmax(logits): [tokens, E] -> [tokens], in [0, 1]."""
    log_p = torch.log_softmax(logits.float(), dim=-1)
    return -(log_p.exp() * log_p).sum(-1) / math.log(logits.shape[-1])


def band_penalty(h: Tensor) -> Tensor:
    """(0.4 - h)₊² + (h - 0.8)₊²; its derivative is what pulls the entropy back into the band."""
    low, high = ENTROPY_BAND
    return torch.relu(low - h) ** 2 + torch.relu(h - high) ** 2


class RefractorRouter(TopKRouter):
    """Top-k router of spec section 8.

    Balance: Megatron's Switch loss E·Σ u_e·P̄_e with coefficient ``router.lb.lambda_kl`` (differentiable surrogate of
    KL(u ‖ 1/E)). Entropy: ``lambda_ent`` times the band penalty, or the literal ``minimize`` of the specification.
    Counters gather in ``pending`` and are taken by the step hook (``take_counters``), never inside forward: with
    activation recomputation forward runs twice, and only the pass that records a graph counts.

    With ``gate_features`` the logits gain ``feature_weight`` @ features of the token's role and scope bits, so experts
    may specialise by role from the first step on. The layer lends the records (``lend_records``), because Megatron
    hands a router nothing but hidden states. The weight is replicated over tensor-parallel ranks like the router's
    own, and marked like it, so that sequence-parallel shares of its gradient are added up.
    """

    def __init__(
        self,
        config: Any,
        pg_collection: Any = None,
        *,
        gate_temperature: float,
        lambda_entropy: float,
        entropy_mode: str,
        gate_features: bool = False,
        **unused: Any,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.gate_temperature = gate_temperature
        self.lambda_entropy = lambda_entropy
        self.entropy_mode = entropy_mode
        self.feature_weight: torch.nn.Parameter | None = None  # [E, K_g]
        if gate_features:
            zeros = torch.zeros(config.num_moe_experts, len(GATE_FEATURES), dtype=config.params_dtype)
            self.feature_weight = torch.nn.Parameter(zeros)
            setattr(self.feature_weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010  Megatron reads it
        self._records: Tensor | None = None
        self.pending: list[Tensor] = []  # each [E + 2]: tokens sent to every expert, Σ entropy, tokens

    @contextmanager
    def lend_records(self, records: Tensor | None) -> Iterator[None]:
        """Give the router the records int32 [b, s, >= 4] of the hidden states [s, b, h] that it will see inside."""
        before, self._records = self._records, records
        try:
            yield
        finally:
            self._records = before

    def gating(self, input: Tensor) -> Tensor:
        """Logits [s, b, E] of hidden states [s, b, h], gating features included."""
        logits: Tensor = super().gating(input)
        if self.feature_weight is None:
            return logits
        assert self._records is not None, "the router needs the records of its tokens (see transformation.layer)"
        assert self._records.shape[:2] == (input.shape[1], input.shape[0]), (self._records.shape, input.shape)
        features = gate_features(self._records).transpose(0, 1).to(input.device)  # [s, b, K_g]
        return logits + (features @ self.feature_weight.float().T).to(logits.dtype)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route: logits [s, b, E] -> (probabilities [tokens, E], routing map bool [tokens, E])."""
        logits = logits / self.gate_temperature
        counting = self.training and torch.is_grad_enabled()
        entropy = gate_entropy(logits.view(-1, logits.shape[-1])) if counting else None  # [tokens]
        probs, routing_map = super().routing(logits, padding_mask)
        if entropy is not None:
            counts = routing_map.sum(0).double()
            totals = torch.stack([entropy.detach().double().sum(), counts.new_tensor(float(entropy.numel()))])
            self.pending.append(torch.cat([counts, totals]))
            if self.lambda_entropy > 0:
                probs = MoEAuxLossAutoScaler.apply(probs, self.lambda_entropy * self._entropy_loss(entropy))
        return probs, routing_map

    def _entropy_loss(self, entropy: Tensor) -> Tensor:
        """This rank's share of the entropy loss of the whole micro-batch.

        Under sequence parallelism each rank holds some of the tokens. f(mean h) is not a sum over ranks, but its
        gradient is: f'(mean h) · Σ h_t / T, with the mean taken over all ranks.
        """
        total = torch.stack([entropy.detach().sum(), entropy.new_tensor(float(entropy.numel()))])
        if self.tp_cp_group.size() > 1:
            torch.distributed.all_reduce(total, group=self.tp_cp_group)
        share = entropy.sum() / total[1]
        if self.entropy_mode == "minimize":
            return share
        with torch.enable_grad():
            mean = (total[0] / total[1]).requires_grad_()
            (slope,) = torch.autograd.grad(band_penalty(mean), mean)
        return slope * share

    def take_counters(self) -> Tensor:
        """Σ of the pending counters, float64 [E + 2], and start anew (called once a step)."""
        zero = torch.zeros(self.config.num_moe_experts + 2, dtype=torch.float64, device=self.weight.device)
        total = torch.stack([zero, *self.pending]).sum(0)
        self.pending.clear()
        return total
