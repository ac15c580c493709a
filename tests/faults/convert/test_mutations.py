"""Two hundred and ten random mutations of one tensor; none survives, and the tool names the tensor each time.

Dropped, exchanged with another of its shape, zeroed, transposed or truncated; in the source at rest, in the target at
rest, and on the way, where a fault of the converter itself would be.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from refractor_megatron.checkpoint.convert import to_hf, to_megatron
from refractor_megatron.checkpoint.convert.mapping import Entry
from refractor_megatron.checkpoint.convert.megatron_folder import find_step
from refractor_megatron.checkpoint.convert.to_hf import ExportOptions, export
from refractor_megatron.checkpoint.convert.to_megatron import ImportOptions, import_folder
from refractor_megatron.checkpoint.convert.verify import verify_folder
from refractor_megatron.errors import CheckpointError
from tests.convert.mutate import KINDS, mutate, mutate_hf, mutate_megatron
from tests.convert.runs import make_run

pytestmark = pytest.mark.slow
OUT = ExportOptions(shard_size=500_000, logits=False)
BACK = ImportOptions(logits=False)
EACH = 6  # of every kind in every place


def silent(text: str) -> None:
    """No output."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose checkpoint has ``tensors.json``, as the store writes it."""
    run = tmp_path_factory.mktemp("mutations") / "run"
    make_run(run, "model.vocab_size=515", "model.d_model=32", "model.rope.dim=32", "model.ffn.hidden=32")
    return run


@pytest.fixture(scope="module")
def served(run: Path) -> Path:
    export(run, run.parent / "served", OUT, silent)
    return run.parent / "served"


def cases() -> list[Any]:
    return [pytest.param(kind, seed, id=f"{kind}-{seed}") for kind in KINDS for seed in range(EACH)]


def named(error: pytest.ExceptionInfo[CheckpointError], names: set[str]) -> None:
    message = str(error.value)
    assert any(name in message for name in names), (names, message)


@pytest.mark.parametrize(("kind", "seed"), cases())
@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_in_a_checkpoint(run: Path, tmp_path: Path, kind: str, seed: int, weights: str) -> None:
    damaged = tmp_path / "run"
    shutil.copytree(run, damaged)
    among = "ema." if weights == "ema" else ""
    names = mutate_megatron(find_step(damaged), kind, random.Random(seed), among=among)
    with pytest.raises(CheckpointError) as error:
        export(damaged, tmp_path / "out", ExportOptions(weights=weights, logits=False), silent)
    named(error, {name.removeprefix("ema.") for name in names})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"], "nothing is published, nothing is left"


@pytest.mark.parametrize(("kind", "seed"), cases())
@pytest.mark.parametrize("index_too", [False, True])
def test_in_a_model_folder_that_is_imported(
    served: Path, tmp_path: Path, kind: str, seed: int, index_too: bool
) -> None:
    damaged = tmp_path / "served"
    shutil.copytree(served, damaged)
    names = mutate_hf(damaged, kind, random.Random(seed), index_too=index_too)
    with pytest.raises(CheckpointError) as error:
        import_folder(damaged, tmp_path / "out", BACK, silent)
    named(error, names)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["served"]


@pytest.mark.parametrize(("kind", "seed"), cases())
def test_in_a_model_folder_that_is_verified(served: Path, tmp_path: Path, kind: str, seed: int) -> None:
    damaged = tmp_path / "served"
    shutil.copytree(served, damaged)
    names = mutate_hf(damaged, kind, random.Random(seed), index_too=bool(seed % 2))
    with pytest.raises(CheckpointError) as error:
        verify_folder(damaged, silent)
    named(error, names)


@pytest.mark.parametrize(("kind", "seed"), cases())
def test_on_the_way_out(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, seed: int) -> None:
    """What is about to be written is damaged: as if a split were wrong."""
    true_split = to_hf._Export._split
    touched: set[str] = set()

    def split(self: Any) -> Iterator[tuple[Entry, list[torch.Tensor]]]:
        pieces = list(true_split(self))
        tensors = {t.name: part for entry, parts in pieces for t, part in zip(entry.tensors, parts, strict=True)}
        changed, names = mutate(tensors, kind, random.Random(seed))
        touched.update(names)
        for entry, _ in pieces:
            yield entry, [changed[t.name] for t in entry.tensors if t.name in changed]

    monkeypatch.setattr(to_hf._Export, "_split", split)
    with pytest.raises(CheckpointError) as error:
        export(run, tmp_path / "out", OUT, silent)
    named(error, touched)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "seed"), cases())
def test_on_the_way_back(served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, seed: int) -> None:
    """The checkpoint that was just written is damaged: as if a join were wrong, or the disk."""
    true_check = to_megatron.Importer._check
    touched: set[str] = set()

    def check(self: Any, step: Path) -> None:
        touched.update(mutate_megatron(step, kind, random.Random(seed), among="ema." if seed % 2 else ""))
        true_check(self, step)

    monkeypatch.setattr(to_megatron.Importer, "_check", check)
    with pytest.raises(CheckpointError) as error:
        import_folder(served, tmp_path / "out", BACK, silent)
    named(error, {name.removeprefix("ema.") for name in touched})
    assert not list(tmp_path.iterdir())
