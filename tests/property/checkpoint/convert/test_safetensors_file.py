"""Our safetensors files against the format's own library, both ways; and no truncation goes unseen."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from refractor_megatron.checkpoint.convert.safetensors_file import SafetensorsWriter, read_header, read_tensor
from refractor_megatron.errors import CheckpointError

shape = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)
dtype = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
name = st.text("abc.é_0", min_size=1, max_size=8)
specs = st.dictionaries(name, st.tuples(shape, dtype), min_size=1, max_size=5)
Specs = dict[str, tuple[tuple[int, ...], torch.dtype]]


def tensors_of(specs: Specs) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(size, generator=generator).to(kind) for key, (size, kind) in specs.items()}


def written(folder: str, specs: Specs) -> tuple[Path, dict[str, torch.Tensor], dict[str, str]]:
    tensors = tensors_of(specs)
    writer = SafetensorsWriter(Path(folder) / "x.safetensors", specs)
    for key, tensor in tensors.items():
        writer.write(key, tensor)
    writer.close()
    return writer.path, tensors, writer.digests


@given(specs)
def test_the_library_reads_what_we_write(specs: Specs) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, tensors, digests = written(folder, specs)
        found = safetensors.torch.load_file(path)
        assert found.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor)
            assert digests[key] == hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()


@given(specs)
def test_we_read_what_the_library_writes(specs: Specs) -> None:
    tensors = tensors_of(specs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        safetensors.torch.save_file(tensors, path)
        header = read_header(path)
        assert header.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert torch.equal(read_tensor(header[key]), tensor)


@given(specs, st.integers(0, 10_000))
def test_a_truncated_or_longer_file_is_refused(specs: Specs, cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = written(folder, specs)[0]
        content = path.read_bytes()
        for damaged in (content[: cut % len(content)], content + b"\0"):
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=r"x\.safetensors"):
                read_header(path)


def test_other_types_are_refused_by_name(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(2), "odd": torch.zeros(2, dtype=torch.int8)}, tmp_path / "x")
    with pytest.raises(CheckpointError, match="tensor odd .* dtype I8"):
        read_header(tmp_path / "x")
