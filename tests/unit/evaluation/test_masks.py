"""``refractor masks``: exit codes and sentences, and a picture that shows the compiled mask."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from refractor_megatron.cli import main
from refractor_megatron.distinction.pattern import FULL, LocalPattern
from refractor_megatron.distinction.rule_file import read_rules
from refractor_megatron.distinction.rules import compile_rules
from refractor_megatron.evaluation.masks import render
from refractor_megatron.evaluation.masks.conversation import Conversation, read_conversation
from refractor_megatron.evaluation.masks.picture import Cell, compile_picture
from refractor_megatron.fabric.spec import MaskSpec, RetrievedSpec, SummarySpec
from tests.corpus import ROOT
from tests.runs import loaded_after

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


def test_check_of_a_configuration_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(
        tmp_path / "run.yaml", "train: {steps: 3}\nsafety:\n  masks:\n  " + SEALED.replace("\n", "\n  ") + "[user]"
    )
    assert main(["masks", "check", path]) == 2
    assert f"error: {path}:4:5: the rule set leaks" in capsys.readouterr().err


def test_check_says_what_training_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "r.yaml", "- {name: prefix, when: {role: system}, causal: false}")
    assert main(["masks", "check", path]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("not for training:")


def test_a_blank_list_of_a_safety_rule_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Blank could mean anyone; whoever leaves it blank in a safety rule means nobody."""
    path = write(tmp_path / "r.yaml", SEALED)
    assert main(["masks", "check", path]) == 2
    out, error = capsys.readouterr()
    assert not out and "field allow_write_to is blank; write [] for nobody" in error


