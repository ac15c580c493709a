"""What may be imported where, asked of fresh interpreters: light modules load nothing heavy, and floors hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = "{'torch', 'megatron', 'deepspeed', 'transformer_engine', 'hydra', 'matplotlib', 'wandb', 'pandas', 'scipy'}"
FRAMEWORKS = "{'torch', 'megatron', 'deepspeed', 'transformer_engine'}"


def run(script: str) -> None:
    answer = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr[-2000:]


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
    run(f"import sys, refractor_megatron; bad = ({HEAVY} | {{'numpy'}}) & set(sys.modules); assert not bad, bad")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["pretrain", "--help"], ["doctor", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    run(
        "import sys\n"
        "from refractor_megatron.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit as end: assert not end.code\n"
        f"bad = {HEAVY} & set(sys.modules)\n"
        "assert not bad, bad"
    )


@pytest.mark.parametrize(
    "package",
    [
        "data_pipeline",
        "refractor_megatron.config",
        "refractor_megatron.tokenizer",
        "refractor_megatron.telemetry",
        "refractor_megatron.distinction.roles",
        "refractor_megatron.checkpoint.manifest",
        "refractor_megatron.errors",
    ],
)
def test_low_floors_load_no_framework(package: str) -> None:
    names = modules_below(package)
    run(
        "import sys, importlib\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"bad = {FRAMEWORKS} & set(sys.modules)\n"
        "assert not bad, bad"
    )


@pytest.mark.slow
def test_floors_hold() -> None:
    program = Path(sys.executable).parent / "lint-imports"
    answer = subprocess.run([program, "--no-logo"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout
