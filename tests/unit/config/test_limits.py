"""Section-16 ranges and contradictions: each has a case, its sentence, and a neighbour that is fine."""

from __future__ import annotations

import pytest

from refractor_megatron.config import check, compose
from refractor_megatron.config.masks import ROLE_NAMES, RULE_FIELDS
from refractor_megatron.config.schema import schema
from refractor_megatron.errors import ConfigError


def problems(*overrides: str, ranks: int | None = None, preset: str = "nano") -> str:
    """The message of ``check``, or nothing."""
    try:
        check(compose([f"experiment={preset}", *overrides]), ranks)
    except ConfigError as error:
        return str(error)
    return ""


def test_section_16_has_the_ranges_of_the_specification() -> None:
    assert {key: leaf.limit for key, leaf in schema().items() if leaf.limit} == {
        "model.d_model": (1024, 8192),
        "model.n_layers": (24, 80),
        "model.n_heads": (16, 64),
        "model.n_kv_heads": (4, 16),
        "model.context_max": (32768, 262144),
        "model.ffn.experts": (16, 128),
        "model.ffn.topk": (1, 4),
        "relation.retrieval.fan_in": (0, 16),
        "relation.retrieval.sigma_min": (0.35, 0.6),
    }


def test_outside_section_16_is_an_error_or_a_warning() -> None:
    changes = ["model.n_layers=12", "model.ffn.topk=5"]
    assert problems(*changes, preset="reference") == (
        "outside the ranges of section 16: model.n_layers=12 (24 to 80), model.ffn.topk=5 (1 to 4); choose values "
        "inside, or set limits=warn."
    )
    (warning,) = check(compose([*changes, "limits=warn"]))
    assert warning == "outside the ranges of section 16: model.n_layers=12 (24 to 80), model.ffn.topk=5 (1 to 4)."


def test_the_number_of_experts_of_a_dense_model_is_not_checked() -> None:
    dense = ["model.ffn.type=dense", "model.ffn.experts=2", "model.ffn.topk=8"]
    assert problems(*dense, preset="reference") == ""


CONTRADICTIONS = [
    (["model.n_heads=5"], "model.d_model=64 is not a multiple of model.n_heads=5"),
    (["model.n_kv_heads=3"], "model.n_heads=4 is not a multiple of model.n_kv_heads=3"),
    (["model.rope.dim=128"], "model.rope.dim=128 exceeds model.d_model=64: set it to 64"),
    (["model.rope.dim=62"], "leaves 15.5 for each of model.n_heads=4, which must be even: set a multiple of 8"),
    (["model.rope.dim=60"], "leaves 15 for each of model.n_heads=4, which must be even: set a multiple of 8"),
    (["model.ffn.topk=5"], "model.ffn.topk=5 exceeds model.ffn.experts=4"),
    (["model.ffn.topk=1"], "so the gate never learns: set router.renormalize_topk=false"),
    (["train.seq_len=256"], "train.seq_len=256 exceeds model.context_max=128"),
    (["train.seq_len=120"], "train.seq_len=120 is not a multiple of relation.global.block_size=16"),
    (["relation.global.block_size=64"], "relation.global.block_size=64 exceeds relation.local.window=32"),
    (["relation.linear_mode.L_switch=64", "parallel.cp=2"], "linear attention does not share a sequence between ranks"),
    (["relation.local.stride=33"], "relation.local.stride=33 exceeds relation.local.window=32"),
    (["relation.local.pattern=dilated"], "relation.local.dilation_unit=128 does not fit into the 32 tokens"),
    (
        ["relation.local={pattern: hybrid, dilation_unit: 1}", "train.seq_len=16384", "model.context_max=16384"],
        "train.seq_len=16384 exceeds 8192",
    ),
    (
        ["relation.global={type: mean, summaries_per_block: 3}"],
        "relation.global.block_size=16 does not divide by relation.global.summaries_per_block=3",
    ),
    (["parallel.cp=4"], "chunks of 16 tokens, and relation.local reaches 31 tokens back, past the chunk before"),
    (["relation.combine=sum", "relation.global.summaries_per_block=0"], "has only the local tier to combine"),
    (["relation.retrieval={enabled: true, fan_in: 0}"], "relation.retrieval.fan_in=0 retrieves nothing"),
    (["relation.retrieval={enabled: true, chunk: 48}"], "relation.retrieval.chunk=48 must divide train.seq_len=128"),
    (["relation.retrieval={enabled: true, chunk: 128}"], "relation.retrieval.chunk=128 must divide train.seq_len=128"),
    (["relation.retrieval={enabled: true, chunk: 32, layers: [2, 3]}"], "layers=[2, 3] must name layers 1 to 2"),
    (["parallel.cp=8"], "cut into 16 chunks for parallel.cp=8 would cut through relation.global.block_size=16"),
    (["parallel.cp=3", "relation.global.summaries_per_block=0"], "train.seq_len=128 does not divide into the 6 chunks"),
    (["train.schedule.warmup_steps=50"], "warmup_steps=50 leaves nothing of train.schedule.cosine.steps=50"),
    (["train.schedule.cosine.min_lr=0.1"], "min_lr=0.1 exceeds train.optimizer.lr=0.003: the cosine would rise"),
    (["train.schedule.tail.type=rm"], "begins after step 50, where train.steps=50 already ended"),
    (
        ["train.schedule.tail.type=rm", "train.schedule.cosine={steps: 40, min_lr: 0}"],
        "which is 0: set a positive min_lr",
    ),
    (["model.rope={scaling: yarn, beta_fast: 0.5}"], "model.rope.beta_fast=0.5 is below model.rope.beta_slow=1"),
    (["parallel.ep=3"], "model.ffn.experts=4 is not a multiple of parallel.ep=3"),
    (["parallel.ep=2", "model.ffn.type=dense"], "parallel.ep=2 has no experts to share with model.ffn.type=dense"),
    (["parallel.tp=8"], "model.n_kv_heads=2 is not a multiple of parallel.tp=8"),
    (["parallel.tp=3"], "model.n_heads=4 is not a multiple of parallel.tp=3"),
    (["parallel.pp=4"], "model.n_layers=2 is not a multiple of parallel.pp=4"),
    (["router.regret.lambda=0"], "router.regret.lambda=0 would have no effect"),
    (["data.name=../up"], "data.name='../up' becomes part of a folder's name"),
]


