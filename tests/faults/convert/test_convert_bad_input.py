"""Damaged, foreign or contradictory input to ``refractor convert``: one sentence, an exit code, nothing published."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from refractor_megatron.checkpoint import manifest as manifests
from refractor_megatron.checkpoint.convert import checksums, hf_manifest, to_hf
from refractor_megatron.checkpoint.convert.megatron_folder import find_step
from refractor_megatron.checkpoint.convert.megatron_metadata import read_index
from refractor_megatron.cli import main
from refractor_megatron.tokenizer.hf_files import write_hf_tokenizer
from tests.convert.mutate import mutate_megatron
from tests.convert.runs import make_run, tokenizer_with

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``run``, as an older version wrote it, without CRCs; ``back``, the same by way of ``served``, with them."""
    root = tmp_path_factory.mktemp("bad")
    make_run(root / "run")
    without_checksums(find_step(root / "run"))
    served = ["convert", str(root / "run"), "--to", "hf", "--out", str(root / "served"), "--no-logits"]
    assert main([*served, "--shard-size", "500kB"]) == 0
    assert main(["convert", str(root / "served"), "--to", "megatron", "--out", str(root / "back"), "--no-logits"]) == 0
    return root


def without_checksums(step: Path) -> None:
    (step / checksums.FILE).unlink()
    manifest = manifests.read(step)
    del manifest.files[checksums.FILE]
    manifests.write(step, manifest)


def refused(
    capsys: pytest.CaptureFixture[str], where: Path, arguments: list[str], code: int, needles: tuple[str, ...]
) -> None:
    """The command fails as it should, and ``where`` holds what it held before."""
    before = sorted(where.rglob("*"))
    capsys.readouterr()
    assert main(["convert", *arguments]) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and "Traceback" not in "".join(lines)
    for needle in needles:
        assert needle in lines[-1], lines[-1]
    assert sorted(where.rglob("*")) == before, "nothing is published, nothing is left behind"


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def data_file(run: Path) -> Path:
    """The largest data file of a run's checkpoint."""
    return max(find_step(run).glob("*.distcp"), key=lambda path: path.stat().st_size)


def within(run: Path, key: str) -> tuple[Path, int]:
    """A file and a place in the middle of a tensor's bytes."""
    step = find_step(run)
    chunk = read_index(step).tensors[key].chunks[0]
    return step / chunk.file, chunk.start + chunk.length // 2


