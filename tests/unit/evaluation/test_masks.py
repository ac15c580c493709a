"""``refractor masks``: exit codes and sentences, and a picture that shows the compiled mask."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refractor_megatron.cli import main
from refractor_megatron.distinction.pattern import FULL, LocalPattern
from refractor_megatron.distinction.rule_file import read_rules
from refractor_megatron.distinction.rules import compile_rules
from refractor_megatron.evaluation.masks.conversation import Conversation, read_conversation
from refractor_megatron.evaluation.masks.picture import Cell, compile_picture
from refractor_megatron.fabric.spec import MaskSpec, RetrievedSpec, SummarySpec
from tests.corpus import ROOT

EXAMPLES = ROOT / "specification" / "examples"
SEALED = "- name: sealed\n  when: {bits: [SAFETY_SCOPE]}\n  allow_write_to: "
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one two three four"},
    {"role": "tool", "content": "five six", "protocol_tags": ["<tool:calc>"], "metadata": {"id": 3}},
    {"role": "assistant", "content": "seven eight nine"},
    {"role": "user", "content": "ten", "protocol_tags": ["<segment:next>"]},
]


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def talk(folder: Path, messages: Any = TALK) -> Conversation:
    return read_conversation(Path(write(folder / "talk.json", json.dumps(messages))), compile_rules([]).roles)


# check


def test_check_accepts_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["masks", "check", write(tmp_path / "r.yaml", SEALED + "[]")]) == 0
    out = capsys.readouterr().out
    assert "sealed  any role +SAFETY_SCOPE" in out and out.rstrip().endswith("a rule on SAFETY_SCOPE forbids it")


def test_check_refuses_a_leak_with_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "r.yaml", SEALED + "[assistant]")
    assert main(["masks", "check", path]) == 2
    out, error = capsys.readouterr()
    assert "✗" in out and "accepted" not in out, "the table is printed before the refusal"
    assert f"error: {path}:1:3: the rule set leaks" in error and "system+SAFETY_SCOPE -> assistant -> system" in error


def test_check_of_a_broken_file_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "r.yaml", "- name: a\n  when: {role: toll}")
    assert main(["masks", "check", path]) == 2
    out, error = capsys.readouterr()
    assert not out and error == (
        f"error: {path}:2:16: rule 'a' field when.role names an unknown role 'toll'; did you mean 'tool'.\n"
    )


def test_check_of_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["masks", "check", "--preset", "nano"]) == 0
    assert "tool_scope" in capsys.readouterr().out
    assert main(["masks", "check", "--preset", "nono"]) == 2
    assert main(["masks", "check"]) == 2 and "either a rules file or --preset" in capsys.readouterr().err


def test_check_loads_no_torch(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", SEALED + "[]")
    code = "import sys\nfrom refractor_megatron.cli import main\n"
    code += (
        f"assert main(['masks', 'check', {path!r}]) == 0\nsys.exit(bool({{'torch', 'matplotlib'}} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL).returncode == 0


def test_check_on_a_terminal_without_unicode(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "refractor_megatron.cli",
        "masks",
        "check",
        write(tmp_path / "r.yaml", SEALED + "[]"),
    ]
    answer = subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert b"x reads directly   o only through" in answer.stdout and b"x x x x x x     . . . . . ." in answer.stdout


def test_the_examples_of_the_specification_are_accepted() -> None:
    for path in sorted(EXAMPLES.glob("*_rules.yaml")):
        assert main(["masks", "check", str(path)]) == 0, path


# the conversation


def test_cells_are_words_with_records(tmp_path: Path) -> None:
    found = talk(tmp_path)
    assert [m.stop - m.start for m in found.messages] == [2, 4, 2, 3, 1]
    assert found.records.tolist()[6] == [0, 0, 3, 4] and found.records.tolist()[11] == [0, 1, 1, 2]
    assert found.messages[1].text == "one two three four"


def test_several_documents_and_empty_messages(tmp_path: Path) -> None:
    found = talk(tmp_path, [[{"role": "user", "content": ""}], TALK])
    assert found.records[:, 0].tolist() == [0] + [1] * 12


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"role": "user" "content": 1}]', ":1:18: not JSON (Expecting ',' delimiter)"),
        ("{}", "is a list of messages"),
        ("[]", "is a list of messages"),
        ("[[]]", "document 0: it has no messages"),
        ('[[{"role": "user", "content": "x"}], 3]', "document 1: messages must be a list"),
        ('[{"role": "usr", "content": "x"}]', "message 0: unknown role 'usr'"),
        ('[{"role": "user", "content": "x", "protocol_tags": ["<tool:a>", "<role:user>"]}]', "follows a tool tag"),
        (json.dumps([{"role": "user", "content": "w " * 2049}]), "2049 words do not fit into a picture of 2048"),
    ],
)
def test_bad_conversations_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str) -> None:
    path = write(tmp_path / "talk.json", text)
    rules = write(tmp_path / "r.yaml", "[]")
    assert main(["masks", "draw", rules, path, "--out", str(tmp_path / "m.png")]) == 3
    assert words in capsys.readouterr().err and not (tmp_path / "m.png").exists()


# the picture


def test_cells_say_what_is_read_and_why_not(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("- {name: t, when: {role: tool}, allow_write_to: [assistant, tool]}\n")
    rules = read_rules(tmp_path / "r.yaml").compiled
    conversation = talk(tmp_path, [TALK, TALK[:1]])
    picture = compile_picture(conversation, rules, MaskSpec(LocalPattern(window=3), SummarySpec(2, 1)))
    cell = lambda q, k: Cell(int(picture.cells[q, k]))  # noqa: E731
    assert cell(3, 2) == Cell.LOCAL and cell(3, 4) == Cell.FUTURE
    assert cell(5, 0) == Cell.SUMMARY and cell(5, 2) == Cell.SUMMARY, "block 1 is complete and outside the window"
    assert cell(9, 6) == Cell.SUMMARY and cell(11, 6) == Cell.RULE, "a user turn may not read the tool's words"
    assert cell(11, 8) == Cell.SEGMENT and cell(11, 0) == Cell.SUMMARY, "system words are shared"
    assert cell(12, 11) == Cell.DOCUMENT
    picture = compile_picture(conversation, rules, MaskSpec(LocalPattern(window=3), SummarySpec(4, 1)))
    assert cell(11, 0) == Cell.UNREAD, "its block holds words of another segment, so its summary is hidden"


def test_every_tier_is_the_plan_s_own(tmp_path: Path) -> None:
    """Edge counts equal those of the plan that attention would use, tier by tier."""
    import torch

    from refractor_megatron.fabric.plan import plan_for

    rules = read_rules(EXAMPLES / "assistant_rules.yaml").compiled
    conversation = read_conversation(EXAMPLES / "conversation.json", rules.roles)
    spec = MaskSpec(LocalPattern("hybrid", 32, 2, 8), SummarySpec(8, 2, 2, 2), RetrievedSpec(32, 3))
    picture = compile_picture(conversation, rules, spec, policy=1)
    ids = np.tile(np.arange(3, dtype=np.int32), (picture.length, 1))
    ids[:32] = -1
    records = torch.from_numpy(np.concatenate([conversation.records, ids], axis=1))[None]
    dense = plan_for(records, rules, spec, policies=np.full(3, 1, np.uint8)).dense(torch.device("cpu"))[0].numpy()
    tiers = plan_for(records, rules, spec, policies=np.full(3, 1, np.uint8)).tiers
    parts = {tier: dense[:, lo:hi] for tier, (lo, hi) in tiers.items()}
    assert (parts["local"] == (picture.cells == Cell.LOCAL)).all()
    assert (parts["summary"] == picture.summary).all() and (parts["retrieved"] == picture.retrieved).all()
    assert all(picture.edges().values())
    readable = np.isin(picture.cells, (Cell.LOCAL, Cell.SUMMARY, Cell.UNREAD))
    whole = compile_picture(conversation, rules, MaskSpec(FULL))
    assert (readable == (whole.cells == Cell.LOCAL)).all()


def test_policies_of_records_change_the_picture(tmp_path: Path) -> None:
    conversation, spec = talk(tmp_path), MaskSpec(FULL, None, RetrievedSpec(4, 1))
    edges = [compile_picture(conversation, compile_rules([]), spec, policy).edges()["retrieved"] for policy in range(4)]
    # Of the words that read records 2 are the tool's, 3 the assistant's; without tools or copying they do not.
    assert edges[3] > edges[1] > edges[0] and edges[3] > edges[2] > 0


def test_draw_writes_a_readable_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from matplotlib.image import imread

    out = tmp_path / "mask.png"
    arguments = ["--window", "8", "--block", "4", "--retrieved", "1", "--chunk", "4", "--policy", "copy"]
    conversation = write(tmp_path / "talk.json", json.dumps([*TALK, {**TALK[1], "protocol_tags": ["<odd>"]}]))
    assert main(["masks", "draw", write(tmp_path / "r.yaml", "[]"), conversation, "--out", str(out), *arguments]) == 0
    printed = capsys.readouterr()
    assert "16 words; edges: " in printed.out and "unknown protocol tag '<odd>' is ignored" in printed.err
    image = imread(out)
    assert image.shape[0] > 300 and image.shape[1] > 600
    colours = {tuple(int(round(255 * x)) for x in pixel[:3]) for pixel in image.reshape(-1, image.shape[2])}
    for tier in ("#1f4e79", "#3fa796", "#8a5cb8", "#a9d9cf"):
        assert tuple(int(tier[i : i + 2], 16) for i in (1, 3, 5)) in colours, tier
    first = out.read_bytes()
    main(["masks", "draw", str(tmp_path / "r.yaml"), conversation, "--out", str(out), *arguments])
    assert out.read_bytes() == first, "the same input draws the same bytes"


def test_draw_in_tokens_of_a_tokenizer(tmp_path: Path) -> None:
    from refractor_megatron.tokenizer import Tokenizer

    Tokenizer([bytes([b]) for b in range(256)]).save(tmp_path / "t.json")
    found = read_conversation(
        Path(write(tmp_path / "talk.json", json.dumps(TALK[:1]))),
        compile_rules([]).roles,
        Tokenizer.load(tmp_path / "t.json"),
    )
    assert len(found.records) == len("be brief") + 2 and found.unit == "tokens"


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--stride", "2", "--pattern", "block"], 2, "--stride moves a sliding window"),
        (["--stride", "99"], 2, "by at most --window"),
        (["--out", "/nowhere/m.png"], 6, "cannot be written"),
        (["--tokenizer", "/nowhere/t.json"], 3, "Cannot read the tokenizer"),
    ],
)
def test_mistaken_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], code: int, words: str
) -> None:
    files = [write(tmp_path / "r.yaml", "[]"), write(tmp_path / "talk.json", json.dumps(TALK))]
    assert main(["masks", "draw", *files, "--out", str(tmp_path / "m.png"), *flags]) == code
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--window", "--block", "--chunk", "--dilation"])
def test_sizes_are_positive(tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(["masks", "draw", "r", "c", "--out", "o", flag, "0"])
    assert end.value.code == 2 and f"{flag}: must be at least 1, not 0" in capsys.readouterr().err


def test_a_refused_set_is_not_drawn(tmp_path: Path) -> None:
    files = [write(tmp_path / "r.yaml", SEALED + "[user]"), write(tmp_path / "talk.json", json.dumps(TALK))]
    assert main(["masks", "draw", *files, "--out", str(tmp_path / "m.png")]) == 2 and not (tmp_path / "m.png").exists()
