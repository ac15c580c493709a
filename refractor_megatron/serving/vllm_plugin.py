"""Entry point of vLLM's plug-in group ``vllm.general_plugins``: vLLM calls ``register`` in each of its processes.

The model class is named, not imported: vLLM loads it in the worker, after the choice of device. vLLM itself is imported
by the time it calls us; nobody else needs it.
"""

from __future__ import annotations

#: ``architectures`` of an export's config.json, and where the class that serves it lies.
ARCHITECTURE = "RefractorForCausalLM"
MODEL_CLASS = "refractor_megatron.serving.vllm_model:RefractorForCausalLM"


def register() -> None:
    """Makes REFRACTOR exports known to vLLM and their configuration to transformers; harmless when called again."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from refractor_megatron.hf.configuration_refractor import RefractorConfig

    # With the class known, vLLM reads config.json without running code from the export's folder.
    AutoConfig.register(RefractorConfig.model_type, RefractorConfig, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, MODEL_CLASS)
