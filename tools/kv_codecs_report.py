"""The record of ``tools/kv_codecs.py``: Markdown and JSON.

python tools/kv_codecs_report.py outbox/benchmarks/kv_codecs.json      (the text again, from what was measured)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from refractor_megatron.evaluation.evidence import record, table

#: On the relative Frobenius error, of codec tight.
BOUND = 1e-3


def write(result: dict[str, Any], out: Path) -> list[Path]:
    """Write ``out`` (.md) and, beside it, the same name with .json."""
    out.parent.mkdir(parents=True, exist_ok=True)
    paths = [out, out.with_suffix(".json")]
    paths[1].write_text(json.dumps(result, indent=1) + "\n")
    out.write_text(markdown(result, paths[1].name))
    return paths


def markdown(result: dict[str, Any], data: str) -> str:
    """The record as text."""
    at, run = result["attention"], result["run"]
    machine = f"{result['hardware']}; {result['threads']} thread(s)"
    about = (
        f"model: `{run['preset']}`, configuration `{run['hash']}`, step {run['step']}, data `{run['data'][:12]}`; "
        f"{at['layers']} layers, {at['heads']} heads over {at['kv_heads']} key/value heads of {at['head_dim']}, window "
        f"{at['window']}, {at['summaries']} summaries per block of {at['block']}"
        + (", retrieved records" if at["retrieval"] else "")
    )
    odd = result["outliers"]
    text = (
        f"Keys (after rotary positions) and values of all layers on the first {result['seq_len']:,} tokens of "
        f"{result['documents']} held-out documents, in chunks of {result['chunk']} tokens of one sequence, headers "
        "included in the bits. Errors are relative to the K/V given: fp32 as the model computes them, or those rounded "
        "to bf16, as a cache holds them. Frobenius is the rms over chunks, the worst chunk in brackets; vector norm is "
        "|‖x'‖ − ‖x‖| / ‖x‖ of each head's vector. Attention output is |o − o'| / |o| of the module's own forward "
        "(local window and summaries, the latter pooled from the restored K/V; same queries): of all layers at once, "
        "the worst layer, and the 99th percentile of tokens. A decoder that keeps its window and summaries raw is "
        "below that. Loss is the mean absolute change of a token's loss, in nats, with all K/V of every layer "
        "restored. Bound missed counts the chunks that `encode` gives to the next codec.\n\n"
        f"The largest channel of a head is at most {odd['before']['K']:.1f} times its median channel in K and "
        f"{odd['before']['V']:.1f} times in V here; larger models have channels that stick out more. "
        f'"With outliers" are the same K/V with every {odd["every"]}th channel times {odd["factor"]:g}, that of the '
        "queries divided by as much."
    )
    parts = [text, "", tables(result), reading(result)]
    title = "Codecs of the KV cache on a trained model's keys and values"
    return record(title, result["commit"], machine, [result["command"]], [data], "\n".join(parts), [about])


def tables(result: dict[str, Any]) -> str:
    """Both tables, and the speeds."""
    header = [
        "format", "bits/value", "of fp16", "Frobenius K", "Frobenius V", "vector norm rms", "p99", "max",
        "attention output", "worst layer", "p99 of tokens", "loss", "bound missed",
    ]  # fmt: skip
    parts = []
    for dtype, rows in result["kinds"].items():
        cells = [row(name, one, result["formats"][name]) for name, one in rows.items()]
        parts += [f"## Keys and values in {dtype}\n", table(header, cells)]
    parts += ["## Speed, MB/s of raw bytes\n", speeds(result)]
    return "\n".join(parts)


def row(name: str, one: dict[str, Any], form: dict[str, Any]) -> list[str]:
    """One line of a table."""
    missed = f"{one['bound_missed']} of {one['chunks']}" if form["codec"] else "-"
    return [
        name,
        f"{one['bits_per_value']:.3f}",
        f"{one['bits_per_value'] / 16:.3f}",
        *(f"{short(one['frobenius'][k]['rms'])} ({short(one['frobenius'][k]['worst'])})" for k in "KV"),
        *(short(one["vector_norm"][k]) for k in ("rms", "p99", "max")),
        short(one["output"]["all"]),
        short(max(one["output"]["layers"].values())),
        short(one["output"]["token_p99"]),
        short(one["loss"]["mean_absolute"]) if one["loss"] else "-",
        missed,
    ]


def short(error: float) -> str:
    """Two digits; nothing is 0."""
    return f"{error:.1e}" if error else "0"


def speeds(result: dict[str, Any]) -> str:
    """Encoding includes decoding and measuring the error, without which nothing is stored."""
    codecs = [name for name in next(iter(result["speed"].values())) if name != "chunk"]
    rows = [
        [name, *(f"{by[name][way]:,.0f}" for by in result["speed"].values() for way in ("encode", "decode"))]
        for name in codecs
    ]
    header = ["codec", *(f"{way}, {dtype}" for dtype in result["speed"] for way in ("encode", "decode"))]
    sizes = " and ".join(f"{by['chunk']['megabytes']:.1f} MB of {dtype}" for dtype, by in result["speed"].items())
    return table(header, rows) + (
        f"\nOne chunk of a batch of {result['documents']} sequences ({sizes}), median; the encoder decodes what it "
        "made and measures the error, which is in its time.\n"
    )


def reading(result: dict[str, Any]) -> str:
    """What the tables say, from the figures."""
    head = ["worst chunk, Frobenius", "tight", "int11/64, no rotation", "E3M7/64", "bits of exact", "bits of tight"]
    names = ("**tight**", "int11/64, no rotation", "E3M7/64, shared exponent")
    rows = []
    for kind, forms in result["kinds"].items():
        worst = [max(forms[name]["frobenius"][k]["worst"] for k in "KV") for name in names]
        cells = [f"{x:.1e}" if x <= BOUND else f"**{x:.1e}**" for x in worst]
        rows.append([kind, *cells, *(f"{forms[name]['bits_per_value']:.2f}" for name in ("**exact**", "**tight**"))])
    holds = [name for i, name in enumerate(head[1:4], 1) if not any(line[i].startswith("*") for line in rows)]
    lines = [
        "## What tight is made of\n",
        table(head, rows),
        f"Bold misses {BOUND:g}. Within it everywhere: {', '.join(holds) or 'none'}.\n",
        "## norm, version 2 against version 1\n",
    ]
    rows = []
    for kind, forms in result["kinds"].items():
        pair = [forms["norm, version 1 (no rotation)"], forms["**norm**"]]
        rows.append(
            [
                kind,
                *(
                    " → ".join(f"{one[a][b]:.1e}" for one in pair)
                    for a, b in (("vector_norm", "rms"), ("output", "all"))
                ),
                " → ".join(f"{one['bits_per_value']:.3f}" for one in pair),
                " → ".join(str(one["bound_missed"]) for one in pair) + f" of {pair[0]['chunks']}",
            ]
        )
    lines.append(table(["", "vector norm rms", "attention output", "bits/value", "bound missed"], rows))
    return "\n".join(lines)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    for written in write(json.loads(source.read_text()), source.with_suffix(".md")):
        print(f"wrote {written}")
