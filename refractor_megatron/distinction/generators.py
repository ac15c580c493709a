"""Rules and records for tests, probes and benchmarks: random, every mask feature at once, or plain documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from refractor_megatron.distinction.roles import DOCUMENT_ROLE, ROLE_ID, ROLES, SCOPE_BITS


def plain_records(length: int, fan_in: int = 0, documents: Sequence[int] | None = None) -> npt.NDArray[np.int32]:
    """int32 [length, 4 + fan_in]: plain documents side by side, every token with the retrieved records 0 to fan_in - 1.

    documents: their lengths, which add up to ``length``; one document where none are given.
    """
    sizes = [length] if documents is None else documents
    assert sum(sizes) == length, (sum(sizes), length)
    records = np.zeros((length, 4 + fan_in), dtype=np.int32)
    records[:, 0] = np.repeat(np.arange(len(sizes)), sizes)
    records[:, 2] = ROLE_ID[DOCUMENT_ROLE]
    records[:, 4:] = np.arange(fan_in)
    return records


def random_records(
    rng: np.random.Generator, length: int, documents: int = 3, padding: bool = True
) -> npt.NDArray[np.int32]:
    """int32 [length, 4] with runs of random lengths; documents and segments may return; -1 documents are padding."""
    columns = [
        _runs(rng, length, -1 if padding else 0, documents, 20),
        _runs(rng, length, 0, 3, 15),
        _runs(rng, length, 0, len(ROLES), 6),
        _runs(rng, length, 0, 32, 7),
    ]
    return np.stack(columns, axis=1).astype(np.int32)


def random_rules(rng: np.random.Generator, most: int = 4, causal: bool = False) -> list[dict[str, Any]]:
    """Up to ``most`` valid rules over all fields; with ``causal`` none relaxes causality."""
    rules = []
    for i in range(int(rng.integers(0, most + 1))):
        when: dict[str, Any] = {}
        if rng.random() < 0.7:
            when["role"] = str(rng.choice(ROLES))
        if not when or rng.random() < 0.5:
            bits = [str(bit.name) for bit in SCOPE_BITS if rng.random() < 0.5]
            when["bits"] = bits or [str(SCOPE_BITS[i % len(SCOPE_BITS)].name)]
        rule: dict[str, Any] = {"name": f"rule-{i}", "when": when, "causal": causal or bool(rng.random() < 0.8)}
        for field in ("allow_read_from", "allow_write_to"):
            if rng.random() < 0.5:
                rule[field] = [role for role in ROLES if rng.random() < 0.6]
        if rule["causal"] and len(rule) == 3:  # a rule must restrict something
            rule["allow_read_from"] = list(ROLES)
        rules.append(rule)
    return rules


def _runs(rng: np.random.Generator, length: int, low: int, high: int, mean: int) -> npt.NDArray[np.int64]:
    sizes = rng.geometric(1 / mean, size=length)
    values = rng.integers(low, high, size=length)
    return np.repeat(values, sizes)[:length].astype(np.int64)
