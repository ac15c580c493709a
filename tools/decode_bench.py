"""Decoding beside transformers' Llama: time a token, cache bytes and prefill at several context lengths.

python tools/decode_bench.py --out outbox/benchmarks/decoding.md                       (CPU, float32, one thread)
python tools/decode_bench.py --device cuda --dtype bfloat16 --out outbox/benchmarks/decoding_gpu.md

The Llama has the model's width, depth, heads and vocabulary, and a feed-forward as wide as the experts that one token
meets: as many weights are read for a token. Both decode with a cache that holds the same number of tokens, turn by turn
in one process, a few tokens each; weights and tokens are random, for time depends on neither.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import decode_report
import numpy as np
import torch
from record import COMMIT
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from refractor_megatron.config import compose
from refractor_megatron.decoding.chat import Prompt
from refractor_megatron.decoding.decoder import Decoder, full_cache_bytes
from refractor_megatron.decoding.load import Exported
from refractor_megatron.decoding.session import Session
from refractor_megatron.distinction.roles import DOCUMENT_ROLE, ROLE_ID
from refractor_megatron.evaluation.evidence import processor
from refractor_megatron.hf.configuration_refractor import RefractorConfig
from refractor_megatron.hf.from_run import hf_config
from refractor_megatron.hf.modeling_refractor import RefractorCache, RefractorForCausalLM
from refractor_megatron.tokenizer import Tokenizer

#: Tokens of a prompt that pass together, and those by which a conversation goes too far.
PIECE, EDIT = 1024, 2048
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def refractor_config(preset: str, context: int) -> RefractorConfig:
    """The preset's model, its window and summaries as they are, for a context of ``context`` tokens."""
    overrides = [f"experiment={preset}", f"model.context_max={context}", "relation.linear_mode.enabled=false"]
    return hf_config(compose(overrides), None)


def llama_config(config: RefractorConfig) -> LlamaConfig:
    """The Llama of the same active size."""
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size * max(1, config.num_experts_per_tok),
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]},
        tie_word_embeddings=config.tie_word_embeddings,
    )


def active_parameters(model: nn.Module) -> int:
    """Weights that one token meets; of embeddings, the output's only."""
    config: Any = model.config
    experts = getattr(config, "num_experts", 0)
    share = config.num_experts_per_tok / experts if experts else 1.0
    counts = ((p.numel(), share if ".experts." in name else 1.0) for name, p in model.named_parameters()
              if "embed_tokens" not in name)  # fmt: skip
    return round(sum(n * s for n, s in counts))


class Ours:
    """Our model with its cache; plain text."""

    def __init__(self, config: RefractorConfig, device: str, dtype: torch.dtype) -> None:
        self.model = RefractorForCausalLM(config).to(device=device, dtype=dtype)
        self.cache: Any = RefractorCache(config)

    def feed(self, ids: Tensor) -> None:
        """Passes ids [1, n] and asks for the last logits."""
        records = torch.zeros(*ids.shape, 4, dtype=torch.int32, device=ids.device)
        records[..., 2] = ROLE_ID[DOCUMENT_ROLE]
        self.model(ids, records=records, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    @property
    def length(self) -> int:
        """Tokens that have passed."""
        return int(self.cache.get_seq_length())

    @property
    def nbytes(self) -> int:
        """Of the cache, as it is allocated."""
        return int(self.cache.nbytes)


class Theirs:
    """transformers' Llama with its `DynamicCache`."""

    def __init__(self, config: LlamaConfig, device: str, dtype: torch.dtype) -> None:
        self.model = LlamaForCausalLM(config).to(device=device, dtype=dtype)
        self.cache: Any = DynamicCache(config=config)

    def feed(self, ids: Tensor) -> None:
        """Passes ids [1, n] and asks for the last logits."""
        self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def fill(self, count: int) -> None:
        """``count`` tokens' random keys and values in place of a prefill that is quadratic in the length."""
        config: Any = self.model.config
        shape = (1, config.num_key_value_heads, count, config.head_dim)
        for layer in range(config.num_hidden_layers):
            like = {"device": self.model.device, "dtype": self.model.dtype}
            self.cache.update(torch.randn(shape, **like), torch.randn(shape, **like), layer)

    @property
    def length(self) -> int:
        """Tokens that have passed."""
        return int(self.cache.get_seq_length())

    @property
    def nbytes(self) -> int:
        """Of the cache."""
        held = [x for layer in self.cache.layers for x in (layer.keys, layer.values)]
        return sum(x.numel() * x.element_size() for x in held)


class InPlace(Theirs):
    """The same Llama with transformers' `StaticCache`, which is as long as it will ever be and never copied."""

    def __init__(self, model: Theirs, room: int) -> None:
        """``room``: tokens that a cache takes besides those it is filled with."""
        self.model, self.room = model.model, room

    def fill(self, count: int) -> None:
        """A new cache of ``count`` tokens' random keys and values."""
        self.cache = StaticCache(config=self.model.config, max_cache_len=count + self.room)
        super().fill(count)


class Clock:
    """Seconds of the processor on one thread of a shared machine, else of the wall."""

    def __init__(self, device: str, threads: int) -> None:
        self.name = "CPU seconds" if device == "cpu" and threads == 1 else "wall-clock seconds"
        self._now = time.process_time if self.name == "CPU seconds" else time.perf_counter
        self._wait: Callable[[], object] = torch.cuda.synchronize if device != "cpu" else lambda: None

    def seconds(self, work: Callable[[], object]) -> float:
        """That ``work`` takes."""
        self._wait()
        started = self._now()
        work()
        self._wait()
        return self._now() - started


def prefill(model: Ours | Theirs, length: int, device: str) -> None:
    """Passes random tokens until ``length`` have passed."""
    vocabulary = int(model.model.config.vocab_size)
    while (left := length - model.length) > 0:
        model.feed(torch.randint(vocabulary, (1, min(PIECE, left)), device=device))


def decode(model: Ours | Theirs, steps: int, device: str) -> None:
    """Passes ``steps`` random tokens one by one."""
    vocabulary = int(model.model.config.vocab_size)
    for _ in range(steps):
        model.feed(torch.randint(vocabulary, (1, 1), device=device))


def cache_bytes(config: RefractorConfig, length: int, dtype: torch.dtype) -> int:
    """Bytes of our cache after ``length`` tokens, without the model: a narrow layer fills the same as any other."""
    values = config.to_dict() | {"num_hidden_layers": 1, "num_experts": 0, "hidden_size": 8, "intermediate_size": 8}
    one = Ours(RefractorConfig(**(values | {"vocab_size": 16})), "cpu", dtype)
    prefill(one, length, "cpu")
    held: int = sum(x.numel() * x.element_size() for x in one.cache.layers[0].values())
    return int(one.nbytes) + (config.num_hidden_layers - 1) * held


def measure(preset: str, args: argparse.Namespace) -> dict[str, Any]:
    """One preset: caches of all lengths are filled first, then models and lengths take turns."""
    clock, dtype = Clock(args.device, args.threads), DTYPES[args.dtype]
    torch.manual_seed(0)
    config = refractor_config(preset, 2 * max(*args.lengths, *args.bytes_at))
    models: dict[str, Ours | Theirs] = {"refractor": Ours(config, args.device, dtype)}
    models["llama"] = theirs = Theirs(llama_config(config), args.device, dtype)
    models["in place"] = InPlace(theirs, args.steps * (args.rounds + 1))
    rows = {length: fill(models, length, clock, args) for length in args.lengths}
    for turn in range(args.rounds + 1):
        for row in rows.values():
            for name, model in models.items():
                model.cache = row["caches"][name]
                took = clock.seconds(partial(decode, model, args.steps, args.device)) / args.steps
                if turn:  # the first turn warms up
                    row["ms_each"][name].append(1e3 * took)
        print(f"{preset}: turn {turn} of {args.rounds}", flush=True)
    for row in rows.values():
        del row["caches"]
        row["ms"] = {name: statistics.median(found) for name, found in row["ms_each"].items()}
    shortest = args.lengths[0]
    check, known = cache_bytes(config, shortest, dtype), rows[shortest]["cache_bytes"]["refractor"]
    assert check == known, f"the narrow layer's cache is that of the model: {check} and {known}"
    full = partial(full_cache_bytes, config, itemsize=dtype.itemsize)
    assert full(shortest) == rows[shortest]["cache_bytes"]["llama"], "a full cache is what it is said to be"
    return {
        "preset": preset,
        "rows": list(rows.values()),
        "bytes_at": {n: {"refractor": cache_bytes(config, n, dtype), "llama": full(n)} for n in args.bytes_at},
        "parameters": {name: sum(p.numel() for p in model.model.parameters()) for name, model in models.items()},
        "active": {name: active_parameters(model.model) for name, model in models.items()},
        "window": config.local_attention["window"],
        "summaries": config.summaries,
        "clock": clock.name,
    }


def fill(models: dict[str, Ours | Theirs], length: int, clock: Clock, args: argparse.Namespace) -> dict[str, Any]:
    """Goes on to ``length`` with both models' caches and keeps copies of them; seconds are those of this stretch."""
    row: dict[str, Any] = {"length": length, "prefill_s": {}, "cache_bytes": {}, "caches": {}, "ms_each": {}}
    for name, model in models.items():
        row["prefill_s"][name] = None
        if isinstance(model, InPlace):
            model.fill(length)
        elif isinstance(model, Theirs) and length > args.llama_prefill:
            model.fill(length - model.length)
        else:
            row["prefill_s"][name] = clock.seconds(partial(prefill, model, length, args.device))
        row["cache_bytes"][name] = model.nbytes
        row["caches"][name], row["ms_each"][name] = copy.deepcopy(model.cache), []
    print(f"{models['refractor'].length} tokens have passed: {row['prefill_s']} s", flush=True)
    return row


def going_back(preset: str, args: argparse.Namespace) -> dict[str, Any]:
    """A conversation that went `EDIT` tokens too far goes back and on: by each codec, and by passing all again.

    The deviation is that of the next logits from those of a session that never went further, relative L2.
    """
    clock, dtype, length = Clock(args.device, args.threads), DTYPES[args.dtype], args.back_at
    torch.manual_seed(0)
    model = Ours(refractor_config(preset, 2 * length + 2 * EDIT), args.device, dtype).model
    decoder = Decoder(Exported(model, model.config, Tokenizer([bytes([b]) for b in range(256)])), PIECE)
    ids = torch.randint(model.config.vocab_size, (length + 2 * EDIT,)).numpy()
    records = np.zeros((len(ids), 4), dtype=np.int32)
    records[:, 2] = ROLE_ID[DOCUMENT_ROLE]
    stretch = [slice(0, length), slice(length, length + EDIT), slice(length + EDIT, length + 2 * EDIT)]
    before, wrong, edit = (Prompt(ids[part], records[part], (0, 0, ROLE_ID[DOCUMENT_ROLE], 0), {}) for part in stretch)
    straight = Session(decoder, "exact")
    straight.feed(before)
    straight.feed(edit)
    aim = straight.next_logits()
    rows = []
    for codec in (None, "exact", "tight", "norm"):
        session = Session(decoder, codec)
        seconds = clock.seconds(partial(session.feed, before)) + clock.seconds(partial(session.feed, wrong))
        back = clock.seconds(partial(session.rewind, length))
        held = {"hot_bytes": session.hot_bytes, "cold_bytes": session.cold_bytes, "full_bytes": session.full_bytes}
        again, found = session.rewinds.recomputed_tokens, session.chunk_statistics
        session.feed(edit)
        deviation = float((session.next_logits() - aim).norm() / aim.norm())
        errors = {} if found is None else {name: error.maximum for name, error in found.by_codec.items()}
        hits = None if found is None else found.hit_rate
        row: dict[str, Any] = {
            "codec": codec or "none",
            "fill_s": seconds,
            "back_ms": 1e3 * back,
            "again": again,
            "hit_rate": hits,
        }
        row |= held | {"largest_error": errors, "deviation": deviation}
        rows.append(row)
        print(f"{preset} going back: {row}", flush=True)
    return {"preset": preset, "length": length, "edit": EDIT, "chunk": straight.chunk, "rows": rows}


def tokens(text: str) -> int:
    """``16k`` or ``16384``."""
    return int(text[:-1]) * 1024 if text.endswith("k") else int(text)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", default="pilot,small", help="shapes (default: pilot,small)")
    parser.add_argument("--lengths", default="4k,16k,64k", help="context lengths (default: 4k,16k,64k)")
    parser.add_argument("--bytes-at", default="128k", help="lengths of which only the caches' bytes are taken")
    parser.add_argument("--llama-prefill", default="4k", help="longest true prefill of the Llama; beyond, random keys")
    parser.add_argument("--back-at", default="16k", help="length to which the first shape goes back (default: 16k)")
    parser.add_argument("--steps", type=int, default=8, help="tokens a turn (default: 8)")
    parser.add_argument("--rounds", type=int, default=7, help="measured turns (default: 7)")
    parser.add_argument("--threads", type=int, default=1, help="of the processor (default: 1)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--note", default="", help="a line for the record's head")
    parser.add_argument("--out", type=Path, required=True, help="the record; .json and .png stand beside it")
    args = parser.parse_args()
    args.presets = args.presets.split(",")
    args.lengths = sorted(map(tokens, args.lengths.split(",")))
    args.bytes_at = sorted(tokens(x) for x in args.bytes_at.split(",") if x)
    args.llama_prefill, args.back_at = tokens(args.llama_prefill), tokens(args.back_at)
    return args


@torch.inference_mode()
def main() -> int:
    """Measure and write the record."""
    args = parse()
    torch.set_num_threads(args.threads)
    found = [measure(preset, args) for preset in args.presets]
    gpu = torch.cuda.get_device_name() if args.device != "cpu" else None
    result = {
        "commit": COMMIT,
        "machine": processor(gpu),
        "command": f"python tools/decode_bench.py {shlex.join(sys.argv[1:])}",
        "torch": torch.__version__,
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "presets": found,
        "going_back": going_back(args.presets[0], args),
    }
    for path in decode_report.write(result, args.out):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
