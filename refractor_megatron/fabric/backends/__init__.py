"""Attention backends: capability flags, self-test on first use, explicit selection."""

from refractor_megatron.fabric.backends.interface import Attention, AttentionInputs
from refractor_megatron.fabric.backends.registry import (
    Backend,
    Capabilities,
    available,
    describe,
    named,
    register,
    resolve,
    select,
    visited_pairs,
)

__all__ = [
    "Attention",
    "AttentionInputs",
    "Backend",
    "Capabilities",
    "available",
    "describe",
    "named",
    "register",
    "resolve",
    "select",
    "visited_pairs",
]
