"""One measurement of attention in a process of its own: ``python -m refractor_megatron.evaluation.bench_measure JSON``.

The argument is a ``Request``; the answer is one line of JSON on standard output, ``{"error": ...}`` with the exit code
of the error where a user can mend it. ``tri-tier`` is our attention on one plain document: a sliding window,
summaries of every complete block before it, and for every chunk of one block the retrieved records of its fan-in.
``dense`` is torch's flash attention, causal, on the same queries. A list of requests is checked, not measured.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil

from ..errors import CapabilityError, RefractorError

if TYPE_CHECKING:
    import torch

    from ..fabric.backends.interface import AttentionInputs
    from ..fabric.backends.registry import Backend
    from ..fabric.plan import MaskPlan

Subject = Literal["tri-tier", "dense"]
Work = Callable[[], object]
#: A run that takes longer than this many seconds is its own only repeat; a shorter first run warms up.
LONG = 10.0
#: Builds of the plan with nothing cached, of which the report takes the median.
BUILDS = 5
#: Tokens of the run after which a process counts its memory from zero.
SETTLE = 256


@dataclass(frozen=True)
class Request:
    """What to measure. Numbers of tokens unless the name says otherwise; zero summaries or records turn a tier off.

    levels, fanout: of the summaries, see ``SummarySpec``.
    """

    subject: Subject
    length: int
    backward: bool
    heads: int
    kv_heads: int
    head_dim: int
    window: int
    block: int
    summaries: int
    levels: int
    fanout: int
    retrieved: int
    repeats: int
    threads: int
    backend: str
    device: str


def timed(work: Callable[[], object], device: str) -> tuple[float, float]:
    """(CPU seconds of all threads, wall seconds); on CUDA both are the device's seconds between two events."""
    if device == "cuda":
        import torch

        start, stop = (torch.Event("cuda", enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        seconds = start.elapsed_time(stop) / 1e3
        return seconds, seconds
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def peak_bytes(device: str) -> int:
    """Largest memory since ``settled_bytes``: resident set of this process, or what torch has allocated on the GPU."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def settled_bytes(request: Request) -> int:
    """Bytes in use once libraries are loaded, the self-test has run and garbage is returned; the peak restarts here.

    The peak of a small process would not do as the zero: it moves by 20 MiB between runs, and the memory that its
    self-test has freed serves larger runs, which hides up to 40 MiB of theirs.
    """
    import torch

    if request.device == "cuda":
        if request.subject == "tri-tier":
            from ..fabric.backends.registry import resolve

            resolve(request.backend, _shapes(request, SETTLE))  # no run: it would change what is compiled for the rest
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    for work in _works(replace(request, length=SETTLE), {}):
        if work is not None:
            work()
    gc.collect()
    with contextlib.suppress(AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # Linux only; elsewhere small lengths show the peak of the run above
        Path("/proc/self/clear_refs").write_text("5")
    return int(psutil.Process().memory_info().rss)


def check(requests: Sequence[Request]) -> None:
    """Raises: ``CapabilityError`` where the device is not there or the backend refuses one of the requests."""
    import torch

    from ..fabric.backends.registry import select

    for request in requests:
        if request.device == "cuda" and not torch.cuda.is_available():
            raise CapabilityError("--device cuda: torch sees no CUDA device here; use --device cpu.")
        if request.subject == "tri-tier":
            with torch.set_grad_enabled(request.backward):
                select(request.backend, _shapes(request, request.length))


def measure(request: Request) -> dict[str, Any]:
    """Runs the request in this process -> laps [[cpu, wall]], memory in bytes, and for tri-tier its plan and pooling.

    cold: the only lap is the first run; memory: the peak of attention and of pooling above ``settled_bytes``.
    Errors: ``CapabilityError`` where the device or the backend is not there.
    """
    import torch

    check([request])
    torch.set_num_threads(request.threads)
    found: dict[str, Any] = {"request": asdict(request), "torch": torch.__version__, "dtype": str(_dtype(request))}
    found["gpu"] = torch.cuda.get_device_name() if request.device == "cuda" else None
    settled = settled_bytes(request)
    run, pooling = _works(request, found)
    found["laps"], found["cold"] = _laps(run, request)
    if pooling is not None:
        found["pooling"], _ = _laps(pooling, request)
    found["memory"] = max(0, peak_bytes(request.device) - settled)
    return found


def _laps(run: Callable[[], object], request: Request) -> tuple[list[tuple[float, float]], bool]:
    """-> (laps, whether they are one run without a warm-up)."""
    first = timed(run, request.device)
    if first[1] > LONG:
        return [first], True
    return [timed(run, request.device) for _ in range(request.repeats)], False


def _works(request: Request, found: dict[str, Any]) -> tuple[Work, Work | None]:
    return (_tri_tier if request.subject == "tri-tier" else _dense)(request, found)


def _tri_tier(request: Request, found: dict[str, Any]) -> tuple[Work, Work | None]:
    """-> (attention from ready keys, pooling of the summaries); writes the plan's figures into ``found``."""
    from ..fabric.attention import tri_tier_attention
    from ..fabric.backends.interface import AttentionInputs
    from ..fabric.backends.registry import select

    q, k, v = (_normal(request, i, h, request.length) for i, h in enumerate(_heads(request)))
    backend = select(request.backend, AttentionInputs(q, k, v))
    found["backend"] = backend.name
    plan = _plan(request, backend, found)
    k_far, v_far = (_normal(request, 3 + i, request.kv_heads, plan.n_far) for i in range(2))

    def attention() -> torch.Tensor:
        return tri_tier_attention(q, k, v, k_far, v_far, plan, request.head_dim**-0.5, request.backend)

    pooling = _pooling(request, k, v) if request.summaries and request.length >= request.block else None
    leaves = [q, k, v, *([k_far, v_far] if plan.n_far else [])]
    return _with_backward(request, attention, leaves, q.shape), pooling


def _plan(request: Request, backend: Backend, found: dict[str, Any]) -> MaskPlan:
    """-> the plan, ready for the kernel; writes the times of making that, with nothing cached, and the counts."""
    import numpy as np
    import torch

    from ..distinction.generators import plain_records
    from ..distinction.pattern import LocalPattern
    from ..distinction.rules import compile_rules
    from ..fabric.backends.registry import visited_pairs
    from ..fabric.plan import clear_plans, plan_for
    from ..fabric.spec import MaskSpec, RetrievedSpec, SummarySpec

    spec = MaskSpec(
        LocalPattern(window=request.window),
        SummarySpec(request.block, request.summaries, request.levels, request.fanout) if request.summaries else None,
        RetrievedSpec(request.block, request.retrieved) if request.retrieved else None,
    )
    device = torch.device(request.device)
    records = torch.from_numpy(plain_records(request.length, request.retrieved))[None]
    rules, policies = compile_rules([]), np.full(request.retrieved, 3, dtype=np.uint8)

    def build() -> tuple[MaskPlan, int]:
        clear_plans()
        plan = plan_for(records, rules, spec, policies=policies)
        return plan, visited_pairs(backend, plan, device)  # counted on the kernel's own visits or tiles: makes them

    laps = [timed(build, request.device) for _ in range(BUILDS)]
    plan, visited = build()
    stats = plan.stats
    found["plan"] = {"laps": laps, "visited": visited, "legal": stats.legal_edges, "causal": stats.causal_pairs}
    return plan


def _pooling(request: Request, k: torch.Tensor, v: torch.Tensor) -> Work:
    import torch

    from ..fabric.spec import SummarySpec
    from ..fabric.summaries import pool, pool_level2

    per_block, fanout, block = request.summaries, request.fanout, request.block
    level2, level1 = SummarySpec(block, per_block, request.levels, fanout).counts(request.length)
    learned = (1 + (level2 > 0), request.kv_heads, per_block, request.head_dim)
    queries = torch.zeros(learned, device=k.device, dtype=k.dtype, requires_grad=request.backward)
    inv_freq = 1e4 ** (-torch.arange(0, request.head_dim, 2, device=k.device) / request.head_dim)

    def summaries() -> torch.Tensor:
        made = pool("attn_pool", k, v, queries[0], per_block, block, inv_freq)
        if not level2:
            return torch.cat(made)
        above = pool_level2("attn_pool", *made, queries[1], per_block, fanout, block, inv_freq)
        return torch.cat([torch.cat(above), torch.cat(made)], dim=2)

    shape = (2, request.kv_heads, level2 + level1, request.head_dim)
    return _with_backward(request, summaries, [k, v, queries], shape)


def _shapes(request: Request, length: int) -> AttentionInputs:
    """Inputs of the request's sizes and of no memory, for questions to a backend."""
    import torch

    from ..fabric.backends.interface import AttentionInputs

    one = torch.zeros(1, 1, 1, 1, device=request.device, dtype=_dtype(request), requires_grad=request.backward)
    q, k, v = (one.expand(1, heads, length, request.head_dim) for heads in _heads(request))
    return AttentionInputs(q, k, v)


def _dense(request: Request, found: dict[str, Any]) -> tuple[Work, None]:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = (_normal(request, i, request.heads, request.length) for i in range(3))
    found["backend"] = "torch flash attention"

    def attention() -> torch.Tensor:
        # The keys of a group of heads are given to each of them: torch's CPU flash kernel takes no fewer key heads.
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    return _with_backward(request, attention, [q, k, v], q.shape), None


def _with_backward(
    request: Request, forward: Callable[[], torch.Tensor], leaves: list[torch.Tensor], shape: Sequence[int]
) -> Work:
    """Forward only, without a graph; or forward and the gradients of all ``leaves``. shape: of forward's result."""
    import torch

    if not request.backward:
        return torch.no_grad()(forward)
    grad = torch.randn(shape, device=request.device, dtype=_dtype(request))
    return lambda: torch.autograd.grad(forward(), leaves, grad)


def _heads(request: Request) -> tuple[int, int, int]:
    return request.heads, request.kv_heads, request.kv_heads


def _dtype(request: Request) -> torch.dtype:
    import torch

    return torch.bfloat16 if request.device == "cuda" else torch.float32


def _normal(request: Request, seed: int, heads: int, length: int) -> torch.Tensor:
    """[1, heads, length, head_dim] of standard normals, a leaf of the graph when there is a backward pass."""
    import torch

    generator = torch.Generator(request.device).manual_seed(seed)
    shape = (1, heads, length, request.head_dim)
    x = torch.randn(shape, generator=generator, device=request.device, dtype=_dtype(request))
    return x.requires_grad_(request.backward)


def main(text: str) -> int:
    """Answers one request, or checks a list of them, on standard output."""
    try:
        asked = json.loads(text)
        if isinstance(asked, list):
            check([Request(**each) for each in asked])
        else:
            print(json.dumps(measure(Request(**asked))))
    except RefractorError as error:
        print(json.dumps({"error": str(error)}))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
