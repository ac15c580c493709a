"""The flex backend's Triton kernels, forward and backward: on a GPU, else by Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from refractor_megatron.fabric.backends import registry, selftest
from tests.corpus import ROOT
from tests.runs import printed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_self_test_on_the_gpu(dtype: torch.dtype) -> None:
    flex = registry._backends["flex"].attention
    errors = selftest.prove("flex", flex, torch.device("cuda", 0), dtype, gqa=True)
    assert len(errors) == 6 and max(errors.values()) <= selftest.TOLERANCE[dtype]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install triton")
def test_the_kernels_by_the_interpreter() -> None:
    """Caught once: block lists whose samples the kernel could not tell apart, unseen by every CPU form of flex."""
    path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    said = printed("tests/gpu/triton_on_cpu.py", CUDA_VISIBLE_DEVICES="", PYTHONPATH=path)
    assert said == "proved with 3 kernels"
