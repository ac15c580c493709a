"""REFRACTOR on Megatron: long-context, retrieval-aware mixture-of-experts training with compiled information flow."""

__version__ = "0.1.0"
