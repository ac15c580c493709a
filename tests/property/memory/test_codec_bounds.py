"""What codecs promise, over shapes, dtypes and values; errors are measured here a second time, in another way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from refractor_megatron.errors import CheckpointError
from refractor_megatron.memory.codecs import CODECS, codec_of, decode, encode, inspect

DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])
SHAPES = st.tuples(
    st.integers(1, 2), st.integers(1, 3), st.integers(0, 70), st.sampled_from([1, 3, 16, 32, 64, 80, 96, 128])
)
#: Spread of head vectors seen in practice: channels that stick out, heavy tails, one huge token, positions apart.
KINDS = ("gaussian", "channels", "tails")
WILD = ("sink", "constant", "one_hot", "zeros", "tiny", "huge", "every_scale", "not_finite")
ORDER = ["norm", "tight", "exact"]
BITS = {"norm": 8.125, "tight": 11.125}


def values(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Values [b, h, n, d] of one kind."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=draw)
    rows = torch.randn((*shape[:-1], 1), generator=draw)
    if kind == "channels":
        x[..., :: max(shape[-1] // 4, 1)] *= 12
    elif kind == "tails":
        x = x / torch.rand(shape, generator=draw).clamp(min=0.01).sqrt()
    elif kind == "sink" and shape[2]:
        x[:, :, 0] *= 50
    elif kind == "constant":
        x = rows.expand(shape).clone()
    elif kind == "one_hot":
        x = torch.where(torch.arange(shape[-1]) == shape[-1] // 2, rows, 0)
    elif kind == "zeros":
        x = torch.zeros(shape)
    elif kind in ("tiny", "huge"):
        x = x * (1e-38 if kind == "tiny" else 2e37)
    elif kind == "every_scale":
        x = x * torch.exp(20 * rows)
    elif kind == "not_finite":
        x = x / torch.randint(0, 2, shape, generator=draw)
    return x.to(dtype)


def errors(raw: Tensor, restored: Tensor) -> dict[str, float]:
    """Both metrics by their definitions, one vector after the other."""
    a, b = raw.double(), restored.double()
    if not a.numel():
        return {"relative_frobenius": 0.0, "norms": 0.0}

    def ratio(error: Tensor, reference: Tensor) -> float:
        return 0.0 if error == 0 else float(error / reference)

    vectors = zip(a.flatten(0, -2), b.flatten(0, -2), strict=True)
    squares = [ratio(abs(y.norm() - x.norm()), x.norm()) ** 2 for x, y in vectors]
    norms = max(ratio(abs(b.norm() - a.norm()), a.norm()), (sum(squares) / len(squares)) ** 0.5)
    return {"relative_frobenius": ratio((a - b).norm(), a.norm()), "norms": norms}


@settings(max_examples=150)
@given(st.sampled_from(KINDS + WILD), SHAPES, DTYPES, st.sampled_from(ORDER), st.integers(0, 2**20))
def test_what_comes_back_is_within_the_bound_and_as_far_off_as_the_header_says(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, asked: str, seed: int
) -> None:
    x = values(kind, shape, dtype, seed)
    data = encode(x, asked)
    header, back = inspect(data), decode(data)
    used = codec_of(header)
    assert back.dtype == header.dtype == x.dtype and back.shape == header.shape == x.shape
    assert ORDER.index(used.name) >= ORDER.index(asked) and header.asked == CODECS[asked].number
    if used.name == "exact":
        word = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(back.view(word), x.view(word))
        assert header.error == 0 and header.metric == "bitwise"
    else:
        measured = errors(x, back)
        assert abs(measured[header.metric] - header.error) <= 1e-9 + 1e-6 * header.error
        assert measured[used.metric] <= 1e-3 and measured[CODECS[asked].metric] <= 1e-3
        assert len(data) * 8 <= BITS[used.name] * (x.numel() + 64) + 8 * 64


@settings(max_examples=60)
@given(
    st.sampled_from(KINDS), st.integers(1, 3), st.integers(128, 160), st.sampled_from([32, 64, 128]), DTYPES,
    st.sampled_from(["norm", "tight"]), st.integers(0, 2**20),
)  # fmt: skip
def test_head_vectors_of_practice_need_no_escalation(
    kind: str, heads: int, tokens: int, d: int, dtype: torch.dtype, codec: str, seed: int
) -> None:
    """Plain, with channels twelve times the others, with heavy tails.

    Not with one vector of fifty times the norm: alone it makes the Frobenius norm, the error of its one block varies
    about the mean, and at 32 values a vector its neighbour shares its scale. Such a chunk may escalate.
    """
    encode(values(kind, (1, heads, tokens, d), dtype, seed), codec, escalate=False)


@settings(max_examples=100)
@given(st.binary(min_size=4, max_size=400), DTYPES)
def test_exact_keeps_every_bit_pattern(raw: bytes, dtype: torch.dtype) -> None:
    whole = raw[: len(raw) // 4 * 4]
    x = torch.frombuffer(bytearray(whole), dtype=dtype)
    back = decode(encode(x, "exact"))
    assert back.dtype == dtype and back.view(torch.uint8).tolist() == list(whole)


@settings(max_examples=300)
@given(st.sampled_from(ORDER), st.data())
def test_no_flipped_cut_or_added_byte_is_accepted(codec: str, draw: st.DataObject) -> None:
    data = encode(values("gaussian", (1, 1, 3, 16), torch.bfloat16, 7), codec, bound=1.0, escalate=False)
    at = draw.draw(st.integers(0, len(data) - 1))
    flip = draw.draw(st.integers(1, 255))
    for wrong in (data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :], data[:at], data + bytes([flip])):
        with pytest.raises(CheckpointError, match=r"^chunk 3 .*\.$"):
            decode(wrong, "chunk 3")


def test_every_single_bit_counts() -> None:
    """All bits of one chunk of every codec, one after the other."""
    for codec in ORDER:
        data = encode(values("gaussian", (1, 1, 2, 8), torch.float32, 3), codec, bound=1.0, escalate=False)
        for at in range(len(data)):
            for bit in range(8):
                wrong = bytearray(data)
                wrong[at] ^= 1 << bit
                with pytest.raises(CheckpointError):
                    decode(bytes(wrong))
