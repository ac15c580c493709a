"""The plug-in in the real vLLM engine. Needs vLLM with this package installed beside it (specification/serving.md)."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from refractor_megatron.errors import CapabilityError
from refractor_megatron.serving.vllm_plugin import ARCHITECTURE
from tests.unit.serving.models import LENGTH, VARIANTS, config_of, model_of

vllm = pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The engine in this process, offline, with small pools."""
    for name, value in {"ENABLE_V1_MULTIPROCESSING": "0", "NO_USAGE_STATS": "1", "CPU_KVCACHE_SPACE": "1"}.items():
        monkeypatch.setenv(f"VLLM_{name}", value)
    yield
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def _arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": LENGTH,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 20,  # prompts come in pieces
        "num_gpu_blocks_override": 4,  # the null page and three: sequences follow each other on a page
    }
    return values | changes


def _prompts() -> list[list[int]]:
    """Lengths below and above a piece; a conversation with all roles and two documents among them."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 24, (n,), generator=generator) for n in (1, 5, 36, 33, 16, 7)]
    prompts[2][[0, 6, 7, 12, 13, 20, 21, 26]] = torch.tensor([24, 28, 25, 28, 27, 28, 26, 29])
    return [prompt.tolist() for prompt in prompts]


@pytest.mark.parametrize("variant", VARIANTS)
def test_engine_gives_the_log_probabilities_of_full_recompute(variant: str, tmp_path: Path) -> None:
    model = model_of(config_of(**VARIANTS[variant]))
    model.save_pretrained(tmp_path)
    engine = vllm.LLM(**_arguments(tmp_path))
    new = 10
    asked = vllm.SamplingParams(
        max_tokens=new, temperature=0, detokenize=False, logprobs=0, prompt_logprobs=0, ignore_eos=True
    )
    prompts = _prompts()
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], asked, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        written = list(output.outputs[0].token_ids)
        ids = torch.tensor(prompt + written)
        with torch.no_grad():
            expected = model(ids[None], use_cache=False).logits[0].log_softmax(-1)
        rows = [*(output.prompt_logprobs or [])[1:], *output.outputs[0].logprobs]
        assert len(rows) == len(ids) - 1 and len(written) == new
        got = torch.tensor([row[int(token)].logprob for row, token in zip(rows, ids[1:], strict=True)])
        torch.testing.assert_close(got, expected[:-1].gather(1, ids[1:, None])[:, 0], rtol=0, atol=5e-5)
        best = expected[len(prompt) - 1 : -1]
        chosen = best.gather(1, torch.tensor(written)[:, None])[:, 0]
        assert (best.amax(-1) - chosen).max() < 1e-4


def test_entry_point_registers_the_model_in_the_real_registry() -> None:
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    assert ARCHITECTURE in ModelRegistry.get_supported_archs()
    known = ModelRegistry.models[ARCHITECTURE].inspect_model_cls()
    assert known.is_text_generation_model and known.has_inner_state and known.is_attention_free
    assert AutoConfig.for_model("refractor").model_type == "refractor"


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size"),
        ({"enable_prefix_caching": True}, "--enable-prefix-caching"),
        ({"mamba_cache_mode": "align"}, "--mamba-cache-mode"),
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype"),
        ({"enable_lora": True}, "--enable-lora"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "--speculative-config"),
    ],
)
def test_settings_that_would_be_wrong_are_refused(changes: dict[str, Any], option: str, tmp_path: Path) -> None:
    with pytest.raises(CapabilityError, match=f"^vLLM was given {option}, "):
        _model(tmp_path, **changes)


def test_vllm_itself_refuses_a_pipeline(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="Pipeline parallelism"):
        _model(tmp_path, pipeline_parallel_size=2)


def _model(folder: Path, **changes: Any) -> Any:
    """The model class given vLLM's configuration, in which an engine would make it."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    from refractor_megatron.serving.vllm_model import RefractorForCausalLM

    load_general_plugins()
    model_of(config_of()).save_pretrained(folder)
    return RefractorForCausalLM(vllm_config=EngineArgs(**_arguments(folder, **changes)).create_engine_config())
