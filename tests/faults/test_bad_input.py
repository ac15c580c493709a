"""A user's mistake: one sentence naming file or key and the way out, an exit code, no traceback, nothing lost."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from refractor_megatron.checkpoint import manifest as manifests
from refractor_megatron.cli import main
from tests.corpus import write_corpus


def empty_folder(root: Path) -> Path:
    (root / "empty").mkdir()
    return root / "empty"


def only_blank(root: Path) -> Path:
    (root / "blank.txt").write_text(" \n\t\n")
    return root / "blank.txt"


def torn_gzip(root: Path) -> Path:
    whole = gzip.compress(b'{"text": "a line"}\n' * 1000)
    (root / "torn.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    return root / "torn.jsonl.gz"


def bad_json_line(root: Path) -> Path:
    (root / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    return root / "bad.jsonl"


def fake_parquet(root: Path) -> Path:
    (root / "x.parquet").write_bytes(b"PAR1 not really")
    return root / "x.parquet"


def dangling(root: Path) -> Path:
    (root / "gone.txt").symlink_to(root / "nowhere.txt")
    return root / "gone.txt"


CORPORA: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda root: root / "missing", "missing"),
    "empty folder": (empty_folder, "empty"),
    "only blank text": (only_blank, "blank"),
    "torn gzip": (torn_gzip, "torn.jsonl.gz"),
    "bad JSON line": (bad_json_line, "bad.jsonl:2"),
    "not a parquet file": (fake_parquet, "x.parquet"),
    "dangling link": (dangling, "gone.txt"),
}


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, *needles: str) -> str:
    """Run the command line and check the shape of the refusal."""
    assert main(arguments) == code
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and "Traceback" not in message
    for needle in needles:
        assert needle in message, message
    return message


@pytest.mark.parametrize("name", CORPORA)
def test_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    make, needle = CORPORA[name]
    arguments = ["pretrain", "--preset", "nano", "--corpus", str(make(tmp_path)), "--data-root", str(tmp_path / "data")]
    refused(capsys, [*arguments, "--out", str(tmp_path / "run")], 3, needle)
    assert not [p for p in (tmp_path / "data").glob("*") if p.name not in ("cache", ".lock")], (
        "no half-built dataset stays behind"
    )


CONTRADICTION = (
    "{name: a, when: {role: tool}, allow_write_to: [assistant]}, "
    "{name: b, when: {role: assistant}, allow_read_from: [user]}"
)
LEAK = "{name: sealed, when: {bits: [SAFETY_SCOPE]}, allow_write_to: [assistant]}"


@pytest.mark.parametrize(
    ("override", "needles"),
    [
        ("train.stepz=5", ("train.stepz", "train.steps")),
        ("train.steps=many", ("train.steps", "many")),
        ("experiment=pilott", ("pilott", "pilot")),
        ("parallel.tp=3", ("n_heads", "tp")),
        ("model.n_heads=5", ("n_heads",)),
        ("train.seq_len=100", ("seq_len",)),
        ("safety.masks=[{name: x, when: {role: robot}}]", ("robot",)),
        ("safety.masks=[{name: x, when: {bits: [SAFETY]}}]", ("rule 'x'", "SAFETY_SCOPE")),
        (f"safety.masks=[{CONTRADICTION}]", ("rule 'b'", "forbids every such edge")),
        (f"safety.masks=[{LEAK}]", ("rule 'sealed'", "system+SAFETY_SCOPE -> assistant -> system")),
        ("relation.local.window=0", ("relation.local.window", ">= 1")),
        ("relation.local.pattern=spiral", ("pattern", "sliding")),
        ("model.ffn.topk=9", ("topk",)),
    ],
)
def test_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, needles: tuple[str, ...]
) -> None:
    ranks = ["--ranks", "3"] if "tp=3" in override else []
    refused(capsys, ["pretrain", "--preset", "nano", *ranks, "--out", str(tmp_path / "run"), override], 2, *needles)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A short finished run."""
    root = tmp_path_factory.mktemp("bad")
    write_corpus(root / "text")
    assert main([*arguments_of(root), "train.steps=3"]) == 0
    yield root / "run"


def arguments_of(root: Path) -> list[str]:
    arguments = ["pretrain", "--preset", "nano", "--corpus", str(root / "text"), "--data-root", str(root / "data")]
    arguments += ["--out", str(root / "run"), "train.schedule.warmup_steps=2", "telemetry.wandb=false"]
    return [*arguments, "telemetry.tensorboard=false"]


