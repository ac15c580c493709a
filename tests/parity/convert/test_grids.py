"""Every grid of TP, PP, EP in {1, 2}: takes a converted checkpoint, and its own converts to the same bytes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from refractor_megatron.checkpoint import manifest as manifests
from refractor_megatron.checkpoint.convert.megatron_folder import find_step
from refractor_megatron.checkpoint.convert.to_hf import ExportOptions, export
from refractor_megatron.checkpoint.convert.to_megatron import ImportOptions, import_folder
from refractor_megatron.training.spawn import spawn
from tests.convert.grid_worker import GRIDS, RANKS, name_of
from tests.convert.runs import make_run
from tests.warm import warm_ranks

pytestmark = [pytest.mark.slow, pytest.mark.gloo, pytest.mark.timeout(600)]
#: Padded vocabulary, gated tiers and router features: every way in which a tensor is split or replicated.
SETTINGS = ["train.ema.enabled=true", "model.vocab_size=700", "relation.combine=gated", "router.gate_features=true"]


def silent(text: str) -> None:
    """No output."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its export, the export turned into a run again, and that run as each grid loads and saves it."""
    root = tmp_path_factory.mktemp("grids")
    make_run(root / "run", *SETTINGS)
    for weights in ("raw", "ema"):
        export(root / "run", root / weights, ExportOptions(weights, logits=False), silent)
    import_folder(root / "raw", root / "back", ImportOptions(logits=False), silent)
    arguments = [str(root / "back"), str(root), *SETTINGS]
    with warm_ranks():
        assert spawn("tests.convert.grid_worker", arguments, RANKS) == 0
    return root


@pytest.mark.parametrize("grid", GRIDS, ids=name_of)
def test_a_grid_takes_and_gives_the_same_weights(root: Path, tmp_path: Path, grid: tuple[int, ...]) -> None:
    run = root / name_of(grid)
    found = manifests.read(find_step(run)).grid
    assert (found["tp"], found["pp"], found["ep"]) == grid
    shutil.copy(root / "run/tokenizer.json", run)
    for weights in ("raw", "ema"):  # the average of an imported model is the model
        export(run, tmp_path / weights, ExportOptions(weights, logits=False), silent)
        for path in (root / "raw").glob("*.safetensors"):
            assert (tmp_path / weights / path.name).read_bytes() == path.read_bytes(), path.name
