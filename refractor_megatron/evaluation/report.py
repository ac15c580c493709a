"""The report of a run: one HTML file that needs nothing beside it, and the same plots as one picture."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from ..errors import OutputError
from ..training.folder import RunFolder
from .report_data import RunData, number, text
from .report_flow import FLOW_PANELS, attention_facts, flow_facts
from .report_plots import LOSS, PANELS, Panel, data_uri, panel_svg, write_picture
from .report_style import CSS
from .report_summary import MISSING, ResultRow, facts, headline, progress, result_rows, tiles

#: Characters of a prompt that are shown: its end, which the continuation follows.
PROMPT_CHARS = 700
#: Sources listed before the rest is summed up.
MAX_SOURCES = 15
#: What the two baselines of the result table are.
BASELINE_NOTE = (
    "Unigram entropy: that of these very tokens, the best that any model without context can do. "
    "Bigram model: Kneser-Ney, fitted on the training split."
)


def write_report(run_dir: Path) -> Path:
    """Render ``run_dir/report.html`` from whatever the run has recorded so far, and return its path.

    The file appears whole or not at all. Raises `OutputError` where ``run_dir`` is no folder or cannot be written.
    """
    page = render(RunData.load(run_dir))
    out = RunFolder(run_dir).report
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        draft.write_text(page, encoding="utf-8")
        draft.replace(out)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise OutputError(f"cannot write {out} ({error.strerror}): free space or mend its permissions") from error
    return out


def write_png(run_dir: Path, out: Path) -> None:
    """Write the six main plots as one PNG to ``out``. Raises `OutputError` as `write_report`."""
    run = RunData.load(run_dir)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_picture(run, f"{_name(run)}, {progress(run)}\n{headline(run)}", out)
    except OSError as error:
        raise OutputError(f"cannot write {out} ({error.strerror}): free space or choose another file") from error


def render(run: RunData) -> str:
    """The page as text."""
    marks = [f"{label} {value}" for label, value in facts(run)[-3:] if value != MISSING]
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(_name(run))}: training report</title>
<style>{CSS}</style>
<main>
<header>
<p class="kicker">REFRACTOR training report</p>
<h1>{escape(_name(run))}</h1>
<p class="lead">{escape(headline(run))}</p>
<p class="identity">{" · ".join(map(escape, [progress(run), *marks]))}</p>
</header>
{_tiles(run)}
<section class="pair">
<div><h2>Results on held-out documents</h2>{_results(run)}</div>
<div><h2>Run</h2>{_table(facts(run))}</div>
</section>
<section><h2>{escape(LOSS.title)}</h2>{_figure(LOSS, run, 11.2, 4.1)}</section>
<section class="grid">{"".join(_card(panel, run) for panel in PANELS)}</section>
<section class="pair">
<div><h2>Who may read whom</h2>{_table(flow_facts(run))}</div>
<div><h2>Attention</h2>{_table(attention_facts(run))}</div>
</section>
<section class="grid">{"".join(_card(panel, run) for panel in FLOW_PANELS)}</section>
<section><h2>Sampled continuations</h2>{_samples(run)}</section>
<section><h2>Data</h2>{_sources(run)}</section>
<section><h2>Environment</h2>{_table(_flat({**run.environment, **run.device}))}</section>
<section><h2>Configuration</h2>{_config(run)}</section>
</main>
</html>
"""


def _name(run: RunData) -> str:
    return run.folder.resolve().name


def _missing() -> str:
    return f'<p class="missing">{MISSING}</p>'


def _tiles(run: RunData) -> str:
    cells = "".join(
        f'<div class="tile"><span class="label">{escape(tile.label)}</span>'
        f'<span class="value{" missing" if tile.value == MISSING else ""}">{escape(tile.value)}</span>'
        f'<span class="note">{escape(tile.note)}</span></div>'
        for tile in tiles(run)
    )
    return f'<section class="tiles">{cells}</section>'


