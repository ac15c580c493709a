"""Opt-in runtime that lets megatron-core 0.16 run on a CPU-only torch over gloo.

Upstream has no CPU mode: about two hundred places in its training path name ``torch.cuda`` or ``device="cuda"``.
``install()`` covers them from outside, in three layers:

1. functions of ``torch.cuda`` that have an exact CPU meaning (device, synchronise, streams, RNG, nvtx) are rebound;
2. one ``TorchFunctionMode`` maps ``device="cuda"`` to the CPU and answers the ``torch.cuda.*Tensor`` type names that
   Megatron's optimizers compare with;
3. six Megatron attributes are replaced (``PATCHES``), each for the reason written beside it.

It never acts when CUDA is present, so GPU runs see upstream untouched. Every replaced name is asserted to exist first:
an upgrade fails loudly here rather than silently later.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import queue
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..errors import CapabilityError

CPU = torch.device("cpu")

#: Megatron attributes replaced on CPU: (module, dotted attribute, why).
PATCHES: tuple[tuple[str, str, str], ...] = (
    ("megatron.core.tensor_parallel.random", "_get_cuda_rng_state", "reads the CUDA generator"),
    ("megatron.core.tensor_parallel.random", "_set_cuda_rng_state", "writes the CUDA generator"),
    (
        "megatron.core.transformer.moe.token_dispatcher",
        "maybe_move_tensor_to_cpu",
        "converts only tensors with .is_cuda, and all_to_all needs host lists of split sizes",
    ),
    (
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer._set_main_param_and_optimizer_states",
        "torch AdamW keeps 'step' in its state, checkpoints keep it in the groups",
    ),
    (
        "megatron.core.dist_checkpointing.strategies.filesystem_async",
        "_get_write_results_queue",
        "spawns a manager process that imports torch again: ten seconds for each save",
    ),
    (
        "megatron.core.dist_checkpointing.strategies.filesystem_async",
        "FileSystemWriterAsync.write_preloaded_data_multiproc",
        "forks a process that already runs OpenMP and gloo threads",
    ),
)

#: Names of ``torch.cuda`` that are rebound.
CUDA_NAMES = (
    *("current_device", "set_device", "synchronize", "empty_cache", "current_stream", "default_stream"),
    *("Stream", "Event", "stream", "get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"),
)

_installed = False


def is_installed() -> bool:
    """Whether the CPU runtime is active in this process."""
    return _installed


def install() -> bool:
    """Make megatron-core usable on this CPU-only process; call before any model is built.

    Returns:
        True when the runtime is active, False when CUDA is present and nothing was touched.

    Raises:
        CapabilityError: the installed megatron-core is not a version this runtime was written for.
    """
    global _installed
    if torch.cuda.is_available():
        return False
    if _installed:
        return True
    _check_version()
    for module, attribute, _ in PATCHES:
        owner, name = locate(module, attribute)
        assert hasattr(owner, name), (
            f"megatron-core no longer has {module}.{attribute}; compat/cpu_runtime.py must follow"
        )
    _rebind_cuda()
    _patch_megatron()
    torch.compiler.set_stance("force_eager")  # jit_fuser is torch.compile: on a CPU that is minutes of C++ compiler
    _CudaToCpu().__enter__()  # type: ignore[no-untyped-call]
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(
        logging.ERROR
    )  # "CPU RNG state changed": expected
    _installed = True
    return True


def locate(module: str, attribute: str) -> tuple[Any, str]:
    """Object that owns ``module.attribute`` and the attribute's last name."""
    owner: Any = importlib.import_module(module)
    *path, name = attribute.split(".")
    for part in path:
        owner = getattr(owner, part)
    return owner, name


def _check_version() -> None:
    from megatron.core import __version__

    if not __version__.startswith("0.16."):
        raise CapabilityError(
            f"megatron-core {__version__} is installed, but the CPU runtime covers 0.16.x: "
            "install 'megatron-core>=0.16.1,<0.17', or run on a GPU."
        )


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device == "cuda" or device.startswith("cuda:")
    return isinstance(device, torch.device) and device.type == "cuda"


class _CudaToCpu(TorchFunctionMode):
    """Maps CUDA device arguments to the CPU; about 2 µs per torch call."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": CPU}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        return func(*args, **(kwargs or {}))


class _Stream:
    """Stands for a CUDA stream or event: everything on a CPU is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exc: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., _Stream]:
        return lambda *args, **kwargs: self


def _constant(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _rebind_cuda() -> None:
    cuda: Any = torch.cuda
    for name in CUDA_NAMES:
        assert hasattr(cuda, name), f"torch.cuda.{name} is gone; compat/cpu_runtime.py must follow"
    stream = _Stream()
    cuda.current_device = _constant(CPU)  # valid as device=..., which an index would not be
    cuda.set_device = cuda.synchronize = cuda.empty_cache = _constant(None)
    cuda.current_stream = cuda.default_stream = _constant(stream)
    cuda.Stream = cuda.Event = _Stream
    cuda.stream = _constant(contextlib.nullcontext())
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    # not torch.manual_seed: that one calls torch.cuda.manual_seed_all again
    cuda.manual_seed = cuda.manual_seed_all = lambda seed: torch.default_generator.manual_seed(int(seed)) and None
    cuda.nvtx.range_push = cuda.nvtx.range_pop = cuda.nvtx.mark = _constant(None)


def _patch_megatron() -> None:
    import megatron.core.dist_checkpointing.strategies.filesystem_async as writer
    import megatron.core.tensor_parallel.random as rng
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as dispatcher
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    rng._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    rng._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    if not hasattr(moe_utils, "te_general_gemm"):  # 0.16.1 names it without importing it when TE is missing
        moe_utils.te_general_gemm = None
    dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.cpu().numpy() if as_numpy and torch.is_tensor(tensor) else tensor
    )
    original = DistributedOptimizer._set_main_param_and_optimizer_states

    def with_step(self: Any, model_param: Any, tensors: Any) -> Any:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        return original(self, model_param, {"step": state["step"], **tensors} if "step" in state else tensors)

    DistributedOptimizer._set_main_param_and_optimizer_states = with_step
    results: queue.Queue[Any] = queue.Queue()
    writer._get_write_results_queue = lambda: results
    writer.FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(_write_in_process)


def _write_in_process(transforms: Any, use_msc: bool, rank: int, write_buckets: Any, results: Any) -> None:
    """Same contract as upstream's multi-process writer: puts {bucket: results} or the first exception."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    local: queue.Queue[Any] = queue.Queue()
    pending: queue.Queue[int] = queue.Queue()
    written: dict[int, Any] = {}
    for i, bucket in enumerate(write_buckets):
        pending.put(i)
        FileSystemWriterAsync.write_preloaded_data(transforms, i, bucket, local, pending, use_fsync=True)
        index, outcome = local.get()
        if isinstance(outcome, Exception):
            results.put(outcome)
            return
        written[index] = outcome
    results.put(written)