def malicious(run: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, ("touch /tmp/refractor-was-here",)

    (find_step(run) / ".metadata").write_bytes(pickle.dumps(Evil()))


def extra_state(run: Path) -> None:
    """Content in an object that must have none: [True] in place of [None]."""
    step = find_step(run)
    chunk = next(iter(read_index(step).objects.values()))
    content = bytearray((step / chunk.file).read_bytes())
    part = slice(chunk.start, chunk.start + chunk.length)
    content[part] = content[part].replace(b"]q\x00Na.", b"]q\x00\x88a.")
    (step / chunk.file).write_bytes(bytes(content))


def longer(path: Path) -> None:
    path.write_text(path.read_text() + " ")


def other_configuration(run: Path) -> None:
    from tests.engine import tiny

    tiny("train.ema.enabled=true", "model.d_model=128", "model.rope.dim=128").save(run / "config.yaml")


def other_dataset(run: Path) -> None:
    tokenizer_with(900).save(run / "checkpoints" / "tokenizer.json")  # any folder will do
    (run / "data.json").write_text(json.dumps({"folder": str(run / "checkpoints")}))


def smaller_tokenizer(folder: Path) -> None:
    """All files about text are those of a smaller tokenizer; the configuration stays."""
    write_hf_tokenizer(tokenizer_with(900), stranger(folder), 128)


QKV = "decoder.layers.1.self_attention.linear_qkv.weight"
RUNS: dict[str, tuple[str, Damage, int, tuple[str, ...]]] = {
    "bit flipped": ("run", lambda run: flip(*within(run, QKV)), 4, (QKV, ".distcp", "sha256")),
    "bit flipped, with CRCs": ("back", lambda run: flip(*within(run, QKV)), 4, (QKV, "CRC-32")),
    "truncated": ("run", lambda run: shorten(data_file(run)), 4, (".distcp", "truncated", "tensor")),
    "truncated, with CRCs": ("back", lambda run: shorten(data_file(run)), 4, ("tensor", "__1_0.distcp")),
    "data file missing": ("run", lambda run: data_file(run).unlink(), 4, (".distcp", "missing")),
    "index missing": ("run", lambda run: (find_step(run) / ".metadata").unlink(), 4, (".metadata", "missing")),
    "index truncated": ("run", lambda run: shorten(find_step(run) / ".metadata"), 4, (".metadata", "damaged")),
    "index that runs code": ("run", malicious, 4, ("system", "do not trust")),
    "extra state": ("back", extra_state, 4, ("_extra_state", "refused")),
    "no checkpoint": (
        "run",
        lambda run: shutil.rmtree(run / "checkpoints"),
        4,
        ("no run folder", "refractor ckpt list"),
    ),
    "no configuration": ("run", lambda run: (run / "config.yaml").unlink(), 4, ("config.yaml", "missing")),
    "another configuration": ("run", other_configuration, 4, ("fixed_hash", "disagree")),
    "no tokenizer": ("run", lambda run: (run / "tokenizer.json").unlink(), 3, ("tokenizer.json", "data.json")),
    "larger tokenizer": ("run", lambda run: tokenizer_with(1030).save(run / "tokenizer.json"), 2, ("1030", "1024")),
    "tokenizer of another dataset": ("run", other_dataset, 3, ("tokenizer.json", "1024", "900", "restore")),
    "data.json cut off": ("run", lambda run: (run / "data.json").write_text("{"), 3, ("data.json", "damaged")),
    "data.json of a list": ("run", lambda run: (run / "data.json").write_text("[1]"), 3, ("data.json", "damaged")),
    "data.json without folder": ("run", lambda run: (run / "data.json").write_text("{}"), 3, ("data.json", "folder")),
    "CRCs altered": ("back", lambda run: longer(find_step(run) / checksums.FILE), 4, (checksums.FILE, "manifest")),
    "manifest cut off": ("run", lambda run: shorten(find_step(run) / manifests.MANIFEST), 4, ("manifest.json",)),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    source, damage, code, needles = RUNS[name]
    shutil.copytree(root / source, tmp_path / "run")
    damage(tmp_path / "run")
    arguments = [str(tmp_path / "run"), "--to", "hf", "--out", str(tmp_path / "out" / "deep"), "--no-logits"]
    refused(capsys, tmp_path, arguments, code, needles)
    assert not Path("/tmp/refractor-was-here").exists()


def test_what_another_family_does_not_take_is_checked_too(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Averages, optimizer state and objects of a run stay behind, each for a reason that the ledger gives."""
    arguments = [str(root / "run"), "--to", "mixtral", "--drop-tiers", "--no-logits", "--ledger"]
    assert main(["convert", *arguments, "--out", str(tmp_path / "whole")]) == 0
    printed = capsys.readouterr().out
    for reason, name in {
        "optimizer state": "optimizer.state.",
        "weights not asked for": "ema.",
        "no content": "decoder.",
    }.items():
        assert re.search(rf"left behind, {reason}: \d+ \({name}", printed), printed
    shutil.copytree(root / "back", tmp_path / "back")
    extra_state(tmp_path / "back")
    arguments[0] = str(tmp_path / "back")
    refused(capsys, tmp_path, [*arguments, "--out", str(tmp_path / "out")], 4, ("_extra_state", "refused"))


def test_an_exchanged_tensor_without_crcs_is_refused_by_file(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint of an older version has no ``tensors.json``: hashes of files are all there is."""
    import random

    shutil.copytree(root / "run", tmp_path / "run")
    mutate_megatron(find_step(tmp_path / "run"), "swap", random.Random(0))
    arguments = [str(tmp_path / "run"), "--to", "hf", "--out", str(tmp_path / "out"), "--no-logits"]
    refused(capsys, tmp_path, arguments, 4, (".metadata",))


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def as_pickle(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save({"lm_head.weight": torch.zeros(1)}, folder / "pytorch_model.bin")


def stranger(folder: Path) -> Path:
    """Make it a folder that our exporter has not written."""
    (folder / "refractor_manifest.json").unlink()
    return folder


def rewrite(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change one tensor and keep everything else in step, without a manifest."""
    file = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = safetensors.torch.load_file(folder / file)
    before = tensors[name].nbytes
    tensors[name] = change(tensors[name])
    safetensors.torch.save_file(tensors, folder / file)

    def add(index: dict[str, Any]) -> None:
        index["metadata"]["total_size"] += tensors[name].nbytes - before

    edit_index(stranger(folder), add)


def without_rules(folder: Path) -> None:
    """The old hash stays, and nothing else remembers the rules."""
    (stranger(folder) / "refractor_run.yaml").unlink()
    edit(folder, mask_rules=[])


def manifest(folder: Path, **changes: Any) -> None:
    path = folder / "refractor_manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def unlisted(folder: Path, name: str) -> None:
    """The file goes from the folder and from the manifest."""
    path = folder / "refractor_manifest.json"
    content = json.loads(path.read_text())
    del content["files"][name]
    path.write_text(json.dumps(content))
    (folder / name).unlink(missing_ok=True)


def own_rules(folder: Path) -> None:
    """Other rules, with hashes of the file and none of the rules: only the manifest remembers them."""
    edit(folder, mask_rules=[], rules_hash=None)
    path = folder / "refractor_manifest.json"
    files = json.loads(path.read_text())["files"]
    manifest(folder, files={**files, "config.json": manifests.file_record(folder / "config.json")})


def not_finite(tensor: torch.Tensor) -> torch.Tensor:
    tensor[0, 0] = float("nan")
    return tensor


OUTPUT = "model.layers.1.self_attn.o_proj.weight"
FIRST = "model-00001-of-00003.safetensors"
SERVED: dict[str, tuple[Damage, int, tuple[str, ...]]] = {
    "bit flipped": (lambda f: flip(f / FIRST, 90_000), 4, ("tensor model.embed_tokens.weight", "sha256")),
    "truncated": (lambda f: shorten(f / FIRST), 4, (FIRST, "truncated", "tensor")),
    "empty shard": (lambda f: (f / FIRST).write_bytes(b""), 4, (FIRST, "truncated")),
    "header damaged": (lambda f: flip(f / FIRST, 9), 4, (FIRST, "header")),
    "shard missing": (lambda f: (f / FIRST).unlink(), 4, (FIRST, "missing", "model.embed_tokens.weight")),
    "index missing": (lambda f: (f / "model.safetensors.index.json").unlink(), 4, ("index.json", "missing")),
    "index cut off": (lambda f: shorten(f / "model.safetensors.index.json"), 4, ("index.json", "damaged")),
    "index names a missing file": (
        lambda f: edit_index(f, lambda i: i["weight_map"].update({OUTPUT: "model-9.safetensors"})),
        4,
        ("model-9", OUTPUT),
    ),
    "index leaves the folder": (
        lambda f: edit_index(f, lambda i: i["weight_map"].update({OUTPUT: "../x.safetensors"})), 4, ("../x", "trust"),
    ),
    "index forgets a tensor": (lambda f: edit_index(f, lambda i: i["weight_map"].pop(OUTPUT)), 4, (OUTPUT, "not in")),
    "index has another size": (
        lambda f: edit_index(stranger(f), lambda i: i["metadata"].update(total_size=5)), 4, ("total_size", "5"),
    ),
    "pickle": (as_pickle, 4, ("pytorch_model.bin", "pickle", "safetensors")),
    "nothing": (lambda f: [p.unlink() for p in f.glob("*.safetensors*")], 4, ("no safetensors", "half")),
    "no configuration": (lambda f: (f / "config.json").unlink(), 4, ("config.json", "missing")),
    "configuration of another kind": (lambda f: edit(f, model_type="bert"), 4, ("bert",)),
    "more layers than weights": (lambda f: edit(f, num_hidden_layers=3), 4, ("model.layers.2.", "missing")),
    "fewer layers than weights": (lambda f: edit(f, num_hidden_layers=1), 4, ("model.layers.1.", "no place")),
    "another width": (lambda f: edit(f, hidden_size=32), 4, ("model.embed_tokens.weight", "[1024, 32]")),
    "no such activation": (lambda f: edit(f, hidden_act="relu"), 4, ("config.json", "relu")),
    "width of a wrong kind": (lambda f: edit(f, num_hidden_layers="two"), 4, ("config.json",)),
    "other norms than the run": (
        lambda f: edit(stranger(f), rms_norm_eps=1e-3), 4, ("rms_norm_eps", "refractor_run.yaml"),
    ),
    "other rules than their hash": (without_rules, 4, ("config.json", "who may read whom", "rules_hash")),
    "rules that are none": (
        lambda f: edit(stranger(f), mask_rules=[{"name": "x"}]), 4, ("config.json", "rule 'x' field when"),
    ),
    "manifest of other rules": (lambda f: manifest(f, rules_hash="1234"), 4, ("who may read whom", "manifest")),
    "manifest of another router": (
        lambda f: manifest(f, versions={"router": 9, "retrieval_index": 1}), 4, ("version 9 of the router", "runs 1"),
    ),
    "unknown dtype": (lambda f: rewrite(f, OUTPUT, lambda t: t.double()), 4, (OUTPUT, "F64")),
    "two dtypes in one tensor": (
        lambda f: rewrite(f, OUTPUT.replace("o_proj", "k_proj"), lambda t: t.bfloat16()), 4, ("k_proj", "bfloat16"),
    ),
    "zero throughout": (lambda f: rewrite(f, OUTPUT, torch.zeros_like), 4, (OUTPUT, "zero throughout")),
    "not finite": (lambda f: rewrite(f, OUTPUT, not_finite), 4, (OUTPUT, "not finite")),
    "another tokenizer": (
        lambda f: tokenizer_with(900).save(stranger(f) / "refractor_tokenizer.json"), 3, ("tokenizer.json", "differ"),
    ),
    "smaller tokenizer": (smaller_tokenizer, 4, ("refractor_tokenizer.json", "900", "1024")),
    "no tokenizer": (lambda f: (f / "refractor_tokenizer.json").unlink(), 3, ("refractor_tokenizer.json",)),
    "vocabulary of another size": (lambda f: edit(f, vocab_size=1025), 4, ("1025", "model.embed_tokens.weight")),
    "manifest cut off": (lambda f: shorten(f / "refractor_manifest.json"), 4, ("refractor_manifest.json", "damaged")),
    "not there": (shutil.rmtree, 4, ("no folder",)),
}  # fmt: skip


@pytest.mark.parametrize("name", SERVED)
def test_a_model_folder(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    damage, code, needles = SERVED[name]
    shutil.copytree(root / "served", tmp_path / "served")
    damage(tmp_path / "served")
    arguments = [str(tmp_path / "served"), "--to", "megatron", "--out", str(tmp_path / "out" / "run"), "--no-logits"]
    refused(capsys, tmp_path, arguments, code, needles)


VERIFIED: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "code altered": (lambda f: flip(f / "modeling_refractor.py", 50), ("modeling_refractor.py", "altered")),
    "template missing": (lambda f: (f / "chat_template.jinja").unlink(), ("chat_template.jinja", "missing")),
    "header rewritten": (
        lambda f: safetensors.torch.save_file(safetensors.torch.load_file(f / FIRST), f / FIRST, {"a": "b"}), (FIRST,),
    ),
    "no manifest": (stranger, ("refractor_manifest.json", "missing")),
    "other rules": (own_rules, ("who may read whom", "refractor_manifest.json")),
    "another router": (lambda f: manifest(f, versions={"router": 9}), ("version 9 of the router",)),
    "no index version": (lambda f: manifest(f, versions={"router": 1}), ("version None of the retrieval_index",)),
    "newer codec": (
        lambda f: manifest(f, versions={**hf_manifest.versions(), "codec_norm": 99}), ("version 99 of the codec_norm",),
    ),
    "unknown part": (
        lambda f: manifest(f, versions={**hf_manifest.versions(), "drive": 1}), ("version 1 of the drive", "none"),
    ),
    "module beside": (lambda f: (f / "evil.py").write_text("1"), ("evil.py", "not in the manifest")),
    "pickle beside": (lambda f: (f / "pytorch_model.bin").write_text("1"), ("pytorch_model.bin", "not in the")),
    "adapter beside": (lambda f: (f / "adapter_config.json").write_text("{}"), ("adapter_config.json", "not in the")),
    "folder beside": (lambda f: (f / "utils").mkdir(), ("utils", "not in the manifest")),
    "no files listed": (lambda f: manifest(f, files={}), ("does not list", "config.json")),
    "code not listed": (lambda f: unlisted(f, "modeling_refractor.py"), ("modeling_refractor.py",)),
    "import not listed": (lambda f: unlisted(f, "masking_refractor.py"), ("masking_refractor.py",)),
}  # fmt: skip


@pytest.mark.parametrize("name", VERIFIED)
def test_verify(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    damage, needles = VERIFIED[name]
    shutil.copytree(root / "served", tmp_path / "served")
    (tmp_path / "served" / ".gitattributes").write_text("hidden files are nobody's business")
    assert main(["convert", "verify", str(tmp_path / "served")]) == 0
    damage(tmp_path / "served")
    refused(capsys, tmp_path, ["verify", str(tmp_path / "served")], 4, needles)


def full(target: Path) -> None:
    target.mkdir()
    (target / "notes.txt").write_text("mine")


@pytest.mark.parametrize("to", ["hf", "megatron"])
@pytest.mark.parametrize("target", [full, lambda target: target.write_text("a file")])
def test_target_is_not_empty(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str, target: Damage
) -> None:
    target(tmp_path / "out")
    source = root / ("run" if to == "hf" else "served")
    arguments = [str(source), "--to", to, "--out", str(tmp_path / "out"), "--no-logits"]
    refused(capsys, tmp_path, arguments, 6, ("out is not empty", "--out"))


def test_what_a_killed_conversion_left_is_swept(root: Path, tmp_path: Path) -> None:
    hidden = tmp_path / ".out.tmp"
    (hidden / "sub").mkdir(parents=True)
    (hidden / "model-00001-of-00009.safetensors").write_bytes(b"half")
    (tmp_path / "out").mkdir()  # an empty folder may be there
    assert main(["convert", str(root / "run"), "--to", "hf", "--out", str(tmp_path / "out"), "--no-logits"]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out/sub").exists() and not (tmp_path / "out/.lock").exists()
    assert main(["convert", "verify", str(tmp_path / "out")]) == 0


def test_two_conversions_to_one_place(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fcntl

    hidden = tmp_path / ".out.tmp"
    hidden.mkdir()
    with open(hidden / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        arguments = [str(root / "run"), "--to", "hf", "--out", str(tmp_path / "out"), "--no-logits"]
        refused(capsys, tmp_path, arguments, 6, ("in use", "--out"))


def test_interrupted(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(to_hf._Export, "_write_companions", stop)
    arguments = ["convert", str(root / "run"), "--to", "hf", "--out", str(tmp_path / "a" / "out"), "--no-logits"]
    assert main(arguments) == 130
    assert not list(tmp_path.iterdir())


MISUSED = {
    "no direction": (["RUN", "--out", "OUT"], ("--to",)),
    "no target": (["RUN", "--to", "hf"], ("--out",)),
    "two folders": (["RUN", "SERVED", "--to", "hf", "--out", "OUT"], ("one too many",)),
    "size": (["RUN", "--to", "hf", "--out", "OUT", "--shard-size", "4 pounds"], ("--shard-size", "500MB")),
    "type of an import": (["SERVED", "--to", "megatron", "--out", "OUT", "--dtype", "bf16"], ("--dtype",)),
    "weights of an import": (["SERVED", "--to", "megatron", "--out", "OUT", "--weights", "ema"], ("--weights",)),
    "verify nothing": (["verify"], ("verify FOLDER",)),
    "verify into": (["verify", "SERVED", "--out", "OUT"], ("--out",)),
    "verify without logits": (["verify", "SERVED", "--no-logits"], ("--no-logits",)),
}


@pytest.mark.parametrize("name", MISUSED)
def test_misuse(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    arguments, needles = MISUSED[name]
    places = {"RUN": str(root / "run"), "SERVED": str(root / "served"), "OUT": str(tmp_path / "out")}
    refused(capsys, tmp_path, [places.get(a, a) for a in arguments], 2, needles)


def test_no_average_to_export(tmp_path: Path, capsys: pytest.CaptureFixture[str], root: Path) -> None:
    from refractor_megatron.checkpoint.store import Store
    from refractor_megatron.training.state import TrainState
    from tests.engine import engine_of, tiny

    cfg = tiny("train.ema.enabled=false")
    TrainState(cfg, engine_of(cfg), "digest").save(Store(tmp_path / "run/checkpoints", 2))
    cfg.save(tmp_path / "run/config.yaml")
    shutil.copy(root / "run/tokenizer.json", tmp_path / "run")
    arguments = [str(tmp_path / "run"), "--to", "hf", "--out", str(tmp_path / "out"), "--weights", "ema"]
    refused(capsys, tmp_path, arguments, 4, ("averaged", "--weights raw"))


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs a small file system of its own")
@pytest.mark.parametrize("room", ["1m", "4m"])
@pytest.mark.parametrize("to", ["hf", "megatron"])
def test_full_disk(root: Path, tmp_path: Path, to: str, room: str) -> None:
    """Too small from the start, and a disk that someone else fills meanwhile."""
    small = tmp_path / "small"
    small.mkdir()
    size = {"1m": "1m", "4m": "12m"}[room]
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mount is not allowed here")
    try:
        code = "from refractor_megatron.cli import main; import sys, shutil, collections\n"
        if room == "4m":  # the look at the disk is deceived, so that writing itself fails
            (small / "other").write_bytes(bytes(11 << 20))
            code += "shutil.disk_usage = lambda p: collections.namedtuple('U', 'free')(1 << 40)\n"
        source = root / ("run" if to == "hf" else "served")
        arguments = ["convert", str(source), "--to", to, "--out", str(small / "out"), "--no-logits"]
        command = [sys.executable, "-W", "ignore", "-c", f"{code}sys.exit(main({arguments!r}))"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 6, done.stderr
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ") and "free" in last and "--out" in last and "Traceback" not in done.stderr
        assert [p.name for p in small.iterdir()] == (["other"] if room == "4m" else [])
    finally:
        subprocess.run(["umount", str(small)], check=True)
