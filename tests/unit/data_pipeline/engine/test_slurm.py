"""Job arrays against stand-ins for SLURM that really run their tasks, through the files a cluster would see."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.engine import slurm as slurm_module
from data_pipeline.engine.choose import executor_of
from data_pipeline.engine.local import LocalExecutor
from data_pipeline.engine.slurm import SlurmExecutor, compressed
from data_pipeline.engine.tasks import Stage, task_folder
from data_pipeline.options import Engine
from data_pipeline.output import write_atomically
from refractor_megatron.errors import CapabilityError, DataError
from tests.corpus import ROOT
from tests.unit.data_pipeline.engine import jobs

#: sbatch, squeue, scancel, sacct and scontrol in one: jobs are folders under STUB, with a file for each queued task.
STUB = """#!{python}
import os, re, signal, subprocess, sys
from pathlib import Path
root, me, arguments = Path({root!r}), Path(sys.argv[0]).name, sys.argv[1:]
value = lambda name: next(a.partition("=")[2] for a in arguments if a.startswith(name + "="))
assert not [name for name in os.environ if name.startswith(("SLURM_", "SQUEUE_"))]
with (root / "log").open("a") as log:
    print(me, *arguments, file=log)
if me == "sbatch":
    assert "--parsable" in arguments
    if "--partition=closed" in arguments:
        sys.exit("sbatch: error: invalid partition specified: closed")
    while (root / "slow").exists() and " --name=" not in (root / "log").read_text():
        import time; time.sleep(0.02)  # until a later run has looked for the job
    script, shift = arguments[-2:]
    job = str(100 + len(list(root.glob("job-*"))))
    folder = root / f"job-{{job}}"
    folder.mkdir()
    (folder / "name").write_text(value("--job-name"))
    ranges, _, limit = value("--array").partition("%")
    tasks = []
    for run in ranges.split(","):
        first, _, last = run.partition("-")
        tasks += range(int(first), int(last or first) + 1)
    for number in tasks:
        (folder / str(number)).touch()
    output = value("--output").replace("%A", job)
    if os.fork() == 0:
        os.setsid()
        (folder / "pid").write_text(str(os.getpid()))
        for fd in (0, 1, 2):
            os.dup2(os.open(os.devnull, os.O_RDWR), fd)
        while (root / "hold").exists() and os.getppid():
            import time; time.sleep(0.02)
        for number in tasks:
            with open(output.replace("%a", str(number)), "w") as out:
                env = {{**os.environ, "SLURM_ARRAY_TASK_ID": str(number)}}
                subprocess.run(["bash", script, shift], stdout=out, stderr=out, env=env)
            (folder / str(number)).unlink()
        os._exit(0)
    while (root / "mute").exists():
        import time; time.sleep(0.02)
    if (root / "timeout").exists():
        sys.exit("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")
    print(f"{{job}};cluster")
