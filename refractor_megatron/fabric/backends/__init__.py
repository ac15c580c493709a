"""Attention backends: capability flags, self-test on first use, explicit selection."""

from refractor_megatron.fabric.backends.registry import (
    Backend,
    Capabilities,
    available,
    describe,
    register,
    resolve,
)

__all__ = ["Backend", "Capabilities", "available", "describe", "register", "resolve"]
