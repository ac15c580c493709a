"""The page: every section from a build with everything switched on, its numbers, and what hostile text does to it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.build import BuiltData
from data_pipeline.filters.audit import read_audit
from data_pipeline.report.contents import Contents
from data_pipeline.report.html import count, percent
from data_pipeline.report.page import SECTIONS, render, write_report
from data_pipeline.report.sections_flow import STEPS
from refractor_megatron.errors import DataError, OutputError

_VOID = {"meta", "br"}


class Page(HTMLParser):
    """Fails on a tag that is not closed where it must be; collects tags, attributes, and rows of cells by section."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: dict[str, list[list[str]]] = {}
        self.texts: dict[str, str] = {}
        self.section = ""
        self._cell = False
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self.section = dict(attrs)["id"] or ""
        if tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.rows[self.section][-1].append("")
            self._cell = True
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another tag"
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        self.texts[self.section] = self.texts.get(self.section, "") + data
        if self._cell:
            self.rows[self.section][-1][-1] += data

    def row(self, section: str, name: str) -> list[str]:
        """The first row of a section whose first cell begins so."""
        return next(row for row in self.rows[section] if row[0].strip().startswith(name))


@pytest.fixture(scope="module")
def page(everything: BuiltData) -> tuple[str, Page]:
    text = render(Contents.load(everything.folder))
    return text, Page(text)


def _ledger(built: BuiltData) -> list[dict[str, Any]]:
    return list(json.loads((built.folder / "ledger.json").read_bytes()))


def test_every_section_is_there(page: tuple[str, Page]) -> None:
    found = [attributes["id"] for tag, attributes in page[1].tags if tag == "section"]
    assert found == [anchor for anchor, _, _ in SECTIONS]
    links = [attributes["href"] for tag, attributes in page[1].tags if tag == "a"]
    assert links == [f"#{anchor}" for anchor in found]


def test_nothing_is_loaded_from_elsewhere(page: tuple[str, Page]) -> None:
    text, parsed = page
    assert len(text.encode()) < 2_000_000
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & {tag for tag, _ in parsed.tags}
    for tag, attributes in parsed.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        assert all(name not in ("src", "srcset", "action", "data") for name in attributes), tag
        assert (attributes.get("href") or "#").startswith("#")
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style and "//" not in style


def test_hostile_text_is_shown_and_not_obeyed(page: tuple[str, Page]) -> None:
    text, parsed = page
    assert "<script" not in text.lower() and "onerror=alert(1)>" not in text
    assert "<script>alert('mine')</script>" in parsed.texts["duplicates"]
    assert "<script>alert('mine')</script>" in parsed.texts["filters"]
    assert "-<b>.txt" in parsed.texts["duplicates"] and "books <i>" in parsed.texts["sources"]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text) and "\u241b[31m" in text


def test_the_funnel_is_the_ledger(everything: BuiltData, page: tuple[str, Page]) -> None:
    for step in _ledger(everything):
        row = page[1].row("funnel", STEPS[step["name"]])
        gone = sum(step["dropped"].values()) + sum(step["quarantined"].values())
        assert row[2] == count(step["kept"])
        assert row[3] == (f"{count(gone)} ({percent(gone / step['in'])})" if gone else "–")
        for why in [*step["dropped"], *step["quarantined"]][:4]:
            assert why in row[4]
    splits = everything.manifest["splits"]
    assert f"{count(splits['train']['documents'])}\xa0training" in page[1].row("funnel", "Split")[4]


def test_sources_and_languages_add_up(everything: BuiltData, page: tuple[str, Page]) -> None:
    for source in json.loads((everything.folder / "sources.json").read_bytes()):
        row = page[1].row("sources", source["name"])
        assert row[1] == source["licence"] and row[2] == count(source["documents"])
        assert row[3] == f"{source['bytes'] / 1e6:,.2f}" and float(row[-1]) == source["weight"]
    languages = page[1].rows["languages"][1:]
    assert (
        sum(int(row[1].replace("\u202f", "")) for row in languages)
        == everything.manifest["splits"]["train"]["documents"]
    )


def test_rules_are_those_of_the_audit(everything: BuiltData, page: tuple[str, Page]) -> None:
    rows = read_audit(everything.folder / "audit.parquet")
    counted: dict[str, int] = {}
    for row in rows:
        if row.action == "drop" and row.filter in ("quality", "perplexity", "decontaminate"):
            counted[row.rule] = counted.get(row.rule, 0) + 1
    assert set(counted) >= {"loose-word-count/1", "perplexity-band/1", "evaluation-overlap/1"}
    for rule, number in counted.items():
        assert page[1].row("filters", rule)[1] == count(number)
    near = sum(1 for row in rows if row.filter == "near-duplicate")
    assert near and f"{count(near)} were near to one" in page[1].texts["duplicates"]


