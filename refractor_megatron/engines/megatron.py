"""The Megatron-core engine: parallel groups, model, DDP, optimizer and schedules of one process."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import astuple
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..compat import cpu_runtime
from ..compat.megatron import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    Float16Module,
    OptimizerConfig,
    clear_aux_losses_tracker,
    finalize_model_grads,
    get_forward_backward_func,
    get_megatron_optimizer,
    model_parallel_cuda_manual_seed,
    parallel_state,
)
from ..config.schema import RunConfig
from ..distinction.closure import compile_checked
from ..distinction.rules import CompiledRules
from ..fabric.backends import AttentionInputs, resolve
from ..fabric.context_parallel import local_shard, part_of
from ..fabric.retrieval import RetrievalBank
from ..transformation.assemble_gpt import Grid, RouterPlan, assemble, transformer_config
from ..transformation.initialise import initialise
from ..transformation.layer_plan import LayerPlan, plan_layers
from ..transformation.router import RefractorRouter
from ..transformation.sharded import SHARDING
from .base import Batch, StepResult

_TIMEOUT = timedelta(minutes=10)


def start_distributed() -> torch.device:
    """Join the process group that the launcher's environment describes, and choose this rank's device.

    A process started by hand is a world of one. Without CUDA the CPU runtime becomes active, over gloo.
    """
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        cpu_runtime.install()
        device, backend = torch.device("cpu"), "gloo"
    if "MASTER_PORT" in os.environ:
        dist.init_process_group(backend, timeout=_TIMEOUT)
    else:
        assert os.environ["WORLD_SIZE"] == "1", "MASTER_PORT is missing"
        dist.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    return device


def stop_distributed() -> None:
    """Leave the process group."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


