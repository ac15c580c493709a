"""The only door to megatron-core, DeepSpeed and Transformer Engine, and what this machine can do.

Import the submodule you need: ``versions`` and ``doctor`` are light, ``megatron`` and ``cpu_runtime`` import torch.
"""
