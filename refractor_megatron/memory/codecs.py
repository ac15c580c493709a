"""Codecs of keys and values: named bounds, errors measured on every chunk, escalation where a bound is missed.

=====  ==========================================  ==================================================  ===============
codec  payload                                     bound on the measured error                         bits/value
=====  ==========================================  ==================================================  ===============
exact  exponents and mantissas apart, zstd         bit for bit, NaN and infinities too                 bf16 10 to 11.2
tight  rotation, 11-bit integers in blocks of 64   relative Frobenius error at most 1e-3               11.125
norm   rotation, 8-bit integers in blocks of 64    tensor norm, and rms of vector norms, within 1e-3   8.125
=====  ==========================================  ==================================================  ===============

A relative Frobenius error of 1e-3 costs at least log2(1000) = 9.97 bits a value on Gaussian values (rate-distortion):
8 bits can bound norms only, and the metric is named. Measured on the K/V of a trained model:
``outbox/benchmarks/kv_codecs.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CapabilityError, CheckpointError, ConfigError
from . import frame, lossless, metrics, quantise
from .frame import Header

Pack = Callable[[Tensor], bytes]
Unpack = Callable[[memoryview, tuple[int, ...], torch.dtype], Tensor]


@dataclass(frozen=True)
class Codec:
    """One codec. ``versions``: how to write and read the newest version and the one before it, if there was one."""

    name: str
    number: int  # in headers
    metric: str
    bound: float  # on the measured error, unless the caller gives another
    versions: dict[int, tuple[Pack, Unpack]]

    @property
    def newest(self) -> int:
        """Version that is written."""
        return max(self.versions)


EXACT = Codec("exact", 1, "bitwise", 0.0, {1: (lossless.pack, lossless.unpack)})
TIGHT = Codec("tight", 2, "relative_frobenius", 1e-3, {1: (quantise.pack_int11, quantise.unpack_int11)})
NORM = Codec(
    "norm", 3, "norms", 1e-3,
    {1: (quantise.pack_int8_v1, quantise.unpack_int8_v1), 2: (quantise.pack_int8, quantise.unpack_int8)},
)  # fmt: skip
CODECS = {codec.name: codec for codec in (EXACT, TIGHT, NORM)}
_BY_NUMBER = {codec.number: codec for codec in CODECS.values()}
#: Codec tried next where a bound is missed.
_NEXT = {"norm": "tight", "tight": "exact"}


def encode(
    tensor: Tensor,
    codec: str = "norm",
    bound: float | None = None,
    *,
    escalate: bool = True,
    version: int | None = None,
) -> bytes:
    """Encode ``tensor`` (fp16, bf16 or fp32, any device, last dimension = head vectors) as one framed chunk.

    Args:
        bound: largest measured error allowed, in the metric of ``codec``; None for the codec's own bound.
        escalate: where it is missed, go on to tight, then to exact, instead of refusing. A codec that stands in must
            keep the same bound in its own metric and in that of ``codec``. The header names the codec used.
        version: write the version before the newest, for readers that are not upgraded yet.

    Raises:
        CapabilityError: the bound is missed and ``escalate`` is off, or the dtype is another.
        ConfigError: no such codec, or it has no such version to write.
    """
    asked = codec_named(codec)
    if version is not None and version not in asked.versions:
        known = " and ".join(map(str, sorted(asked.versions)))
        raise ConfigError(f"codec {codec} cannot write version {version}: it writes {known}.")
    if not frame.holds(tensor.dtype):
        raise CapabilityError(f"a chunk holds float16, bfloat16 or float32, not {tensor.dtype}: convert it first.")
    assert tensor.dim() >= 1 and tensor.shape[-1] > 0, tuple(tensor.shape)
    values = tensor.detach().cpu().contiguous()
    limit = asked.bound if bound is None else bound
    used = asked
    while True:
        number = used.newest if version is None or used is not asked else version
        payload, errors = _measured(values, used, number, {asked.metric, used.metric})
        if all(error <= limit for error in errors.values()):  # NaN is not
            return frame.seal(
                payload, codec=used.number, version=number, asked=asked.number, dtype=values.dtype,
                shape=tuple(values.shape), metric=used.metric, error=errors[used.metric],
            )  # fmt: skip
        assert used is not EXACT, "the exact codec lost bits"
        if not escalate:
            raise CapabilityError(
                f"codec {used.name} misses its bound here ({used.metric} error {errors[used.metric]:.3g}, allowed "
                f"{limit:.3g}): use codec {_NEXT[used.name]}, or let encode escalate."
            )
        used = CODECS[_NEXT[used.name]]


def _measured(values: Tensor, codec: Codec, version: int, wanted: set[str]) -> tuple[bytes, dict[str, float]]:
    """Payload, and its errors by metric, measured on what a reader will get."""
    pack, unpack = codec.versions[version]
    if codec is not EXACT and not bool(torch.isfinite(values).all()):
        return b"", dict.fromkeys(wanted, float("inf"))
    payload = pack(values)
    restored = unpack(memoryview(payload), tuple(values.shape), values.dtype)
    if codec is EXACT:
        return payload, dict.fromkeys(wanted, 0.0 if metrics.bitwise(values, restored) else float("inf"))
    raw, back = metrics.rows_of(values), metrics.rows_of(restored)
    measures = {"relative_frobenius": metrics.relative_frobenius, "norms": metrics.norms}
    return payload, {name: measures[name](raw, back) for name in wanted}


def decode(data: bytes, where: str = "the chunk") -> Tensor:
    """The tensor that `encode` was given, within the error its header names; in host memory, dtype and shape restored.

    Raises:
        CheckpointError: truncated, altered, or of a codec version other than the newest two; ``where`` says which.
    """
    header, payload = frame.open_frame(data, where)
    codec = _readable(header, where)
    return codec.versions[header.version][1](payload, header.shape, header.dtype)


def inspect(data: bytes, where: str = "the chunk") -> Header:
    """The checked header of an encoded chunk; the payload is not read. Raises as `decode`."""
    header, _ = frame.read_header(data, where)
    _readable(header, where)
    return header


def codec_of(header: Header) -> Codec:
    """Codec that made the payload."""
    return _BY_NUMBER[header.codec]


def _readable(header: Header, where: str) -> Codec:
    if header.codec not in _BY_NUMBER:
        raise CheckpointError(
            f"{where} is of codec number {header.codec}, this version reads {', '.join(CODECS)}: read it with the "
            "version that wrote it."
        )
    codec = _BY_NUMBER[header.codec]
    if header.version not in codec.versions:
        kind = "new" if header.version > codec.newest else "old"
        known = " and ".join(map(str, sorted(codec.versions)))
        raise CheckpointError(
            f"{where} is of codec {codec.name} version {header.version}, too {kind} for this version, which reads "
            f"{known}: read it with the version that wrote it."
        )
    return codec


def codec_named(name: str) -> Codec:
    """The codec of that name. Errors: ``ConfigError``."""
    if name not in CODECS:
        raise ConfigError(f"there is no codec {name!r}: choose {', '.join(CODECS)}.")
    return CODECS[name]


def codec_for(ratio: float, dtype: torch.dtype = torch.float16) -> str:
    """Codec for ``memory.kv.compress_ratio``, the size of an old chunk relative to fp16, and the dtype of the cache.

    From 0.5 it is norm (8.125 of 16 bits, 0.508), from 0.7 tight (11.125 bits, 0.695), and exact at 1. A bf16 cache is
    exact from 0.7 already: its mantissas are so short that lossless takes about what tight takes, or less.

    Errors: ``ConfigError`` below 0.5, which no codec reaches.
    """
    if not 0.5 <= ratio <= 1:
        raise ConfigError(f"memory.kv.compress_ratio={ratio} has no codec: give 0.5 (norm), 0.7 (tight) or 1 (exact).")
    if ratio < 0.7:
        return "norm"
    return "exact" if ratio == 1 or dtype == torch.bfloat16 else "tight"
