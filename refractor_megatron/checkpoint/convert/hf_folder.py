"""A Hugging Face folder: its index, its safetensors files, its tensors one by one."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...errors import CheckpointError
from . import hf_manifest
from .buffers import Buffers
from .mapping import HfTensor
from .safetensors_file import SafetensorsWriter, Stored, read_header, read_tensor
from .tensors import sha256

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
#: Vocabulary rows that only Megatron has; no file that transformers would load.
PADDING = "megatron_padding.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

Plan = dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]]  # file -> tensor -> shape and dtype


class HfFolder:
    """Reads tensors by name; each is checked against the manifest's hash where there is one."""

    def __init__(self, folder: Path) -> None:
        """Read the index and every header.

        Raises:
            CheckpointError: no such folder, pickles in place of safetensors, an index that is missing or does not agree
                with the files, a file that is missing or damaged, an unknown dtype.
        """
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is no folder: give one with config.json and safetensors files.")
        self.folder = folder
        self.buffers = Buffers()  # who reads many tensors gives a pool
        self.manifest = hf_manifest.read(folder)
        self._total: int | None = None
        self.tensors: dict[str, Stored] = self._indexed()
        size = sum(stored.nbytes for stored in self.tensors.values())
        if (folder / PADDING).exists():
            self.tensors |= read_header(folder / PADDING)
        if self.manifest is not None:
            self._compare_manifest(self.manifest)
        if self._total not in (None, size):
            raise CheckpointError(
                f"{folder / INDEX} has total_size {self._total}, which its tensors do not add up to: they disagree."
            )

    def _indexed(self) -> dict[str, Stored]:
        path = self.folder / INDEX
        if not path.exists():
            return self._without_index()
        try:
            content = json.loads(path.read_text())
            places: dict[str, str] = dict(content["weight_map"])
            total = (content.get("metadata") or {}).get("total_size")  # the format does not ask for it
            self._total = None if total is None else int(total)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged ({str(error)[:80]}): {self._again}.") from None
        found: dict[str, Stored] = {}
        for file in sorted(set(places.values())):
            if Path(file).name != file:
                raise CheckpointError(f"{path} names {file!r}, which is not a file of this folder: do not trust it.")
            if not (self.folder / file).is_file():
                name = min(name for name, at in places.items() if at == file)
                raise CheckpointError(
                    f"{self.folder / file} is missing, and {INDEX} looks for tensor {name} there: {self._again}."
                )
        for file in sorted(set(places.values())):
            for name, stored in read_header(self.folder / file).items():
                if places.get(name) != file:
                    raise CheckpointError(f"tensor {name} of {self.folder / file} is not in {INDEX}: they disagree.")
                found[name] = stored
        for name, file in places.items():
            if name not in found:
                raise CheckpointError(f"tensor {name} is missing in {self.folder / file}, where {INDEX} looks for it.")
        return found

    @property
    def _again(self) -> str:
        """What to do about a damaged folder: only those with a manifest are exports."""
        return "download it again" if self.manifest is None else "export the model again"

    def _without_index(self) -> dict[str, Stored]:
        if (self.folder / SINGLE).exists():
            return read_header(self.folder / SINGLE)
        if any(self.folder.glob("model-*.safetensors")):
            raise CheckpointError(
                f"{self.folder / INDEX} is missing: without it nobody knows whether all shards exist; {self._again}."
            )
        pickles = sorted(path.name for pattern in _PICKLES for path in self.folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{self.folder / pickles[0]} is a pickle, which can run code when it is opened: refused, save the "
                "model as safetensors."
            )
        raise CheckpointError(f"{self.folder} has no safetensors files: it is no model folder, or only half of one.")

    def _compare_manifest(self, manifest: hf_manifest.HfManifest) -> None:
        for name, expected in manifest.tensors.items():
            if name not in self.tensors:
                raise CheckpointError(f"tensor {name} is missing in {self.folder}, its manifest has it.")
            stored = self.tensors[name]
            if list(stored.shape) != expected["shape"] or str(stored.dtype) != f"torch.{expected['dtype']}":
                raise CheckpointError(
                    f"tensor {name} of {stored.file} is {stored.dtype} {list(stored.shape)} and was exported as "
                    f"{expected['dtype']} {expected['shape']}: it was altered."
                )
        for name in self.tensors:
            if name not in manifest.tensors:
                raise CheckpointError(
                    f"tensor {name} of {self.tensors[name].file} is not in the manifest: it was added."
                )

    @property
    def weights(self) -> dict[str, Stored]:
        """Tensors that the model loads: all but the padding rows."""
        return {name: stored for name, stored in self.tensors.items() if stored.file.name != PADDING}

    def read(self, name: str, *, check: bool = True) -> Tensor:
        """A tensor.

        Raises:
            CheckpointError: it does not have the manifest's hash.
        """
        tensor = read_tensor(self.tensors[name], self.buffers)
        if check and self.manifest is not None and sha256(tensor) != self.manifest.tensors[name]["sha256"]:
            raise CheckpointError(
                f"tensor {name} of {self.tensors[name].file} does not match its sha256: it was altered, export the "
                "model again."
            )
        return tensor


