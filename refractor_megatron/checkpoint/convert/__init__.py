"""Checkpoints between Megatron's distributed format and a Hugging Face folder, both ways from one table."""