elif me == "squeue":
    if (root / "down").exists():
        left = int((root / "down").read_text()) - 1
        (root / "down").write_text(str(left)) if left else (root / "down").unlink()
        sys.exit("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    if any(argument.startswith("--name=") for argument in arguments):
        assert value("--format") == "%F %K"
        for folder in root.glob("job-*"):
            for task in folder.glob("[0-9]*") if (folder / "name").read_text() == value("--name") else ():
                print(folder.name[4:], task.name)
        sys.exit(0)
    folder = root / f"job-{{value('--jobs')}}"
    left = [name.name for name in folder.glob("[0-9]*")] if folder.exists() else []
    if not left:
        sys.exit("slurm_load_jobs error: Invalid job id specified")
    print("\\n".join(left))
elif me == "scancel":
    if arguments[0].startswith("--name="):
        sys.exit(0)
    folder = root / f"job-{{arguments[0]}}"
    try:
        os.killpg(int((folder / "pid").read_text()), signal.SIGKILL)
    except ProcessLookupError:
        pass
    for name in folder.glob("[0-9]*"):
        name.unlink()
elif me == "sacct":
    print("OUT_OF_MEMORY")
else:
    print("SLURM_VERSION = 24.05\\nMaxArraySize            = " + (root / "size").read_text())
"""


class Cluster:
    """The stand-ins' folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "tools").mkdir(parents=True)
        (root / "size").write_text("1001")
        for name in ("sbatch", "squeue", "scancel", "sacct", "scontrol"):
            path = root / "tools" / name
            path.write_text(STUB.format(python=sys.executable, root=str(root)))
            path.chmod(0o755)

    def release(self) -> None:
        """Lets everything go on that waits."""
        for state in ("hold", "mute", "slow"):
            (self.root / state).unlink(missing_ok=True)

    def calls(self, program: str) -> list[str]:
        return [line for line in (self.root / "log").read_text().splitlines() if line.startswith(program)]


def executor(limit: int = 0, *arguments: str) -> SlurmExecutor:
    return SlurmExecutor(arguments, limit, poll_s=0.05, lag_s=0.5)


def silent(line: str) -> None:
    """No log."""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    it = Cluster(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{it.root / 'tools'}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # the build itself may run in a job
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")  # a user's own, which would hide what waits
    monkeypatch.chdir(ROOT)  # whence the tasks' interpreters find the tests
    yield it
    it.release()


def test_numbers_are_compressed_as_sbatch_reads_them() -> None:
    assert compressed([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert compressed([4]) == "4" and compressed([]) == ""


def test_array_gives_the_bytes_of_the_local_executor(cluster: Cluster, tmp_path: Path) -> None:
    sample = jobs.stage("hashes", 4, megabytes=(1, 2, 3, 4), seed=5)
    with executor(3, "--partition=cpu", "--time=10") as slurm:
        folder = slurm.run(sample, tmp_path / "a", silent)
    local = LocalExecutor(1).run(sample, tmp_path / "b", silent)
    assert jobs.tree(folder) == jobs.tree(local) and len(jobs.tree(local)) == 9
    (call,) = cluster.calls("sbatch")
    assert call.startswith("sbatch --partition=cpu --time=10 ") and " --array=0-3%3 " in call


def test_only_what_is_left_is_submitted_in_arrays_the_cluster_accepts(cluster: Cluster, tmp_path: Path) -> None:
    (cluster.root / "size").write_text("4")
    sample = jobs.stage("hashes", 10)
    folder = sample.prepare(tmp_path)
    for index in (0, 1, 4, 5, 6, 7, 9):
        task_folder(folder, index).mkdir()
    with executor() as slurm:
        slurm.run(sample, tmp_path, silent)
        slurm.run(sample, tmp_path, silent)  # nothing left
    arrays = [(call.split("--array=")[1].split()[0], call.split()[-1]) for call in cluster.calls("sbatch")]
    assert arrays == [("2-3", "0"), ("0", "8")]
    full = jobs.tree(LocalExecutor(1).run(sample, tmp_path / "b", silent))
    assert {name: full[name] for name in full if name[:5] in ("00002", "00003", "00008")}.items() <= jobs.tree(
        folder
    ).items()


@pytest.mark.parametrize(
    ("params", "said"),
    [({"sentence": "a.txt, line 3: no."}, "(OUT_OF_MEMORY, a.txt, line 3: no)"), ({"signal": 9}, "(OUT_OF_MEMORY)")],
)
def test_task_that_dies_stops_the_array_and_is_named_with_its_log(
    cluster: Cluster, tmp_path: Path, params: dict[str, object], said: str
) -> None:
    sample = jobs.stage("fails", 3, bad=1, pause=0.1, **params)
    folder = sample.folder(tmp_path)
    with executor() as slurm, pytest.raises(DataError) as caught:
        slurm.run(sample, tmp_path, silent)
    message, log = str(caught.value), folder / "slurm" / "100_1.log"
    assert message.startswith(f"Task 1 of stage sample ended without a result in SLURM job 100_1 {said}")
    assert str(log) in message and log.is_file() and "\n" not in message
    assert len(cluster.calls("sbatch")) == 1 and cluster.calls("scancel") == ["scancel 100"]
    assert task_folder(folder, 0).is_dir() and not task_folder(folder, 1).exists()


def start_and_kill(cluster: Cluster, tmp_path: Path, when: Callable[[], bool]) -> Stage:
    """Starts a build of three tasks in another process, which SIGKILL ends as soon as ``when``."""
    script = (
        "from pathlib import Path\nfrom data_pipeline.engine.slurm import SlurmExecutor\n"
        "from tests.unit.data_pipeline.engine import jobs\n"
        f"SlurmExecutor((), 0, 0.05).run(jobs.stage('hashes', 3), Path({str(tmp_path)!r}), print)\n"
    )
    build = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        jobs.wait_until(when)
    finally:
        build.kill()
    assert build.wait() == -signal.SIGKILL
    return jobs.stage("hashes", 3)


def noted(sample: Stage, tmp_path: Path) -> dict[str, Any]:
    """The note of the last submission; empty if there is none."""
    path = sample.folder(tmp_path) / "slurm" / "job"
    return json.loads(path.read_bytes()) if path.is_file() else {}


def finish(cluster: Cluster, sample: Stage, tmp_path: Path, *before: str) -> None:
    """Runs the build again: it must find the array of the killed one, and submit nothing."""
    said: list[str] = []

    def log(line: str) -> None:
        said.append(line)
        assert not line.startswith("sample: SLURM job"), "a second array was submitted"
        if "waiting for SLURM job" in line:
            cluster.release()

    folder = SlurmExecutor((), 0, poll_s=0.05).run(sample, tmp_path, log)
    assert said == [*before, "sample: waiting for SLURM job 100 of an earlier run"]
    assert len(cluster.calls("sbatch")) == 1
    assert jobs.tree(folder) == jobs.tree(LocalExecutor(1).run(sample, tmp_path / "b", silent))


def test_array_of_a_killed_build_is_found_again(cluster: Cluster, tmp_path: Path) -> None:
    (cluster.root / "hold").touch()
    sample = start_and_kill(cluster, tmp_path, lambda: noted(jobs.stage("hashes", 3), tmp_path).get("answered", False))
    (call,) = cluster.calls("sbatch")
    assert f" --job-name={noted(sample, tmp_path)['name']} " in call and sample.digest[:12] in call
    finish(cluster, sample, tmp_path)


def test_build_killed_between_submission_and_answer_orphans_nothing(cluster: Cluster, tmp_path: Path) -> None:
    (cluster.root / "hold").touch()
    (cluster.root / "mute").touch()  # the job is in the queue, and sbatch has not said so
    sample = start_and_kill(cluster, tmp_path, (cluster.root / "job-100" / "pid").is_file)
    assert noted(sample, tmp_path)["answered"] is False
    finish(cluster, sample, tmp_path)


def test_sbatch_that_outlives_its_build_is_waited_for(cluster: Cluster, tmp_path: Path) -> None:
    (cluster.root / "hold").touch()
    (cluster.root / "slow").touch()  # submits only after the next run has looked for the first time
    log = cluster.root / "log"
    sample = start_and_kill(cluster, tmp_path, lambda: log.is_file() and bool(cluster.calls("sbatch")))
    assert not list(cluster.root.glob("job-*"))
    finish(cluster, sample, tmp_path, "sample: an earlier run ended while it submitted; looking for its job for 60 s")


def test_build_killed_before_sbatch_started_submits_after_a_while(cluster: Cluster, tmp_path: Path) -> None:
    sample = jobs.stage("hashes", 3)
    folder = sample.prepare(tmp_path)
    write_atomically(folder / "slurm" / "job", '{"name": "refractor-never", "first": 0, "answered": false}')
    said: list[str] = []
    executor().run(sample, tmp_path, said.append)
    assert "looking for its job for 0.5 s" in said[0]
    assert said[1:] == ["sample: SLURM job 100, 3 tasks"] and len(cluster.calls("sbatch")) == 1
    looks = [call for call in cluster.calls("squeue") if "--name=refractor-never " in call]
    assert len(looks) > 2


def test_submission_that_timed_out_and_was_made_is_found(cluster: Cluster, tmp_path: Path) -> None:
    (cluster.root / "hold").touch()
    (cluster.root / "timeout").touch()
    sample = jobs.stage("hashes", 3)
    with pytest.raises(DataError, match="Socket timed out"):
        executor().run(sample, tmp_path, silent)
    finish(cluster, sample, tmp_path)


def test_refused_submission_is_made_again_at_once(cluster: Cluster, tmp_path: Path) -> None:
    sample = jobs.stage("hashes", 2)
    with pytest.raises(DataError, match="invalid partition"):
        SlurmExecutor(("--partition=closed",), 0).run(sample, tmp_path, silent)
    SlurmExecutor((), 0, poll_s=0.05).run(sample, tmp_path, silent)
    assert len([call for call in cluster.calls("squeue") if "--name=" in call]) == 1


def test_queue_that_is_silent_for_a_while_leads_to_no_second_array(cluster: Cluster, tmp_path: Path) -> None:
    (cluster.root / "hold").touch()
    sample = start_and_kill(cluster, tmp_path, lambda: noted(jobs.stage("hashes", 3), tmp_path).get("answered", False))
    (cluster.root / "down").write_text("3")
    finish(cluster, sample, tmp_path)
    assert not (cluster.root / "down").exists()


def test_queue_that_stays_silent_leads_to_no_second_array(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cluster.root / "hold").touch()
    sample = start_and_kill(cluster, tmp_path, lambda: noted(jobs.stage("hashes", 3), tmp_path).get("answered", False))
    monkeypatch.setattr("data_pipeline.engine.slurm._PATIENCE", 2)
    (cluster.root / "down").write_text("1000")
    with pytest.raises(DataError, match="^squeue does not answer for SLURM job refractor-sample-.*; run again when"):
        executor().run(sample, tmp_path, silent)
    assert len(cluster.calls("sbatch")) == 1 and not cluster.calls("scancel")
    (cluster.root / "down").unlink()
    finish(cluster, sample, tmp_path)


@pytest.mark.parametrize("note", ["", "100 0", "{}", "[1]"])
def test_damaged_note_is_named(cluster: Cluster, tmp_path: Path, note: str) -> None:
    sample = jobs.stage("hashes", 2)
    write_atomically(sample.prepare(tmp_path) / "slurm" / "job", note)
    with pytest.raises(DataError, match=r"slurm/job cannot be read .*delete it and run again\.$"):
        executor().run(sample, tmp_path, silent)


def test_interrupted_submission_is_taken_back_by_its_name(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = slurm_module._ask

    def interrupted(command: list[str]) -> subprocess.CompletedProcess[str]:
        if command[0] == "sbatch":
            raise KeyboardInterrupt
        return ask(command)

    monkeypatch.setattr(slurm_module, "_ask", interrupted)
    sample = jobs.stage("hashes", 2)
    with pytest.raises(KeyboardInterrupt):
        executor().run(sample, tmp_path, silent)
    assert cluster.calls("scancel") == [f"scancel --name={noted(sample, tmp_path)['name']}"]


def test_interrupted_build_takes_its_array_back(cluster: Cluster, tmp_path: Path) -> None:
    (cluster.root / "hold").touch()

    def interrupt(line: str) -> None:
        if "SLURM job" not in line:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_pipeline.progress.QUIET_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            executor().run(jobs.stage("hashes", 3), tmp_path, interrupt)
    assert cluster.calls("scancel") == ["scancel 100"]


def test_queue_that_does_not_answer_is_an_error_in_the_end(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.engine.slurm._PATIENCE", 2)
    (cluster.root / "hold").touch()
    (cluster.root / "down").write_text("1000")
    with pytest.raises(DataError, match="^squeue does not answer for SLURM job 100; run again when it does.$"):
        executor().run(jobs.stage("hashes", 2), tmp_path, silent)


def test_refused_submission_says_what_sbatch_said(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="refused stage sample .*invalid partition.* correct data.engine.arguments"):
        executor(0, "--partition=closed").run(jobs.stage("hashes", 2), tmp_path, silent)


@pytest.mark.parametrize(
    "argument", ["--array=1-3", "-a", "-a1", "--output", "--wrap=x", "-o", "--wait", "-W", "-J", "--job-name=x"]
)
def test_arguments_of_ours_are_refused(cluster: Cluster, argument: str) -> None:
    with pytest.raises(DataError, match=f"data.engine.arguments: {argument} is set by the build itself"):
        executor(0, argument)


@pytest.mark.parametrize("argument", ["--account=x", "-p", "cpu", "-A", "--oversubscribe", "--wckey=w"])
def test_arguments_of_the_users_pass(cluster: Cluster, argument: str) -> None:
    assert isinstance(executor(0, argument), SlurmExecutor)


def test_without_slurm_it_says_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(CapabilityError, match="needs sbatch on the PATH"), executor_of(Engine(kind="slurm")):
        pass


def test_the_options_choose_it(cluster: Cluster) -> None:
    with executor_of(Engine(kind="slurm", workers=2, arguments=("--time=5",))) as slurm:
        assert isinstance(slurm, SlurmExecutor)
