"""What this machine and environment can do, and what each missing part costs.

``probe_all`` answers from package metadata where it can, and imports only what must be asked at run time (torch, for
its devices and collectives). Optional packages are imported under ``except Exception``: Transformer Engine's bare
metapackage, for one, raises RuntimeError on import and would otherwise take the whole process with it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from types import ModuleType

#: Versions the package is written and tested against: lowest allowed, first refused (None: no upper bound).
PYTHON_MINIMUM = (3, 11)
TORCH_RANGE = ("2.6", None)
MEGATRON_RANGE = ("0.16.1", "0.17")
TRANSFORMER_ENGINE_RANGE = ("2.9", "2.12")
DEEPSPEED_RANGE = ("0.19", "0.20")
#: The other packages that pyproject.toml requires; their presence is checked, their versions are pip's business.
LIBRARIES = (
    "hydra-core",
    "omegaconf",
    "pyyaml",
    "numpy",
    "tokenizers",
    "tiktoken",
    "tensorboard",
    "wandb",
    "matplotlib",
    "rich",
    "psutil",
    "pyarrow",
    "zstandard",
    "selectolax",
    "resiliparse",
    "numba",
    "py3langid",
    "gigatoken",
    "google-re2",
    "jsonschema-rs",
    "safetensors",
    "transformers",
)


@dataclass(frozen=True)
class Capability:
    """One thing that is there or not.

    Attributes:
        name: what is probed.
        present: whether it can be used.
        found: version, device or amount that was found; empty if nothing was.
        required: whether the package cannot run without it.
        disables: what its absence switches off; empty when present.
        remedy: version or command that would enable it; empty when present.
    """

    name: str
    present: bool
    found: str
    required: bool = False
    disables: str = ""
    remedy: str = ""


def version_key(version: str) -> tuple[int, ...]:
    """Release numbers of a version, for comparison: ``"2.13.0+cpu"`` -> ``(2, 13, 0)``."""
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in numbers[0].split(".")) if numbers else ()


def in_range(version: str, bounds: tuple[str, str | None]) -> bool:
    """Whether ``lowest <= version < first_refused``."""
    low, high = bounds
    key = version_key(version)
    return key >= version_key(low) and (high is None or key < version_key(high))


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, None if it is absent."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def try_import(module: str) -> tuple[ModuleType | None, str]:
    """Import an optional module.

    Returns:
        The module and "", or None and why not (one line).
    """
    try:
        return importlib.import_module(module), ""
    except Exception as error:  # a broken optional package may raise anything
        return None, f"{type(error).__name__}: {error}".splitlines()[0][:120]


def _spelled(bounds: tuple[str, str | None]) -> str:
    low, high = bounds
    return f">={low}" + (f",<{high}" if high else "")


def _package(
    distribution: str,
    module: str,
    bounds: tuple[str, str | None],
    disables: str,
    remedy: str,
    *,
    required: bool = False,
    load: bool = True,
) -> Capability:
    """Probe one package: installed, in range, and (``load``) importable."""
    version = installed_version(distribution)
    if version is None:
        return Capability(distribution, False, "", required, disables, remedy)
    if not in_range(version, bounds):
        return Capability(distribution, False, f"{version}, outside {_spelled(bounds)}", required, disables, remedy)
    if load:
        _, problem = try_import(module)
        if problem:
            return Capability(distribution, False, f"{version}, broken ({problem})", required, disables, remedy)
    return Capability(distribution, True, version, required)


def probe_python() -> Capability:
    """The running interpreter."""
    found = platform.python_version()
    if sys.version_info >= PYTHON_MINIMUM:
        return Capability("python", True, found, True)
    return Capability("python", False, found, True, "everything", "install Python 3.11 or newer")


def probe_torch() -> Capability:
    """PyTorch itself."""
    return _package("torch", "torch", TORCH_RANGE, "everything", "pip install torch==2.13.0", required=True)


def probe_megatron() -> Capability:
    """megatron-core, by metadata: importing it takes seconds and adds nothing to the answer."""
    remedy = f"pip install 'megatron-core{_spelled(MEGATRON_RANGE)}'"
    return _package(
        "megatron-core",
        "megatron.core",
        MEGATRON_RANGE,
        "training, evaluation and checkpoints",
        remedy,
        required=True,
        load=False,
    )


def probe_libraries() -> Capability:
    """The light libraries that the package requires, as one line."""
    missing = [name for name in LIBRARIES if installed_version(name) is None]
    if not missing:
        return Capability("libraries", True, f"all {len(LIBRARIES)}", True)
    found = f"without {', '.join(missing)}"
    return Capability("libraries", False, found, True, "the parts that use them", f"pip install {' '.join(missing)}")


def probe_cuda() -> Capability:
    """CUDA devices that torch can use."""
    disables = "GPU training; runs use the CPU runtime over gloo"
    torch, problem = try_import("torch")
    if torch is None:
        return Capability("cuda", False, problem, False, disables, "install torch first")
    if not torch.cuda.is_available():
        built = torch.version.cuda
        remedy = "a GPU and its driver" if built else "a CUDA build of torch, on a machine with a GPU"
        return Capability("cuda", False, f"torch built for {built or 'cpu'}", False, disables, remedy)
    count = torch.cuda.device_count()
    device = torch.cuda.get_device_properties(0)
    found = f"{count} x {device.name}, {device.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    return Capability("cuda", True, found)


def _backend(name: str, required: bool, disables: str, remedy: str) -> Capability:
    distributed, problem = try_import("torch.distributed")
    if distributed is None or not distributed.is_available():
        return Capability(name, False, problem, required, disables, "a torch build with torch.distributed")
    if not getattr(distributed, f"is_{name}_available")():
        return Capability(name, False, "", required, disables, remedy)
    return Capability(name, True, "torch.distributed", required)


def probe_gloo() -> Capability:
    """Collectives on CPU; nothing trains without them where there is no GPU."""
    remedy = "a torch build with gloo, e.g. pip install torch==2.13.0"
    return _backend("gloo", not probe_cuda().present, "runs on CPU and multi-rank tests", remedy)


def probe_nccl() -> Capability:
    """Collectives on GPU; nothing trains without them where there is one."""
    return _backend("nccl", probe_cuda().present, "runs on GPUs", "a CUDA build of torch")


def probe_transformer_engine() -> Capability:
    """NVIDIA Transformer Engine (GPU only). A broken install is worse than none: megatron-core cannot be imported."""
    answer = _package(
        "transformer-engine",
        "transformer_engine",
        TRANSFORMER_ENGINE_RANGE,
        "FP8 and fused GPU layers, which nothing here uses yet",
        "on a GPU machine, after torch: pip install --no-build-isolation -e '.[te]'",
    )
    if not answer.found or answer.present:
        return answer
    return replace(
        answer,
        required=True,
        disables="megatron-core, whose import fails with it",
        remedy="pip uninstall transformer-engine",
    )


def probe_deepspeed() -> Capability:
    """DeepSpeed, by metadata: importing it looks for compilers."""
    disables = "the DeepSpeed engine, which is not part of this version yet"
    return _package("deepspeed", "deepspeed", DEEPSPEED_RANGE, disables, "pip install -e '.[deepspeed]'", load=False)


def probe_triton() -> Capability:
    """Triton, which FlexAttention's kernels are written in."""
    return _package(
        "triton",
        "triton",
        ("3.2", None),
        "the compiled attention kernels of a GPU (relation.backend=flex)",
        "on a GPU machine: pip install -e '.[gpu]'",
    )


