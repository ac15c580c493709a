"""The really compiled CPU forward of flex attention over our block lists, in a process without the CPU runtime."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
@pytest.mark.timeout(420)
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_the_compiled_cpu_forward_equals_the_oracle(tmp_path: Path) -> None:
    """Compiled kernels walk the block lists, which the uncompiled form ignores."""
    command = [sys.executable, "-W", "ignore", __file__]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["2", "graphs,", "6", "masks"]


def main() -> None:
    """Three masks of each table form; each form compiles once."""
    import torch
    from torch._dynamo.utils import counters

    from refractor_megatron.distinction.pattern import LocalPattern
    from refractor_megatron.fabric.backends import flex
    from refractor_megatron.fabric.backends.dense import dense_attention
    from refractor_megatron.fabric.backends.flex_mask import Geometry, lower
    from refractor_megatron.fabric.spec import MaskSpec, SummarySpec
    from tests.unit.fabric.test_flex import inputs, random_plan

    masks = 0
    for sizes in ((8,), ()):  # interval tables of eight, bit tiles
        for seed in range(3):
            plan = random_plan(seed, 2, 380 + seed, MaskSpec(LocalPattern(window=90), SummarySpec(16, 2)))
            joint = Geometry(plan.length, plan.n_far, plan.n_tokens, 128)
            mask = lower(plan.samples, 2, joint, torch.device("cpu"), sizes)
            q, k, v, k_far, v_far = inputs(plan, 4, 2, 16, torch.float32)
            rows, keys, values = joint.pad_rows(q), joint.join_keys(k_far, k), joint.join_keys(v_far, v)
            with torch.no_grad():
                call = flex._compiled_for(rows, keys, mask.shape_class)
                out = call(rows, keys, values, mask.block_mask, 0.25, {})[:, :, : joint.rows]
                oracle = dense_attention(q, k, v, k_far, v_far, plan, 0.25)
            error = float((out - oracle).abs().max())
            assert error <= 1e-5, (sizes, seed, error)
            masks += 1
    print(counters["stats"]["unique_graphs"], "graphs,", masks, "masks")


if __name__ == "__main__":
    main()
