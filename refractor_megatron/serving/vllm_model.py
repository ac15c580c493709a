"""REFRACTOR decoders under vLLM (V1 engine): the model of the export, its cache in vLLM's pages.

Tri-tier attention is none of vLLM's attention kinds, and its state does not grow with the sequence but for summaries.
So vLLM sees one recurrent layer: a page for each running sequence holds the whole state (``state``), allocated when the
sequence starts and freed when it ends. The forward pass is that of the export's own modelling code.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.models.interfaces import HasInnerState, IsAttentionFree
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheSpec, MambaSpec

from refractor_megatron.errors import CapabilityError
from refractor_megatron.hf.configuration_refractor import RefractorConfig
from refractor_megatron.hf.modeling_refractor import RefractorModel
from refractor_megatron.serving.state import Pages, load_exactly, state_fields

#: A page is a multiple of this many bytes, so that every field of every page is aligned.
_ALIGNMENT = 64


@dataclass
class StateMetadata:
    """Of each request in a batch: its page, where its tokens begin (and the last one's end), and how many it had."""

    pages: Tensor
    starts: list[int]
    known: list[int]


class StateMetadataBuilder(AttentionMetadataBuilder[StateMetadata]):
    """Picks what the state layer needs from vLLM's description of a batch."""

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> StateMetadata:
        """The batch's metadata. Lengths are exact: their upper bound differs under speculative decoding only."""
        common = common_attn_metadata
        starts = common.query_start_loc_cpu.tolist()
        lengths = common.seq_lens_cpu_upper_bound
        known = (common.seq_lens.cpu() if lengths is None else lengths)[: common.num_reqs].tolist()
        known = [total - (stop - start) for total, start, stop in zip(known, starts, starts[1:], strict=False)]
        return StateMetadata(common.block_table_tensor[:, 0].long(), starts, known)


class StateBackend(AttentionBackend):
    """What vLLM calls an attention backend: here only the source of ``StateMetadata``."""

    @staticmethod
    def get_name() -> str:
        """Name in vLLM's log."""
        return "REFRACTOR_STATE"

    @staticmethod
    def get_impl_cls() -> type[Any]:
        """Attention is computed by the model itself."""
        raise AssertionError("the model computes its attention itself")

    @staticmethod
    def get_builder_cls() -> type[StateMetadataBuilder]:
        """Maker of the metadata."""
        return StateMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        """The state is one page a sequence."""
        return True


class SequenceState(nn.Module, MambaBase):
    """The one stateful layer that vLLM sees; ``kv_cache`` holds the fields of all pages, [pages, ...] each."""

    def __init__(self, config: RefractorConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.config, self.name = config, prefix
        self.length = vllm_config.model_config.max_model_len
        self.fields = state_fields(config, self.length, vllm_config.model_config.dtype)
        self.kv_cache: tuple[Tensor, ...] = ()
        vllm_config.compilation_config.static_forward_context[prefix] = self

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the fields in a page."""
        return tuple(field.shape for field in self.fields)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """Their element types."""
        return tuple(field.dtype for field in self.fields)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """None of vLLM's own kinds."""
        return MambaAttentionBackendEnum.CUSTOM

    def get_attn_backend(self) -> type[AttentionBackend]:
        """Ours, whatever the kind."""
        return StateBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """One page for a whole sequence."""
        size = sum(field.nbytes for field in self.fields)
        return MambaSpec(
            shapes=self.get_state_shape(),
            dtypes=self.get_state_dtype(),
            block_size=self.length,
            page_size_padded=-(-size // _ALIGNMENT) * _ALIGNMENT,
            mamba_type=self.mamba_type,
            mamba_cache_mode="none",
        )


class RefractorForCausalLM(nn.Module, HasInnerState, IsAttentionFree):
    """An export as vLLM runs it: unsharded, without CUDA graphs; parameters bear the names of its files.

    Errors: ``ConfigError`` for tiers that a request cannot feed (``state.state_fields``), ``CapabilityError`` for
    settings of vLLM that this model does not know, ``CheckpointError`` for files that do not fit the configuration.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        _refuse(vllm_config)
        config = vllm_config.model_config.hf_config
        assert isinstance(config, RefractorConfig), type(config)  # registered: transformers prefers it to the folder's
        self.config = config
        # vLLM reads a layer's number from its name.
        self.state = SequenceState(config, vllm_config, f"{prefix}.state.0" if prefix else "state.0")
        self.model = RefractorModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embeddings of ids, without the roles' rows, which depend on what came before."""
        out: Tensor = self.model.embed_tokens(input_ids)
        return out

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        """Hidden states [tokens, hidden] of a batch of requests laid end to end; padding rows are zero."""
        assert input_ids is not None and inputs_embeds is None and intermediate_tensors is None
        ids = input_ids.long()
        metadata = get_forward_context().attn_metadata
        if not metadata:  # vLLM measures the memory of a batch before there are pages
            out: Tensor = self.model(ids[None, : self.state.length], use_cache=False).last_hidden_state[0]
            return F.pad(out, (0, 0, 0, len(ids) - len(out)))
        batch: StateMetadata = metadata[self.state.name]
        pages = Pages(self.config, self.state.fields, self.state.kv_cache)
        return pages.run_batch(self.model, ids, batch.starts, batch.known, batch.pages)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Logits [rows, vocabulary] of the rows that vLLM samples from."""
        out: Tensor = self.lm_head(hidden_states)
        return out

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copies every tensor of the export into the parameter of its name, one to one."""
        return load_exactly(dict(self.named_parameters()), weights)


def _refuse(vllm_config: VllmConfig) -> None:
    """Raises ``CapabilityError`` for what would not do what the user asked for."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    asked = {
        "--tensor-parallel-size": parallel.tensor_parallel_size > 1,
        "--pipeline-parallel-size": parallel.pipeline_parallel_size > 1,
        "--speculative-config": vllm_config.speculative_config is not None,
        "--quantization": vllm_config.model_config.quantization is not None,
        "--enable-prefix-caching": cache.enable_prefix_caching,
        "--mamba-cache-mode": cache.mamba_cache_mode != "none",
        "--enable-prompt-embeds": vllm_config.model_config.enable_prompt_embeds,
        "--enable-lora": vllm_config.lora_config is not None,
        "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
        "--kv-cache-dtype": cache.cache_dtype != "auto",
    }
    for option, given in asked.items():
        if given:
            raise CapabilityError(f"vLLM was given {option}, which a REFRACTOR model does not serve yet; leave it out.")
