"""What each codec of the cache costs and loses on the keys and values of a trained model, over held-out documents.

python tools/kv_codecs.py RUN_FOLDER --documents 16

Keys (after rotary positions) and values of every layer are caught on their way into attention, cut into chunks as the
cache cuts them, encoded, decoded, and handed to the same attention again. Formats that are no codecs of ours stand
beside them as points of reference.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kv_codecs_report
import numpy as np
import torch
from record import COMMIT, ROOT
from torch import Tensor

from refractor_megatron.config import RunConfig
from refractor_megatron.engines.base import Batch
from refractor_megatron.engines.megatron import stop_distributed
from refractor_megatron.errors import DataError, RefractorError
from refractor_megatron.evaluation.evidence import processor
from refractor_megatron.evaluation.position_run import long_documents
from refractor_megatron.evaluation.trained import Trained, load_trained
from refractor_megatron.memory import metrics
from refractor_megatron.memory.codecs import CODECS, codec_of, decode, encode, inspect
from refractor_megatron.memory.quantise import BLOCK, in_blocks, log_scales, nearest, rotation
from refractor_megatron.training.batches import stack
from refractor_megatron.training.dataset import heldout_stream
from refractor_megatron.training.folder import RunFolder
from refractor_megatron.transformation.core_attention import TriTierCoreAttention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: Larger decoders have a few channels of keys and values that stick out; a small one is given them: every eighth
#: channel times 12, the query's divided by as much, which leaves the logits of the window as they were.
OUTLIERS, FACTOR = 8, 12.0
#: Runs of an encoder or decoder whose median is its speed, after one that is not counted.
REPEATS = 15

RoundTrip = Callable[[Tensor], tuple[Tensor, int]]  # the tensor that comes back, and the bits it took


@dataclass(frozen=True)
class Format:
    """One way to keep keys and values. ``codec`` and ``version`` where it is one of ours."""

    name: str
    round_trip: RoundTrip
    codec: str | None = None
    version: int | None = None


def cast(dtype: torch.dtype) -> RoundTrip:
    """Kept in another floating-point type."""
    return lambda x: (x.to(dtype).to(x.dtype), 16 * x.numel())


def int8_per_tensor(x: Tensor) -> tuple[Tensor, int]:
    """One scale for the whole chunk, as caches with a scale per tensor do."""
    scale = x.float().abs().max() / 127
    return ((x.float() / scale).round() * scale).to(x.dtype), 8 * x.numel() + 32


def int11_unturned(x: Tensor) -> tuple[Tensor, int]:
    """`tight` without its rotation."""
    blocks = in_blocks(x.float().numpy())
    _, codes, scales = log_scales(blocks, 1023)
    back = (nearest(blocks / np.where(scales > 0, scales, 1), 1023) * scales).reshape(-1)[: x.numel()]
    return torch.from_numpy(back).reshape(x.shape).to(x.dtype), 11 * blocks.size + 8 * codes.size + 32


def e3m7(x: Tensor) -> tuple[Tensor, int]:
    """Block minifloat: sign, 3 exponent bits under an exponent shared by 64 values, 7 bits of mantissa, subnormals."""
    blocks = torch.from_numpy(in_blocks(x.float().numpy()))
    shared = torch.frexp(blocks.abs().amax(1, keepdim=True)).exponent - 1
    own = torch.maximum(torch.frexp(blocks).exponent - 1, shared - 6)
    step = torch.exp2((own - 7).double())
    largest = torch.exp2(shared.double()) * (2 - 2**-7)
    back = ((blocks / step).round() * step).clamp(-largest, largest).float().reshape(-1)[: x.numel()]
    return back.reshape(x.shape).to(x.dtype), 11 * blocks.numel() + 8 * len(blocks)


def ours(codec: str, version: int | None = None) -> RoundTrip:
    """A codec with its bound wide open: what it does, not what stands in for it."""

    def round_trip(x: Tensor) -> tuple[Tensor, int]:
        data = encode(x, codec, float("inf"), escalate=False, version=version)
        return decode(data), 8 * len(data)

    return round_trip


FORMATS = [
    Format("fp16", cast(torch.float16)),
    Format("bf16", cast(torch.bfloat16)),
    Format("int8, a scale per tensor", int8_per_tensor),
    Format("norm, version 1 (no rotation)", ours("norm", 1), "norm", 1),
    Format("**norm**", ours("norm"), "norm"),
    Format("int11/64, no rotation", int11_unturned),
    Format("E3M7/64, shared exponent", e3m7),
    Format("**tight**", ours("tight"), "tight"),
    Format("**exact**", ours("exact"), "exact"),
]


@dataclass
class Sums:
    """Running sums over chunks and layers for one format and dtype."""

    bits: int = 0
    values: int = 0
    chunks: int = 0
    refused: int = 0  # chunks (K or V) whose bound the codec missed, so that another codec stands in
    frobenius: dict[str, list[float]] = field(default_factory=lambda: {"K": [], "V": []})
    vectors: list[np.ndarray] = field(default_factory=list)
    output: dict[int, list[float]] = field(default_factory=dict)  # layer -> [squared error, squared reference]
    tokens: list[np.ndarray] = field(default_factory=list)  # relative output error of each token
    loss: list[np.ndarray] = field(default_factory=list)  # change of each token's loss

    def result(self) -> dict[str, Any]:
        """What the record says."""
        vectors, tokens = np.concatenate(self.vectors), np.concatenate(self.tokens)
        loss = np.concatenate(self.loss) if self.loss else None
        layers = {layer: (error / reference) ** 0.5 for layer, (error, reference) in self.output.items()}
        error, reference = np.sum(list(self.output.values()), axis=0)
        return {
            "bits_per_value": self.bits / self.values,
            "chunks": self.chunks,
            "bound_missed": self.refused,
            "frobenius": {
                k: {"rms": float(np.sqrt(np.mean(np.square(v)))), "worst": max(v)} for k, v in self.frobenius.items()
            },
            "vector_norm": {
                "rms": float(np.sqrt(np.mean(vectors**2))),
                "p99": float(np.quantile(vectors, 0.99)),
                "max": float(vectors.max()),
            },
            "output": {
                "all": float((error / reference) ** 0.5),
                "layers": layers,
                "token_p99": float(np.quantile(tokens, 0.99)),
                "token_max": float(tokens.max()),
            },
            "loss": None if loss is None else {"mean": float(loss.mean()), "mean_absolute": float(np.abs(loss).mean())},
        }


def chunked(x: Tensor, chunk: int, sums: Sums, which: str, form: Format) -> Tensor:
    """``x`` [s, b, h, d] after a round trip of each sequence's chunks [1, h, chunk, d]; measures them on the way."""
    parts = x.permute(1, 2, 0, 3)
    back = torch.empty_like(parts)
    for b in range(parts.shape[0]):
        for start in range(0, parts.shape[2], chunk):
            at = (slice(b, b + 1), slice(None), slice(start, start + chunk))
            raw = parts[at].contiguous()
            back[at], bits = form.round_trip(raw)
            a, z = metrics.rows_of(raw), metrics.rows_of(back[at])
            sums.bits, sums.values, sums.chunks = sums.bits + bits, sums.values + raw.numel(), sums.chunks + 1
            sums.frobenius[which].append(metrics.relative_frobenius(a, z))
            sums.vectors.append(metrics.vector_norm_errors(a, z))
            if form.codec is not None:
                header = inspect(encode(raw, form.codec, version=form.version))
                sums.refused += codec_of(header).name != form.codec
    return back.permute(2, 0, 1, 3)


