"""A seventh role, from the rules file to the mask: nothing but the list of roles knows how many there are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from data_pipeline.sources.messages import conversation
from refractor_megatron.distinction.closure import indirect_flows, transitive_closure
from refractor_megatron.distinction.flows import describe
from refractor_megatron.distinction.intervals import compile_intervals
from refractor_megatron.distinction.lowerings import dense_mask, mask_mod
from refractor_megatron.distinction.pattern import FULL, LocalPattern
from refractor_megatron.distinction.roles import ROLES
from refractor_megatron.distinction.rule_file import RuleFile, read_rules
from refractor_megatron.distinction.rules import SCOPES, compile_rules, type_name

RULES = """\
roles: [critic]
shared_roles: [system]
rules:
  # A critic reads the answer and nobody but a critic reads its verdict.
  - {name: verdict, when: {role: critic}, allow_read_from: [assistant, critic], allow_write_to: [critic]}
"""
MESSAGES = [("system", 3), ("user", 2), ("assistant", 3), ("critic", 2), ("assistant", 2), ("critic", 2)]


def rules_of(folder: Path) -> RuleFile:
    (folder / "rules.yaml").write_text(RULES)
    return read_rules(folder / "rules.yaml")


def records_of(roles: tuple[str, ...]) -> np.ndarray:
    rows = [(0, 0, roles.index(role), 0) for role, size in MESSAGES for _ in range(size)]
    return np.array(rows, dtype=np.int32)


def test_from_the_file_to_all_three_masks(tmp_path: Path) -> None:
    rules = rules_of(tmp_path).compiled
    records = records_of(rules.roles)
    names = [rules.roles[role] for role in records[:, 2]]
    length = len(records)
    expected = np.zeros((length, length), dtype=np.bool_)
    for q, reader in enumerate(names):
        for k in range(q + 1):
            verdict = names[k] == "critic"
            expected[q, k] = q == k or (names[k] in ("assistant", "critic") if reader == "critic" else not verdict)
    assert (compile_intervals(records, rules, FULL).rows.dense(length, 0, length) == expected).all()
    assert (dense_mask(torch.from_numpy(records), rules, FULL).numpy() == expected).all()
    index = torch.arange(length)
    window = LocalPattern(window=4)
    near = mask_mod(torch.from_numpy(records), rules, window)(index[:, None], index).numpy()
    assert (near == expected & (index[:, None] - index < 4).numpy()).all()


def test_tables_names_flows_and_text_know_it(tmp_path: Path) -> None:
    file = rules_of(tmp_path)
    rules = file.compiled
    assert rules.types == 7 * SCOPES and type_name(6 * SCOPES, rules.roles) == "critic"
    assert rules != compile_rules([]), "another list of roles is another rule set"
    assert file.check() == indirect_flows(rules)
    critic, user = 6 * SCOPES, ROLES.index("user") * SCOPES
    assert transitive_closure(rules.table)[critic, user] and not rules.table[critic, user]
    assert not transitive_closure(rules.table)[user, critic]
    assert "user, tool, code, data -> assistant -> critic" in describe(rules).replace("system, user", "user")


def test_conversations_may_use_it(tmp_path: Path) -> None:
    roles = rules_of(tmp_path).compiled.roles
    messages = json.loads('[{"role": "user", "content": "x", "protocol_tags": ["<role:critic>"]}]')
    assert conversation(messages, "talk", roles).parts[0].role == 6


def test_ids_of_the_standard_roles_stay(tmp_path: Path) -> None:
    """Append only: records and role embeddings made before the extension keep their meaning."""
    assert rules_of(tmp_path).compiled.roles[: len(ROLES)] == ROLES
