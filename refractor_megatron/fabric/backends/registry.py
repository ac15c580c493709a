"""Backend registry and the selection rule.

``auto`` means: on CPU ``blocksparse_cpu``, on CUDA ``flex``, whatever the length, so that a run's short evaluations
have the arithmetic of its training. Elsewhere ``dense`` up to its length limit, else an error that names what is
missing. A named backend is used or refused, never replaced. Every backend but the oracle proves itself on a 256-token
probe against the oracle, forward and gradients, before its first use in a process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from refractor_megatron.distinction.lowerings import DENSE_LIMIT
from refractor_megatron.errors import CapabilityError
from refractor_megatron.fabric.backends import flex
from refractor_megatron.fabric.backends.blocksparse_cpu import blocksparse_attention, flash_kernel, matmul_kernel
from refractor_megatron.fabric.backends.dense import dense_attention
from refractor_megatron.fabric.backends.interface import Attention
from refractor_megatron.fabric.backends.selftest import prove

_FLOATS = frozenset({torch.float32, torch.float64, torch.bfloat16})
_AUTO = {"cpu": "blocksparse_cpu", "cuda": "flex"}


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do on some devices; ``None`` for devices or max_len means "no limit".

    rectangular: other numbers of queries and token keys, as context parallelism has them; deterministic: equal inputs
    give equal bits, gradients included.
    """

    backward: bool
    gqa: bool
    dtypes: frozenset[torch.dtype]
    devices: frozenset[str] | None
    max_len: int | None
    min_head_dim: int = 1
    rectangular: bool = True
    deterministic: bool = True


def _nothing_missing(device: torch.device) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """A named attention function with its capability flags, for one group of devices or for several.

    detail: which kernel runs and why; missing: what this process lacks to run it on a device, or None.
    """

    name: str
    attention: Attention
    capabilities: tuple[Capabilities, ...]
    detail: str
    missing: Callable[[torch.device], str | None] = _nothing_missing

    def on(self, device: torch.device) -> Capabilities | None:
        """The flags that hold on a device, None where the backend does not run."""
        holding = (can for can in self.capabilities if can.devices is None or device.type in can.devices)
        return next(holding, None)

    def refusal(self, q: torch.Tensor, k: torch.Tensor) -> str | None:
        """Why this backend cannot serve the request, or None."""
        can = self.on(q.device)
        if can is None:
            devices = sorted(device for flags in self.capabilities for device in flags.devices or ())
            return f"runs on {', '.join(devices)} only, not on {q.device.type}"
        if q.dtype not in can.dtypes:
            return f"does not take {q.dtype}, only {', '.join(sorted(map(str, can.dtypes)))}"
        if can.max_len is not None and q.shape[2] > can.max_len:
            return f"is limited to {can.max_len} tokens per sample, and the sample has {q.shape[2]}"
        if q.shape[3] < can.min_head_dim:
            return f"needs heads of at least {can.min_head_dim} values, not {q.shape[3]}"
        if not can.gqa and q.shape[1] != k.shape[1]:
            return f"needs as many key heads as query heads, not {k.shape[1]} and {q.shape[1]}"
        if not can.rectangular and q.shape[2] != k.shape[2]:
            return f"needs as many keys as queries, not {k.shape[2]} and {q.shape[2]} (context parallelism)"
        if not can.backward and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
            return f"has no backward pass on {q.device.type}"
        if not can.deterministic and torch.are_deterministic_algorithms_enabled():
            return "is not deterministic, which torch.use_deterministic_algorithms asks for"
        return self.missing(q.device)


_backends: dict[str, Backend] = {}
_proved: set[tuple[str, str, torch.dtype]] = set()


def register(backend: Backend) -> None:
    """Adds a backend under its name; a second registration of a name is a mistake of ours."""
    assert backend.name not in _backends and backend.name != "auto", backend.name
    _backends[backend.name] = backend


def available() -> tuple[str, ...]:
    """Names accepted by ``relation.backend`` besides ``auto``."""
    return tuple(_backends)


def describe() -> dict[str, str]:
    """One sentence per backend: which kernel it runs."""
    return {backend.name: backend.detail for backend in _backends.values()}


def select(name: str, q: torch.Tensor, k: torch.Tensor) -> Backend:
    """The backend for this request. Errors: ``CapabilityError`` naming the backend and what is missing."""
    device = q.device.type
    chosen = _AUTO.get(device, "dense") if name == "auto" else name
    backend = _backends.get(chosen)
    if backend is None:
        raise CapabilityError(f"relation.backend {chosen!r} does not exist; choose auto, {', '.join(available())}.")
    refusal = backend.refusal(q, k)
    if refusal is not None:
        ways = " or ".join(other.name for other in _backends.values() if other.refusal(q, k) is None)
        raise CapabilityError(
            f"relation.backend {name}: {chosen} {refusal}; "
            + (f"use {ways}." if ways else f"no backend of this version serves {q.shape[2]} tokens on {device}.")
        )
    return backend


def resolve(name: str, q: torch.Tensor, k: torch.Tensor) -> Attention:
    """``select``, then the self-test where this backend has not run on this device and dtype before."""
    backend = select(name, q, k)
    proof = (backend.name, q.device.type, q.dtype)
    if proof not in _proved:
        can = backend.on(q.device)
        assert can is not None
        prove(backend.name, backend.attention, q.device, q.dtype, can.gqa, can.backward)
        _proved.add(proof)
    return backend.attention


def _register_own() -> None:
    dense = Capabilities(backward=True, gqa=True, dtypes=_FLOATS, devices=None, max_len=DENSE_LIMIT)
    register(Backend("dense", dense_attention, (dense,), "masked softmax over all keys in plain torch; the oracle"))
    flash = flash_kernel()
    kernel = flash or matmul_kernel()
    reason = "" if flash else "; this torch lacks the private flash op, expect about half the speed"
    sparse = Capabilities(backward=True, gqa=True, dtypes=_FLOATS, devices=frozenset({"cpu"}), max_len=None)
    detail = f"visited key ranges only, by {kernel.name}{reason}"
    register(Backend("blocksparse_cpu", blocksparse_attention(kernel), (sparse,), detail))
    halves = frozenset({torch.float32, torch.bfloat16})
    on_gpu = Capabilities(True, True, halves, frozenset({"cuda"}), None, min_head_dim=flex.MIN_HEAD_DIM)
    on_cpu = Capabilities(False, True, _FLOATS, frozenset({"cpu"}), DENSE_LIMIT)
    detail = f"visited tiles of {flex.BLOCK} x {flex.BLOCK}, compiled by torch for CUDA; on CPU its dense forward only"
    register(Backend("flex", flex.flex_backend(), (on_gpu, on_cpu), detail, flex.missing))


_register_own()