def plan_files(tensors: Iterable[HfTensor], dtypes: Mapping[str, torch.dtype], shard_size: int) -> Plan:
    """Files of at most ``shard_size`` bytes, or one tensor, in the order of ``tensors``; padding goes to its own."""
    shards: list[dict[str, tuple[tuple[int, ...], torch.dtype]]] = [{}]
    padding: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    room = shard_size
    for tensor in tensors:
        dtype = dtypes[tensor.name]
        size = tensor.numel * dtype.itemsize
        if tensor.padding:
            padding[tensor.name] = tensor.shape, dtype
            continue
        if size > room and shards[-1]:
            shards.append({})
            room = shard_size
        shards[-1][tensor.name] = tensor.shape, dtype
        room -= size
    count = len(shards)
    plan: Plan = {f"model-{n:05d}-of-{count:05d}.safetensors": shard for n, shard in enumerate(shards, start=1)}
    return plan | ({PADDING: padding} if padding else {})


def planned_bytes(plan: Plan, *, padding: bool = True) -> int:
    """Bytes of a plan's tensors, with or without those of the side file."""
    return sum(
        math.prod(shape) * dtype.itemsize
        for file, shard in plan.items()
        for shape, dtype in shard.values()
        if padding or file != PADDING
    )


class HfWriter:
    """Writes the tensors of a plan, in its order, and then the index."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.plan = folder, plan
        self._file_of = {name: file for file, shard in plan.items() for name in shard}
        self._open: dict[str, SafetensorsWriter] = {}
        self._left = {file: len(shard) for file, shard in plan.items()}
        self.digests: dict[str, str] = {}

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor to its file, which is closed after its last."""
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = SafetensorsWriter(self.folder / file, self.plan[file])
        self._open[file].write(name, tensor)
        self._left[file] -= 1
        if not self._left[file]:
            writer = self._open.pop(file)
            writer.close()
            self.digests |= writer.digests

    def finish(self) -> None:
        """Write the index."""
        assert not self._open and not any(self._left.values()), self._left
        sizes = {
            name: torch.Size(shape).numel() * dtype.itemsize
            for s in self.plan.values()
            for name, (shape, dtype) in s.items()
        }
        weight_map = {name: file for name, file in self._file_of.items() if file != PADDING}
        index = {"metadata": {"total_size": sum(sizes[name] for name in weight_map)}, "weight_map": weight_map}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def abort(self) -> None:
        """Close what is open after a failure."""
        for writer in self._open.values():
            writer.close(whole=False)


def header_sha256(path: Path) -> str:
    """Digest of a safetensors file's length field and header."""
    with open(path, "rb") as file:
        prefix = file.read(8)
        return hashlib.sha256(prefix + file.read(struct.unpack("<Q", prefix)[0])).hexdigest()
