"""``refractor doctor``: table, JSON, exit code."""

from __future__ import annotations

import json

import pytest

from refractor_megatron.compat import doctor as module
from refractor_megatron.compat.versions import Capability

HERE = Capability("torch", True, "2.13.0", required=True)
OPTIONAL = Capability("triton", False, "", False, "compiled kernels", "pip install triton")
REQUIRED = Capability("megatron-core", False, "0.19.2, outside >=0.16.1,<0.17", True, "training", "pip install it")


def fake(monkeypatch: pytest.MonkeyPatch, *capabilities: Capability) -> None:
    monkeypatch.setattr(module, "probe_all", lambda: list(capabilities))


def test_missing_optional_part_is_shown_and_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch, HERE, OPTIONAL)
    assert module.doctor() == 0
    out, err = capsys.readouterr()
    assert "disables: compiled kernels" in out and "enable:   pip install triton" in out
    assert err == ""


def test_missing_required_part_fails_with_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch, HERE, REQUIRED)
    assert module.doctor() == 1
    out, err = capsys.readouterr()
    assert "MISSING" in out
    assert err == (
        "error: megatron-core is missing (0.19.2, outside >=0.16.1,<0.17), which disables training: pip install it.\n"
    )


def test_json_holds_every_field(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fake(monkeypatch, HERE, REQUIRED)
    assert module.doctor(as_json=True) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is False
    assert answer["capabilities"][0]["name"] == "torch"
    assert answer["capabilities"][1]["remedy"] == "pip install it"


def test_columns_line_up() -> None:
    lines = [line for line in module.table([HERE, OPTIONAL, REQUIRED]) if "disables" not in line]
    starts = {line.index(text) for line in lines for text in ("2.13.0", "not installed", "0.19.2") if text in line}
    assert len(starts) == 1


def test_this_environment_is_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    assert module.doctor() == 0
    assert "megatron-core" in capsys.readouterr().out
