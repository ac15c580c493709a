"""Rules files: what they may hold, and the file, line and column of every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from refractor_megatron.config.masks import ROLE_NAMES
from refractor_megatron.config.sections import DEFAULT_MASKS
from refractor_megatron.distinction.rule_file import read_rules
from refractor_megatron.distinction.rules import compile_rules
from refractor_megatron.errors import ConfigError
from tests.runs import loaded_after

GOOD = """\
# tools answer to the assistant
- name: tool_scope
  when: {role: tool}
  allow_read_from: [system, user, assistant, tool]
  allow_write_to: [assistant, tool]
  causal: true
- name: safety_restricted
  when: {bits: [SAFETY_SCOPE]}
  allow_write_to: []
  causal: true
"""


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "rules.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def mistake(folder: Path, text: str | bytes) -> str:
    """The sentence about a file, without the folder."""
    with pytest.raises(ConfigError) as error:
        read_rules(write(folder, text)).check()
    sentence = str(error.value)
    assert "\n" not in sentence and sentence.endswith(".")
    return sentence.replace(f"{folder}/", "")


def test_a_list_is_the_value_of_the_configuration_key(tmp_path: Path) -> None:
    """Same digest as the same rules in ``safety.masks``: a checkpoint cannot tell where they came from."""
    assert read_rules(write(tmp_path, GOOD)).compiled == compile_rules(DEFAULT_MASKS)


def test_a_configuration_s_rules_are_read_and_nothing_else(tmp_path: Path) -> None:
    text = "train: {steps: 3}\nsafety:\n  masks:\n" + "".join(f"  {line}\n" for line in GOOD.splitlines())
    assert read_rules(write(tmp_path, text)).compiled == compile_rules(DEFAULT_MASKS)


def test_a_mapping_may_append_roles_and_choose_shared_ones(tmp_path: Path) -> None:
    text = "roles: [critic]\nshared_roles: [system, critic]\nrules:\n"
    text += "- {name: c, when: {role: critic}, allow_write_to: []}\n"
    compiled = read_rules(write(tmp_path, text)).compiled
    assert compiled.roles == (*ROLE_NAMES, "critic") and compiled.shared_roles == ("critic", "system")
    assert read_rules(write(tmp_path, "rules: []")).compiled == compile_rules([])
    assert read_rules(write(tmp_path, "rules: []\nshared_roles: []")).compiled.shared_roles == ()


def test_anchors_spare_repetition(tmp_path: Path) -> None:
    text = "- {name: a, when: {role: tool}, allow_read_from: &some [user, tool]}\n"
    text += "- {name: b, when: {role: code}, allow_read_from: *some}\n"
    rules = read_rules(write(tmp_path, text)).compiled.rules
    assert rules[0].allow_read_from == rules[1].allow_read_from == ("user", "tool")


NOBODY = "- name: a\n  when: {role: tool}\n  allow_write_to: []\n"
#: Nine aliases of nine aliases ...: 9**7 values in seven lines.
BOMB = "a: &v0 [x,x,x,x,x,x,x,x,x]\n" + "".join(f"b{i}: &v{i} [{','.join([f'*v{i - 1}'] * 9)}]\n" for i in range(1, 7))
RULE = "- name: a\n  when: {role: tool}\n"


@pytest.mark.parametrize(
    ("text", "start", "words"),
    [
        ("", "rules.yaml:1:1: ", "holds no rules; write []"),
        ("3", "rules.yaml:1:1: ", "a list of rules, a mapping with roles, shared_roles, rules, or a configuration"),
        ("# only\n", "rules.yaml:1:1: ", "holds no rules"),
        # the mapping
        ("rulez: []", "rules.yaml:1:1: ", "no field 'rulez'; did you mean 'rules'"),
        ("roles: [critic]", "rules.yaml:1:1: ", "has no field 'rules'"),
        ("rules: {}", "rules.yaml:1:8: ", "the value of rules must be a list of rules, not dict"),
        ("rules: []\nroles: critic", "rules.yaml:2:8: ", "roles must be a list of role names, not 'critic'"),
        ("rules: []\nroles: [a, 3]", "rules.yaml:2:12: ", "but holds 3"),
        ("rules: []\nroles:\n- critic\n- tool", "rules.yaml:4:3: ", "'tool' is a standard role; list only the new"),
        ("rules: []\nroles: [a, a]", "rules.yaml:2:12: ", "'a' is listed twice"),
        ("rules: []\nroles: [A b]", "rules.yaml:2:9: ", "lower-case letters, digits and _"),
        ("rules: []\nroles: [" + ", ".join(f"r{i}" for i in range(251)) + "]", "rules.yaml:2:8: ", "257 roles"),
        ("rules: []\nshared_roles: [sytem]", "rules.yaml:2:16: ", "unknown role 'sytem'; did you mean 'system'"),
        # one rule
        ("- tool", "rules.yaml:1:3: ", "rule 1 must be a mapping with the fields name, when"),
        ("- {when: {role: tool}}", "rules.yaml:1:3: ", "rule 1 field name must be a non-empty string, not None"),
        ("- name: 7", "rules.yaml:1:9: ", "rule 1 field name must be a non-empty string, not 7"),
        ("- name: a", "rules.yaml:1:3: ", "rule 'a' field when must name a role, bits or both"),
        (RULE + "  allow_read: []", "rules.yaml:3:3: ", "unknown field 'allow_read'; did you mean 'allow_read_from'"),
        (RULE + "  causal: 1", "rules.yaml:3:11: ", "field causal must be true or false, not 1"),
        (RULE + "  allow_read_from: user", "rules.yaml:3:20: ", "allow_read_from must be a list of roles"),
        (RULE + "  allow_write_to:\n  - user\n  - toll", "rules.yaml:5:5: ", "'toll'; did you mean 'tool'"),
        ("- name: a\n  when:\n    rol: tool", "rules.yaml:3:5: ", "field when has an unknown field 'rol'"),
        ("- name: a\n  when:\n    role: root", "rules.yaml:3:11: ", "unknown role 'root'; known are system, user"),
        ("- name: a\n  when: {bits: SAFETY_SCOPE}", "rules.yaml:2:16: ", "when.bits must be a non-empty list"),
        ("- name: a\n  when: {bits: [SAFETY]}", "rules.yaml:2:17: ", "unknown scope bit 'SAFETY'; did you mean"),
        ("- name: a\n  when: {bits: [SEGMENT]}", "rules.yaml:2:17: ", "names SEGMENT, which acts on positions"),
        (
            RULE,
            "rules.yaml:1:3: ",
            "rule 'a' restricts nothing; give it allow_read_from or allow_write_to, [] for nobody",
        ),
        (RULE + "  allow_write_to:", "rules.yaml:3:18: ", "allow_write_to is blank; write [] for nobody, or leave the"),
        (NOBODY + NOBODY, "rules.yaml:4:9: ", "rule 'a' is there twice"),
        # a configuration
        ("train: {}\nsafety: {}", "rules.yaml:2:9: ", "sets no safety.masks, so its preset's rules hold"),
        ("safety: {masks: {}}", "rules.yaml:1:17: ", "the value of safety.masks must be a list of rules"),
        ("safety:\n  masks:\n  - tool", "rules.yaml:3:5: ", "rule 1 must be a mapping"),
        # size
        ("[" * 3000, "rules.yaml: ", "nested too deeply"),
        (BOMB, "rules.yaml:", "more than 100,000 values, aliases written out"),
        # YAML
        (RULE + "  name: b", "rules.yaml:3:3: ", "field 'name' stands here for the second time (first in line 1)"),
        ("- name: a\n  when: {role: tool\n", "rules.yaml:3:1: ", "expected ',' or '}'"),
        ("- name: a\n\twhen: b", "rules.yaml:2:1: ", "YAML error"),
        ("[]\n---\n[]", "rules.yaml:2:1: ", "but found another document"),
        ("- name: *a", "rules.yaml:1:9: ", "undefined alias"),
        ("- &a [*a]", "rules.yaml:1:3: ", "the alias names a value that it stands in"),
        ("- !!set {a}", "rules.yaml:1:3: ", "is not understood in rules"),
        ("- name: !python/name:os.system a", "rules.yaml:1:9: ", "could not determine a constructor"),
        ("- {<<: {name: a}}", "rules.yaml:1:4: ", "merge keys and nested keys"),
        ("- {[a]: b}", "rules.yaml:1:4: ", "must be a plain name"),
        ('- name: "a\x01"', "rules.yaml:1:11: ", "special characters are not allowed"),
        (b"- name: a\n  when: {role: \xff}", "rules.yaml:2:16: ", "not UTF-8"),
    ],
)
def test_every_mistake_has_a_place(tmp_path: Path, text: str | bytes, start: str, words: str) -> None:
    sentence = mistake(tmp_path, text)
    assert sentence.startswith(start) and words in sentence, sentence


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        read_rules(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_rules(tmp_path)


@pytest.mark.parametrize(
    ("text", "start", "words"),
    [
        (
            RULE + "  allow_write_to: [assistant]\n- name: b\n  when: {role: assistant}\n  allow_read_from: [user]\n",
            "rules.yaml:3:19: ",
            "rule 'a' lets its tokens write to assistant, but rule 'b' forbids every such edge; remove assistant",
        ),
        (
            "- {name: a, when: {role: user}, allow_read_from: [tool]}\n"
            "- {name: b, when: {role: tool}, allow_write_to: [code]}\n"
            "- {name: c, when: {role: tool}, allow_write_to: []}",
            "rules.yaml:1:50: ",
            "rule 'a' lets its tokens read from tool, but rules 'b' and 'c' forbid every such edge",
        ),
        (
            "- {name: b, when: {role: user}, allow_read_from: [user]}\n- {name: a, when: {role: user}, causal: false}",
            "rules.yaml:1:3: ",
            "rules 'a' and 'b' match the same tokens, but one is causal and the other is not",
        ),
    ],
)  # fmt: skip
def test_contradictions_are_named_with_both_rules(tmp_path: Path, text: str, start: str, words: str) -> None:
    sentence = mistake(tmp_path, text)
    assert sentence.startswith(start) and words in sentence, sentence


SEALED = "- name: sealed\n  when: {bits: [SAFETY_SCOPE]}\n  allow_write_to: "


@pytest.mark.parametrize(
    ("text", "start", "path"),
    [
        (SEALED + "[assistant]\n", "rules.yaml:1:3: ", "system+SAFETY_SCOPE -> assistant -> system"),
        (
            RULE
            + "  allow_read_from: [system, user, code]\n"
            + SEALED
            + "[code]\n- {name: z, when: {role: code}, allow_write_to: [tool]}\n"
            "- {name: y, when: {role: tool}, allow_write_to: [user]}\n",
            "rules.yaml:4:3: ",
            "system+SAFETY_SCOPE -> code -> tool",
        ),
        (  # the rule that the text leaks past is blamed, not the first that names the scope
            "- {name: a, when: {role: code, bits: [SAFETY_SCOPE]}, allow_read_from: [system, user, assistant, tool, "
            "code, data]}\n" + SEALED + "[assistant]\n",
            "rules.yaml:2:3: ",
            "rule 'sealed' forbids system to read system+SAFETY_SCOPE",
        ),
        (
            "- name: clean\n  when: {role: user, bits: [SAFETY_SCOPE]}\n  allow_read_from: [system, user]\n",
            "rules.yaml:1:3: ",
            "assistant -> system -> user+SAFETY_SCOPE",
        ),
        (
            "- name: half\n  when: {role: system, bits: [SAFETY_SCOPE]}\n  allow_write_to: []\n",
            "rules.yaml:1:3: ",
            "a scope rule that names a role leaves the scope's other roles free to carry its text out: drop",
        ),
    ],
)
def test_leaking_sets_are_refused_with_their_path(tmp_path: Path, text: str, start: str, path: str) -> None:
    sentence = mistake(tmp_path, text)
    assert sentence.startswith(start + "the rule set leaks across SAFETY_SCOPE") and path in sentence, sentence


def test_a_closed_path_is_accepted(tmp_path: Path) -> None:
    text = SEALED + "[assistant]\n- {name: last, when: {role: assistant}, allow_write_to: [assistant]}\n"
    flows = read_rules(write(tmp_path, text)).check()
    assert all("SAFETY_SCOPE" not in flow.key for flow in flows)


def test_reading_rules_loads_no_torch() -> None:
    code = "import refractor_megatron.distinction.rule_file, refractor_megatron.distinction.flows"
    assert "torch" not in loaded_after(code)
