"""Engines run a LayerPlan: Megatron-core first."""