def test_stages_mix_and_tasks_are_the_manifests(everything: BuiltData, page: tuple[str, Page]) -> None:
    curriculum = everything.manifest["curriculum"]
    for number, stage in enumerate(curriculum["stages"]):
        row = page[1].row("stages", count(stage["length"]))
        assert row[1] == count(stage["sequences"])
        for domain in stage["domains"]:
            cell = page[1].row("mix", domain["name"])[2 + number]
            assert cell == f"{percent(domain['share'])} × {domain['epochs_per_pass']:.2f}"
    made = [one for one in everything.manifest["tasks"]["tasks"]["stages"] if one["documents"]]
    assert made
    rows = page[1].rows["tasks"][1:]
    for one in made:
        family = one["family"].replace("_", "-")
        row = next(row for row in rows if row[:3] == ["training", count(one["stage"]), family])
        assert row[3] == count(one["documents"])
        assert row[5] == ", ".join(f"{n} {kind}" for kind, n in one["kinds"].items())


def test_token_records_add_up_to_the_split(everything: BuiltData, page: tuple[str, Page]) -> None:
    head, *rows = page[1].rows["records"]
    roles = [row for row in rows if row[0] in ("system", "user", "assistant", "tool", "code", "data")]
    for column, split in enumerate(("train", "heldout"), start=1):
        total = sum(int(row[column].replace("\u202f", "")) for row in roles)
        assert total == everything.manifest["splits"][split]["tokens"], head


def test_pii_is_counted_and_never_quoted(everything: BuiltData, page: tuple[str, Page]) -> None:
    rows = [row for row in read_audit(everything.folder / "audit.parquet") if row.filter == "pii"]
    assert rows and all(row.detail.startswith("email ") for row in rows)
    assert page[1].row("edits", "email")[1] == count(sum(row.score or 0 for row in rows))
    assert "letters.fi" not in page[0]
    assert "<EMAIL>" in page[1].texts["filters"] and "<EMAIL>" in page[1].texts["duplicates"]
    assert "letters.fi" not in (everything.folder / "report.json").read_text()


def test_the_quarantine_names_places(page: tuple[str, Page]) -> None:
    row = page[1].row("quarantine", "chat.jsonl:4")
    assert row[1:3] == ["talk", "broken-json"]


def _without(built: BuiltData, folder: Path, names: list[str]) -> Contents:
    shutil.copytree(built.folder, folder)
    for name in names:
        (folder / name).unlink()
    return Contents(folder, {key: value for key, value in built.manifest.items() if key not in ("curriculum", "tasks")})


def test_what_a_folder_lacks_is_left_out(everything: BuiltData, tmp_path: Path) -> None:
    receipts = ["report.json", "ledger.json", "audit.parquet", "documents-train.parquet"]
    parsed = Page(render(_without(everything, tmp_path / "old", receipts)))
    found = [attributes["id"] for tag, attributes in parsed.tags if tag == "section"]
    assert found == ["sources", "records", "build"]


def test_a_build_without_options_has_a_page(mixed: BuiltData) -> None:
    parsed = Page(render(Contents.load(mixed.folder)))
    found = [attributes["id"] for tag, attributes in parsed.tags if tag == "section"]
    assert {"funnel", "sources", "lengths", "records", "build"} <= set(found)
    assert not {"filters", "signals", "stages", "mix", "tasks", "languages"} & set(found)


def test_the_page_is_written_beside_the_folder(everything: BuiltData, tmp_path: Path) -> None:
    path = write_report(everything.folder)
    assert path == everything.folder.with_name(f"{everything.folder.name}.html")
    assert path.read_text() == render(Contents.load(everything.folder))
    assert write_report(everything.folder, tmp_path / "a" / "page.html").read_text() == path.read_text()


def _refused(everything: BuiltData, tmp_path: Path) -> Iterator[tuple[Path, Path | None, type[Exception], str]]:
    yield everything.folder, everything.folder / "report.html", OutputError, "lies in the dataset"
    yield everything.folder, tmp_path, OutputError, "is a folder"
    yield tmp_path, None, DataError, "is no dataset"


def test_where_it_cannot_be_written(everything: BuiltData, tmp_path: Path) -> None:
    for folder, out, error, said in _refused(everything, tmp_path):
        with pytest.raises(error, match=said) as caught:
            write_report(folder, out)
        assert "\n" not in str(caught.value)
    assert not (everything.folder / "report.html").exists()
