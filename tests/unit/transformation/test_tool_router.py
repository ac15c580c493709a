"""Tool router: what is forbidden stays forbidden, what is learnt can be learnt, ties are decided."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_megatron.distinction.gating import GATE_FEATURES
from refractor_megatron.distinction.roles import ROLE_ID, MaskBit
from refractor_megatron.errors import ConfigError
from refractor_megatron.transformation.tool_router import Tool, ToolRouter

TOOLS = (
    Tool("calc", frozenset({"shop", "lab"}), 2),
    Tool("mail", frozenset({"shop"}), 1),
    Tool("shell", frozenset({"lab"}), 8),
)
WIDTH = 6


def records_of(*tokens: tuple[str, int]) -> torch.Tensor:
    return torch.tensor([[0, 0, ROLE_ID[role], bits] for role, bits in tokens], dtype=torch.int32)


def router_of(seed: int = 0) -> ToolRouter:
    torch.manual_seed(seed)
    return ToolRouter(WIDTH, TOOLS)


def test_domain_and_budget_close_tools() -> None:
    router, records = router_of(), records_of(("assistant", 0))
    closed = lambda domain, **calls: router.forbidden(records, domain, calls)[0].tolist()  # noqa: E731
    assert closed("shop") == [False, False, True, False]
    assert closed("lab") == [False, True, False, False]
    assert closed("shop", mail=1, calc=1) == [False, True, True, False]
    assert closed("shop", mail=1, calc=2) == [True, True, True, False]
    assert closed("nowhere") == [True, True, True, False]


@pytest.mark.parametrize("bits", [MaskBit.SAFETY_SCOPE, MaskBit.RET_SCOPE, MaskBit.RET_SCOPE | MaskBit.SEGMENT])
def test_protected_tokens_call_nothing(bits: MaskBit) -> None:
    router = router_of()
    records = records_of(("assistant", int(bits)), ("assistant", int(MaskBit.TOOL_SCOPE)))
    out = router(torch.randn(2, WIDTH), records, "lab", {})
    assert out[0].tolist() == [-torch.inf] * 3 + [0.0]
    assert out[1, 0] > -torch.inf


@settings(max_examples=60)
@given(st.integers(0, 2**31 - 1), st.sampled_from(["shop", "lab", "none"]), st.integers(0, 3), st.integers(0, 9))
def test_a_forbidden_tool_has_no_mass_however_large_its_logit(seed: int, domain: str, calls: int, power: int) -> None:
    router = router_of(seed)
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 32, (5,), generator=generator)
    records = records_of(*(("assistant", int(bit)) for bit in bits))
    with torch.no_grad():  # an adversary pushes every tool's logit, by weight, by feature and by hidden state
        router.weight[:-1] *= 10.0**power
        router.feature_weight[:-1] += 10.0**power
    spent = {"calc": calls, "shell": calls}
    hidden = torch.randn(5, WIDTH, generator=generator) * 10.0**power
    out = router(hidden, records, domain, spent)
    closed = router.forbidden(records, domain, spent)
    assert (out.exp()[closed] == 0).all() and not out.isnan().any()
    assert torch.allclose(out.exp().sum(1), torch.ones(5))
    names = {tool.name: i for i, tool in enumerate(TOOLS)}
    for row, name in enumerate(router.choose(out)):
        assert name is None or not closed[row, names[name]]


def test_features_start_silent_and_can_be_learnt() -> None:
    router = router_of()
    hidden = torch.zeros(2, WIDTH)
    records = records_of(("assistant", 0), ("user", 0))
    target = torch.tensor([0, 3])
    assert torch.equal(*router(hidden, records, "lab", {})), "roles make no difference at the start"
    optimizer = torch.optim.SGD(router.parameters(), lr=2.0)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.nll_loss(router(hidden, records, "lab", {}), target).backward()
        optimizer.step()
    assert router.choose(router(hidden, records, "lab", {})) == ["calc", None]


def test_gradients_match_finite_differences_and_spare_forbidden_tools() -> None:
    router = router_of().double()
    records = records_of(("assistant", 0), ("tool", 4), ("user", 8))
    hidden = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
    out = router(hidden, records, "shop", {})
    out[:, [0, 1, 3]][:2].sum().backward()
    assert router.weight.grad is not None and router.feature_weight.grad is not None
    assert (router.weight.grad[2] == 0).all() and router.weight.grad[:2].norm() > 0
    assert router.feature_weight.grad[:, GATE_FEATURES.index("assistant")].norm() > 0
    assert (router.feature_weight.grad[:, GATE_FEATURES.index("user")] == 0).all(), "its token had no choice"
    step, at = 1e-2, (1, 3)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            router.weight[at] += sign * step
            values.append(router(hidden, records, "shop", {})[:, [0, 1, 3]][:2].sum().item())
            router.weight[at] -= sign * step
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(router.weight.grad[at].item(), rel=1e-2)


def test_ties_go_to_no_tool_then_to_the_first() -> None:
    router = router_of()
    even = torch.tensor([[-1.0, -1.0, -1.0, -1.0], [-1.0, -1.0, -1.0, -2.0], [-3.0, -1.0, -1.0, -2.0]])
    assert router.choose(even) == [None, "calc", "mail"]


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ([TOOLS[0], TOOLS[0]], "name of its own"),
        ([Tool("", frozenset({"a"}), 1)], "name of its own"),
        ([Tool("x", frozenset(), 1)], "lists no domain"),
        ([Tool("x", frozenset({"a"}), -1)], "max_calls must be 0 or more, not -1"),
    ],
)
def test_bad_registrations_are_named(tools: list[Tool], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ToolRouter(WIDTH, tools)


def test_calls_of_an_unregistered_tool_are_our_mistake() -> None:
    with pytest.raises(AssertionError, match="not registered"):
        router_of()(torch.zeros(1, WIDTH), records_of(("user", 0)), "lab", {"rm": 1})
