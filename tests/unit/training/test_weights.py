"""The launcher's half of ``--weights``: which checkpoint, which tokenizer, what is written down, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from refractor_megatron.cli import main
from refractor_megatron.tokenizer import Tokenizer
from refractor_megatron.training.weights import find_checkpoint, run_of
from tests.convert.runs import make_run, tokenizer_with
from tests.corpus import write_corpus
from tests.runs import pretrain


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus in ``text``, and in ``source`` a run of two checkpoints with a tokenizer that no corpus would give."""
    root = tmp_path_factory.mktemp("weights")
    write_corpus(root / "text")
    make_run(root / "source", step=3)
    make_run(root / "source", step=5)
    return root


def prepare(root: Path, out: Path, *more: str, code: int = 0) -> None:
    assert main(pretrain(root, out, "--prepare-only", *more)) == code


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_run_means_its_newest_checkpoint(root: Path) -> None:
    newest = root / "source" / "checkpoints" / "step_00000005"
    for path in (root / "source", root / "source" / "checkpoints", newest):
        assert find_checkpoint(path) == newest and run_of(newest).path == root / "source"
    older = newest.with_name("step_00000003")
    assert find_checkpoint(older) == older


def test_what_is_written_down(root: Path, tmp_path: Path) -> None:
    prepare(root, tmp_path / "run", "--weights", str(root / "source"))
    record = json.loads((tmp_path / "run" / "weights.json").read_text())
    assert record["step"] == 5 and record["source"] == str(root / "source")
    assert record["checkpoint"] == str(root / "source" / "checkpoints" / "step_00000005")
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert "step_00000005 (step 5" in environment["first_weights"]
    prepare(root, tmp_path / "run", "--weights", str(root / "source" / "checkpoints" / "step_00000003"))
    assert json.loads((tmp_path / "run" / "weights.json").read_text())["step"] == 3, "nothing has been trained yet"


