"""The one door to megatron-core: every name the package uses, imported here (and in ``cpu_runtime``) only.

Importing this module imports torch and Megatron; it installs nothing (see ``cpu_runtime.install``).
"""

from __future__ import annotations

import logging
import warnings

warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*")

from megatron.core import __version__ as MEGATRON_VERSION  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories  # noqa: E402
from megatron.core.dist_checkpointing.serialization import (  # noqa: E402
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.utils import nested_values  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding  # noqa: E402
from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.module import Float16Module, MegatronModule  # noqa: E402
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, clear_aux_losses_tracker  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402
from megatron.core.transformer.transformer_block import (  # noqa: E402
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from megatron.core.transformer.transformer_layer import (  # noqa: E402
    TransformerLayer,
    get_transformer_layer_offset,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint  # noqa: E402

logging.getLogger("megatron.core").setLevel(logging.ERROR)

__all__ = [
    "MEGATRON_VERSION",
    "DistributedDataParallel",
    "DistributedDataParallelConfig",
    "Float16Module",
    "GPTModel",
    "LanguageModelEmbedding",
    "MegatronModule",
    "MegatronOptimizer",
    "ModuleSpec",
    "MoEAuxLossAutoScaler",
    "OptimizerConfig",
    "ShardedTensor",
    "ShardedTensorFactory",
    "TopKRouter",
    "TransformerBlockSubmodules",
    "TransformerConfig",
    "TransformerLayer",
    "apply_factories",
    "clear_aux_losses_tracker",
    "dist_checkpointing",
    "finalize_model_grads",
    "get_default_load_sharded_strategy",
    "get_default_save_sharded_strategy",
    "get_forward_backward_func",
    "get_gpt_layer_local_spec",
    "get_megatron_optimizer",
    "get_num_layers_to_build",
    "get_pos_emb_on_this_cp_rank",
    "get_transformer_layer_offset",
    "make_sharded_tensors_for_checkpoint",
    "model_parallel_cuda_manual_seed",
    "nested_values",
    "parallel_state",
    "set_tensor_model_parallel_attributes",
    "tensor_parallel",
]
