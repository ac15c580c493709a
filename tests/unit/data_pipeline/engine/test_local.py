"""The local executor: same bytes for any number of workers, errors as raised, and nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data_pipeline.engine.choose import executor_of
from data_pipeline.engine.failures import TaskFailed
from data_pipeline.engine.local import LocalExecutor, in_order
from data_pipeline.engine.tasks import task_folder
from data_pipeline.options import Engine
from refractor_megatron.errors import DataError
from tests.corpus import ROOT
from tests.unit.data_pipeline.engine import jobs


def silent(line: str) -> None:
    """No log."""


def test_results_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    sample = jobs.stage("hashes", 7, megabytes=(1, 5, 2, 2, 9, 0.5, 3), seed=3)
    trees = []
    for workers in (1, 2, 3):
        with LocalExecutor(workers) as executor:
            trees.append(jobs.tree(executor.run(sample, tmp_path / str(workers), silent)))
    assert trees[0] == trees[1] == trees[2]
    assert len(trees[0]) == 1 + 7 * 2


def test_done_tasks_are_not_done_again(tmp_path: Path) -> None:
    sample = jobs.stage("start_times", 5)
    with LocalExecutor(2) as executor:
        folder = executor.run(sample, tmp_path, silent)
        before = jobs.tree(folder)
        (task_folder(folder, 3) / "started.txt").unlink()
        task_folder(folder, 3).rmdir()
        executor.run(sample, tmp_path, silent)
    after = jobs.tree(folder)
    assert {name for name in after if after[name] != before[name]} == {"00003/started.txt"}


def test_little_input_starts_no_pool(tmp_path: Path) -> None:
    with LocalExecutor(2) as executor:
        for megabytes, here in ((1.0, True), (9.0, False), (1.5, False)):  # a pool that there is serves little too
            stage = jobs.stage("environment", 2, megabytes=(megabytes, megabytes), seed=megabytes)
            folder = executor.run(stage, tmp_path, silent)
            said = {(task_folder(folder, index) / "said.txt").read_text().split()[0] for index in range(2)}
            assert (said == {str(os.getpid())}) == here


def test_one_pool_serves_all_stages_with_one_thread_each(tmp_path: Path) -> None:
    with LocalExecutor(2) as executor:
        folders = [executor.run(jobs.stage("environment", 6, pause=0.1, n=n), tmp_path, silent) for n in range(2)]
    said = [path.read_text().split() for folder in folders for path in folder.glob("*/said.txt")]
    assert len(said) == 12 and {tuple(one[1:]) for one in said} == {("1", "1", "1")}
    pids = {int(one[0]) for one in said}
    assert len(pids) == 2 and not any(map(jobs.alive, pids))


def test_largest_tasks_start_first() -> None:
    assert in_order(jobs.stage("hashes", 4, megabytes=(1, 5, 2, 5)), [3, 2, 1, 0]) == [1, 3, 2, 0]
    assert in_order(jobs.stage("hashes", 4), [3, 0, 1]) == [0, 1, 3]


def test_one_worker_starts_in_that_order_too(tmp_path: Path) -> None:
    folder = LocalExecutor(1).run(jobs.stage("start_times", 3, megabytes=(1, 3, 2)), tmp_path, silent)
    times = [int((task_folder(folder, index) / "started.txt").read_text()) for index in range(3)]
    assert times[1] < times[2] < times[0]


@pytest.mark.parametrize("workers", [1, 2])
def test_data_error_of_a_task_is_raised_as_such_and_leaves_no_draft(tmp_path: Path, workers: int) -> None:
    sample = jobs.stage("fails", 4, bad=0, sentence="a.txt, line 3: no.")
    begun = time.monotonic()
    with LocalExecutor(workers) as executor, pytest.raises(DataError) as caught:
        executor.run(sample, tmp_path, silent)
    assert str(caught.value) == "a.txt, line 3: no."
    assert time.monotonic() - begun < 30  # the other tasks would last a minute
    assert jobs.drafts(sample.folder(tmp_path)) == []


def test_our_own_mistake_keeps_its_traceback(tmp_path: Path) -> None:
    with LocalExecutor(2) as executor, pytest.raises(TaskFailed, match="(?s)task 1 of 4.*in fails.*ZeroDivision"):
        executor.run(jobs.stage("fails", 4, bad=1), tmp_path, silent)


@pytest.mark.parametrize(
    ("params", "how"),
    [
        ({"signal": int(signal.SIGKILL)}, "lost its worker process to signal 9"),
        ({"signal": int(signal.SIGSEGV)}, "lost its worker process to signal 11"),
        ({"memory": True}, "ran out of memory"),
    ],
)
def test_worker_that_dies_is_one_sentence(tmp_path: Path, params: dict[str, object], how: str) -> None:
    sample = jobs.stage("fails", 3, bad=1, **params)
    with LocalExecutor(2) as executor:
        with pytest.raises(DataError, match=f"^Task 1 of stage sample {how}") as caught:
            executor.run(sample, tmp_path, silent)
        assert "\n" not in str(caught.value) and "data.engine.workers" in str(caught.value)
        executor.run(jobs.stage("hashes", 3), tmp_path, silent)  # with a new pool


def orphans(tmp_path: Path, number: signal.Signals, deaf: bool) -> tuple[int, list[int]]:
    """Sends a signal to a build of two busy workers; its status, and the processes that were busy."""
    signs = tmp_path / "signs"
    signs.mkdir()
    script = (
        "import sys; from pathlib import Path\n"
        "from data_pipeline.engine.local import LocalExecutor\n"
        "from tests.unit.data_pipeline.engine import jobs\n"
        f"stage = jobs.stage('waits', 3, signs={str(signs)!r}, deaf={deaf})\n"
        f"with LocalExecutor(2) as it: it.run(stage, Path({str(tmp_path)!r}), print)\n"
    )
    build = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.DEVNULL)
    jobs.wait_until(lambda: len([one for one in signs.iterdir() if one.name in "012"]) == 2)
    pids = [int(pid) for one in signs.iterdir() for pid in one.read_text().split()]
    build.send_signal(number)
    return build.wait(timeout=30), pids


@pytest.mark.parametrize("deaf", [False, True])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_worker_outlives_its_build(tmp_path: Path, number: signal.Signals, deaf: bool) -> None:
    status, pids = orphans(tmp_path, number, deaf)
    assert status != 0 and len(pids) == 4
    workers = [pids[0], pids[2]]
    jobs.wait_until(lambda: not any(map(jobs.alive, pids if deaf else workers)), seconds=15)
    if not deaf:
        assert jobs.drafts(next(tmp_path.glob("sample-*"))) == []  # they had the time to take them away


def test_slow_stage_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.progress.QUIET_SECONDS", 0.0)
    said: list[str] = []
    with LocalExecutor(2) as executor:
        executor.run(jobs.stage("hashes", 3, seed=1), tmp_path, said.append)
        executor.run(jobs.stage("hashes", 3, megabytes=(1, 2, 4), seed=2), tmp_path, said.append)
    assert any(line.startswith("sample: 3/3 tasks, ") and line.endswith(" tasks/s, 0 s left") for line in said)
    assert any(line.startswith("sample: 7.0/7.0 MB, ") and line.endswith(" MB/s, 0 s left") for line in said)


def test_waiting_says_so_before_anything_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.progress.QUIET_SECONDS", 0.0)
    said: list[str] = []
    with LocalExecutor(2) as executor:
        executor.run(jobs.stage("hashes", 2, pause=1.5), tmp_path, said.append)
    assert said[0] == "sample: 0/2 tasks, 0.0 tasks/s, no estimate yet"


def test_runs_in_a_thread_and_under_a_main_without_guard(tmp_path: Path) -> None:
    """Workers do not import the caller's ``__main__``; a script without a guard would start builds for ever."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\n"
        "from data_pipeline.engine.local import LocalExecutor\n"
        "from tests.unit.data_pipeline.engine import jobs\n"
        "print('main')\n"
        f"with LocalExecutor(2) as it: it.run(jobs.stage('hashes', 3), Path({str(tmp_path)!r}), print)\n"
    )
    answer = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=True)
    assert answer.stdout == "main\n"
    failures: list[BaseException] = []

    def run() -> None:
        try:
            with LocalExecutor(2) as executor:
                executor.run(jobs.stage("hashes", 3, seed=4), tmp_path, silent)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not failures and len(list(jobs.stage("hashes", 3, seed=4).folder(tmp_path).glob("0*"))) == 3


def test_local_executor_is_the_default_and_uses_its_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 3, 5})
    with executor_of(Engine()) as executor:
        folder = executor.run(jobs.stage("environment", 9, pause=0.2), tmp_path, silent)
    assert len({path.read_text().split()[0] for path in folder.glob("*/said.txt")}) == 3
