"""What may be imported where, asked of fresh interpreters: light modules load nothing heavy, and floors hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.corpus import ROOT
from tests.runs import loaded_after

FRAMEWORKS = {"torch", "megatron", "deepspeed", "transformer_engine"}
HEAVY = FRAMEWORKS | {"hydra", "matplotlib", "wandb", "pandas", "scipy"}


def modules_below(package: str) -> list[str]:
    """Names of all modules of a package, found by its files."""
    folder = ROOT.joinpath(*package.split("."))
    if not folder.exists():
        return [package]
    names = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_after("import refractor_megatron").isdisjoint(HEAVY | {"numpy"})


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["pretrain", "--help"], ["doctor", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = f"from refractor_megatron.cli import main\ntry: main({arguments!r})\nexcept SystemExit as end: "
    assert loaded_after(code + "sys.exit(end.code) if end.code else None").isdisjoint(HEAVY)


@pytest.mark.parametrize(
    "package",
    [
        "data_pipeline",
        "refractor_megatron.config",
        "refractor_megatron.tokenizer",
        "refractor_megatron.telemetry",
        "refractor_megatron.distinction.roles",
        "refractor_megatron.distinction.tags",
        "refractor_megatron.checkpoint.manifest",
        "refractor_megatron.errors",
    ],
)
def test_low_floors_load_no_framework(package: str) -> None:
    names = modules_below(package)
    loaded = loaded_after(f"import importlib\nfor name in {names!r}: importlib.import_module(name)")
    assert loaded.isdisjoint(FRAMEWORKS)


@pytest.mark.slow
def test_floors_hold() -> None:
    program = Path(sys.executable).parent / "lint-imports"
    answer = subprocess.run([program, "--no-logo"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout
