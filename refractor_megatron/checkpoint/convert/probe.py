"""A fixed batch that makes a model use everything it has, and its logits by both implementations.

Two documents, every role, scope bits, two segments, and enough tokens that summaries are read (with two levels, those
of groups too); made-up records where the model retrieves. Batch and some logits travel with an exported model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...distinction.roles import ROLES, MaskBit, RecordPolicy
from ...errors import CheckpointError

#: Largest difference between the two implementations in fp32, as a share of the largest logit (of 1, if that is more).
PARITY = 1e-5
#: The same for stored logits, which may come from another processor or library.
FINGERPRINT = 1e-4
#: Tokens of a probe are a multiple of this and at most that: one forward pass should take seconds.
_MULTIPLE, _MOST = 64, 4096
_RECORDS = 8
_SEED = 20_260_001
_POSITIONS, _TOKENS = 8, 16


@dataclass(frozen=True)
class Probe:
    """``tokens`` int64 [1, L]; ``records`` int32 [1, L, 4] = (document, segment, role, mask bits).

    Where the model retrieves: ``vectors`` float32 [N, D] and ``policies`` uint8 [N] of made-up records, and ``ids``
    int32 [1, U, R] of those that each chunk reads, -1 for none.
    """

    tokens: Tensor
    records: Tensor
    vectors: Tensor | None = None
    policies: Tensor | None = None
    ids: Tensor | None = None

    @classmethod
    def of(cls, config: Any) -> Probe:
        """The probe of a ``RefractorConfig``."""
        length = probe_length(config)
        generator = torch.Generator().manual_seed(_SEED)
        tokens = torch.randint(0, config.vocab_size, (1, length), generator=generator)
        records = _records(length, _plain(config))
        if config.retrieval is None:
            return cls(tokens, records)
        chunk, fan_in = config.retrieval["chunk"], config.retrieval["fan_in"]
        vectors = torch.randn(_RECORDS, config.retrieval["dim"], generator=generator)
        vectors = vectors / vectors.norm(dim=-1, keepdim=True)
        policies = torch.arange(_RECORDS, dtype=torch.uint8) % (2 * max(RecordPolicy))
        chunks = -(-length // chunk)
        ids = torch.randint(-1, _RECORDS, (1, chunks, fan_in), generator=generator, dtype=torch.int32)
        ids[:, 0] = -1  # nothing was retrieved before the first chunk
        return cls(tokens, records, vectors, policies, ids)

    def retrieved(self) -> tuple[Tensor, Tensor] | None:
        """Vectors [1, U, R, D] and policies int64 [1, U, R] (-1: none), as the HF model takes them."""
        if self.ids is None or self.vectors is None or self.policies is None:
            return None
        place = self.ids.long().clamp(min=0)
        return self.vectors[place], torch.where(self.ids < 0, -1, self.policies.long()[place])


def probe_length(config: Any) -> int:
    """Tokens of the probe: a plain document that reads summaries, and a conversation before it."""
    plain = _plain(config)
    length = -(-(plain + max(_MULTIPLE // 2, plain // 4)) // _MULTIPLE) * _MULTIPLE
    longest = int(config.max_position_embeddings) // _MULTIPLE * _MULTIPLE
    return max(_MULTIPLE, min(length, _MOST, longest))


def _plain(config: Any) -> int:
    """Tokens until a query reads a complete block, or group of blocks, that lies behind its window and one more."""
    summaries = config.summaries
    block = int(summaries["block_size"]) if summaries else _MULTIPLE
    if summaries and summaries["levels"] == 2:
        block *= int(summaries["fanout"])
    return (int(config.reach) if config.reach is not None else 4 * _MULTIPLE) + 3 * block


def _records(length: int, plain: int) -> Tensor:
    """A conversation of every role in two segments, with scope bits in places; then a plain document.

    The plain one is undisturbed: a summary is read only where all of its tokens may be.
    """
    records = torch.zeros(1, length, 4, dtype=torch.int32)
    first = length - min(plain, length * 3 // 4)
    order = ("system", "user", "assistant", "tool", "assistant", "code", "data", "user", "assistant")
    for number, role in enumerate(order):
        part = slice(number * first // len(order), (number + 1) * first // len(order))
        records[0, part, 1] = int(number >= len(order) // 2)
        records[0, part, 2] = ROLES.index(role)
    for number, bit in enumerate((MaskBit.TOOL_SCOPE, MaskBit.SAFETY_SCOPE, MaskBit.RET_SCOPE)):
        at = (2 * number + 1) * first // 6
        records[0, at : at + max(1, first // 16), 3] = int(bit)
    records[0, first:, 0] = 1
    records[0, first:, 2] = ROLES.index("data")
    return records


def hf_logits(folder: Path, probe: Probe, device: torch.device | None = None) -> Tensor:
    """fp32 logits [L, V] by transformers, loaded strictly from ``folder`` with the package's own modelling code.

    Raises:
        CheckpointError: transformers found a weight missing, unexpected or of another shape.
    """
    import transformers

    from ...hf.modeling_refractor import RefractorForCausalLM

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = device or torch.device("cpu")
    try:
        model, info = RefractorForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        text = str(error).strip().splitlines()[0][:160]
        raise CheckpointError(
            f"transformers cannot load {folder} ({text}): it was altered or is half written."
        ) from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            name = sorted(map(str, info[kind]))[0]
            raise CheckpointError(
                f"transformers reports {kind} for {folder}: {name}; configuration and weights disagree."
            )
    model.to(device).eval()
    retrieved = probe.retrieved()
    with torch.no_grad():
        out = model(
            input_ids=probe.tokens.to(device),
            records=probe.records.to(device),
            retrieved=None if retrieved is None else tuple(t.to(device) for t in retrieved),
            use_cache=False,
        )
    logits: Tensor = out.logits[0].float().cpu()
    return logits


def compare(ours: Tensor, theirs: Tensor, bound: float) -> tuple[float, float]:
    """Largest difference of two sets of logits, and the largest that ``bound`` allows."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    difference = float((ours.double() - theirs.double()).abs().max())
    scale = max(1.0, float(ours.abs().max()))
    return (difference if math.isfinite(difference) else math.inf), bound * scale


def fingerprint(logits: Tensor, difference: float) -> dict[str, Any]:
    """Some logits [positions, tokens] of fp32 ``logits`` [L, V], as JSON keeps them."""
    rows = np.linspace(0, logits.shape[0] - 1, _POSITIONS).astype(int).tolist()
    columns = np.linspace(0, logits.shape[1] - 1, _TOKENS).astype(int).tolist()
    scale = max(1.0, float(logits.abs().max()))
    values = logits[rows][:, columns].tolist()
    return {
        "positions": rows,
        "tokens": columns,
        "logits": values,
        "scale": scale,
        "tolerance": FINGERPRINT * scale,
        "parity": difference,
    }


def check_fingerprint(logits: Tensor, expected: dict[str, Any]) -> float:
    """Largest difference between the stored logits and the same places of ``logits``.

    Raises:
        CheckpointError: there are no such places.
    """
    stored = torch.tensor(expected["logits"])
    if max(expected["positions"]) >= len(logits) or max(expected["tokens"]) >= logits.shape[1]:
        raise CheckpointError(
            f"the manifest's fingerprint has places outside of its probe's {len(logits)} tokens and {logits.shape[1]} "
            "ids: export the model again."
        )
    found = logits[expected["positions"]][:, expected["tokens"]]
    difference = float((found.double() - stored.double()).abs().max())
    return difference if math.isfinite(difference) else math.inf
