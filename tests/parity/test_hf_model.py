"""The model in plain torch against Megatron's: logits and every gradient; its cache against full recomputation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from refractor_megatron.config import RunConfig
from refractor_megatron.distinction.generators import random_records
from refractor_megatron.distinction.roles import ROLE_ID
from refractor_megatron.engines.base import Batch
from refractor_megatron.fabric.retrieval import RetrievalBank
from refractor_megatron.hf.masking_refractor import RefractorCache
from refractor_megatron.hf.modeling_refractor import RefractorForCausalLM
from tests.engine import engine_of, plain_batch, tiny
from tests.hf import hf_tensors, twin

LENGTH, SAMPLES, RECORDS = 128, 2, 30
#: Weights large enough that every tier moves the logits, and no loss but the cross-entropy.
BASE = ("model.init_std=0.15", f"train.seq_len={LENGTH}", "router.lb.lambda_kl=0", "router.lb.lambda_ent=0")
TIERS = ("relation.local.window=24", "relation.global.block_size=16")
TWO_LEVELS = (*TIERS, "relation.global.levels=2", "relation.global.fanout=2")
RETRIEVAL = tuple(f"relation.retrieval.{x}" for x in ("enabled=true", "chunk=16", "fan_in=3", "dim=8"))
LINEAR = ("relation.linear_mode.enabled=true", "relation.linear_mode.L_switch=64")
CASES = {
    "tri-tier": TIERS,
    "two levels, tied": (*TWO_LEVELS, "model.tie_embeddings=true"),
    "mean, two levels": (*TWO_LEVELS, "relation.global.type=mean"),
    "max, two levels, sum": (*TWO_LEVELS, "relation.global.type=max", "relation.combine=sum"),
    "retrieval in one layer, gated": (
        *TIERS,
        *RETRIEVAL,
        "relation.retrieval.layers=[2]",
        "relation.combine=gated",
        "router.gate_features=true",
    ),
    "retrieval, block, dense": (*TIERS, *RETRIEVAL, "relation.local.pattern=block", "model.ffn.type=dense"),
    "hybrid": (*TIERS, *(f"relation.local.{x}" for x in ("pattern=hybrid", "dilation=2", "dilation_unit=8"))),
    "dilated": (*TIERS, *(f"relation.local.{x}" for x in ("pattern=dilated", "dilation=2", "dilation_unit=8"))),
    "stride, gelu": (*TIERS, "relation.local.stride=8", "model.ffn.activation=gelu"),
    "full window, no roles": ("relation.local.window=4096", "model.role_embeddings=false", "model.ffn.type=dense"),
    "linear, raw gate": (*LINEAR, "router.renormalize_topk=false", "router.gate_temp=0.7"),
    "favor+": (*LINEAR, "relation.linear_mode.kernel=favor+", "relation.linear_mode.features=32"),
    "yarn": (
        *TIERS,
        *(f"model.{x}" for x in ("rope.alpha=0.5", "rope.scaling=yarn", "context_max=256", "rope.dim=32")),
    ),
    "linear positions, padded vocabulary": (*TIERS, "model.rope.alpha=0.75", "model.vocab_size=1000"),
}


@dataclass
class Pair:
    """One model twice, and a batch for both."""

    cfg: RunConfig
    engine: object
    model: RefractorForCausalLM
    batch: Batch
    retrieved: tuple[Tensor, Tensor] | None

    def logits(self, **more: object) -> Tensor:
        """Of the model in plain torch, over the whole batch at once unless told otherwise."""
        given = {"retrieved": self.retrieved, "use_cache": False, **more}
        return self.model(self.batch.tokens, records=self.batch.records[..., :4], **given).logits

    def chunks(self, start: int, stop: int) -> tuple[Tensor, Tensor] | None:
        """What the chunks that begin in [start, stop) retrieved."""
        if self.retrieved is None:
            return None
        size = self.cfg.relation.retrieval.chunk
        first, last = -(-start // size), -(-stop // size)
        return (self.retrieved[0][:, first:last], self.retrieved[1][:, first:last]) if last > first else None


def pair_of(case: str) -> Pair:
    cfg = tiny(*BASE, f"train.micro_batch={SAMPLES}", *CASES[case])
    spec, generator = cfg.relation.retrieval, torch.Generator().manual_seed(3)
    rng = np.random.default_rng(7)
    linear = "linear_mode" in str(CASES[case])
    bank = retrieved = None
    if spec.enabled:
        vectors = torch.randn(RECORDS, spec.dim, generator=generator)
        bank = RetrievalBank(vectors, rng.integers(0, 4, RECORDS).astype(np.uint8), "test")
    engine = engine_of(cfg, bank=bank)
    with torch.no_grad():
        for weight in engine.model.parameters():  # gates and role table start at zero
            if not weight.any():
                weight.normal_(0, 0.3, generator=generator)
    batch = plain_batch(cfg)
    nasty = random_records(rng, LENGTH)
    samples = [_conversation(rng), _ordered(nasty) if linear else nasty]
    records = torch.from_numpy(np.stack(samples))
    if bank is not None:
        ids = torch.randint(-1, RECORDS, (SAMPLES, LENGTH // spec.chunk, spec.fan_in), generator=generator)
        ids = ids.sort(-1, descending=True).values
        policies = torch.where(ids >= 0, torch.from_numpy(bank.policies).long()[ids.clamp(min=0)], -1)
        retrieved = bank.vectors[ids.clamp(min=0)], policies
        records = torch.cat([records, ids.repeat_interleave(spec.chunk, 1).int()], -1)
    batch = Batch(batch.tokens, batch.labels, records.int())
    return Pair(cfg, engine, twin(cfg, engine), batch, retrieved)


def _conversation(rng: np.random.Generator) -> np.ndarray:
    """A document of messages, most of them readable, and the beginning of another: whole blocks can be read."""
    records = np.zeros((LENGTH, 4), dtype=np.int32)
    bounds = [0, 20, 38, 60, 81, 90, 110, LENGTH]
    for number, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        role = int(rng.choice([ROLE_ID[name] for name in ("system", "user", "assistant", "tool")]))
        records[start:stop] = (stop == LENGTH, 0, role, 8 if number == 3 else 0)
    return records


def _ordered(records: np.ndarray) -> np.ndarray:
    """Records whose documents and segments rise, as running states need them."""
    records[:, 0] = np.sort(np.maximum(records[:, 0], 0))
    for document in np.unique(records[:, 0]):
        records[records[:, 0] == document, 1] = np.sort(records[records[:, 0] == document, 1])
    return records


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(", ", "-").replace(" ", "_"))
def pair(request: pytest.FixtureRequest) -> Pair:
    return pair_of(request.param)


def test_logits_are_megatrons(pair: Pair) -> None:
    theirs = pair.engine.logits(pair.batch.tokens, pair.batch.records)[..., : pair.cfg.model.vocab_size]
    assert theirs.abs().max() > 1
    with torch.no_grad():
        assert (pair.logits() - theirs).abs().max() <= 1e-5


def test_every_gradient_is_megatrons(pair: Pair) -> None:
    engine, batch, vocabulary = pair.engine, pair.batch, pair.cfg.model.vocab_size
    engine.model.train()
    engine.ddp.zero_grad_buffer()
    positions = torch.arange(LENGTH).expand_as(batch.tokens)
    # of true rows only: Megatron's cross-entropy also counts the rows that pad the vocabulary
    theirs = engine.ddp(batch.tokens, positions, batch.records)[..., :vocabulary]
    torch.nn.functional.cross_entropy(theirs.flatten(0, 1).float(), batch.labels.flatten()).backward()
    expected = hf_tensors(pair.cfg, engine.model, lambda p: p.main_grad)
    pair.model.zero_grad()
    torch.nn.functional.cross_entropy(pair.logits().flatten(0, 1), batch.labels.flatten()).backward()
    ours = {name: weight.grad for name, weight in pair.model.named_parameters()}
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any(), name
        assert (ours[name] - gradient).norm() <= 2e-5 * gradient.norm(), name


@pytest.mark.parametrize("pieces", [[1] * LENGTH, [50, 1, 1, 20, 56]], ids=["one by one", "in pieces"])
@torch.no_grad()
def test_decoding_equals_recomputation(pair: Pair, pieces: list[int]) -> None:
    cache, start, parts = RefractorCache(pair.model.config), 0, []
    for n in pieces:
        part = slice(start, start + n)
        given = {"records": pair.batch.records[:, part, :4], "retrieved": pair.chunks(start, start + n)}
        parts.append(pair.model(pair.batch.tokens[:, part], past_key_values=cache, use_cache=True, **given).logits)
        start += n
    assert (torch.cat(parts, 1) - pair.logits()).abs().max() <= 2e-5
    assert cache.length.tolist() == [LENGTH] * SAMPLES


@torch.no_grad()
def test_samples_of_unlike_length_do_not_see_each_other(pair: Pair) -> None:
    tokens, records, chunk = pair.batch.tokens, pair.batch.records[..., :4], pair.cfg.relation.retrieval.chunk
    mask = torch.ones(SAMPLES, LENGTH, dtype=torch.long)
    mask[0, :37] = 0  # padded on the left, as generate does
    cache = RefractorCache(pair.model.config)

    def pass_on(start: int, stop: int) -> Tensor:
        given = pair.retrieved
        if given is not None and start:  # each sample's own next chunk
            number = (-(-cache.length // chunk)).clamp(max=given[1].shape[1] - 1)
            given = tuple(x[torch.arange(SAMPLES), number][:, None] for x in given)
        part = slice(start, stop)
        out = pair.model(tokens[:, part], mask[:, :stop], records[:, part], given, cache, use_cache=True)
        return out.logits

    together = torch.cat([pass_on(0, 100), *(pass_on(i, i + 1) for i in range(100, LENGTH))], 1)
    assert cache.length.tolist() == [LENGTH - 37, LENGTH]
    for row, start in ((0, 37), (1, 0)):
        own = tuple(x[row : row + 1] for x in pair.retrieved) if pair.retrieved is not None else None
        one = slice(row, row + 1)
        alone = pair.model(tokens[one, start:], records=records[one, start:], retrieved=own, use_cache=False).logits
        assert (together[row, start:] - alone[0]).abs().max() <= 2e-5
