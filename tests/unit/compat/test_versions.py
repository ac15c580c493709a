"""The capability probe: right answers for present, absent, out-of-range and broken packages."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from refractor_megatron.compat import versions
from tests.runs import loaded_after


def test_version_key_ignores_local_and_pre_release_parts() -> None:
    assert versions.version_key("2.13.0+cpu") == (2, 13, 0)
    assert versions.version_key("0.17.0rc1") == (0, 17, 0)
    assert versions.version_key("unknown") == ()


@pytest.mark.parametrize(
    ("version", "inside"),
    [("0.16.0", False), ("0.16.1", True), ("0.16.9", True), ("0.17.0", False), ("0.9", False), ("1.0", False)],
)
def test_megatron_range(version: str, inside: bool) -> None:
    assert versions.in_range(version, versions.MEGATRON_RANGE) is inside


def test_range_compares_numbers_not_text() -> None:
    assert versions.in_range("2.13.0", ("2.6", None))


def test_out_of_range_package_is_missing_and_names_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed_version", lambda name: "0.19.2")
    answer = versions.probe_megatron()
    assert not answer.present and answer.required
    assert "0.19.2" in answer.found and ">=0.16.1,<0.17" in answer.found
    assert "megatron-core>=0.16.1,<0.17" in answer.remedy


def test_broken_transformer_engine_is_reported_not_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('no CUDA library\\nsecond line')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)
    monkeypatch.setattr(versions, "installed_version", lambda name: "2.10.0")
    answer = versions.probe_transformer_engine()
    assert not answer.present and answer.required  # it takes megatron-core down with it
    assert "RuntimeError: no CUDA library" in answer.found and "second line" not in answer.found
    assert answer.remedy == "pip uninstall transformer-engine"


def test_absent_transformer_engine_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed_version", lambda name: None)
    answer = versions.probe_transformer_engine()
    assert not answer.present and not answer.required and "[te]" in answer.remedy


def test_unrelated_apex_package_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    answer = versions.probe_apex()
    assert not answer.present
    assert "without NVIDIA's kernels" in answer.found and "uninstall" in answer.remedy


def test_gloo_is_required_exactly_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda in (False, True):
        monkeypatch.setattr(versions, "probe_cuda", lambda cuda=cuda: versions.Capability("cuda", cuda, ""))
        assert versions.probe_gloo().required is not cuda
        assert versions.probe_nccl().required is cuda


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed_version", lambda name: None if name == "pyarrow" else "1")
    answer = versions.probe_libraries()
    assert not answer.present and answer.required and "pyarrow" in answer.found and "pyarrow" in answer.remedy


def test_libraries_and_ranges_are_those_of_pyproject(repo_root: Path) -> None:
    project = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]
    required = {re.match(r"[\w.-]+", line)[0]: line for line in project["dependencies"]}  # type: ignore[index]
    assert set(required) == {"torch", "megatron-core", *versions.LIBRARIES}
    assert required["megatron-core"].endswith(versions._spelled(versions.MEGATRON_RANGE))
    assert required["torch"].endswith(versions._spelled(versions.TORCH_RANGE))
    extras = project["optional-dependencies"]
    assert extras["deepspeed"][0].endswith(versions._spelled(versions.DEEPSPEED_RANGE))
    assert extras["te"][0].endswith(versions._spelled(versions.TRANSFORMER_ENGINE_RANGE))


def test_no_extra_asks_the_index_for_apex(repo_root: Path) -> None:
    project = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    assert not [line for line in lines if line.startswith("apex")]


def test_every_absent_capability_says_what_it_costs_and_how_to_get_it() -> None:
    for capability in versions.probe_all():
        if not capability.present:
            assert capability.disables and capability.remedy, capability.name


def test_importing_the_probe_is_light() -> None:
    loaded = loaded_after("import refractor_megatron.compat.doctor")
    assert "refractor_megatron" in loaded and loaded.isdisjoint({"torch", "megatron", "numpy", "hydra"})
