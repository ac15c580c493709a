"""``refractor generate``: what it prints, and one sentence for every mistake."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from refractor_megatron.checkpoint.convert.hf_manifest import MANIFEST, HfManifest, versions
from refractor_megatron.cli import main
from refractor_megatron.decoding.chat import message_prompt, text_prompt
from refractor_megatron.decoding.decoder import Decoder
from refractor_megatron.decoding.load import load_weights, read_exported
from refractor_megatron.decoding.session import Session
from refractor_megatron.evaluation.sampling import SamplingOptions
from refractor_megatron.tokenizer import Tokenizer, train_tokenizer
from refractor_megatron.tokenizer.hf_files import read_hf_tokenizer, write_hf_tokenizer
from tests.runs import loaded_after

from .conftest import CONTEXT

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], folder: Path) -> Run:
    """``run(*arguments, at=folder)`` -> exit code, output, error output."""

    def call(*arguments: object, at: Path = folder) -> tuple[int, str, str]:
        try:
            code = main(["generate", str(at), *map(str, arguments)])
        except SystemExit as left:  # argparse
            code = int(left.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A folder that a test may spoil."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def answers(out: str) -> list[dict[str, Any]]:
    """Of ``--json``."""
    (line,) = out.splitlines()
    found: list[dict[str, Any]] = json.loads(line)["answers"]
    return found


def test_the_streamed_text_is_the_answer(run: Run, folder: Path, tokenizer: Tokenizer) -> None:
    options = ["--prompt", "parser.add_", "--max-tokens", 12, "--seed", 4]
    code, out, err = run(*options)
    (row,) = answers(run(*options, "--json")[1])
    assert (code, out) == (0, row["text"] + "\n") and err.count("\n") == 1 and "refractor_manifest.json" in err
    decoder = Decoder(load_weights(read_exported(folder)))
    prompt = text_prompt(tokenizer, b"parser.add_", "--prompt")
    session = Session(decoder)
    session.feed(prompt)
    answer = session.answer(prompt, SamplingOptions(seed=4), 12)
    assert (row["ids"], row["text"], row["finish_reason"]) == (answer.ids, answer.text, answer.finish)
    assert (row["prompt_tokens"], row["tokens"], row["seed"]) == (len(prompt.ids), len(answer.ids), 4)
    assert run(*options, "--no-stream")[1] == out


def test_several_answers_one_after_the_other_or_together(run: Run) -> None:
    """With chunks kept, each answer begins where the prompt ended; without, they are one batch: the same answers."""
    options = ["--prompt", "def f(self, x): return x\n" * 9, "--num", 3, "--max-tokens", 9, "--json", "--stats"]
    found = {codec: json.loads(run(*options, "--kv-codec", codec)[1]) for codec in ("none", "exact", "norm", "auto")}
    rows = found["none"]["answers"]
    assert rows == found["exact"]["answers"] and [row["seed"] for row in rows] == [0, 1, 2]
    assert len({tuple(row["ids"]) for row in rows}) == 3 and rows[0]["prompt_tokens"] > 100
    for codec, name in (("exact", "exact"), ("norm", "norm"), ("auto", "tight")):  # the folder's ratio is 0.7
        stats = found[codec]["stats"]
        assert (stats["rewinds"], stats["recomputed_tokens"], stats["chunk_hit_rate"]) == (2, 0, 1.0)
        assert set(stats["measured_errors"]) == {name} and stats["chunks"] >= 3 and stats["cold_bytes"] > 0
    assert found["none"]["stats"]["samples"] == 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str, run: Run) -> None:
    options = ["--prompt", "def f(self, x): return x\n" * 9, "--num", 2, "--max-tokens", 9, "--json", "--dtype", dtype]
    found = [run(*options, "--kv-codec", codec)[1] for codec in ("exact", "exact", "none")]
    assert found[0] == found[1] and [row["tokens"] for row in answers(found[2])] == [9, 9]


def test_answers_stand_in_order_below_headings(run: Run) -> None:
    options = ["--prompt", "def f(self", "--num", 2, "--max-tokens", 5, "--temperature", 0]
    _, out, err = run(*options, "--stats")
    (one, two) = answers(run(*options, "--json")[1])
    assert out == f"--- answer 1 of 2\n{one['text']}\n--- answer 2 of 2\n{two['text']}\n" and one["ids"] == two["ids"]
    assert "tokens per s: " in err and "cache bytes per sample: " in err
    _, _, err = run("--prompt", "def f(self, x): return x\n" * 9, *options[2:], "--stats", "--kv-codec", "norm")
    assert re.search(r"^measured errors: norm mean [\d.e-]+, max [\d.e-]+$", err, re.M)
    assert "chunk hit rate: 1\n" in err


def test_a_role_makes_the_prompt_a_message(run: Run, folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    text, messages = "what is this?", tmp_path / "m.json"
    (tmp_path / "p.txt").write_text(text)
    messages.write_text(json.dumps([{"role": "user", "content": text}]))
    options = ["--max-tokens", 8, "--temperature", 0, "--json"]
    ways = [["--prompt", text, "--role", "user"], ["--prompt-file", tmp_path / "p.txt", "--role", "user"]]
    rows = [answers(run(*way, *options)[1]) for way in [*ways, ["--messages", messages]]]
    assert rows[0] == rows[1] == rows[2]
    expected = len(message_prompt(tokenizer, text.encode(), "user", "--prompt").ids)
    assert rows[0][0]["prompt_tokens"] == expected != answers(run("--prompt", text, *options)[1])[0]["prompt_tokens"]


def test_a_file_of_several_conversations_is_one_batch(run: Run, tmp_path: Path) -> None:
    first, second = [{"role": "user", "content": "a"}], [{"role": "user", "content": "longer words " * 9}]
    options = ["--max-tokens", 6, "--json", "--num", 2]
    rows = []
    for number, content in enumerate(([first, second], first, second)):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(content))
        rows.append(answers(run("--messages", path, *options)[1]))
    assert [row["prompt"] for row in rows[0]] == [0, 0, 1, 1]
    assert [row["ids"] for row in rows[0]] == [row["ids"] for row in rows[1] + rows[2]]


def test_a_chat_goes_on_goes_back_and_ends(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--prompt", "hello", "--role", "user", "--chat", "--max-tokens", 6, "--kv-codec", "exact"]
    lines = ["/undo", "more", "/undo", "other", "/retry", "/stats", "/what", "x" * 4 * CONTEXT, "", "/quit", "never"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    code, out, err = run(*options)
    assert code == 0 and err.count("nothing to take back") == 1 and err.count("context_max") == 1
    assert "rewinds: 2\n" in err and "recomputed tokens: 0\n" in err and err.count("/retry: another answer") == 1
    monkeypatch.setattr("sys.stdin", io.StringIO("more\nother"))  # the end of the input ends it too
    _, unlike, _ = run(*options)
    assert out != unlike and out.splitlines()[0] == unlike.splitlines()[0]


@pytest.mark.parametrize(
    "options,code,says",
    [
        (["--prompt", ""], 3, "--prompt is empty"),
        (["--prompt-file", "/nowhere.txt"], 3, r"/nowhere\.txt: cannot be read \(No such file"),
        (["--messages", "/nowhere.json"], 3, r"/nowhere\.json: cannot be read"),
        (["--prompt", "x", "--num", "0"], 2, "--num 0 makes no sense"),
        (["--prompt", "x", "--max-tokens", "0"], 2, "--max-tokens 0 makes no sense"),
        (["--prompt", "x", "--max-tokens", CONTEXT], 2, rf"for {CONTEXT} \(model.context_max\): give --max-tokens"),
        (["--prompt", "x" * 4 * CONTEXT], 2, "context_max"),
        (["--prompt", "x", "--temperature", "-1"], 2, "temperature -1.0 makes no sense"),
        (["--prompt", "x", "--top-p", "0"], 2, "top-p 0.0 makes no sense"),
        (["--prompt", "x", "--top-k", "-1"], 2, "top-k -1 makes no sense"),
        (["--prompt", "x", "--seed", "-1"], 2, "seed -1 makes no sense"),
        (["--prompt", "x", "--role", "boss"], 3, "unknown role 'boss'"),
        (["--messages", "x", "--role", "user"], 2, "--role goes with --prompt"),
        (["--prompt", "x", "--chat"], 2, "--chat begins with a message"),
        (["--prompt", "x", "--role", "user", "--chat", "--json"], 2, "leave out --json"),
        (["--prompt", "x", "--kv-budget-mb", "3"], 2, "give --kv-codec"),
        (["--prompt", "x", "--kv-budget-mb", "0", "--kv-codec", "norm"], 2, "more than 0"),
        (["--prompt", "x", "--device", "gpu"], 5, "device 'gpu' cannot be used"),
        (["--prompt", "x", "--prompt-file", "y"], 2, "not allowed with argument --prompt"),
        ([], 2, "one of the arguments --prompt --prompt-file --messages is required"),
    ],
)
def test_wrong_options_are_one_sentence(options: list[object], code: int, says: str, run: Run) -> None:
    found, out, err = run(*options)
    lines = [line for line in err.splitlines() if "refractor_manifest" not in line]
    assert (found, out) == (code, "") and len(lines) == 1 and lines[0].startswith("error: ")

    assert re.search(says, lines[0])


@pytest.mark.slow
def test_generating_needs_no_megatron(folder: Path) -> None:
    code = (
        f"from refractor_megatron.cli import main\nmain(['generate', {str(folder)!r}, '--prompt', 'x', '--num', '2'])"
    )
    assert "megatron" not in loaded_after(code)


def spoil_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spoil_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def manifest(folder: Path, **changes: Any) -> None:
    """A manifest that fits the folder, but for the changes."""
    config, tokenizer = json.loads((folder / "config.json").read_text()), read_hf_tokenizer(folder)
    fields: dict[str, Any] = {
        "weights": "raw", "source": {"step": 0}, "package_version": "0", "megatron_version": "0", "tensors": {},
        "files": {},
        "rules_hash": config["rules_hash"], "tokenizer_digest": tokenizer.digest, "versions": versions(),
        "fingerprint": None,
    }  # fmt: skip
    HfManifest(**(fields | changes)).write(folder)


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def other_tokenizer(folder: Path) -> None:
    write_hf_tokenizer(train_tokenizer([b"ab" * 400], 300), folder, CONTEXT)


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


SPOILT: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "no folder": (shutil.rmtree, 4, "is no folder: give one that refractor convert wrote"),
    "no config": (lambda f: (f / "config.json").unlink(), 4, "holds no config.json"),
    "a run": (lambda f: (f / "config.json").rename(f / "config.yaml"), 4, "refractor convert .* OUT"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), 4, r"config\.json is damaged"),
    "another model": (lambda f: spoil_config(f, model_type="llama"), 4, "type 'llama', and this needs refractor"),
    "wrong value": (lambda f: spoil_config(f, combine="max"), 4, "combine"),
    "wrong size": (lambda f: spoil_config(f, intermediate_size=44), 4, "in another shape model.layers.0.mlp"),
    "wrong roles": (lambda f: spoil_config(f, roles=["user", "system"]), 4, "the roles begin with user"),
    "wrong ids": (lambda f: spoil_config(f, end_token_id=5), 4, "ids of special tokens"),
    "another tokenizer": (other_tokenizer, 4, "the model has 400 tokens and the tokenizer 272"),
    "no tokenizer": (lambda f: (f / "refractor_tokenizer.json").unlink(), 3, r"refractor_tokenizer\.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), 4, "the weights cannot be loaded"),
    "truncated": (truncate, 4, "the weights cannot be loaded"),
    "a pickle": (pickled, 4, "the weights cannot be loaded"),
    "a tensor short": (
        lambda f: spoil_weights(f, lambda t: t.pop("model.layers.1.mlp.gate.weight")), 4,
        r"lack model\.layers\.1\.mlp\.gate\.weight",
    ),
    "a tensor more": (
        lambda f: spoil_weights(f, lambda t: t.update(extra=torch.ones(2))), 4, "have besides extra",
    ),
    "not a number": (
        lambda f: spoil_weights(f, lambda t: t["lm_head.weight"].fill_(float("nan"))), 4, "logits that are not finite",
    ),
    "other rules": (lambda f: spoil_config(f, mask_rules=[]), 4, "the rules of who may read whom are not those"),
    "rules that are none": (lambda f: spoil_config(f, mask_rules=[{"name": "x"}]), 4, "rule 'x' field when must"),
    "manifest not JSON": (lambda f: (f / MANIFEST).write_text("{"), 4, r"refractor_manifest\.json is damaged"),
    "manifest of other rules": (lambda f: manifest(f, rules_hash="1234"), 4, "the rules of who may read whom are not"),
    "manifest of another tokenizer": (lambda f: manifest(f, tokenizer_digest="12"), 4, "the tokenizer is not the one"),
    "another router": (lambda f: manifest(f, versions={"router": 9}), 4, "version 9 of the router, this version runs"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_spoilt_folders_are_one_sentence(name: str, run: Run, copied: Path) -> None:

    spoil, code, says = SPOILT[name]
    spoil(copied)
    found, out, err = run("--prompt", "x", "--max-tokens", 3, at=copied)
    lines = [line for line in err.splitlines() if "has no refractor_manifest" not in line]
    assert (found, out) == (code, "") and len(lines) == 1 and lines[0].startswith("error: "), err
    assert re.search(says, lines[0]) and str(copied) in lines[0] or name == "not a number"


def test_a_folder_with_its_manifest_needs_no_note(run: Run, copied: Path) -> None:
    manifest(copied)
    code, out, err = run("--prompt", "x", "--max-tokens", 3, at=copied)
    assert (code, err) == (0, "") and out


def test_several_conversations_cannot_share_chunks(run: Run, tmp_path: Path) -> None:
    one = [{"role": "user", "content": "a"}]
    (tmp_path / "m.json").write_text(json.dumps([one, one]))
    code, _, err = run("--messages", tmp_path / "m.json", "--kv-codec", "norm")
    assert code == 2 and "has 2 conversations and --kv-codec norm serves one" in err
