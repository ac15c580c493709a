"""A sources file: what it may say, and what it says of mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.shards import Located
from data_pipeline.sources import open_sources
from data_pipeline.sources.base import Quarantined, Reading, Source
from data_pipeline.sources.units import read_unit
from data_pipeline.validate.schema import ENTRY, compiled
from refractor_megatron.errors import DataError

EXAMPLE = Path(__file__).parents[4] / "specification" / "examples" / "sources.yaml"


def opened(root: Path, entries: Any) -> list[Source]:
    file = root / "sources.yaml"
    file.write_text(entries if isinstance(entries, str) else yaml.safe_dump(entries))
    return open_sources(None, root / "cache", lambda line: None, sources_file=file)


def items(source: Source) -> tuple[list[bytes], list[Quarantined]]:
    found = [item for unit in source.units for item in read_unit(json.loads(json.dumps(unit)), Reading())]
    texts = [b"|".join(p.data for p in item.document.parts) for item in found if isinstance(item, Located)]
    return texts, [item for item in found if isinstance(item, Quarantined)]


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def test_what_a_source_says_of_itself(tmp_path: Path) -> None:
    write(tmp_path, "books/a/one.txt", "one")
    write(tmp_path, "books/two.txt", "two")
    write(tmp_path, "books/notes.pdf", "no")
    entry = {"name": "books", "path": "books", "licence": "CC0-1.0", "weight": 2, "version": "3", "fetched": "2026"}
    (source,) = opened(tmp_path, [entry])
    assert (source.name, source.licence, source.weight, source.version) == ("books", "CC0-1.0", 2.0, "3")
    assert source.fetched == "2026" and source.mendable
    assert [one["path"] for one in source.files] == ["a/one.txt", "two.txt"]
    assert items(source) == ([b"one", b"two"], [])


def test_patterns_cross_folders_and_lists_join(tmp_path: Path) -> None:
    for name in ("x/1.txt", "x/y/2.txt", "z/3.md", "z/4.jsonl"):
        write(tmp_path, name, '{"text": "t"}' if name.endswith("l") else name)
    both = {"name": "n", "path": ["x/**/*.txt", "z"], "licence": "L"}
    (source,) = opened(tmp_path, [both])
    assert [one["path"] for one in source.files] == ["x/1.txt", "x/y/2.txt", "z/3.md", "z/4.jsonl"]
    (only,) = opened(tmp_path, [{"name": "n", "path": "z", "licence": "L", "format": "jsonl"}])
    assert items(only) == ([b"t"], [])


def test_fields_are_renamed_and_checked_by_the_sources_own_schema(tmp_path: Path) -> None:
    lines = [{"body": "good", "lang": "en", "url": "http://a"}, {"body": "bad", "lang": "xx"}, {"text": "not it"}]
    write(tmp_path, "a.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write(tmp_path, "s.json", json.dumps({"properties": {"lang": {"enum": ["en", "de"]}}, "required": ["body"]}))
    entry = {"name": "n", "path": "a.jsonl", "licence": "L", "schema": "s.json"}
    (source,) = opened(tmp_path, [{**entry, "fields": {"text": "body", "source": "url"}}])
    texts, bad = items(source)
    assert texts == [b"good"] and [(one.reason, one.position) for one in bad] == [
        ("wrong-schema", 2),
        ("wrong-schema", 3),
    ]
    assert bad[0].detail.startswith('lang: "xx" is not one of') and '"body" is a required property' in bad[1].detail
    documents = [i for u in source.units for i in read_unit(u, Reading()) if isinstance(i, Located)]
    assert documents[0].document.provenance.source == "http://a"


def test_the_rules_are_part_of_the_identity(tmp_path: Path) -> None:
    write(tmp_path, "a.html", "<p>text of a page")
    entry = {"name": "n", "path": "a.html", "licence": "L"}
    identities = [opened(tmp_path, [entry | more])[0].identity for more in ({}, {"html": "all"}, {"weight": 3})]
    assert identities[0] != identities[1] and identities[0] == identities[2]


def test_main_text_leaves_out_menus_and_keeps_code(tmp_path: Path) -> None:
    menu = "".join(f'<li><a href="/{i}">Menu {i}</a></li>' for i in range(30))
    prose = "<p>" + "A long sentence of the article, with more words than any menu. " * 8 + "</p>"
    code = "for x in y:\n    print(x)"
    page = f"<body><div class='sidebar'><ul>{menu}</ul></div><main>{prose}<pre>{code}</pre>{prose}</main></body>"
    write(tmp_path, "a.html", page)
    write(tmp_path, "menu.html", f"<body><nav></nav><ul>{menu}</ul><div class='footer'><pre>{code}</pre></div></body>")
    entry = {"name": "n", "path": "*.html", "licence": "L"}
    (main, short), _ = items(opened(tmp_path, [entry])[0])
    assert b"A long sentence" in main and b"Menu 3" not in main and code.encode() in main
    assert short, "a page of which nothing would be left is taken whole"
    (whole, _), _ = items(opened(tmp_path, [entry | {"html": "all"}])[0])
    assert b"Menu 3" in whole and code.encode() in whole


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("x = 1", "x=1"),
        ("a\n\n  b\n", "ab"),
        ("&lt;tag&gt; &amp; more", "<tag>&more"),
        ("<b>bold</b> <i>in</i> code", "boldincode"),
    ],
)
@pytest.mark.parametrize("around", ["<main>{}</main>", "<div class='social-share comments'>{}</div>", "<li>{}</li>"])
def test_no_code_is_lost(tmp_path: Path, code: str, shown: str, around: str) -> None:
    article = "<p>Words of an article. </p>" * 20
    write(tmp_path, "a.html", f"<body>{article}{around.format(f'<pre>{code}</pre>')}")
    (text,), _ = items(opened(tmp_path, [{"name": "n", "path": "a.html", "licence": "L"}])[0])
    assert shown.encode() in b"".join(text.split())


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("- name: [", r"sources\.yaml is not valid YAML"),
        ("name: x\npath: y\n", "must be a list of sources"),
        ([], "must be a list of sources"),
        (["x"], r"source 1: .*not of type \"object\""),
        ([{"name": "n", "path": "a.txt"}], r'source 1: .*"licence" is a required property'),
        ([{"name": "n", "path": "a.txt", "license": "L"}], "no key 'license'; did you mean 'licence'"),
        ([{"name": "n", "path": "a.txt", "licence": "L", "colour": 1}], "no key 'colour'; known are name, path"),
        ([{"name": "n", "path": "a.txt", "licence": "L", "fields": {"txt": "b"}}], "fields: .*did you mean 'text'"),
        ([{"name": "n", "path": "a.txt", "licence": "L", "weight": 0}], "weight: 0 is less than or equal"),
        ([{"name": "n", "path": "a.txt", "licence": "L", "format": "csv"}], 'format: "csv" is not one of'),
        ([{"name": "n", "path": "a.txt", "licence": "L"}] * 2, "two sources are named 'n'"),
        ([{"name": "n", "path": "b.txt", "licence": "L"}], r"source 'n': .*b\.txt does not exist"),
        ([{"name": "n", "path": "s.json", "licence": "L"}], r"s\.json is none of"),
        ([{"name": "n", "path": "*.rst", "licence": "L"}], r"\*\.rst holds no"),
        ([{"name": "n", "path": "a.txt", "licence": "L", "schema": "no.json"}], r"Cannot read the schema .*no\.json"),
        ([{"name": "n", "path": "a.txt", "licence": "L", "schema": "a.txt"}], r"a\.txt is not valid JSON"),
        ([{"name": "n", "path": "a.txt", "licence": "L", "schema": "s.json"}], r"s\.json is no JSON Schema"),
        ([{"name": "n", "path": "a.txt", "licence": "L", "schema": "old.json"}], "write it for https.*2020-12"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, entries: Any, message: str) -> None:
    write(tmp_path, "a.txt", "text")
    write(tmp_path, "s.json", '{"type": "nonsense"}')
    write(tmp_path, "old.json", '{"$schema": "http://json-schema.org/draft-07/schema#"}')
    with pytest.raises(DataError, match=message):
        opened(tmp_path, entries)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Cannot read data\.sources=.*none\.yaml"):
        open_sources(None, tmp_path, lambda line: None, sources_file=tmp_path / "none.yaml")
    with pytest.raises(DataError, match="Both --corpus"):
        open_sources(tmp_path, tmp_path, lambda line: None, sources_file=tmp_path / "none.yaml")


def test_the_shipped_example_is_valid(tmp_path: Path) -> None:
    for name in ("books/x/a.txt", "crawl/2026-01/a.html", "crawl/2026-02/b.htm"):
        write(tmp_path, name, "<p>text")
    write(tmp_path, "articles/a.jsonl.zst", "")
    write(tmp_path, "dialogues/a.jsonl", '{"messages": []}')
    write(tmp_path, "article.schema.json", '{"type": "object"}')
    sources = opened(tmp_path, EXAMPLE.read_text())
    assert [source.name for source in sources] == ["books", "web", "articles", "dialogues"]
    assert [source.weight for source in sources] == [1.0, 0.5, 1.0, 2.0]


def test_the_default_schema_knows_both_kinds_of_entry() -> None:
    check = compiled(ENTRY)
    message = {"role": "user", "content": {"value": "x", "encoding": None}, "protocol_tags": None, "id": 3}
    assert check({"text": "x", "anything": [1]}) is None
    assert check({"messages": [message], "text": None, "trust": 0.5}) is None
    assert check({"messages": [{"role": 5, "content": "x"}]}) is not None
    assert check({"text": b"x"}) == "Unsupported type: 'bytes'"
    assert compiled(dict(ENTRY)) is check, "compiled once"


def test_a_field_of_ours_that_means_something_else_in_the_file(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", json.dumps({"text": {"html": "<p>"}, "body": "good"}) + "\n" + '{"body": 5}\n[]\n')
    (source,) = opened(tmp_path, [{"name": "n", "path": "a.jsonl", "licence": "L", "fields": {"text": "body"}}])
    texts, bad = items(source)
    assert texts == [b"good"] and [one.detail[:7] for one in bad] == ["text: 5", "entry: "]