class MegatronEngine:
    """See ``engines.base.Engine``. One pipeline stage, one model chunk."""

    def __init__(
        self,
        cfg: RunConfig,
        device: torch.device,
        *,
        grid: Grid | None = None,
        stock_attention: bool = False,
        bank: RetrievalBank | None = None,
    ) -> None:
        """Build everything for ``cfg``.

        Args:
            grid: in place of ``cfg.parallel`` (a run is evaluated on one rank, whatever grid trained it).
            stock_attention: keep Megatron's own causal DotProductAttention (parity tests).
            bank: the records that batches name; needed where ``cfg`` retrieves.
        """
        self.device = device
        self.grid = grid or Grid(cfg.parallel.tp, cfg.parallel.pp, cfg.parallel.ep, cfg.parallel.cp)
        self.plan: LayerPlan = plan_layers(cfg)
        self.rules: CompiledRules = compile_checked(cfg.safety.masks)[0]
        self.seq_len, self.micro_batch, self.seed = cfg.train.seq_len, cfg.train.micro_batch, cfg.train.seed
        bf16 = cfg.train.mixed_precision == "bf16"
        _initialise_groups(self.grid)
        self.part = part_of(parallel_state.get_context_parallel_group())
        self.data_rank = parallel_state.get_data_parallel_rank()  # ranks that share a sequence share these
        self.data_size = parallel_state.get_data_parallel_world_size()
        self.is_reporter = dist.get_rank() == 0
        self.reseed(0)
        lb = cfg.router.lb
        router = RouterPlan(
            cfg.router.gate_temp,
            cfg.router.renormalize_topk,
            lb.lambda_kl,
            lb.lambda_ent,
            lb.entropy,
            cfg.router.gate_features,
        )
        self.config = transformer_config(self.plan, router, self.grid, bf16=bf16, recompute=cfg.train.recompute)
        self.rules_enforced = not stock_attention
        rules = None if stock_attention else self.rules
        core = assemble(self.plan, router, rules, self.config, self.seq_len, bank)
        initialise(core, self.plan, self.seed)
        self.model = core.to(device)
        self._prove_backend()
        wrapped = Float16Module(self.config, core) if bf16 else core
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, average_in_collective=False)
        self.ddp = DistributedDataParallel(self.config, ddp, wrapped)
        self.optimizer = get_megatron_optimizer(_optimizer_config(cfg, bf16), [self.ddp])
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.finalize_model_grads_func = finalize_model_grads
        self.routers = [m for m in core.modules() if isinstance(m, RefractorRouter)]
        self._run = get_forward_backward_func()

    def _prove_backend(self) -> None:
        """Choose the attention backend now: a refusal, a failed self-test, a long compilation belong to the start."""
        plan = self.plan.attention[0]
        if plan.linear is not None or not self.rules_enforced:
            return
        shape = (1, plan.heads // self.grid.tp, self.seq_len // self.grid.cp, plan.head_dim)
        one = torch.empty(1, 1, 1, 1, dtype=self.config.params_dtype, device=self.device, requires_grad=True)
        key = one.expand(1, plan.kv_heads // self.grid.tp, *shape[2:])
        resolve(plan.backend, AttentionInputs(one.expand(shape), key, key))

    def reseed(self, step: int) -> None:
        """Make every random choice of a step a function of (seed, step): nothing is left to save or to restore."""
        torch.manual_seed(self.seed + step)
        model_parallel_cuda_manual_seed(self.seed + step)

    def train_step(self, batches: Iterator[Batch], micro_batches: int, lr: float, weight_decay: float) -> StepResult:
        """One optimizer step over ``micro_batches`` micro-batches on this data-parallel rank."""
        return self.apply(self.accumulate(batches, micro_batches), lr, weight_decay)

    def apply(self, loss: float, lr: float, weight_decay: float) -> StepResult:
        """Clip and update with the gradients of ``accumulate``; nothing is updated when they are not finite."""
        finite = self._all_finite(loss)
        grad_norm = float("nan")
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group.get("lr_mult", 1.0)
                group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)
            updated, norm, _ = self.optimizer.step()
            finite, grad_norm = bool(updated), float(norm)
        return StepResult(loss, grad_norm, finite, self._router_counters())

    def accumulate(self, batches: Iterator[Batch], micro_batches: int) -> float:
        """Forward and backward from zero; returns the loss. Gradients are then reduced and final in ``main_grad``."""
        self.ddp.train()
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = self._schedule(batches, micro_batches, forward_only=False)
        if self.routers:
            clear_aux_losses_tracker()
        return self._mean_loss(losses, micro_batches)

    @torch.no_grad()
    def eval_loss(self, batches: Iterator[Batch], micro_batches: int) -> float:
        """Mean loss (nats per token) over all data-parallel ranks."""
        self.ddp.eval()
        losses = self._schedule(batches, micro_batches, forward_only=True)
        self.ddp.train()
        return self._mean_loss(losses, micro_batches)

    @torch.no_grad()
    def token_losses(self, batch: Batch) -> Tensor:
        """Loss of every token, nats [b, s], of a model that lives on this rank alone."""
        assert dist.get_world_size() == 1
        self.ddp.eval()
        tokens, labels = (t.to(self.device) for t in (batch.tokens, batch.labels))
        out: Tensor = self.ddp(tokens, _positions(tokens), batch.records, labels=labels)
        self.ddp.train()
        return out.float()

    @torch.no_grad()
    def logits(self, tokens: Tensor, records: Tensor) -> Tensor:
        """Logits [b, s, vocab] of a model that lives on this rank alone (evaluation and sampling)."""
        assert dist.get_world_size() == 1
        self.ddp.eval()
        tokens = tokens.to(self.device)
        out: Tensor = self.ddp(tokens, _positions(tokens), records)
        self.ddp.train()
        return out.float()

    def model_state(self) -> dict[str, Any]:
        """Sharded state dict of the weights."""
        state: dict[str, Any] = self.model.sharded_state_dict(metadata=dict(SHARDING))
        return state

    def optimizer_state(self, model_state: dict[str, Any], loading: bool) -> dict[str, Any]:
        """Sharded state dict of the optimizer, in the layout of ``model_state``."""
        state: dict[str, Any] = self.optimizer.sharded_state_dict(model_state, is_loading=loading)
        return state

    def load(self, model_state: dict[str, Any], optimizer_state: dict[str, Any] | None) -> None:
        """Take loaded state; without an optimizer state its fp32 copies follow the weights."""
        self.model.load_state_dict(model_state)
        if optimizer_state is None:
            self.optimizer.reload_model_params()
        else:
            self.optimizer.load_state_dict(optimizer_state)

    def _schedule(self, batches: Iterator[Batch], micro_batches: int, *, forward_only: bool) -> list[Tensor]:
        return [
            out["loss"]
            for out in self._run(
                forward_step_func=self._forward,
                data_iterator=batches,
                model=self.ddp,
                num_microbatches=micro_batches,
                seq_length=self.seq_len,
                micro_batch_size=self.micro_batch,
                decoder_seq_length=self.seq_len,
                forward_only=forward_only,
            )
        ]

    def _forward(self, batches: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
        batch = next(batches)
        tokens, labels = (t.to(self.device) for t in (batch.tokens, batch.labels))
        # Records stay whole, as the mask of a shard needs those of every key it reads, and in host memory, where masks
        # are planned: reading them back from the device would make each micro-batch wait for the one before.
        shard = [local_shard(t, 1, self.part) for t in (tokens, _positions(tokens), labels)]
        output = model(shard[0], shard[1], batch.records, labels=shard[2])

        def loss_function(per_token: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss = per_token.float().mean()
            # the schedule multiplies by cp, in place, and gradients are averaged over the shards of a sequence as well
            return loss / self.part.size, {"loss": loss.detach()}

        return output, loss_function

    def _mean_loss(self, losses: list[Tensor], micro_batches: int) -> float:
        """Mean over micro-batches, data-parallel ranks and shards, known to every rank of every stage."""
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        if losses and parallel_state.get_tensor_model_parallel_rank() == 0:
            total[0] = torch.stack(losses).double().sum()
            total[1] = micro_batches
        dist.all_reduce(total)
        return float(total[0] / total[1])

    def _all_finite(self, loss: float) -> bool:
        """Whether loss and gradients are finite on every rank."""
        buffers = [*self.ddp.buffers, *self.ddp.expert_parallel_buffers]
        sums = torch.stack([b.grad_data.sum().double() for b in buffers])
        bad = torch.tensor([float(not (torch.isfinite(sums).all() and math.isfinite(loss)))], device=self.device)
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        return not bool(bad.item())

    def _router_counters(self) -> Tensor | None:
        """Counters of all layers from all ranks, [layers, E + 2]; each token is counted once."""
        experts = self.plan.feed_forward[0].experts
        if not experts:
            return None
        table = torch.zeros(self.plan.n_layers, experts + 2, dtype=torch.float64, device=self.device)
        for router in self.routers:
            table[router.layer_number - 1] = router.take_counters()
        dist.all_reduce(table)
        return table.cpu()


def _positions(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)


def _initialise_groups(grid: Grid) -> None:
    """Megatron's groups for ``grid``; those of an earlier engine on the same grid serve again.

    torch never drops a group that is only forgotten, and each of gloo's has threads that wake up all the time.
    """
    if parallel_state.model_parallel_is_initialized() and _present_grid() == (*astuple(grid), grid.etp):
        return
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=grid.tp,
        pipeline_model_parallel_size=grid.pp,
        context_parallel_size=grid.cp,
        expert_model_parallel_size=grid.ep,
        expert_tensor_parallel_size=grid.etp,
    )


def _present_grid() -> tuple[int, ...]:
    """Sizes of the groups that exist: the fields of ``Grid``, then tensor parallelism inside experts."""
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_expert_tensor_parallel_world_size(),
    )


def _optimizer_config(cfg: RunConfig, bf16: bool) -> Any:
    optimizer = cfg.train.optimizer
    assert optimizer.type == "adamw"
    return OptimizerConfig(
        optimizer="adam",  # Megatron's name; decoupled weight decay is its default
        lr=optimizer.lr,
        weight_decay=optimizer.wd,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.eps,
        clip_grad=cfg.train.grad_clip,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
    )
