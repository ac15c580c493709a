"""Codecs: what they refuse and say, escalation, old versions."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch

from refractor_megatron.errors import CapabilityError, CheckpointError, ConfigError
from refractor_megatron.memory import frame
from refractor_megatron.memory.codecs import CODECS, NORM, codec_for, codec_named, codec_of, decode, encode, inspect
from refractor_megatron.memory.quantise import keep_norms, rotation
from tests.unit.memory.golden import PATH, sample

GOLDEN: list[dict[str, Any]] = json.loads(PATH.read_text())


def resealed(data: bytes, **changed: int) -> bytes:
    """``data`` as if its writer had meant other header fields: both checksums are right."""
    head = list(struct.unpack_from("<4s8BdQI", data))
    names = ["magic", "layout", "codec", "version", "asked", "dtype", "metric"]
    for name, value in changed.items():
        head[names.index(name)] = value
    dims = data[32 : 32 + 4 * head[7]]
    start = struct.pack("<4s8BdQI", *head) + dims
    return start + struct.pack("<I", zlib.crc32(start)) + data[len(start) + 4 :]


@pytest.mark.parametrize("entry", GOLDEN, ids=lambda e: f"{e['codec']}-v{e['version']}-{e['dtype']}")
def test_golden_chunks_decode_as_they_did(entry: dict[str, Any]) -> None:
    chunk = base64.b64decode(entry["chunk"])
    header, restored = inspect(chunk), decode(chunk)
    assert (codec_of(header).name, header.version) == (entry["codec"], entry["version"])
    assert restored.dtype == getattr(torch, entry["dtype"]) and restored.shape == (1, 2, 3, 16)
    then = np.frombuffer(base64.b64decode(entry["restored_fp32"]), np.float32)
    # The rotation is a matrix product, whose order of additions is the library's.
    turned = entry["codec"] == "tight" or entry["version"] == 2
    tolerance = 0 if not turned else {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[entry["dtype"]]
    np.testing.assert_allclose(restored.float().numpy().reshape(-1), then, rtol=tolerance, atol=100 * 2e-7 * turned)


def test_the_golden_file_has_both_versions_that_readers_must_know() -> None:
    held = {(entry["codec"], entry["version"]) for entry in GOLDEN}
    assert held == {(codec.name, version) for codec in CODECS.values() for version in codec.versions}
    assert sorted(NORM.versions) == [1, 2] and all(codec.newest - min(codec.versions) <= 1 for codec in CODECS.values())


@pytest.mark.parametrize(
    "entry", [e for e in GOLDEN if (e["codec"], e["version"]) == ("norm", 1)], ids=lambda e: e["dtype"]
)
def test_the_previous_version_can_still_be_written_byte_for_byte(entry: dict[str, Any]) -> None:
    golden = base64.b64decode(entry["chunk"])
    again = encode(sample(getattr(torch, entry["dtype"])), "norm", bound=1.0, version=1)
    assert frame.open_frame(again, "it")[1] == frame.open_frame(golden, "it")[1]


def test_unknown_versions_are_refused_in_one_sentence() -> None:
    data = encode(sample(torch.float32), "norm", bound=1.0)
    with pytest.raises(CheckpointError, match=r"^layer 3 is of codec norm version 3, too new .* reads 1 and 2: .*\.$"):
        decode(resealed(data, version=3), "layer 3")
    with pytest.raises(CheckpointError, match="version 0, too old"):
        decode(resealed(data, version=0))
    with pytest.raises(CheckpointError, match="codec number 9, this version reads exact, tight, norm"):
        decode(resealed(data, codec=9))
    for other in ({"layout": 2}, {"dtype": 7}, {"metric": 5}):
        with pytest.raises(CheckpointError, match="read it with the version that wrote it"):
            decode(resealed(data, **other))
    assert torch.equal(decode(resealed(data)), decode(data))


def test_damage_is_named() -> None:
    data = encode(sample(torch.float32), "norm", bound=1.0)
    changed = bytearray(data)
    changed[-1] ^= 1
    for wrong, said in (
        (data[:-1], "is truncated"),
        (data[:20], "is truncated inside its header"),
        (data[:40], "is truncated inside its header"),
        (data + b"x", "is followed by other bytes"),
        (bytes(changed), "fails its CRC-32"),
        (b"PK\x03\x04" + data, "is not an encoded chunk"),
    ):
        with pytest.raises(CheckpointError, match=f"^the chunk.* {said}"):
            decode(wrong)


def test_a_payload_of_another_shape_is_refused_before_anything_is_allocated() -> None:
    for codec in CODECS:
        header, payload = frame.open_frame(encode(sample(torch.bfloat16), codec, bound=1.0), "it")
        forged = frame.seal(
            bytes(payload), codec=header.codec, version=header.version, asked=header.asked, dtype=header.dtype,
            shape=(2**20, 2**20, 64), metric=header.metric, error=0.0,
        )  # fmt: skip
        with pytest.raises(CheckpointError, match="compute it again"):
            decode(forged)


def test_planes_that_are_no_frames_are_refused() -> None:
    for payload in (b"", b"\x08\0\0\0nonsense", struct.pack("<I", 2**31), b"\xff"):
        forged = frame.seal(
            payload, codec=1, version=1, asked=1, dtype=torch.float32, shape=(4,), metric="bitwise", error=0.0
        )
        with pytest.raises(CheckpointError, match="does not hold the planes"):
            decode(forged)


def test_a_codec_that_misses_its_bound_escalates_or_refuses() -> None:
    x = torch.randn(1, 2, 40, 64, generator=torch.Generator().manual_seed(0))
    assert codec_of(inspect(encode(x, "norm"))).name == "norm"
    # Tight keeps norms within 2e-4, but must keep the bound in its own metric too, where it has 7e-4.
    for bound in (2e-4, 1e-6):
        header = inspect(encode(x, "norm", bound))
        assert codec_of(header).name == "exact" and header.asked == NORM.number
        assert header.error == 0.0 and header.metric == "bitwise"
        with pytest.raises(CapabilityError, match=r"^codec norm misses its bound here .* use codec tight"):
            encode(x, "norm", bound, escalate=False)
    with pytest.raises(CapabilityError, match="codec tight misses its bound here .* use codec exact"):
        encode(x, "tight", 1e-4, escalate=False)


def test_norm_escalates_to_tight_where_tight_is_enough() -> None:
    """With one head dimension there is no choice of rounding and no rotation; 11 bits still hold the norms."""
    x = 1 + torch.rand(1, 1, 512, 1, generator=torch.Generator().manual_seed(0))
    header = inspect(encode(x, "norm"))
    assert codec_of(header).name == "tight" and header.metric == "relative_frobenius" and 0 < header.error <= 1e-3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_only_exact_holds_what_is_not_finite(value: float) -> None:
    x = torch.ones(1, 1, 4, 8, dtype=torch.bfloat16)
    x[0, 0, 1, 3] = value
    for codec in CODECS:
        data = encode(x, codec)
        assert codec_of(inspect(data)).name == "exact"
        assert torch.equal(decode(data).view(torch.int16), x.view(torch.int16))
    with pytest.raises(CapabilityError, match="error inf"):
        encode(x, "norm", bound=1e9, escalate=False)


def test_other_dtypes_codecs_and_versions_are_refused() -> None:
    with pytest.raises(CapabilityError, match="not torch.float64"):
        encode(torch.zeros(1, 1, 1, 4, dtype=torch.float64))
    with pytest.raises(ConfigError, match="there is no codec 'zip': choose exact, tight, norm"):
        codec_named("zip")
    with pytest.raises(ConfigError, match="codec exact cannot write version 2: it writes 1"):
        encode(torch.zeros(4), "exact", version=2)


def test_codec_for_a_ratio() -> None:
    assert [codec_for(r) for r in (0.5, 0.699, 0.7, 0.99, 1.0)] == ["norm", "norm", "tight", "tight", "exact"]
    assert [codec_for(r, torch.bfloat16) for r in (0.5, 0.7, 1.0)] == ["norm", "exact", "exact"]
    for ratio in (0.49, 0.0, 1.01):
        with pytest.raises(ConfigError, match=r"memory\.kv\.compress_ratio"):
            codec_for(ratio)


@pytest.mark.parametrize(("codec", "bits"), [("norm", 8.125), ("tight", 11.125)])
def test_sizes_are_as_stated(codec: str, bits: float) -> None:
    x = torch.randn(1, 8, 512, 64, generator=torch.Generator().manual_seed(1))
    assert 8 * len(encode(x, codec, escalate=False)) / x.numel() == pytest.approx(bits, abs=0.003)


def test_bf16_is_no_larger_exact_than_tight() -> None:
    """Which is why `codec_for` has no tight bf16 cache; bell-shaped values are the hardest."""
    x = torch.randn(1, 8, 512, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert len(encode(x, "exact")) < len(encode(x, "tight"))


def test_norm_keeps_norms_better_than_its_first_version_at_less_bits() -> None:
    for d in (32, 64, 128):
        x = torch.randn(1, 4, 512, d, generator=torch.Generator().manual_seed(d))
        x[..., ::16] *= 12
        first, second = (encode(x, bound=1.0, escalate=False, version=version) for version in (1, 2))
        assert len(second) < len(first) and inspect(second).error < 0.5 * inspect(first).error


@pytest.mark.parametrize("d", [1, 3, 8, 48, 64, 96, 128])
def test_the_rotation_is_orthogonal_and_fits_the_vector(d: int) -> None:
    turn = rotation(d)
    assert d % len(turn) == 0 and len(turn) <= 64
    np.testing.assert_allclose(turn @ turn.T, np.eye(len(turn)), atol=1e-6)
    np.testing.assert_allclose(np.abs(turn), len(turn) ** -0.5, rtol=1e-6)


def test_norms_are_kept_within_the_range_of_a_byte() -> None:
    """The value at the top would mend the norm best, and may not go beyond it; one of the others does."""
    steps = np.array([[127, 100.45, 100.45, 100.45]], np.float32)
    kept = keep_norms(steps, np.rint(steps), np.ones_like(steps))
    assert sorted(kept[0]) == [100, 100, 101, 127]
