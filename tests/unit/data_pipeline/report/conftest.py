from __future__ import annotations

import pytest

from data_pipeline.build import BuiltData
from tests.unit.data_pipeline.report.everything import build_everything


@pytest.fixture(scope="session")
def everything(tmp_path_factory: pytest.TempPathFactory) -> BuiltData:
    """A dataset built with everything switched on."""
    return build_everything(tmp_path_factory)
