"""One measurement of attention in a process of its own: ``python -m refractor_megatron.evaluation.bench_measure JSON``.

The argument is a ``Request``; the answer is one line of JSON on standard output, ``{"error": ...}`` with the exit code
of the error where a user can mend it. ``fabric`` is the tri-tier attention on one plain document: a sliding window,
summaries of every complete block before it, and for every chunk of one block the retrieved records of its fan-in.
``sdpa`` is torch's flash attention, dense and causal, on the same queries.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import CapabilityError, RefractorError

if TYPE_CHECKING:
    import torch

    from ..fabric.plan import MaskPlan

Subject = Literal["fabric", "sdpa"]
Work = Callable[[], object]
#: A run that takes longer than this many seconds is its own only repeat; a shorter first run warms up.
LONG = 10.0
#: Cold builds of the plan, of which the report takes the median.
BUILDS = 5


@dataclass(frozen=True)
class Request:
    """What to measure. Numbers of tokens unless the name says otherwise; zero summaries or records turn a tier off."""

    subject: Subject
    length: int
    backward: bool
    heads: int
    kv_heads: int
    head_dim: int
    window: int
    block: int
    summaries: int
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
    """Largest memory so far: resident set of this process (VmHWM), or what torch has allocated on the GPU."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(request: Request) -> dict[str, Any]:
    """Runs the request in this process -> laps [[cpu, wall]], peak in bytes, and for the fabric its plan and pooling.

    Errors: ``CapabilityError`` where the device or the backend is not there.
    """
    import torch

    if request.device == "cuda" and not torch.cuda.is_available():
        raise CapabilityError("--device cuda: torch sees no CUDA device here; use --device cpu.")
    torch.set_num_threads(request.threads)
    found: dict[str, Any] = {"request": asdict(request), "torch": torch.__version__, "dtype": str(_dtype(request))}
    found["gpu"] = torch.cuda.get_device_name() if request.device == "cuda" else None
    run, prepare = (_fabric if request.subject == "fabric" else _sdpa)(request, found)
    found["laps"] = _laps(run, request)
    found["peak"] = peak_bytes(request.device)
    if prepare is not None:
        found["pooling"] = _laps(prepare, request)
    return found


def _laps(run: Callable[[], object], request: Request) -> list[tuple[float, float]]:
    first = timed(run, request.device)
    return [first] if first[1] > LONG else [timed(run, request.device) for _ in range(request.repeats)]


def _fabric(request: Request, found: dict[str, Any]) -> tuple[Work, Work | None]:
    """-> (attention from ready keys, pooling of the summaries); writes the plan's figures into ``found``."""
    from ..fabric.attention import tri_tier_attention
    from ..fabric.backends.registry import select

    plan = _plan(request, found)
    q, k, v = (_normal(request, i, h, request.length) for i, h in enumerate(_heads(request)))
    k_far, v_far = (_normal(request, 3 + i, request.kv_heads, plan.n_far) for i in range(2))
    found["backend"] = select(request.backend, q, k).name

    def attention() -> torch.Tensor:
        return tri_tier_attention(q, k, v, k_far, v_far, plan, request.head_dim**-0.5, request.backend)

    pooling = _pooling(request, k, v) if request.summaries and request.length >= request.block else None
    leaves = [q, k, v, *([k_far, v_far] if plan.n_far else [])]
    return _with_backward(request, attention, leaves, q.shape), pooling


def _plan(request: Request, found: dict[str, Any]) -> MaskPlan:
    import numpy as np
    import torch

    from ..distinction.pattern import LocalPattern
    from ..distinction.roles import DOCUMENT_ROLE, ROLE_ID
    from ..distinction.rules import compile_rules
    from ..fabric.plan import clear_plans, plan_for
    from ..fabric.spec import MaskSpec, RetrievedSpec, SummarySpec

    spec = MaskSpec(
        LocalPattern(window=request.window),
        SummarySpec(request.block, request.summaries) if request.summaries else None,
        RetrievedSpec(request.block, request.retrieved) if request.retrieved else None,
    )
    records = torch.zeros(1, request.length, 4 + request.retrieved, dtype=torch.int32)
    records[..., 2] = ROLE_ID[DOCUMENT_ROLE]
    rules, policies, records = compile_rules([]), np.full(1, 3, dtype=np.uint8), records.to(request.device)

    def build() -> MaskPlan:
        clear_plans()
        return plan_for(records, rules, spec, policies=policies)

    builds = [timed(build, "cpu")[0] for _ in range(BUILDS)]
    plan = build()
    stats = plan.stats
    found["plan"] = {"seconds": builds, "visited": stats.visited_pairs, "legal": stats.legal_edges}
    found["plan"]["causal"] = stats.causal_pairs
    return plan


def _pooling(request: Request, k: torch.Tensor, v: torch.Tensor) -> Work:
    import torch

    from ..fabric.summaries import pool

    queries = torch.zeros(request.kv_heads, request.summaries, request.head_dim, device=k.device, dtype=k.dtype)
    queries.requires_grad_(request.backward)
    inv_freq = 1e4 ** (-torch.arange(0, request.head_dim, 2, device=k.device) / request.head_dim)

    def summaries() -> torch.Tensor:
        return torch.cat(pool("attn_pool", k, v, queries, request.summaries, request.block, inv_freq))

    shape = (2, request.kv_heads, request.length // request.block * request.summaries, request.head_dim)
    return _with_backward(request, summaries, [k, v, queries], shape)


def _sdpa(request: Request, found: dict[str, Any]) -> tuple[Work, None]:
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
    """Answers one request on standard output."""
    try:
        print(json.dumps(measure(Request(**json.loads(text)))))
    except RefractorError as error:
        print(json.dumps({"error": str(error)}))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
