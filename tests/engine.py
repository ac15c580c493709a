"""Small engines for tests: one process, CPU runtime, random tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from refractor_megatron.compat.megatron import MoEAuxLossAutoScaler
from refractor_megatron.config import RunConfig, compose
from refractor_megatron.distinction.roles import ROLE_ID
from refractor_megatron.engines.base import Batch
from refractor_megatron.engines.megatron import MegatronEngine, start_distributed
from refractor_megatron.fabric.retrieval import RetrievalBank


def tiny(*overrides: str) -> RunConfig:
    """The nano preset in fp32 with overrides."""
    return compose(["experiment=nano", "train.mixed_precision=fp32", *overrides])


def engine_of(cfg: RunConfig, *, stock_attention: bool = False, bank: RetrievalBank | None = None) -> MegatronEngine:
    """An engine in this process, which becomes a world of one."""
    # What an earlier backward pass by hand left here has another shape than the schedule's (upstream, one per process).
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    device = torch.device("cpu") if torch.distributed.is_initialized() else start_distributed()
    return MegatronEngine(cfg, device, stock_attention=stock_attention, bank=bank)


def plain_batch(cfg: RunConfig, seed: int = 0, samples: int | None = None) -> Batch:
    """Random tokens of plain documents."""
    generator = torch.Generator().manual_seed(seed)
    b, s = samples or cfg.train.micro_batch, cfg.train.seq_len
    tokens = torch.randint(0, cfg.model.vocab_size, (b, s + 1), generator=generator)
    records = torch.zeros(b, s, 4, dtype=torch.int32)
    records[..., 2] = ROLE_ID["data"]
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), records)


def records_of(runs: Sequence[tuple[int, int, int, str, int]]) -> torch.Tensor:
    """Records int32 [1, s, 4] from runs (length, document, segment, role, mask bits)."""
    rows = [[document, segment, ROLE_ID[role], bits] for n, document, segment, role, bits in runs for _ in range(n)]
    return torch.tensor(rows, dtype=torch.int32)[None]
