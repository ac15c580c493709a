"""The Ray executor, on a real Ray of two CPUs."""

from __future__ import annotations

import builtins
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.engine.choose import executor_of
from data_pipeline.engine.failures import TaskFailed
from data_pipeline.engine.local import LocalExecutor
from data_pipeline.engine.ray_executor import RayExecutor
from data_pipeline.options import Engine
from refractor_megatron.errors import CapabilityError, DataError
from tests.unit.data_pipeline.engine import jobs


def silent(line: str) -> None:
    """No log."""


@pytest.fixture(scope="module")
def ray() -> Iterator[RayExecutor]:
    """One Ray for all tests: its start takes seconds."""
    with executor_of(Engine(kind="ray", workers=2)) as executor:
        assert isinstance(executor, RayExecutor)
        yield executor


@pytest.mark.slow
def test_ray_gives_the_bytes_of_the_local_executor(ray: RayExecutor, tmp_path: Path) -> None:
    sample = jobs.stage("hashes", 6, megabytes=(1, 2, 6, 4, 5, 3), seed=6)
    folder = ray.run(sample, tmp_path / "a", silent)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    ray.run(sample, tmp_path / "a", silent)  # nothing left to do
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert {path for path in before if before[path] != after[path]} <= {folder / "stage.json"}
    local = LocalExecutor(1).run(sample, tmp_path / "b", silent)
    assert jobs.tree(folder) == jobs.tree(local) and len(jobs.tree(local)) == 13


@pytest.mark.slow
def test_ray_tasks_run_elsewhere_with_one_thread_each(ray: RayExecutor, tmp_path: Path) -> None:
    folder = ray.run(jobs.stage("environment", 3), tmp_path, silent)
    assert {path.read_text().partition(" ")[2] for path in folder.glob("*/said.txt")} == {"1 1 1"}


@pytest.mark.slow
def test_errors_of_ray_tasks_arrive_as_they_were(ray: RayExecutor, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        ray.run(jobs.stage("fails", 3, bad=0, pause=1, sentence="a.txt, line 3: no."), tmp_path, silent)
    assert str(caught.value) == "a.txt, line 3: no."
    with pytest.raises(TaskFailed, match="(?s)task 1 of 2.*ZeroDivision"):
        ray.run(jobs.stage("fails", 2, bad=1, pause=0), tmp_path, silent)
    with pytest.raises(DataError, match="^Task 1 of stage sample was lost by Ray"):
        ray.run(jobs.stage("fails", 2, bad=1, pause=0, signal=int(signal.SIGKILL)), tmp_path, silent)


def test_missing_ray_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def without_ray(name: str, *rest: Any) -> Any:
        if name == "ray":
            raise ModuleNotFoundError(name)
        return found(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_ray)
    with pytest.raises(CapabilityError, match=r"pip install 'refractor-megatron\[ray\]'"):
        executor_of(Engine(kind="ray"))