def files_of(folder: Path) -> dict[Path, bytes]:
    """Every file below a folder with its bytes."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_another_configuration_in_the_same_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_of(run)
    refused(
        capsys,
        [*arguments_of(run.parent), "train.steps=3", "train.optimizer.lr=1e-3"],
        6,
        "train.optimizer.lr 0.003 -> 0.001",
        "--out",
    )
    assert files_of(run) == before and manifests.latest_step(run / "checkpoints") == 3


def test_a_mistake_before_training_does_not_claim_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing corpus, then another configuration in the same folder: there is nothing to protect yet."""
    write_corpus(tmp_path / "text")
    wrong = arguments_of(tmp_path)
    wrong[wrong.index("--corpus") + 1] = str(tmp_path / "missing")
    refused(capsys, wrong, 3, "missing")
    assert main([*arguments_of(tmp_path), "train.optimizer.lr=1e-3", "--prepare-only"]) == 0


@pytest.mark.slow
def test_another_corpus_in_the_same_folder(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.txt").write_text("some other words, quite a few of them\n" * 2000)
    (tmp_path / "more.txt").write_text("and another document of other words\n" * 2000)
    arguments = [*arguments_of(run.parent), "train.steps=3"]
    arguments[arguments.index("--corpus") + 1] = str(tmp_path)
    before = files_of(run)
    refused(capsys, arguments, 6, "--corpus", "--out")
    assert files_of(run) == before, "the run of the first corpus is whole"


@pytest.mark.slow
def test_second_run_on_a_folder_in_use(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_of(run)
    with open(run / ".lock", "r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused(capsys, [*arguments_of(run.parent), "train.steps=3"], 6, str(run), "in use", "--out")
    assert files_of(run) == before, "the run that holds the folder is not disturbed"


@pytest.mark.slow
def test_checkpoint_of_another_configuration(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Even where the folder's configuration was replaced, the checkpoint itself knows."""
    other = [*arguments_of(run.parent), "train.steps=5", "train.seed=99"]
    other[other.index("--out") + 1] = str(tmp_path / "other")
    assert main([*other, "--prepare-only"]) == 0
    (tmp_path / "other" / "checkpoints").symlink_to(run / "checkpoints")
    assert main(other) == 4
    message = capfd.readouterr().err
    assert "fixed_hash" in message and "--out" in message and "Traceback" not in message


@pytest.mark.slow
def test_never_read_key(tmp_path: Path, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [*arguments_of(run.parent), "train.steps=3", "relation.global.fanout=8"]
    arguments[arguments.index("--out") + 1] = str(tmp_path / "unread")
    assert main(arguments) == 2
    message = capfd.readouterr().err
    assert "relation.global.fanout" in message and "Traceback" not in message


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs a small file system of its own")
def test_full_disk(tmp_path: Path, run: Path) -> None:
    """A real one: a file system of 3 MiB. The first checkpoint does not fit; the run says so and keeps what it had."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mount is not allowed here")
    try:
        arguments = [*arguments_of(run.parent), "train.steps=3"]
        arguments[arguments.index("--out") + 1] = str(small / "run")
        command = [sys.executable, "-W", "ignore", "-m", "refractor_megatron.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 6, done.stderr
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ") and "free" in last and "--out" in last
        assert "Traceback" not in done.stderr
        assert not manifests.complete(small / "run" / "checkpoints")
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.slow
def test_odd_but_legal_text_is_taken(tmp_path: Path) -> None:
    """Invalid UTF-8, an empty document and one line of 50 MB: counted, kept byte for byte or cut, never fatal."""
    text = tmp_path / "text"
    text.mkdir()
    (text / "bytes.txt").write_bytes(bytes(range(256)) * 40)
    (text / "none.txt").write_bytes(b"")
    (text / "line.txt").write_bytes(b"all work and no play makes a long line " * 1_300_000)
    write_corpus(text)
    arguments = ["pretrain", "--preset", "nano", "--corpus", str(text), "--data-root", str(tmp_path / "data")]
    options = ["data.max_mb=60", "data.max_bad_fraction=0.01", "--prepare-only"]
    assert main([*arguments, "--out", str(tmp_path / "run"), *options]) == 0
    folder = Path(json.loads((tmp_path / "run" / "data.json").read_text())["folder"])
    counts = json.loads((folder / "manifest.json").read_text())
    assert sum(split["bytes"] for split in counts["splits"].values()) > 50_000_000