@contextmanager
def attention_sees(trained: Trained, change: Callable[[int, list[Any]], None]) -> Iterator[None]:
    """Within it ``change(layer, [query, key, value, records])`` may replace what attention is given."""

    def hook(module: TriTierCoreAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = ("query", "key", "value", "attention_mask")
        given = [*args[:4], *(kwargs[name] for name in names[len(args) :])]
        change(module.layer_number, given)
        inside = min(len(args), 4)
        return (*given[:inside], *args[4:]), kwargs | dict(zip(names[inside:], given[inside:], strict=True))

    handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in attentions(trained).values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def attentions(trained: Trained) -> dict[int, TriTierCoreAttention]:
    """Attention modules by layer number."""
    found = (m for m in trained.engine.model.modules() if isinstance(m, TriTierCoreAttention))
    return {m.layer_number: m for m in found}


def caught(trained: Trained, batch: Batch) -> dict[int, list[Tensor]]:
    """[query, key, value, records] that each layer's attention is given for ``batch``."""
    seen: dict[int, list[Tensor]] = {}
    with attention_sees(trained, lambda layer, given: seen.update({layer: list(given)})):
        trained.engine.token_losses(batch)
    return seen


@torch.no_grad()
def measure(trained: Trained, batches: list[Batch], chunk: int) -> dict[str, dict[str, Sums]]:
    """Sums by kind of keys and values (each dtype as caught and with outlier channels) and format."""
    kinds = {f"{dtype}{more}": (DTYPES[dtype], bool(more)) for more in ("", " with outliers") for dtype in DTYPES}
    sums = {kind: {form.name: Sums() for form in FORMATS} for kind in kinds}
    for number, batch in enumerate(batches):
        print(f"batch {number + 1} of {len(batches)}", file=sys.stderr, flush=True)
        seen = caught(trained, batch)
        for kind, (dtype, outliers) in kinds.items():
            given = {layer: with_outliers(x) if outliers else x for layer, x in seen.items()}
            raw = {layer: [x.to(dtype) for x in one[1:3]] for layer, one in given.items()}
            for form in FORMATS:
                measure_attention(trained, given, raw, chunk, form, sums[kind][form.name])
            if not outliers:  # the model itself has none
                base = losses_with(trained, batch, lambda x, dtype=dtype, **_: x.to(dtype))
                for form in FORMATS:
                    measure_loss(trained, batch, base, dtype, chunk, form, sums[kind][form.name])
    return sums


def with_outliers(given: list[Tensor]) -> list[Tensor]:
    """[query, key, value, records] with channels that stick out."""
    query, key, value, records = given
    factor = torch.ones(key.shape[-1], dtype=key.dtype)
    factor[::OUTLIERS] = FACTOR
    return [query / factor, key * factor, value * factor, records]


def measure_attention(
    trained: Trained,
    seen: dict[int, list[Tensor]],
    raw: dict[int, list[Tensor]],
    chunk: int,
    form: Format,
    sums: Sums,
) -> None:
    """Every layer's own attention, all its tiers, with restored keys and values against the raw ones."""
    for layer, module in attentions(trained).items():
        query, records = seen[layer][0], seen[layer][3]
        keys, values = raw[layer]
        restored = (chunked(x, chunk, sums, which, form) for x, which in ((keys, "K"), (values, "V")))
        expected = module(query, keys.to(query), values.to(query), records).double()
        off = module(query, *(x.to(query) for x in restored), records).double() - expected
        total = sums.output.setdefault(layer, [0.0, 0.0])
        total[0] += float(off.square().sum())
        total[1] += float(expected.square().sum())
        sums.tokens.append((off.norm(dim=-1) / expected.norm(dim=-1)).flatten().numpy())


def measure_loss(
    trained: Trained, batch: Batch, base: Tensor, dtype: torch.dtype, chunk: int, form: Format, sums: Sums
) -> None:
    """Loss of the whole model with all keys and values restored in every layer, against raw ones of the same dtype."""
    aside = Sums()  # these chunks were measured in `measure_attention`, from undisturbed layers
    quiet = Format(form.name, form.round_trip)

    def restored(x: Tensor, which: str) -> Tensor:
        return chunked(x.to(dtype), chunk, aside, which, quiet)

    sums.loss.append((losses_with(trained, batch, restored) - base).double().flatten().numpy())


def losses_with(trained: Trained, batch: Batch, change: Callable[..., Tensor]) -> Tensor:
    """Loss of every token where ``change(x, which=...)`` stands in for keys and values."""

    def replace(_: int, given: list[Any]) -> None:
        given[1:3] = (change(x, which=which).to(x) for x, which in ((given[1], "K"), (given[2], "V")))

    with attention_sees(trained, replace):
        return trained.engine.token_losses(batch)


def speed(trained: Trained, batches: list[Batch], chunk: int) -> dict[str, dict[str, dict[str, float]]]:
    """MB/s by dtype and codec, of raw bytes, on chunks [documents, h, chunk, d] of every layer's keys and values."""
    by_layer: dict[int, list[Tensor]] = {}
    for batch in batches:
        for layer, given in caught(trained, batch).items():
            by_layer.setdefault(layer, []).append(torch.stack(given[1:3])[:, :chunk])  # [2, chunk, b, h, d]
    chunks = [x.permute(1, 2, 0, 3).contiguous() for parts in by_layer.values() for x in torch.cat(parts, 2)]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, dtype in DTYPES.items():
        raw = [x.to(dtype) for x in chunks]
        megabytes = raw[0].numel() * raw[0].element_size() / 1e6
        for codec in CODECS:
            rates = [timed(raw[i % len(raw)], codec) for i in range(-1, REPEATS)][1:]
            encoding, decoding = (megabytes / float(np.median(column)) for column in zip(*rates, strict=True))
            found.setdefault(name, {})[codec] = {"encode": encoding, "decode": decoding}
        found[name]["chunk"] = {"megabytes": megabytes}
    return found


def timed(x: Tensor, codec: str) -> tuple[float, float]:
    """Seconds to encode and to decode."""
    started = time.perf_counter()
    data = encode(x, codec, float("inf"))
    between = time.perf_counter()
    decode(data)
    return between - started, time.perf_counter() - between


def held_out(folder: RunFolder, cfg: RunConfig, trained: Trained, documents: int) -> tuple[list[Batch], str]:
    """The first windows of long held-out documents as batches, and the digest of the data."""
    stream = heldout_stream(folder, cfg)
    starts = long_documents(stream)[:documents]
    if len(starts) < documents:
        raise DataError(
            f"the held-out split of {stream.folder} has {len(starts)} documents of more than {stream.seq_len} tokens: "
            f"give --documents {len(starts)}." if starts else f"{stream.folder} has no held-out document of a window."
        )  # fmt: skip
    size = cfg.train.micro_batch
    groups = [starts[i : i + size] for i in range(0, documents, size)]
    return [stack([stream.at(s) for s in group], trained.neighbours) for group in groups], stream.digest


def outliers(trained: Trained, batches: list[Batch]) -> dict[str, float]:
    """How far the largest channel of a head sticks out: its rms over the median channel's, the largest of all."""
    worst = {"K": 0.0, "V": 0.0}
    for given in caught(trained, batches[0]).values():
        for which, x in zip(worst, given[1:3], strict=True):
            channels = x.double().square().mean((0, 1)).sqrt()  # [h, d]
            worst[which] = max(worst[which], float((channels.amax(1) / channels.median(1).values).max()))
    return worst


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Load, measure, and say with what."""
    folder = RunFolder(args.run)
    cfg = RunConfig.load(folder.config)
    trained = load_trained(folder)
    batches, digest = held_out(folder, cfg, trained, args.documents)
    chunk = cfg.memory.kv.chunk
    found = measure(trained, batches, chunk)
    rates = speed(trained, batches, chunk)
    return {
        "command": "python tools/kv_codecs.py " + shlex.join(sys.argv[1:]),
        "commit": COMMIT,
        "hardware": processor(),
        "threads": torch.get_num_threads(),
        "run": {"preset": cfg.model.name, "hash": cfg.hash, "step": trained.state.progress.step, "data": digest},
        "attention": {
            "layers": cfg.model.n_layers,
            "heads": cfg.model.n_heads,
            "kv_heads": cfg.model.n_kv_heads,
            "head_dim": cfg.model.d_model // cfg.model.n_heads,
            "window": cfg.relation.local.window,
            "block": cfg.relation.global_.block_size,
            "summaries": cfg.relation.global_.summaries_per_block,
            "retrieval": cfg.relation.retrieval.enabled,
        },
        "documents": args.documents,
        "seq_len": cfg.train.seq_len,
        "chunk": chunk,
        "rotation": len(rotation(cfg.model.d_model // cfg.model.n_heads)),
        "block": BLOCK,
        "formats": {form.name: {"codec": form.codec, "version": form.version} for form in FORMATS},
        "outliers": {"every": OUTLIERS, "factor": FACTOR, "before": outliers(trained, batches)},
        "kinds": {name: {form: one.result() for form, one in by.items()} for name, by in found.items()},
        "speed": rates,
    }


def main() -> int:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--documents", type=int, default=16, help="held-out documents longer than a window")
    parser.add_argument("--out", type=Path, default=ROOT / "outbox" / "benchmarks" / "kv_codecs.md")
    args = parser.parse_args()
    try:
        result = run(args)
        stop_distributed()
    except RefractorError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    print(kv_codecs_report.tables(result))
    for written in kv_codecs_report.write(result, args.out):
        print(f"wrote {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
