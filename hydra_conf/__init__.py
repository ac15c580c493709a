"""Hydra groups. Each file holds differences from the defaults of ``refractor_megatron.config.schema`` and no more."""