def _results(run: RunData) -> str:
    def cell(value: float | None, form: str) -> str:
        return "<td>–</td>" if value is None else f"<td>{format(value, form).replace('-', '−')}</td>"

    def line(row: ResultRow) -> str:
        numbers = (
            cell(row.loss, ".3f") + cell(row.bits_per_byte, ".3f") + cell(row.below_unigram, ".1%")
            + cell(row.below_bigram, ".1%")
        )  # fmt: skip
        return f"<tr{' class=own' if row.own else ''}><th>{escape(row.name)}</th>{numbers}</tr>"

    rows = result_rows(run)
    if all(row.loss is None for row in rows):
        return _missing()
    head = "<th></th><th>nats/token</th><th>bits/byte</th><th>below unigram</th><th>below bigram</th>"
    tokens = number(run.result("raw"), "tokens")
    scored = f"{tokens:,.0f} held-out tokens predicted. " if tokens else ""
    note = f'<p class="note">{scored}{BASELINE_NOTE}</p>'
    return (
        f'<table class="results"><thead><tr>{head}</tr></thead><tbody>{"".join(map(line, rows))}</tbody></table>{note}'
    )


def _table(rows: Iterable[tuple[str, str]]) -> str:
    body = "".join(f"<tr><th>{escape(label)}</th><td>{escape(value)}</td></tr>" for label, value in rows)
    return f'<table class="facts"><tbody>{body}</tbody></table>' if body else _missing()


def _flat(mapping: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(str(key).replace("_", " "), str(value)) for key, value in mapping.items()]


def _card(panel: Panel, run: RunData) -> str:
    return f'<div class="card"><h3>{escape(panel.title)}</h3>{_figure(panel, run, 5.5, 2.9)}</div>'


def _figure(panel: Panel, run: RunData, width: float, height: float) -> str:
    svg = panel_svg(panel, run, width, height)
    if svg is None:
        return _missing()
    caption = f"<figcaption>{escape(panel.caption)}</figcaption>" if panel.caption else ""
    return f'<figure><img alt="{escape(panel.title)} by step" src="{data_uri(svg)}">{caption}</figure>'


def _samples(run: RunData) -> str:
    def block(number_: int, sample: Mapping[str, Any]) -> str:
        prompt, continuation = (text(sample, key) or "" for key in ("prompt", "continuation"))
        shown = f"… {prompt[-PROMPT_CHARS:]}" if len(prompt) > PROMPT_CHARS else prompt
        options = ", ".join(
            f"{key.replace('_', ' ')} {value}" for key, value in sample.items() if key not in ("prompt", "continuation")
        )
        return (
            f'<div class="sample"><pre><span class="prompt">{escape(shown)}</span>'
            f'<span class="continuation">{escape(continuation.rstrip())}</span></pre>'
            f'<p class="note">Sample {number_}{escape("; " + options if options else "")}</p></div>'
        )

    if not run.samples:
        return _missing()
    lead = '<p class="note">Held-out text in grey, the model\'s continuation on blue.</p>'
    return lead + "".join(block(number_, sample) for number_, sample in enumerate(run.samples, 1))


def _sources(run: RunData) -> str:
    if not run.sources:
        return _missing()

    def line(name: str, version: str, licence: str, documents: float, size: float) -> str:
        return (
            f"<tr><th>{escape(name)}</th><td>{escape(version)}</td><td>{escape(licence)}</td>"
            f"<td class=n>{documents:,.0f}</td><td class=n>{size / 1e6:,.2f}</td></tr>"
        )

    counts = [(number(row, "documents") or 0, number(row, "bytes") or 0) for row in run.sources]
    shown = [
        line(text(row, "name") or MISSING, text(row, "version") or "", text(row, "licence") or MISSING, *count)
        for row, count in list(zip(run.sources, counts, strict=True))[:MAX_SOURCES]
    ]
    if rest := counts[MAX_SOURCES:]:
        shown.append(
            line(f"{len(rest)} more", "", "see sources.json", sum(d for d, _ in rest), sum(b for _, b in rest))
        )
    shown.append(line("all", "", "", sum(d for d, _ in counts), sum(b for _, b in counts)))
    head = "<th>source</th><th>version</th><th>licence</th><th class=n>documents</th><th class=n>MB</th>"
    return f'<table class="sources"><thead><tr>{head}</tr></thead><tbody>{"".join(shown)}</tbody></table>'


def _config(run: RunData) -> str:
    if not run.config_text:
        return _missing()
    return f"<details><summary>Resolved configuration</summary><pre>{escape(run.config_text)}</pre></details>"
