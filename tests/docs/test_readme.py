"""The README's commands exist, their flags parse, and the tables of codes and presets are the code's."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from refractor_megatron import cli, errors
from refractor_megatron.resilience.signals import EXIT_STOPPED
from tests.corpus import ROOT

README = (ROOT / "README.md").read_text()


def help_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 0
    return capsys.readouterr().out


def test_readme_fits_on_a_screen_or_little_more() -> None:
    assert len(README.splitlines()) <= 86


def test_scripts_that_the_readme_names_exist() -> None:
    scripts = set(re.findall(r"(?:bash|sbatch) ([\w/]+\.sh)", README))
    assert {"launch/pretrain_local.sh", "launch/pretrain_64k.sh", "tests/run.sh"} <= scripts
    assert not [script for script in scripts if not (ROOT / script).is_file()]


def test_flags_that_the_readme_names_are_in_the_help() -> None:
    text = subprocess.run(
        ["bash", "launch/pretrain_local.sh", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    flags = set(re.findall(r"(?<![\w-])--[a-z]+", re.sub(r"^refractor .*$", "", README, flags=re.M))) - {"--help"}
    assert flags and not [flag for flag in flags if flag not in text]


def test_sessions_of_the_readme_are_commands_that_parse(capsys: pytest.CaptureFixture[str]) -> None:
    lines = re.findall(r"^refractor ([^#\n]+)", README, flags=re.M)
    assert lines
    for words in map(str.split, lines):
        text = help_of([*words[:2], "--help"], capsys)
        assert not [word for word in words if word.startswith("--") and word not in text], words
        files = [word for word in words[2:] if "/" in word and Path(word).suffix]  # folders are the reader's own
        assert not [file for file in files if not (ROOT / file).is_file()]


def test_commands_that_the_readme_names_are_those_of_the_command_line() -> None:
    named = re.search(r"`refractor ([a-z |]+)`", README)
    assert named
    assert {word.strip() for word in named[1].split("|")} == set(cli.COMMANDS)


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"refractor {command}" in help_of([command, "--help"], capsys)


def test_launcher_flags_are_flags_of_pretrain(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(["pretrain", "--help"], capsys)
    for flag in ("--preset", "--steps", "--corpus", "--ranks", "--out", "--prepare-only"):
        assert flag in text


def test_presets_that_the_readme_names_are_those_that_ship() -> None:
    line = next(line for line in README.splitlines() if "presets `" in line)
    shipped = {path.stem for path in (ROOT / "hydra_conf" / "experiment").glob("*.yaml")}
    assert set(re.findall(r"`([a-z0-9_]+)`", line)) == shipped


def test_exit_codes_are_those_of_the_error_classes() -> None:
    table = (ROOT / "specification" / "exit_codes.md").read_text()
    rows = dict(re.findall(r"^\| (\d+) \|.*\| `?(\w*)`? ?\|$", table, flags=re.MULTILINE))
    classes = {
        str(value.exit_code): name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.RefractorError)
    }
    assert {code: name for code, name in rows.items() if name} == classes
    assert str(EXIT_STOPPED) in rows


def test_test_command_is_what_continuous_integration_calls() -> None:
    assert "bash tests/run.sh" in README
    assert "bash tests/run.sh" in (ROOT / ".ci" / "run").read_text()


def published_table() -> dict[str, tuple[object, bool]]:
    """Section 12 of the specification: key -> (default, whether it is marked as read by nothing yet)."""
    text = (ROOT / "specification" / "REFRACTOR_SPEC.md").read_text()
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", text[text.index("## 12.") :], flags=re.MULTILINE)
    found: dict[str, tuple[object, bool]] = {}
    for cell, default in [pair for row in rows for pair in (row[:2], row[2:])]:
        first, *others = cell.removesuffix(" *").split(" / ")
        parent = first.rpartition(".")[0]
        # "a.b.c / d" names a.b.c and a.b.d; "a.b / c.d" names a.b and a.c.d
        for key, value in zip([first, *(f"{parent}.{other}" for other in others)], default.split(" / "), strict=True):
            found[key] = (yaml.safe_load(value), cell.endswith(" *"))
    return {key: entry for key, entry in found.items() if "." in key}


def test_defaults_in_the_specification_are_those_of_the_reference_preset() -> None:
    from refractor_megatron.config import compose
    from refractor_megatron.config.schema import schema

    table = published_table()
    assert len(table) >= 45
    values = compose(["experiment=reference"]).values()
    assert table.pop("safety.masks")[0] == "list of rules"
    for key, (default, reserved) in table.items():
        assert values[key] == (float(default) if isinstance(values[key], float) else default), key  # type: ignore[arg-type]
        assert schema()[key].reserved is reserved, key
    unmarked = {key for key, leaf in schema().items() if leaf.reserved} - set(table)
    assert not unmarked, unmarked
