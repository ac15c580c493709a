"""Every split and join: inverse of each other, and each number in the place that the definition says."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from refractor_megatron.checkpoint.convert.mapping import Table, global_shapes, table, to_hf, to_megatron
from refractor_megatron.checkpoint.convert.rules import GroupedQkv, Rows, Rule, Same
from refractor_megatron.checkpoint.convert.shape import LayerShape, Shape

small = st.integers(1, 4)


def numbered(*shape: int) -> torch.Tensor:
    """All numbers are different."""
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


def is_exact(rule: Rule, tensor: torch.Tensor) -> list[torch.Tensor]:
    parts = rule.split(tensor)
    assert torch.equal(rule.join(parts), tensor)
    assert sorted(torch.cat([p.flatten() for p in parts]).tolist()) == sorted(tensor.flatten().tolist())
    again = rule.split(rule.join(parts))
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    return parts


@given(small, small, small, small)
def test_grouped_qkv(kv_heads: int, per_group: int, head_dim: int, width: int) -> None:
    heads = kv_heads * per_group
    tensor = numbered((heads + 2 * kv_heads) * head_dim, width)
    q, k, v = is_exact(GroupedQkv(heads, kv_heads, head_dim), tensor)
    assert (len(q), len(k), len(v)) == (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    rows = iter(tensor)
    for group in range(kv_heads):  # the definition, row by row
        for head in range(group * per_group, (group + 1) * per_group):
            for one in range(head_dim):
                assert torch.equal(q[head * head_dim + one], next(rows))
        for part in (k, v):
            for one in range(head_dim):
                assert torch.equal(part[group * head_dim + one], next(rows))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), small)
def test_rows(sizes: list[int], width: int) -> None:
    tensor = numbered(sum(sizes), width)
    parts = is_exact(Rows(tuple(sizes)), tensor)
    assert [len(part) for part in parts] == sizes and torch.equal(torch.cat(parts), tensor)


@given(st.lists(small, min_size=1, max_size=3))
def test_same(shape: list[int]) -> None:
    (part,) = is_exact(Same(), numbered(*shape))
    assert part.shape == tuple(shape)


layers = st.builds(LayerShape, small, st.integers(0, 2), st.integers(0, 3), st.integers(0, 3))


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    kv_heads, head_dim = draw(small), draw(small)
    return Shape(
        vocab=draw(st.sampled_from([1, 127, 128, 130])),
        hidden=draw(small),
        heads=kv_heads * draw(small),
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=draw(small),
        gated=draw(st.booleans()),
        experts=draw(st.integers(0, 3)),
        tied=draw(st.booleans()),
        roles=draw(st.sampled_from([0, 6])),
        router_features=draw(st.booleans()),
        layers=tuple(draw(st.lists(layers, min_size=1, max_size=3))),
    )


@given(shapes())
def test_any_table_is_a_bijection(shape: Shape) -> None:
    entries: Table = table(shape)
    names = [tensor.name for entry in entries for tensor in entry.tensors]
    slices = [(entry.key, entry.expert) for entry in entries]
    assert len(set(names)) == len(names) and len(set(slices)) == len(slices)
    at, full = 0, {}
    for key, size in global_shapes(entries).items():
        full[key] = numbered(*size) + at
        at += full[key].numel()
    hf = to_hf(entries, full)
    assert sorted(torch.cat([t.flatten() for t in hf.values()]).tolist()) == list(range(at)), "nothing lost or doubled"
    for entry in entries:
        for tensor in entry.tensors:
            assert tuple(hf[tensor.name].shape) == tensor.shape
    back = to_megatron(entries, hf)
    assert back.keys() == full.keys() and all(torch.equal(back[key], full[key]) for key in full)
