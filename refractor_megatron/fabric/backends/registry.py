"""Backend registry and the selection rule.

``auto`` means: on CPU ``blocksparse_cpu``, on CUDA ``flex``, whatever the length, so that a run's short evaluations
have the arithmetic of its training. Elsewhere ``dense`` up to its length limit, else an error that names what is
missing. A named backend is used or refused, never replaced. A backend proves itself on a 256-token probe against the
oracle in float64, forward and gradients, before its first use in a process on a kind of device and in a dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from refractor_megatron.distinction.intervals import IntArray
from refractor_megatron.distinction.lowerings import DENSE_LIMIT
from refractor_megatron.distinction.rules import BoolTable
from refractor_megatron.errors import CapabilityError
from refractor_megatron.fabric.backends import flex
from refractor_megatron.fabric.backends.blocksparse_cpu import (
    blocksparse_attention,
    blocksparse_edges,
    blocksparse_pairs,
    flash_kernel,
    matmul_kernel,
)
from refractor_megatron.fabric.backends.dense import dense_attention, dense_edges, dense_pairs
from refractor_megatron.fabric.backends.interface import Attention, AttentionInputs
from refractor_megatron.fabric.backends.selftest import prove
from refractor_megatron.fabric.plan import MaskPlan

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

    visited_pairs: (plan, device) -> (query, key) pairs that the kernel computes there per head, over the batch;
    executed: (plan, sample, ascending rows, device) -> bool [rows, n_far + n_tokens, then any padding], the joint keys
    that each row is let read, from the tables that the kernel takes; detail: which kernel runs and why; missing: what
    this process lacks to run it on a device, or None.
    """

    name: str
    attention: Attention
    visited_pairs: Callable[[MaskPlan, torch.device], int]
    executed: Callable[[MaskPlan, int, IntArray, torch.device], BoolTable]
    capabilities: tuple[Capabilities, ...]
    detail: str
    missing: Callable[[torch.device], str | None] = _nothing_missing

    def on(self, device: torch.device) -> Capabilities | None:
        """The flags that hold on a device, None where the backend does not run."""
        holding = (can for can in self.capabilities if can.devices is None or device.type in can.devices)
        return next(holding, None)

    def refusal(self, x: AttentionInputs) -> str | None:
        """Why this backend cannot serve the request, or None."""
        q, k = x.q, x.k
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
        if not can.backward and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in x):
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


def named(name: str, device: torch.device) -> Backend:
    """The backend that ``relation.backend`` means on a device. Errors: ``CapabilityError`` for an unknown name."""
    chosen = _AUTO.get(device.type, "dense") if name == "auto" else name
    if chosen not in _backends:
        raise CapabilityError(f"relation.backend {chosen!r} does not exist; choose auto, {', '.join(available())}.")
    return _backends[chosen]


def visited_pairs(backend: str | Backend, plan: MaskPlan, device: torch.device) -> int:
    """(query, key) pairs that a backend computes for a plan on a device: per head, over the batch.

    backend: a name, ``auto`` among them, or what ``select`` gave. Errors: ``CapabilityError`` for an unknown name.
    """
    return (named(backend, device) if isinstance(backend, str) else backend).visited_pairs(plan, device)


def select(name: str, x: AttentionInputs) -> Backend:
    """The backend for this request. Errors: ``CapabilityError`` naming the backend and what is missing."""
    backend = named(name, x.q.device)
    refusal = backend.refusal(x)
    if refusal is not None:
        nothing = f"no backend of this version serves {x.q.shape[2]} tokens on {x.q.device.type}"
        raise CapabilityError(f"relation.backend {name}: {backend.name} {refusal}; {_others(backend, x) or nothing}.")
    return backend


def _others(backend: Backend, x: AttentionInputs) -> str:
    """A way out by the other backends that serve the request, empty where none does."""
    names = " or ".join(other.name for other in _backends.values() if other is not backend and not other.refusal(x))
    return names and f"use {names}"


def resolve(name: str, x: AttentionInputs) -> Attention:
    """``select``, then the self-test where this backend has not run on this device and dtype before."""
    backend, device, dtype = select(name, x), x.q.device, x.q.dtype
    proof = (backend.name, device.type, dtype)
    if proof not in _proved:
        can = backend.on(device)
        assert can is not None
        way_out = _others(backend, x) or "use another torch or device"
        prove(backend.name, backend.attention, device, dtype, can.gqa, can.backward, way_out)
        _proved.add(proof)
    return backend.attention


def _register_own() -> None:
    dense = Capabilities(backward=True, gqa=True, dtypes=_FLOATS, devices=None, max_len=DENSE_LIMIT)
    detail = "masked softmax over all keys in plain torch; the oracle"
    register(Backend("dense", dense_attention, dense_pairs, dense_edges, (dense,), detail))
    flash = flash_kernel()
    kernel = flash or matmul_kernel()
    reason = "" if flash else "; this torch lacks the private flash op, expect about half the speed"
    sparse = Capabilities(backward=True, gqa=True, dtypes=_FLOATS, devices=frozenset({"cpu"}), max_len=None)
    detail = f"visited key ranges only, by {kernel.name}{reason}"
    attention = blocksparse_attention(kernel)
    register(Backend("blocksparse_cpu", attention, blocksparse_pairs, blocksparse_edges, (sparse,), detail))
    halves = frozenset({torch.float32, torch.bfloat16})
    on_gpu = Capabilities(True, True, halves, frozenset({"cuda"}), None, min_head_dim=flex.MIN_HEAD_DIM)
    on_cpu = Capabilities(False, True, _FLOATS, frozenset({"cpu"}), DENSE_LIMIT)
    detail = f"visited tiles of {flex.BLOCK} x {flex.BLOCK}, compiled by torch for CUDA; on CPU its dense forward only"
    attention = flex.flex_backend()
    register(Backend("flex", attention, flex.visited_pairs, flex.executed, (on_gpu, on_cpu), detail, flex.missing))


_register_own()
