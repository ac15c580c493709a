"""What is written past the page cache is the same file, and tensors anywhere in it are read as they are."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_megatron.checkpoint.convert import direct_file
from refractor_megatron.checkpoint.convert.buffers import Buffers
from refractor_megatron.checkpoint.convert.tensors import raw

MIB = 1 << 20
NOISE = os.urandom(9 * MIB)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 5 * MIB) | st.sampled_from([0, 1, 4095, 4096, 4 * MIB]), max_size=5))
def test_written(sizes: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        file = direct_file.DirectFile(path, digest=True)
        expected = b"".join(NOISE[n : n + size] for n, size in enumerate(sizes))
        for n, size in enumerate(sizes):
            scratch = bytearray(NOISE[n : n + size])
            assert file.write(scratch) == size
            scratch[:] = bytes(size)  # the caller's memory is free again
        assert file.tell() == len(expected)
        file.close()
        assert path.read_bytes() == expected
        assert file.record == {"bytes": len(expected), "sha256": hashlib.sha256(expected).hexdigest()}


@settings(max_examples=40, deadline=None)
@given(
    start=st.integers(0, 3 * 4096),
    count=st.integers(0, 600_000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    cached=st.booleans(),
    pool=st.booleans(),
)
def test_read(start: int, count: int, dtype: torch.dtype, cached: bool, pool: bool) -> None:
    size = count * dtype.itemsize
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        if cached:
            path.write_bytes(NOISE[: start + size])
        else:
            file = direct_file.DirectFile(path)
            file.write(NOISE[: start + size])
            file.close()
        found = direct_file.read_tensor(path, start, (count,), dtype, Buffers(64 * MIB if pool else 0))
        assert not count or bytes(raw(found)) == NOISE[start : start + size]
        assert found.untyped_storage().nbytes() == size, "torch.save would write more than the tensor"
        if size:
            with pytest.raises(EOFError):
                direct_file.read_tensor(path, start + 1, (count,), dtype, Buffers(64 * MIB if pool else 0))
