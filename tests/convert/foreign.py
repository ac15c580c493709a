"""Tiny models of other families, made by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TINY: dict[str, Any] = {
    "vocab_size": 600,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.12,  # logits above 1, so that 1e-5 means something
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

#: Name -> family and what its configuration has besides ``TINY``.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied, all heads their own": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama yarn": ("llama", {"rope_parameters": YARN}),
    "llama linear": ("llama", {"rope_parameters": LINEAR, "rms_norm_eps": 1e-4}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral window": ("mistral", {"sliding_window": 24}),
    "mixtral": ("mixtral", EXPERTS),
    "mixtral window, top 3": ("mixtral", EXPERTS | {"sliding_window": 17, "num_experts_per_tok": 3}),
}


def save(folder: Path, name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **how: Any) -> Path:
    """Write a random model of ``MODELS`` as transformers does; ``how`` goes to ``save_pretrained``."""
    import transformers

    transformers.logging.disable_progress_bar()
    family, more = MODELS[name]
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(family, **(TINY | more))
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    for weight in model.parameters():  # transformers starts every norm with ones, which hides a swapped one
        if weight.dim() == 1:
            weight.data.uniform_(0.5, 1.5)
    model.save_pretrained(folder, **how)
    return folder


def write_tokenizer(folder: Path, texts: list[str], vocab_size: int = TINY["vocab_size"], reserved: int = 10) -> Path:
    """A byte-level BPE of exactly this many ids as ``tokenizer.json``, with special tokens like Llama 3's."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    specials = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{n}|>" for n in range(reserved))]
    one = tokenizers.Tokenizer(models.BPE())
    one.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    one.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(specials),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    one.train_from_iterator(texts, trainer)
    one.add_special_tokens(specials)
    assert one.get_vocab_size() == vocab_size
    one.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end_of_text|>"}\n'
    )
    return folder / "tokenizer.json"