def test_a_run_stopped_before_its_first_checkpoint_keeps_its_start(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(root / "source", tmp_path / "source")
    prepare(root, tmp_path / "run", "--weights", str(tmp_path / "source"))
    record = (tmp_path / "run" / "weights.json").read_text()
    capsys.readouterr()
    prepare(root, tmp_path / "run")
    assert "step_00000005, as --weights said before" in capsys.readouterr().err
    assert (tmp_path / "run" / "weights.json").read_text() == record
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert "step_00000005 (step 5" in environment["first_weights"]
    manifest = tmp_path / "source" / "checkpoints" / "step_00000005" / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    prepare(root, tmp_path / "run", code=4)
    assert "another now: give --weights again" in last_line(capsys)
    shutil.rmtree(tmp_path / "source")
    prepare(root, tmp_path / "run", code=4)
    assert "is gone: give --weights again" in last_line(capsys)
    assert (tmp_path / "run" / "weights.json").read_text() == record


def test_the_text_is_encoded_by_the_tokenizer_that_the_weights_know(root: Path, tmp_path: Path) -> None:
    own = Tokenizer.load(root / "source" / "tokenizer.json")
    prepare(root, tmp_path / "run", "--weights", str(root / "source"))
    data = json.loads((tmp_path / "run" / "data.json").read_text())
    dataset = Tokenizer.load(Path(data["folder"]) / "tokenizer.json")
    assert own.digest == dataset.digest == data["tokenizer"]
    assert Tokenizer.load(tmp_path / "run" / "tokenizer.json").digest == own.digest
    prepare(root, tmp_path / "plain")
    plain = json.loads((tmp_path / "plain" / "data.json").read_text())
    assert plain["tokenizer"] != own.digest and plain["folder"] != data["folder"]
    assert not (tmp_path / "plain" / "tokenizer.json").exists()


def test_the_tokenizer_comes_from_the_dataset_of_an_older_run(root: Path, tmp_path: Path) -> None:
    """A run that trained its tokenizer has it in its dataset only."""
    shutil.copytree(root / "source", tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").unlink()
    prepare(root, tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / "data.json", tmp_path / "source" / "data.json")
    prepare(root, tmp_path / "run", "--weights", str(tmp_path / "source"))
    known = json.loads((tmp_path / "run" / "weights.json").read_text())["tokenizer"]
    assert known == json.loads((tmp_path / "other" / "data.json").read_text())["tokenizer"]


def test_another_tokenizer_is_refused(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer_with(900).save(tmp_path / "other.json")
    more = ["--weights", str(root / "source"), "--tokenizer", str(tmp_path / "other.json")]
    prepare(root, tmp_path / "run", *more, code=2)
    message = last_line(capsys)
    assert message.startswith("error: ") and "leave --tokenizer out" in message and str(root / "source") in message


def test_without_a_tokenizer_it_says_what_is_not_checked(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(root / "source", tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").unlink()
    prepare(root, tmp_path / "run", "--weights", str(tmp_path / "source"))
    assert "carries no tokenizer, so it is not checked" in capsys.readouterr().err


def test_settings_that_change_what_the_weights_compute_are_named(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["model.rope.theta=2e4", "relation.local.window=64", "safety=open", "train.optimizer.lr=1e-3"]
    prepare(root, tmp_path / "run", "--weights", str(root / "source"), *more)
    note = next(line for line in capsys.readouterr().err.splitlines() if "other settings" in line)
    for needle in ("model.rope.theta 10000 -> 20000", "relation.local.window 32 -> 64", "safety.masks", "[]"):
        assert needle in note
    assert "train." not in note


def test_refusals(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases: list[tuple[list[str], int, str]] = [
        (["--weights", str(tmp_path / "nowhere")], 4, "nowhere holds no complete checkpoint"),
        (["--weights", str(root / "text")], 4, "holds no complete checkpoint"),
        (["--weights", str(root / "source"), "model.vocab_size=1000"], 2, "set model.vocab_size=1024"),
    ]
    lone = tmp_path / "lone" / "checkpoints"
    shutil.copytree(root / "source" / "checkpoints", lone)
    cases.append((["--weights", str(lone)], 4, "config.yaml is missing"))
    for more, code, needle in cases:
        prepare(root, tmp_path / "run", *more, code=code)
        message = last_line(capsys)
        assert message.startswith("error: ") and needle in message
    (tmp_path / "run" / "weights.json").write_text("{")
    prepare(root, tmp_path / "run", code=6)
    assert "weights.json is damaged" in last_line(capsys)


def test_a_tokenizer_for_a_dataset(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``data build --tokenizer`` encodes by it, finds the dataset again, and does not take more ids than the model."""
    tokenizer_with(900).save(tmp_path / "mine.json")
    command = ["data", "build", "--preset", "nano", "--corpus", str(root / "text"), "--data-root", str(root / "data")]
    command += ["--tokenizer", str(tmp_path / "mine.json")]
    assert main(command) == 0
    folder = Path(capsys.readouterr().out.strip().splitlines()[-1])
    assert Tokenizer.load(folder / "tokenizer.json").digest == tokenizer_with(900).digest
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["parameters"]["tokenizer"] == tokenizer_with(900).digest == manifest["tokenizer"]["sha256"]
    assert main(command) == 0 and str(folder) in capsys.readouterr().out
    assert main([*command, "model.vocab_size=800"]) == 2
    assert "set model.vocab_size=900" in last_line(capsys)


def test_a_saved_configuration_brings_its_preset(root: Path, tmp_path: Path) -> None:
    """Otherwise the keys in which that preset differs from the pilot would count as set by hand, and unread."""
    config = ["--config", str(root / "source" / "config.yaml"), "--weights", str(root / "source")]
    command = ["pretrain", *config, "--corpus", str(root / "text"), "--data-root", str(root / "data")]
    assert main([*command, "--out", str(tmp_path / "run"), "--prepare-only"]) == 0
    header = (tmp_path / "run" / "config.yaml").read_text()
    assert "preset: nano" in header


def test_other_shapes_are_all_named_before_data_is_built(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As overrides that can be pasted; with them the run is prepared."""
    wrong = ["model.n_layers=3", "model.d_model=32", "model.rope.dim=32", "model.ffn.hidden=64"]
    prepare(root, tmp_path / "run", "--weights", str(root / "source"), *wrong, code=2)
    message = last_line(capsys)
    right = "model.d_model=64 model.n_layers=2 model.ffn.hidden=128 model.rope.dim=64"
    assert f"add {right} to the command" in message and not (tmp_path / "run" / "data.json").exists()
    prepare(root, tmp_path / "run", "--weights", str(root / "source"), *wrong, *right.split())