@pytest.mark.parametrize(("overrides", "message"), CONTRADICTIONS, ids=lambda value: str(value)[:40])
def test_a_contradiction_is_named_with_the_way_out(overrides: list[str], message: str) -> None:
    assert message in problems(*overrides)


FINE = [
    ["model.ffn.topk=1", "router.renormalize_topk=false"],
    ["model.rope.dim=32"],
    ["relation.global={block_size: 48, summaries_per_block: 0}"],
    ["relation.linear_mode={L_switch: 64, enabled: false}"],
    ["train.schedule.tail.type=rm", "train.schedule.cosine.steps=40"],
    ["train.schedule.warmup_steps=0"],
    ["parallel={tp: 2, pp: 2, ep: 4}"],
    ["safety=open"],
    ["router=literal"],
]


@pytest.mark.parametrize("overrides", FINE, ids=str)
def test_neighbours_of_the_contradictions_are_fine(overrides: list[str]) -> None:
    assert problems(*overrides) == ""


@pytest.mark.parametrize(
    ("overrides", "ranks", "message"),
    [
        (
            ["parallel.tp=2"],
            3,
            "3 ranks cannot form a grid of parallel.tp=2 times parallel.pp=1: start a multiple of 2",
        ),
        ([], 4, "train.global_batch=8 is not a multiple of train.micro_batch=4 times 4 data-parallel ranks"),
        (["parallel.ep=4"], 2, "parallel.ep=4 does not divide the 2 ranks of a pipeline stage"),
        (["parallel.tp=2"], 2, ""),
        (["parallel.pp=2"], 2, ""),
        (["parallel.ep=2"], 2, ""),
        (["parallel={tp: 2, ep: 2}"], 2, ""),
    ],
)
def test_the_grid_must_fit_the_ranks(overrides: list[str], ranks: int, message: str) -> None:
    found = problems(*overrides, ranks=ranks)
    assert message in found and bool(found) == bool(message)


def test_all_problems_are_listed_at_once() -> None:
    found = problems("model.n_heads=5", "parallel.pp=3", "train.schedule.warmup_steps=99")
    assert found.count(";") >= 2 and "n_heads" in found and "parallel.pp" in found and "warmup_steps" in found


def test_summaries_that_nobody_can_read_are_mentioned() -> None:
    warnings = check(compose(["experiment=nano", "relation.local.window=128"]))
    assert warnings[0].startswith("relation.local.window=128 covers the whole of train.seq_len=128")
    assert len(check(compose(["experiment=nano", "relation=dense"]))) == len(warnings) - 1


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("{when: {role: tool}}", "safety.masks[0] has no name"),
        ("{name: r, when: {role: tol}}", "safety.masks rule r names an unknown role tol in when; did you mean tool"),
        ("{name: r, when: {role: tool}, allow_read_from: [boss]}", "unknown role boss in allow_read_from: known are"),
        ("{name: r, when: {role: tool}, allow_read: [user]}", "unknown field allow_read; did you mean allow_read_from"),
        ("{name: r, when: {role: tool}, causal: false}", "safety.masks rule r is not causal"),
        ("{name: r, when: {role: tool}}", ""),
    ],
)
def test_the_shape_of_mask_rules(rule: str, message: str) -> None:
    found = problems(f"safety.masks=[{rule}]")
    assert message in found and bool(found) == bool(message)


def test_role_names_mirror_the_vocabulary_one_floor_up() -> None:
    from refractor_megatron.distinction import roles, rules

    assert roles.ROLES == ROLE_NAMES
    assert rules._FIELDS == RULE_FIELDS


def test_checking_is_not_reading() -> None:
    cfg = compose(["experiment=nano"])
    check(cfg, ranks=1)
    assert cfg.read_keys() == set()
