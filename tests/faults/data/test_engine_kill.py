"""SIGKILL of a build or of a worker at any moment, run again: every task's bytes are those of a calm build."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.engine.local import LocalExecutor
from data_pipeline.engine.tasks import pending
from tests.corpus import ROOT
from tests.unit.data_pipeline.engine import jobs

TASKS, PAUSE, SEEDS = 24, 0.03, 2
STAGE = jobs.stage("hashes", TASKS, seed=11, pause=PAUSE)
pytestmark = pytest.mark.slow


def start(work: Path, workers: int) -> subprocess.Popen[bytes]:
    """A build of the stage in a process of its own."""
    script = (
        "from pathlib import Path\nfrom data_pipeline.engine.local import LocalExecutor\n"
        "from tests.unit.data_pipeline.engine import jobs\n"
        f"stage = jobs.stage('hashes', {TASKS}, seed=11, pause={PAUSE})\n"
        f"with LocalExecutor({workers}) as it: it.run(stage, Path({str(work)!r}), print)\n"
    )
    return subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE)


def workers_of(pid: int) -> list[int]:
    """Children of a process."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def done(folder: Path) -> int:
    return TASKS - len(pending(folder, TASKS))


def at_some_moment(build: subprocess.Popen[bytes], folder: Path, chance: random.Random) -> None:
    """Waits until a few more tasks are done, and then a moment."""
    goal = done(folder) + chance.randint(0, 4)
    while done(folder) < goal and build.poll() is None:
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 2 * PAUSE))


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return jobs.tree(LocalExecutor(1).run(STAGE, tmp_path_factory.mktemp("calm"), lambda line: None))


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("workers", [1, 3])
def test_killed_build_ends_in_the_same_bytes(tmp_path: Path, calm: dict[str, str], seed: int, workers: int) -> None:
    chance, folder, kills, counts = random.Random(f"{seed} {workers}"), STAGE.folder(tmp_path), 0, [0]
    while True:
        build = start(tmp_path, workers)
        if len(counts) < 6:
            at_some_moment(build, folder, chance)
            build.kill()
        _, errors = build.communicate(timeout=60)
        counts.append(done(folder))
        assert counts[-1] >= counts[-2], "a done task was lost"
        if build.returncode == 0:
            break
        assert build.returncode == -signal.SIGKILL, errors.decode()
        kills += 1
    assert kills >= 2, "the kills came too late to mean anything"
    assert jobs.tree(folder) == calm
    assert len(calm) == 2 * TASKS + 1


def test_killed_worker_stops_the_build_in_one_sentence_and_loses_nothing(tmp_path: Path, calm: dict[str, str]) -> None:
    chance, folder = random.Random(4), STAGE.folder(tmp_path)
    for _ in range(3):
        build = start(tmp_path, 2)
        jobs.wait_until(lambda build=build: len(workers_of(build.pid)) == 2)
        at_some_moment(build, folder, chance)
        os.kill(chance.choice(workers_of(build.pid)), signal.SIGKILL)
        _, errors = build.communicate(timeout=60)
        last = errors.decode().strip().splitlines()[-1]
        assert build.returncode == 1 and "of stage sample lost its worker process to signal 9" in last, last
    build = start(tmp_path, 2)
    assert build.wait(timeout=60) == 0
    assert jobs.tree(folder) == calm


def test_build_that_starts_while_orphans_still_work_is_not_hurt(tmp_path: Path, calm: dict[str, str]) -> None:
    """Workers that notice late write on in their drafts, beside those who do the same tasks again."""
    chance, folder, stopped = random.Random(9), STAGE.folder(tmp_path), 0
    build = start(tmp_path, 2)
    for _ in range(4):
        at_some_moment(build, folder, chance)
        if build.poll() is not None:
            break
        orphans = workers_of(build.pid)
        for pid in orphans:
            os.kill(pid, signal.SIGSTOP)
        try:
            build.kill()
            build.wait(timeout=60)
            build = start(tmp_path, 2)
            at_some_moment(build, folder, chance)
        finally:
            for pid in orphans:
                os.kill(pid, signal.SIGCONT)
        stopped += len(orphans)
    assert build.wait(timeout=60) == 0
    jobs.wait_until(lambda: not jobs.drafts(folder))  # the orphans are done for, and have taken theirs away
    assert jobs.tree(folder) == calm
    assert stopped >= 2
