"""Logits of a Megatron checkpoint by Megatron's own path: its loader, its model, one process."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...compat.megatron import dist_checkpointing, get_default_load_sharded_strategy, parallel_state
from ...config.schema import RunConfig
from ...engines.megatron import MegatronEngine, start_distributed, stop_distributed
from ...errors import CheckpointError
from ...fabric.retrieval import RetrievalBank
from ...transformation.assemble_gpt import Grid
from ...transformation.sharded import sharded_tensors
from .probe import Probe


def megatron_logits(cfg: RunConfig, step: Path, prefix: str, rounded: torch.dtype | None, probe: Probe) -> Tensor:
    """fp32 logits [L, V] without padding, of the checkpoint ``step``.

    Args:
        prefix: of the keys of the weights (``ema.`` for the average). rounded: type that an export stores them in.

    Raises:
        CheckpointError: Megatron cannot load the checkpoint.
    """
    alone = not dist.is_initialized()
    device = start_distributed() if alone else _device()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch and megatron-core about themselves
            return _logits(cfg, step, prefix, rounded, probe, device)
    finally:
        if alone:
            stop_distributed()
        else:
            parallel_state.destroy_model_parallel()


def _logits(
    cfg: RunConfig, step: Path, prefix: str, rounded: torch.dtype | None, probe: Probe, device: torch.device
) -> Tensor:
    engine = MegatronEngine(_in_fp32(cfg), device, grid=Grid(), bank=_bank(probe, device))
    _load(engine, step, prefix)
    if rounded is not None:
        for parameter in engine.model.parameters():
            parameter.data.copy_(parameter.data.to(rounded))
    logits = engine.logits(probe.tokens, _records(probe, cfg))
    return logits[0, :, : cfg.model.vocab_size].cpu()


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _in_fp32(cfg: RunConfig) -> RunConfig:
    """The same model, computed in fp32: what is compared is the conversion, not rounding."""
    values = cfg.values() | {"train.mixed_precision": "fp32", "train.recompute": "none"}
    return RunConfig.from_values(values, preset=cfg.preset, baseline=cfg.baseline)


def _bank(probe: Probe, device: torch.device) -> RetrievalBank | None:
    if probe.vectors is None or probe.policies is None:
        return None
    return RetrievalBank(probe.vectors.to(device), probe.policies.numpy(), "probe")


def _records(probe: Probe, cfg: RunConfig) -> Tensor:
    """Records int32 [1, L, 4 + R]: the ids that a chunk reads stand with its tokens."""
    if probe.ids is None:
        return probe.records
    chunk, length = cfg.relation.retrieval.chunk, probe.tokens.shape[1]
    ids = probe.ids.repeat_interleave(chunk, dim=1)[:, :length]
    return torch.cat([probe.records, ids], dim=-1)


def _load(engine: MegatronEngine, step: Path, prefix: str) -> None:
    state: dict[str, Any] = sharded_tensors(engine.model)
    for entry in state.values():
        entry.key = prefix + entry.key
    try:
        strategy = get_default_load_sharded_strategy(str(step))
        loaded: dict[str, Any] = dist_checkpointing.load({"model": state}, str(step), strategy)["model"]
    except (KeyError, dist_checkpointing.core.CheckpointingException) as error:
        raise CheckpointError(f"Megatron cannot load {step} ({str(error)[:160]}).") from None
    parameters = dict(engine.model.named_parameters())
    assert loaded.keys() == parameters.keys(), sorted(loaded.keys() ^ parameters.keys())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(loaded[name])
