"""``refractor config show | explain | diff``."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from refractor_megatron.config import RunConfig, command, compose
from refractor_megatron.config.diff import diff
from refractor_megatron.config.explain import explain
from refractor_megatron.config.schema import schema
from refractor_megatron.errors import ConfigError


def run(*arguments: str) -> int:
    """Parse and run one command line."""
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["config", *arguments])
    code: int = args.run(args)
    return code


def test_every_key_is_explained() -> None:
    for key, leaf in schema().items():
        text = explain(key)
        assert text.startswith(f"{key}\n  {leaf.meaning}\n"), key
        assert not leaf.meaning.endswith(".") and len(leaf.meaning) > 10, key
        for part in ("type", "default", "presets", "defined in", "on resume", "read by"):
            assert re.search(rf"^  {part} +\S", text, re.M), (key, part)
        assert ("(reserved)" in text) == leaf.reserved


def test_explaining_a_key_says_all_that_is_known() -> None:
    assert explain("model.d_model").splitlines() == [
        "model.d_model",
        "  Width of the residual stream",
        "  type        an integer, >= 1, in features",
        "  default     4096",
        "  presets     64 in nano; 192 in pilot; 768 in small",
        "  section 16  1024 to 8192, an error unless limits=warn",
        "  defined in  section 12.1",
        "  on resume   must stay the same: a checkpoint belongs to this value",
        "  read by     refractor_megatron.transformation.layer_plan",
    ]


def test_explaining_a_section_lists_its_keys_and_choices() -> None:
    text = explain("router")
    assert "router=CHOICE: band, literal" in text and "router.lb.lambda_kl" in text
    assert "train.schedule.tail.power" in explain("train.schedule")
    assert "experiment=CHOICE: 8b, nano" in explain("experiment")


def test_explaining_a_misspelled_key() -> None:
    with pytest.raises(ConfigError, match="config explain: unknown key model.dmodel; did you mean model.d_model"):
        explain("model.dmodel")


def test_the_named_readers_really_read_their_keys(repo_root: Path) -> None:
    """A key whose reader is gone is a setting without effect: name the new reader in the schema, or drop the key."""
    for key, leaf in schema().items():
        assert leaf.reserved == (leaf.readers == ())
        for module in () if leaf.only_checked else leaf.readers:
            source = (repo_root / "refractor_megatron" / (module.replace(".", "/") + ".py")).read_text()
            assert re.search(rf"\.{leaf.attribute}\b", source), f"{module} does not read {key}"


def test_diff_is_an_aligned_table() -> None:
    lines = diff("nano", "pilot").splitlines()
    column = lines[0].index("pilot")
    assert lines[0].startswith("key ") and all(line[column - 1] == " " for line in lines[1:-1])
    assert [line for line in lines if line.startswith("train.steps ")][0].split() == [
        "train.steps",
        "50",
        "480",
        "free",
    ]
    assert not [line for line in lines if line.startswith("model.norm.eps")]
    assert lines[-1] == "Fixed keys differ: a checkpoint of one cannot be resumed with the other."


def test_diff_takes_run_folders_and_files(tmp_path: Path) -> None:
    cfg = compose(["experiment=nano", "telemetry.every=5"])
    cfg.save(tmp_path / "run" / "config.yaml")
    table = diff("nano", str(tmp_path / "run"))
    assert "telemetry.every" in table and "Only free keys differ" in table
    mine = tmp_path / "mine.yaml"
    mine.write_text("safety: {masks: [{name: tool_scope, when: {role: tool}}]}\n")
    assert re.search(r"safety.masks +tool_scope, safety_restricted \(#\w{6}\) +tool_scope \(#\w{6}\) +fixed",
                     diff("reference", str(mine)))  # fmt: skip
    assert diff("nano", str(tmp_path / "run" / "config.yaml")).count("telemetry.every") == 1
    assert (
        diff("pilot", "pilot") == f"pilot and pilot are the same configuration ({compose(['experiment=pilot']).hash})."
    )


def test_diff_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nan: neither a preset .* nor a YAML file; did you mean nano"):
        diff("nan", "pilot")
    with pytest.raises(ConfigError, match="config.yaml: there is no such file"):
        diff("nano", str(tmp_path))


def test_show_prints_what_load_reads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("show", "--preset", "nano", "train.seed=9") == 0
    printed = capsys.readouterr()
    (tmp_path / "config.yaml").write_text(printed.out)
    assert RunConfig.load(tmp_path / "config.yaml").hash == compose(["experiment=nano", "train.seed=9"]).hash
    assert printed.err.startswith("warning: outside the ranges of section 16: model.d_model=64")


def test_show_prints_the_configuration_before_it_complains(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="n_heads=5"):
        run("show", "model.n_heads=5")
    assert "n_heads: 5" in capsys.readouterr().out


def test_show_lays_a_file_over_the_preset(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("train: {seed: 77}\n")
    assert run("show", "--preset", "nano", "--file", str(tmp_path / "mine.yaml")) == 0
    assert "seed: 77" in capsys.readouterr().out


def test_explain_and_diff_print(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("explain", "train.steps") == 0 and run("diff", "nano", "pilot") == 0
    printed = capsys.readouterr().out
    assert "Optimizer steps of the run" in printed and "(hash)" in printed
