"""The tool router: which tool, if any, a token calls (spec section 8, optional).

The gate is the experts' one, a linear layer plus gating features. What may be called is no matter of learning: tools
outside the request's domain, tools whose calls are spent, and every tool for tokens in a protected scope get the
probability zero before the softmax. Latency quotas belong to serving, which measures latency.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..distinction.gating import GATE_FEATURES, gate_features
from ..distinction.roles import MaskBit
from ..errors import ConfigError

#: Tokens that carry one of these bits never call a tool: restricted text, and text that came from outside.
PROTECTED = MaskBit.SAFETY_SCOPE | MaskBit.RET_SCOPE


@dataclass(frozen=True)
class Tool:
    """A tool, the domains whose requests may call it, and how often one request may."""

    name: str
    domains: frozenset[str]
    max_calls: int


class ToolRouter(torch.nn.Module):
    """Log-probabilities over ``tools`` and, last, "no tool", which is always permitted."""

    def __init__(self, d_model: int, tools: Sequence[Tool]) -> None:
        """Raises ``ConfigError`` for two tools of one name, a tool without domains, and a negative number of calls."""
        super().__init__()
        self.tools = tuple(tools)
        _check(self.tools)
        choices = len(self.tools) + 1
        self.weight = torch.nn.Parameter(torch.empty(choices, d_model))
        torch.nn.init.normal_(self.weight, std=d_model**-0.5)
        #: Starts at zero: what a role or scope means for a tool is learnt.
        self.feature_weight = torch.nn.Parameter(torch.zeros(choices, len(GATE_FEATURES)))

    def forward(self, hidden: Tensor, records: Tensor, domain: str, calls: Mapping[str, int]) -> Tensor:
        """Route.

        Args:
            hidden: [T, d_model]. records: int32 [T, >= 4] = (document, segment, role, mask_bits), in host memory too.
            domain: of the request. calls: how often the request has called each tool so far; missing means never.

        Returns:
            float32 [T, tools + 1]; -inf for every forbidden tool, whatever its logit.
        """
        assert hidden.dim() == 2 and hidden.shape[0] == records.shape[0], (tuple(hidden.shape), tuple(records.shape))
        features = gate_features(records).to(hidden.device)
        logits = hidden.float() @ self.weight.float().T + features @ self.feature_weight.float().T
        forbidden = self.forbidden(records, domain, calls).to(hidden.device)
        return torch.log_softmax(logits.masked_fill(forbidden, -torch.inf), dim=-1)

    def forbidden(self, records: Tensor, domain: str, calls: Mapping[str, int]) -> Tensor:
        """bool [T, tools + 1]: what each token may not choose."""
        unknown = set(calls) - {tool.name for tool in self.tools}
        assert not unknown, f"calls of tools that are not registered: {sorted(unknown)}"
        closed = [domain not in tool.domains or calls.get(tool.name, 0) >= tool.max_calls for tool in self.tools]
        protected = (records[:, 3] & int(PROTECTED)) != 0
        out = torch.tensor([*closed, False], device=records.device) | protected[:, None]
        out[:, -1] = False
        return out

    def choose(self, log_probabilities: Tensor) -> list[str | None]:
        """The most probable choice of each token; ties go to no tool first, then to the tool registered first."""
        none_first = torch.cat([log_probabilities[:, -1:], log_probabilities[:, :-1]], dim=1)
        names = (None, *(tool.name for tool in self.tools))
        return [names[i] for i in none_first.argmax(dim=1).tolist()]


def _check(tools: Sequence[Tool]) -> None:
    seen: set[str] = set()
    for tool in tools:
        if not tool.name or tool.name in seen:
            raise ConfigError(f"tool {tool.name!r}: give every tool a name of its own.")
        if not tool.domains:
            raise ConfigError(f"tool {tool.name!r} lists no domain, so nobody could call it; name one or remove it.")
        if tool.max_calls < 0:
            raise ConfigError(f"tool {tool.name!r}: max_calls must be 0 or more, not {tool.max_calls}.")
        seen.add(tool.name)
