"""The report stands alone, escapes what runs say, and never fails for something that a run did not record."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from refractor_megatron.errors import OutputError
from refractor_megatron.evaluation import report
from refractor_megatron.evaluation.report import write_png, write_report

MakeRun = Callable[..., Path]
VOID = {"meta", "img", "br", "link"}
FILES = (
    "metrics.jsonl", "eval.jsonl", "baselines.json", "final.json", "samples.json", "data.json", "environment.json",
    "device.json", "config.yaml",
)  # fmt: skip


class Page(HTMLParser):
    """Checks that tags close in order, and collects attributes and text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == [], f"unclosed {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


@pytest.fixture
def blank_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take most of a report's time; tests about words do without."""
    monkeypatch.setattr(report, "panel_svg", lambda *_: "<svg/>")


def _page(folder: Path) -> Page:
    return Page(write_report(folder).read_text())


def test_a_whole_run(make_run: MakeRun) -> None:
    page = _page(make_run(60))
    for expected in (
        "Held-out loss 3.712 nats per token (1.306 bits per byte): 44.9% below the unigram entropy of the same tokens "
        "and 19.3% below the bigram model.",
        "step 60 of 60", "245,760 (1.44 epochs)", "31.0% of 0.12 TF/s (measured fp32 GEMM, 2 threads)",
        "configuration hash 9f3c2a7e51b0d846", "data digest 81c0aa53e1f27d90", "commit 4be1d2c09a77",
        "this run, EMA weights3.6551.28645.7%20.5%", "bigram model4.5991.61831.7%–", "unigram entropy6.7342.369–−46.4%",
        "126,976 held-out tokens predicted", "linux-doc-6.1", "GPL-2", "which returns 0 for <every> device",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert "not recorded" not in page.text and "unused" not in page.text
    assert sum(tag == "img" for tag, name, _ in page.attributes if name == "src") == 9
    assert page.text.count("Sample ") == 3


def test_nothing_outside_the_file_is_needed(make_run: MakeRun) -> None:
    source = write_report(make_run(3)).read_text()
    addresses = [value for _, name, value in Page(source).attributes if name in ("src", "href", "srcset", "action")]
    assert addresses and all(address.startswith("data:image/svg+xml;base64,") for address in addresses)
    assert not re.search(r"url\(|@import|<script", source)


@pytest.mark.usefixtures("blank_plots")
def test_what_a_run_says_is_text_and_not_markup(make_run: MakeRun) -> None:
    folder, attack = make_run(2, name="<b>&amp;"), "<script>alert(1)</script>\"'&"
    (folder / "samples.json").write_text(json.dumps([{"prompt": attack, "continuation": attack, attack: attack}]))
    (folder / "environment.json").write_text(json.dumps({attack: attack, "commit": attack}))
    (folder / "device.json").write_text(json.dumps({"peak_flops": 1e12, "peak_name": attack, "ranks": 4}))
    (folder / "data.json").write_text(json.dumps({"digest": attack, "sources": [{"name": attack, "licence": attack}]}))
    (folder / "config.yaml").write_text(f"resolved:\n  preset: '{attack.replace(chr(39), '')}'\n")
    source = write_report(folder).read_text()
    assert "<script" not in source and "<b>" not in source
    assert {tag for tag, _, _ in Page(source).attributes} <= {
        "html", "meta", "p", "section", "div", "span", "table", "tr", "th", "td", "img",
    }  # fmt: skip
    assert Page(source).text.count("alert(1)") >= 8


def test_a_run_of_one_step(make_run: MakeRun) -> None:
    page = _page(make_run(1))
    assert "step 1 of 1" in page.text and "not recorded" not in page.text


def test_an_empty_folder_says_what_is_not_recorded(tmp_path: Path) -> None:
    page = _page(tmp_path)
    assert "No held-out loss is recorded for this run yet." in page.text
    assert page.text.count("not recorded") >= 20
    assert not any(tag == "img" for tag, _, _ in page.attributes)
    write_png(tmp_path, tmp_path / "plots.png")


def test_files_may_be_missing_one_after_the_other(make_run: MakeRun) -> None:
    folder, gaps = make_run(3), [0]
    for name in FILES:
        (folder / name).unlink()
        gaps.append(_page(folder).text.count("not recorded"))
    assert gaps == sorted(gaps) and gaps[-1] >= 20


@pytest.mark.parametrize(
    "junk",
    [b"", b"\x00\xff\xfe", b'{"loss": ', b"[1, null, [2]]", b"null", b'"text"', b"{}\n[]\n",
     b'{"step": "x", "loss": {}, "weights": 3, "raw": 5, "sources": 7, "folder": 1, "unigram": [], "train": []}',
     b'{"step": 1, "loss": "nan", "lr": null, "expert_load": [], "router_entropy_layer": ["a"], "weights": "raw"}'],
)  # fmt: skip
def test_damaged_files_are_as_good_as_missing(make_run: MakeRun, junk: bytes) -> None:
    folder = make_run(3)
    for name in FILES:
        (folder / name).write_bytes(junk)
    assert "not recorded" in _page(folder).text


@pytest.mark.usefixtures("blank_plots")
def test_a_run_in_progress_uses_the_last_evaluation(make_run: MakeRun) -> None:
    folder = make_run(60)
    (folder / "final.json").unlink()
    last = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()][-2]
    assert last["weights"] == "raw"
    assert f"Held-out loss {last['loss']:.3f} nats per token" in _page(folder).text


@pytest.mark.usefixtures("blank_plots")
def test_worse_than_the_baselines_is_said_plainly(make_run: MakeRun) -> None:
    folder = make_run(2)
    (folder / "final.json").write_text(json.dumps({"raw": {"loss": 7.0, "bits_per_byte": 2.4}}))
    text = _page(folder).text
    assert "4.0% above the unigram entropy" in text and "52.2% above the bigram model" in text
    assert "Above bigram model" in text and "Below" not in text


@pytest.mark.usefixtures("blank_plots")
def test_sources_come_from_the_dataset_folder_and_the_tail_is_summed_up(make_run: MakeRun, tmp_path: Path) -> None:
    folder, data = make_run(1), tmp_path / "data"
    data.mkdir()
    rows = [{"name": f"package-{i:02d}", "licence": "MIT", "documents": 1, "bytes": 1e6 + i} for i in range(20)]
    (data / "sources.json").write_text(json.dumps(rows))
    (folder / "data.json").write_text(json.dumps({"digest": "d", "folder": str(data)}))
    text = _page(folder).text
    assert "package-19" in text and "package-05" in text and "package-04" not in text
    assert "5 moresee sources.json55.00" in text and "all2020.00" in text


def test_the_picture(make_run: MakeRun, tmp_path: Path) -> None:
    out = tmp_path / "docs" / "run.png"
    write_png(make_run(30), out)
    header = out.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert (int.from_bytes(header[16:20]), int.from_bytes(header[20:24])) == (1800, 996)


@pytest.mark.usefixtures("blank_plots")
def test_no_folder_and_no_room_are_named(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match="nowhere is not a folder"):
        write_report(tmp_path / "nowhere")
    folder = make_run(1)
    (folder / "report.html").mkdir()
    with pytest.raises(OutputError, match=r"cannot write .*report\.html"):
        write_report(folder)
    assert not list(folder.glob(".report*")), "no draft stays behind"
    monkeypatch.setattr(report, "write_picture", _no_room)
    with pytest.raises(OutputError, match=r"plots\.png \(No space left on device\)"):
        write_png(folder, tmp_path / "plots.png")


def _no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