def probe_flash_attn() -> Capability:
    """The flash-attn package."""
    return _package(
        "flash-attn",
        "flash_attn",
        ("2.8", "3"),
        "the flash-attn kernels; torch's own attention is used",
        "on a GPU machine, after torch: pip install --no-build-isolation 'flash-attn>=2.8,<3'",
    )


def probe_apex() -> Capability:
    """NVIDIA apex, told from the unrelated package of that name by the modules inside."""
    disables = "apex's fused optimizers; torch's are used"
    remedy = "optional; build NVIDIA's apex from its source (the package 'apex' on the index is another project)"
    if importlib.util.find_spec("apex") is None:
        return Capability("apex", False, "", False, disables, remedy)
    if importlib.util.find_spec("amp_C") is None:
        found = "a package named apex without NVIDIA's kernels"
        return Capability("apex", False, found, False, disables, f"pip uninstall apex; {remedy}")
    return Capability("apex", True, installed_version("apex") or "source build")


def probe_cores() -> Capability:
    """CPU cores this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Capability("cpu cores", True, str(usable))


def probe_memory() -> Capability:
    """Memory that is free now, and in all."""
    psutil, problem = try_import("psutil")
    if psutil is None:
        return Capability("memory", False, problem, False, "memory figures", "pip install psutil")
    memory = psutil.virtual_memory()
    return Capability("memory", True, f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free")


def probe_disk(folder: Path | None = None) -> Capability:
    """Space on the disk of ``folder`` (default: the current one)."""
    usage = shutil.disk_usage(folder or Path.cwd())
    return Capability("disk", True, f"{usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free here")


PROBES: tuple[Callable[[], Capability], ...] = (
    probe_python,
    probe_torch,
    probe_megatron,
    probe_libraries,
    probe_cuda,
    probe_gloo,
    probe_nccl,
    probe_transformer_engine,
    probe_deepspeed,
    probe_triton,
    probe_flash_attn,
    probe_apex,
    probe_cores,
    probe_memory,
    probe_disk,
)


def probe_all() -> list[Capability]:
    """Every capability, required ones first. Imports torch and nothing heavier."""
    return [probe() for probe in PROBES]
