"""The flex backend under torch.compile on the CPU: how often it compiles, and what compiled kernels make of our lists.

Each test runs this file in a process of its own, without the CPU runtime, whose torch modes Dynamo would trace.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]


def run(part: str, cache: Path) -> str:
    """Standard output of one part, which must succeed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    command = [sys.executable, "-W", "ignore", __file__, part]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.mark.slow
def test_masks_and_shapes_compile_once_each(tmp_path: Path) -> None:
    """Three masks of each table form, then nine lengths, more than Dynamo takes for one function."""
    assert run("count", tmp_path) == "2 graphs for 6 masks\n11 graphs for 15 masks"


@pytest.mark.slow
@pytest.mark.timeout(420)
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_the_compiled_cpu_forward_equals_the_oracle(tmp_path: Path) -> None:
    """Compiled kernels walk the block lists, which the uncompiled form ignores."""
    assert run("compile", tmp_path) == "2 graphs for 6 masks"


def compare(plan: Any, sizes: tuple[int, ...]) -> None:
    """The steps of the CUDA path on the CPU, against the oracle."""
    import torch

    from refractor_megatron.fabric.backends import flex
    from refractor_megatron.fabric.backends.dense import dense_attention
    from refractor_megatron.fabric.backends.flex_mask import Geometry, lower
    from tests.unit.fabric.test_flex import inputs

    joint = Geometry(plan.length, plan.n_far, plan.n_tokens, 128)
    mask = lower(plan.samples, len(plan.samples), joint, torch.device("cpu"), sizes)
    x = inputs(plan, 4, 2, 16, torch.float32)
    rows, keys, values = joint.pad_rows(x.q), joint.join_keys(x.k_far, x.k), joint.join_keys(x.v_far, x.v)
    with torch.no_grad():
        call = flex._compiled_for(rows, keys, mask.shape_class)
        out = call(rows, keys, values, mask.block_mask, 0.25, {})[:, :, : joint.rows]
        oracle = dense_attention(x, plan, 0.25)
    error = float((out - oracle).abs().max())
    assert error <= 1e-5, (plan.spec, sizes, error)


def main(part: str) -> None:
    """count: graphs run as they are. compile: by Inductor."""
    import torch
    from torch._dynamo.utils import counters

    from refractor_megatron.distinction.pattern import LocalPattern
    from refractor_megatron.distinction.rules import compile_rules
    from refractor_megatron.fabric import plan_for
    from refractor_megatron.fabric.spec import MaskSpec, SummarySpec
    from tests.unit.fabric.test_flex import random_plan

    if part == "count":
        torch.compile = functools.partial(torch.compile, backend="eager")
    masks = 0
    spec = MaskSpec(LocalPattern(window=90), SummarySpec(16, 2))
    for sizes in ((8,), ()):  # interval tables of eight, bit tiles
        for seed in range(3):
            compare(random_plan(seed, 2, 380 + seed, spec), sizes)  # padded to one length
            masks += 1
    print(counters["stats"]["unique_graphs"], "graphs for", masks, "masks")
    if part == "count":
        for length in range(128, 128 * 10, 128):
            compare(plan_for(torch.zeros(1, length, 4, dtype=torch.int32), compile_rules([]), MaskSpec()), (1,))
            masks += 1
        assert masks - 6 > torch._dynamo.config.recompile_limit
        print(counters["stats"]["unique_graphs"], "graphs for", masks, "masks")


if __name__ == "__main__":
    main(sys.argv[1])
