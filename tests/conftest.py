"""Settings that every test shares."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Before any test imports torch or wandb: one thread, nothing sent anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# where transformers copies code that lies beside weights; it looks once, when it is imported
if "HF_MODULES_CACHE" not in os.environ:
    os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="refractor_modules_")
    atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

# No example is too slow: processors are shared here. What fails can be run again from what is printed.
settings.register_profile("project", deadline=None, print_blob=True)
settings.load_profile("project")

#: Files that take longest, longest first: workers take whole files, and the last one to start must be short.
SLOW_FILES = (
    "test_kill_resume",
    "test_build_kill",
    "test_engine_kill",
    "test_whole_build",
    "test_round_trip",
    "test_mutations",
    "test_tiers",
    "test_gpu_check",
    "test_bad_input",
    "test_mask_classes",
    "test_flex_compiled",
    "test_bench_attention",
    "test_flex_kernels",
    "test_retrieval_run",
    "test_information_flow",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first, all else in the order in which it was found."""
    place = {name: number for number, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


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