def test_check_loads_no_torch(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", SEALED + "[]")
    code = f"from refractor_megatron.cli import main\nassert main(['masks', 'check', {path!r}]) == 0"
    assert loaded_after(code).isdisjoint({"torch", "matplotlib"})


def test_check_on_a_terminal_without_unicode(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "refractor_megatron.cli",
        "masks",
        "check",
        write(tmp_path / "r.yaml", SEALED.replace("sealed", "versiegelt-žé") + "[]"),
    ]
    answer = subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert b"versiegelt-\\u017e\\xe9  any role" in answer.stdout
    assert b"x reads directly   o only through" in answer.stdout and b"x x x x x x     . . . . . ." in answer.stdout


def test_the_examples_of_the_specification_are_accepted() -> None:
    paths = sorted(EXAMPLES.glob("*_rules.yaml"))
    assert len(paths) >= 3
    for path in paths:
        assert main(["masks", "check", str(path)]) == 0, path


# the conversation


def test_cells_are_words_with_records(tmp_path: Path) -> None:
    found = talk(tmp_path)
    assert [m.stop - m.start for m in found.messages] == [2, 4, 2, 3, 1]
    assert found.records.tolist()[6] == [0, 0, 3, 4] and found.records.tolist()[11] == [0, 1, 1, 2]
    assert found.messages[1].text == "one two three four"


def test_an_object_like_a_line_of_a_corpus(tmp_path: Path) -> None:
    found = talk(tmp_path, {"source": "desk", "messages": TALK})
    assert found.messages == talk(tmp_path).messages


def test_several_documents_and_empty_messages(tmp_path: Path) -> None:
    found = talk(tmp_path, [[{"role": "user", "content": ""}], TALK])
    assert found.records[:, 0].tolist() == [0] + [1] * 12


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"role": "user" "content": 1}]', ":1:18: not JSON (Expecting ',' delimiter)"),
        ("{}", "is a list of messages"),
        ("[]", "is a list of messages"),
        ("[[]]", "document 1: it has no messages"),
        ('[[{"role": "user", "content": "x"}], 3]', "document 2: messages must be a list"),
        ('[{"role": "usr", "content": "x"}]', "message 1: unknown role 'usr'"),
        ('[{"role": "user", "content": "x", "protocol_tags": ["<tool:a>", "<role:user>"]}]', "follows a tool tag"),
        ('[{"role": "user", "content": "x", "protocol_tags": ["<saftey:restricted>"]}]', "did you mean '<safety:restr"),
        ('[{"role": "user", "content": "x", "protocol_tag": []}]', "message 1: a message has no field 'protocol_tag'"),
        ('[{"role": "user", "role": "tool", "content": "x"}]', "field 'role' stands twice in one object"),
        ("[" * 100_000, "values are nested too deeply"),
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
    assert cell(9, 6) == Cell.SUMMARY
    assert cell(11, 6) == Cell.SEGMENT, (
        "the topic has changed; that a rule forbids the tool's words as well is no matter"
    )
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
    conversation = write(tmp_path / "talk.json", json.dumps([*TALK, TALK[1]]))
    assert main(["masks", "draw", write(tmp_path / "r.yaml", "[]"), conversation, "--out", str(out), *arguments]) == 0
    printed = capsys.readouterr()
    assert "16 words; edges: " in printed.out and not printed.err
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
        (["--stride", "2", "--pattern", "block"], 2, "--stride has no effect without --pattern sliding"),
        (["--stride", "99"], 2, "by at most --window"),
        (["--dilation", "2"], 2, "--dilation has no effect without --pattern dilated or hybrid"),
        (["--unit", "2", "--pattern", "block"], 2, "--unit has no effect without"),
        (["--fanout", "2"], 2, "--fanout has no effect without --levels 2"),
        (["--levels", "2", "--summaries", "0"], 2, "--levels has no effect without --summaries 1 or more"),
        (["--chunk", "2"], 2, "--chunk has no effect without --retrieved 1 or more"),
        (["--policy", "copy"], 2, "--policy has no effect without"),
        (["--out", "m.jpg"], 6, "give --out a name that ends in .png"),
        (["--out", "{folder}/r.yaml/m.png"], 6, "cannot be written"),
        (["--tokenizer", "/nowhere/t.json"], 3, "Cannot read the tokenizer"),
    ],
)
def test_mistaken_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], code: int, words: str
) -> None:
    files = [write(tmp_path / "r.yaml", "[]"), write(tmp_path / "talk.json", json.dumps(TALK))]
    flags = [flag.replace("{folder}", str(tmp_path)) for flag in flags]
    assert main(["masks", "draw", *files, "--out", str(tmp_path / "m.png"), *flags]) == code
    assert words in capsys.readouterr().err and not (tmp_path / "m.png").exists()


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        *((flag, "0", "from 1 to 1048576, not '0'") for flag in ("--window", "--block", "--chunk", "--dilation")),
        ("--window", "9" * 5000, "from 1 to 1048576, not '999999999999999999999999'"),
        ("--window", "²", "from 1 to 1048576, not '²'"),
        ("--summaries", "5", "from 0 to 4, not '5'"),
        ("--retrieved", "5000", "from 0 to 64, not '5000'"),
        ("--policy", "read", "must be copy, tools, copy,tools or none, not 'read'"),
    ],
)
def test_values_out_of_bounds(capsys: pytest.CaptureFixture[str], flag: str, value: str, words: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(["masks", "draw", "r", "c", "--out", "o", flag, value])
    assert end.value.code == 2 and words in capsys.readouterr().err


def test_policies_have_commas_between(tmp_path: Path) -> None:
    """A list with blanks would swallow the files that follow it."""
    files = [write(tmp_path / "r.yaml", "[]"), write(tmp_path / "talk.json", json.dumps(TALK))]
    for policy in ("copy,tools", "none"):
        flags = ["--retrieved", "1", "--chunk", "4", "--out", str(tmp_path / f"{policy}.png"), "--policy", policy]
        assert main(["masks", "draw", *flags, *files]) == 0
    assert (tmp_path / "none.png").read_bytes() != (tmp_path / "copy,tools.png").read_bytes()


def test_more_far_keys_than_a_picture_has_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk = [{"role": "user", "content": "w " * 600}]
    files = [write(tmp_path / "r.yaml", "[]"), write(tmp_path / "talk.json", json.dumps(talk))]
    for flags, words in (
        (["--block", "1", "--summaries", "4"], "2400 summaries do not fit into a picture of 2048; raise --block"),
        (
            ["--chunk", "1", "--retrieved", "4"],
            "2400 retrieved records do not fit into a picture of 2048; raise --chunk",
        ),
    ):
        assert main(["masks", "draw", *files, "--out", str(tmp_path / "m.png"), *flags]) == 2
        assert words in capsys.readouterr().err


def test_the_picture_takes_no_input_s_place_and_gets_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules, conversation = write(tmp_path / "r.yaml", "[]"), write(tmp_path / "talk.png", json.dumps(TALK))
    assert main(["masks", "draw", rules, conversation, "--out", f"{tmp_path}/./talk.png"]) == 6
    assert "is an input and would be overwritten" in capsys.readouterr().err
    assert json.loads(Path(conversation).read_text()) == TALK
    assert main(["masks", "draw", rules, conversation, "--out", str(tmp_path / "new" / "m.PNG")]) == 0


@pytest.mark.parametrize("text", [r"$\foo$", "costs $5 or $7", "nul \0 and \u202e right to left", "你好 🙂 \ud83d"])
@pytest.mark.filterwarnings("error")
def test_words_are_drawn_whatever_they_hold(tmp_path: Path, text: str) -> None:
    """Neither TeX, nor control characters, nor glyphs that the font lacks."""
    files = [
        write(tmp_path / "r.yaml", "[]"),
        write(tmp_path / "t.json", json.dumps([{"role": "user", "content": text}])),
    ]
    assert main(["masks", "draw", *files, "--out", str(tmp_path / "m.png")]) == 0


def figure_of(messages: Any, folder: Path, spec: MaskSpec, title: str = "talk.json under r.yaml") -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = render.draw(compile_picture(talk(folder, messages), compile_rules([]), spec), title)
    FigureCanvasAgg(figure).draw()  # the figure's canvas from here on
    return figure


def words_of(figure: Figure) -> dict[str, Any]:
    """Texts of a figure with their extents in pixels."""
    return {text.get_text(): text.get_window_extent() for text in figure.texts}


def test_all_text_lies_on_the_page(tmp_path: Path) -> None:
    """A picture of one word is as wide as its title."""
    figure = figure_of([{"role": "user", "content": "W" * 40}], tmp_path, MaskSpec(FULL), "a long name " * 20)
    width, height = figure.canvas.get_width_height()
    for text, box in words_of(figure).items():
        assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height, text
    assert "local: 1 edge" in words_of(figure), "and the legend says no more of the tiers than there is"


def test_groups_and_blocks_are_told_apart(tmp_path: Path) -> None:
    spec = MaskSpec(LocalPattern(window=2), SummarySpec(2, 1, 2, 2))
    words = words_of(figure_of(TALK, tmp_path, spec))
    assert any("1 summary for every 2 cells and for groups of 2 such blocks" in text for text in words)
    assert words["groups"].x1 < words["blocks"].x0 + 1 and "summaries" not in words


def test_short_messages_keep_labels_and_cells(tmp_path: Path) -> None:
    """Every n-th message has its label, both roles among them, and no line covers the cells."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": "a b c"} for i in range(200)]
    figure = figure_of(messages, tmp_path, MaskSpec(FULL))
    labels = [text.get_text() for text in figure.texts]
    assert labels.count("user") > 10 and labels.count("assistant") > 10
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)  # type: ignore[attr-defined]
    dark = (pixels == [0x1F, 0x4E, 0x79]).all(axis=2).sum()
    assert dark > 0.98 * 600 * 601 / 2, "a cell is a pixel; the frame hides a few"


def test_a_refused_set_is_not_drawn(tmp_path: Path) -> None:
    files = [write(tmp_path / "r.yaml", SEALED + "[user]"), write(tmp_path / "talk.json", json.dumps(TALK))]
    assert main(["masks", "draw", *files, "--out", str(tmp_path / "m.png")]) == 2 and not (tmp_path / "m.png").exists()
