"""Settings that every test shares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before any test imports torch or wandb: one thread, nothing sent anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture
def repo_root() -> Path:
    """Root of the working tree."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _same_working_directory() -> Iterator[None]:
    """A test that changes the working directory does not change it for the next one."""
    before = Path.cwd()
    yield
    os.chdir(before)
