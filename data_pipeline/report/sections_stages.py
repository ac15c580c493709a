"""Sections of the page about what is trained on: stages, mix, made tasks and token records."""

from __future__ import annotations

from typing import Any

from data_pipeline.report.contents import Contents, totals
from data_pipeline.report.html import bar, count, details, esc, long_table, note, percent, short, table

_DOMAINS = 16
#: Passes up to which repeated text teaches about as much as fresh text (Muennighoff et al. 2023).
REPEATS = 4.0


def stages(data: Contents) -> str:
    """Tokens of each stage, how much of them is long, and what packing cut."""
    if not data.stages:
        return ""
    most = max(stage["tokens"] for stage in data.stages)
    rows = [
        [
            f"<b>{count(stage['length'])}</b>", count(stage["sequences"]), short(stage["tokens"]),
            bar(stage["tokens"] / most), percent(stage["long_share"]) if stage["below"] else "–",
            percent(stage["long_share_drawn"]) if stage["below"] else "–",
            f"{stage['pieces'] / stage['sequences']:.1f}",
            f"{count(stage['documents_cut'])} <small>({percent(stage['documents_cut_share'])})</small>",
            count(stage["documents_longer"]),
        ]
        for stage in data.stages
    ]  # fmt: skip
    plan = data.curriculum
    said = [
        "Long: tokens in documents that the stage before cannot hold whole, in the stage's text and as it is drawn "
        "with the weights of the mix. Every sequence is full; a document is cut only to fill the last place.",
        f"{count(plan['tokens_left_over'])} tokens filled no sequence.",
    ]
    if plan.get("tokens_of_weight_0"):
        said.append(f"{count(plan['tokens_of_weight_0'])} tokens are of domains with weight 0.")
    said += [
        f"Stage {count(one['length'])} was left out: of documents that long there are {count(one['tokens'])} tokens, "
        f"and it needs {count(one['needs'])}."
        for one in plan.get("left_out", [])
    ]
    head = [
        "length",
        "sequences",
        "tokens",
        "",
        "long",
        "long as drawn",
        "pieces/sequence",
        "documents cut",
        "longer than it",
    ]
    return note(" ".join(said)) + table(head, rows, (0, 1, 2, 4, 5, 6, 7, 8))


def mix(data: Contents) -> str:
    """Share of every domain in the schedule of every stage against its target, and how often its text is read."""
    if not data.stages:
        return ""
    found = [{row["name"]: row for row in stage["domains"]} for stage in data.stages]
    names = sorted({name for one in found for name in one}, key=lambda name: (-_sum(found, name), name))
    largest = max(row["share"] for one in found for row in one.values())
    natural = _natural(data)
    rows = [
        [
            esc(name),
            percent(natural[name]) if name in natural else "–",
            *(_cell(one.get(name), largest) for one in found),
        ]
        for name in names
    ]
    gap = max(abs(row["share"] - row["target"]) for one in found for row in one.values())
    again = sum(1 for one in found for row in one.values() if row["epochs_per_pass"] > REPEATS)
    temperature = data.curriculum["temperature"]
    lead = (
        f"Bar: share of the stage's samples; mark: its target, at temperature {temperature:g}. "
        f"Largest gap between the two: {100 * gap:.2g} percentage points. × says how often a domain's text is read "
        "while the stage is read once"
    )
    lead += (
        f"; more than {REPEATS:g} times in {again} places, which are marked."
        if again
        else f", never more than {REPEATS:g} times."
    )
    head = ["domain", "of the text", *(f"stage {count(stage['length'])}" for stage in data.stages)]
    empty = "".join(
        f"<li>stage {count(stage['length'])}: {esc(', '.join(stage['domains_without_sequence']))}</li>"
        for stage in data.stages
        if stage["domains_without_sequence"]
    )
    missing = details("Domains too small for a sequence of a stage", f"<ul>{empty}</ul>") if empty else ""
    return note(lead) + long_table(head, rows, (1,), _DOMAINS, "domains", "mix") + missing


def _sum(found: list[dict[str, Any]], name: str) -> float:
    return float(sum(one[name]["share"] for one in found if name in one))


def _natural(data: Contents) -> dict[str, float]:
    """Share of each domain in the tokens of the training text."""
    documents = data.documents("train")
    names = data.manifest.get("domains", [])
    if documents is None or not documents.tokens.sum():
        return {}
    whole = int(documents.tokens.sum())
    return {names[number]: sums[0] / whole for number, _, sums in totals(documents.domain, documents.tokens)}


def _cell(row: dict[str, Any] | None, largest: float) -> str:
    if row is None:
        return "<small>–</small>"
    hot = ' class="hot"' if row["epochs_per_pass"] > REPEATS else ""
    said = f"{percent(row['share'])} <small{hot}>× {row['epochs_per_pass']:.2f}</small>"
    title = f"target {row['target']:.4%}, share {row['share']:.4%}, {count(row['sequences'])} sequences"
    return f'<span title="{title}">{said}</span>{bar(row["share"] / largest, row["target"] / largest)}'


def tasks(data: Contents) -> str:
    """Made documents: by stage and family, and by kind."""
    made = data.manifest.get("tasks", {})
    rows = []
    for split, label in (("tasks", "training"), ("tasks-heldout", "held out")):
        for one in made.get(split, {}).get("stages", []):
            kinds = ", ".join(f"{count(n)} {esc(kind)}" for kind, n in one["kinds"].items())
            rejected = ", ".join(f"{count(n)} {esc(why)}" for why, n in one["rejected"].items())
            rows.append(
                [
                    label, count(one["stage"]), esc(one["family"].replace("_", "-")), count(one["documents"]),
                    short(one["tokens"]), kinds or esc(one["why_none"]) or "–", rejected or "–",
                ]
            )  # fmt: skip
    if not rows:
        return ""
    total = {
        label: made.get(split, {}).get("documents", 0)
        for split, label in (("tasks", "training"), ("tasks-heldout", "held-out"))
    }
    lead = note(
        f"{count(total['training'])} training and {count(total['held-out'])} held-out tasks, each made of text of its "
        "own split. Not used: candidates that were rejected, and why."
    )
    head = ["split", "stage", "family", "tasks", "tokens", "kinds", "not used"]
    return lead + table(head, rows, (1, 3, 4), "tasks")


def records(data: Contents) -> str:
    """Tokens by role and by mask bit, in text and tasks."""
    stores = {"train": "training text", "heldout": "held-out text", "tasks": "training tasks"}
    roles = {store: data.roles(store) for store in stores}
    bits = {store: data.bits(store) for store in stores}
    names = list(dict.fromkeys(name for one in roles.values() for name in one))
    marks = list(dict.fromkeys(name for one in bits.values() for name in one))
    if not names:
        return ""
    shown = [store for store in stores if roles[store]]
    rows = [[esc(name), *(count(roles[store].get(name, 0)) for store in shown)] for name in names]
    rows += [[f"<code>{esc(name)}</code>", *(count(bits[store].get(name, 0)) for store in shown)] for name in marks]
    lead = note(
        "Tokens by the role of their record, then by the mask bits it carries. Plain documents have the role data."
    )
    return lead + table(["role or bit", *(stores[store] for store in shown)], rows, tuple(range(1, len(shown) + 1)))
