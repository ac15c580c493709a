"""Logits of a foreign folder by transformers' own model, beside those of ours with the same weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...config import RunConfig
from ...distinction.roles import DOCUMENT_ROLE, ROLE_ID
from ...errors import CheckpointError
from . import probe
from .foreign import ForeignFolder
from .probe import Probe

#: Short: transformers rounds angles to fp32, so its positions are off by about position · 6e-8 rad.
_TOKENS, _MOST = 64, 256
_SEED = 20_260_004


def plain_probe(cfg: RunConfig, vocab_size: int | None = None) -> Probe:
    """One document of plain text: random tokens, below ``vocab_size``, past the end of a short sliding window."""
    longest, window = cfg.model.context_max, cfg.relation.local.window
    length = min(longest, window + _TOKENS if window + _TOKENS <= _MOST else _TOKENS)
    vocab_size = vocab_size or cfg.model.vocab_size
    tokens = torch.randint(0, vocab_size, (1, length), generator=torch.Generator().manual_seed(_SEED))
    records = torch.zeros(1, length, 4, dtype=torch.int32)
    records[..., 2] = ROLE_ID[DOCUMENT_ROLE]
    return Probe(tokens, records)


def transformers_logits(folder: Path, batch: Probe) -> Tensor:
    """fp32 logits [L, V] of the class that transformers has for ``folder``.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise CheckpointError(f"transformers cannot load {folder} ({text}), so it cannot be compared.") from None
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=batch.tokens, use_cache=False).logits[0]
    return logits.float()


def our_logits(foreign: ForeignFolder, batch: Probe) -> Tensor:
    """fp32 logits [L, V] of our HF model with the weights of ``foreign``."""
    from ...hf.from_run import hf_config
    from ...hf.modeling_refractor import RefractorForCausalLM

    with torch.device("meta"):
        model = RefractorForCausalLM(hf_config(foreign.model.cfg, None))
    weights = {name: foreign.read(name).float() for name in foreign.tensors}
    model.load_state_dict(weights, strict=not foreign.shape.tied, assign=True)
    model.tie_weights()
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=batch.tokens, records=batch.records, use_cache=False).logits[0]
    return logits


def check_same_model(ours: Tensor, theirs: Tensor, folder: Path) -> float:
    """Largest difference of two sets of logits, over the tokens of ``theirs``.

    Raises:
        CheckpointError: it is more than 1e-5 of the largest logit.
    """
    difference, bound = probe.compare(ours[..., : theirs.shape[-1]], theirs, probe.PARITY)
    if not difference <= bound:
        raise CheckpointError(
            f"logits of {folder} by transformers and by REFRACTOR differ by {difference:.2e}, more than {bound:.1e}: "
            "its configuration means something that is not understood here, so nothing was published."
        )
    return difference
