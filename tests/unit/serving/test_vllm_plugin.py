"""The entry point of the vLLM plug-in, against a stand-in for vLLM's registry (the real one: test_vllm_engine.py)."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from refractor_megatron.serving import vllm_plugin


class Registry:
    """What ``register`` uses of vLLM's ``ModelRegistry``."""

    def __init__(self) -> None:
        self.models: dict[str, str] = {}
        self.calls = 0

    def get_supported_archs(self) -> set[str]:
        return set(self.models)

    def register_model(self, model_arch: str, model_cls: str) -> None:
        self.models[model_arch], self.calls = model_cls, self.calls + 1


def test_import_loads_nothing() -> None:
    code = (
        "import sys, refractor_megatron.serving.vllm_plugin;"
        "print(sorted({'torch', 'transformers', 'vllm'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_register_is_lazy_and_idempotent(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig

    from refractor_megatron.hf.configuration_refractor import RefractorConfig

    registry, stub = Registry(), ModuleType("vllm")
    stub.ModelRegistry = registry  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", stub)
    model_module = vllm_plugin.MODEL_CLASS.split(":")[0]
    sys.modules.pop(model_module, None)
    vllm_plugin.register()
    vllm_plugin.register()
    assert (registry.models, registry.calls) == ({"RefractorForCausalLM": vllm_plugin.MODEL_CLASS}, 1)
    assert model_module not in sys.modules
    assert isinstance(AutoConfig.for_model("refractor"), RefractorConfig)


def test_named_class_is_there() -> None:
    module, name = vllm_plugin.MODEL_CLASS.split(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def test_package_declares_the_entry_point() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"refractor": f"{vllm_plugin.__name__}:register"}
    assert "vllm" in project["optional-dependencies"]
