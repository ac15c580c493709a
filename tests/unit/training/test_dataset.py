"""The dataset that a run was prepared with."""

from pathlib import Path

import pytest

from refractor_megatron.config import compose
from refractor_megatron.errors import DataError
from refractor_megatron.training.dataset import heldout_stream, open_index
from refractor_megatron.training.folder import RunFolder


def test_an_imported_model_has_none_and_the_way_out_is_named(tmp_path: Path) -> None:
    cfg = compose(["experiment=nano", "relation.retrieval.enabled=true"])
    with pytest.raises(DataError, match="no dataset.*pretrain --weights"):
        heldout_stream(RunFolder(tmp_path), cfg)
    with pytest.raises(DataError, match="no dataset.*pretrain --weights"):
        open_index(RunFolder(tmp_path), cfg)
