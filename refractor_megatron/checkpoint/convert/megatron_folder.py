"""A Megatron checkpoint read tensor by tensor: no process group, no model, never more than one slice in memory."""

from __future__ import annotations

import io
import math
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...config.schema import RunConfig
from ...errors import CheckpointError
from .. import manifest as manifests
from . import checksums, direct_file
from .buffers import Buffers
from .ledger import Ledger
from .megatron_metadata import METADATA, Chunk, Index, StoredTensor, View, read_index
from .saved_tensor import numbers_start

EMA = "ema."
#: Moments and masters under every name that Megatron's optimizers give them; the group is the weight's key.
_OPTIMIZER = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.[a-z0-9_]+\.(.+)")


def find_step(path: Path) -> Path:
    """The checkpoint that ``path`` means: itself, or the newest one of a run folder.

    Raises:
        CheckpointError: it is neither a checkpoint nor a run with one.
    """
    if (path / manifests.MANIFEST).is_file():
        return path
    for root in (path / "checkpoints", path):
        if folders := manifests.complete(root):
            return folders[-1]
    raise CheckpointError(f"{path} is no run folder and no checkpoint: give one that `refractor ckpt list` shows.")


def config_of(step: Path) -> RunConfig:
    """The configuration of the run that a checkpoint belongs to, checked against the checkpoint.

    Raises:
        CheckpointError: there is no configuration beside it, or it is another run's.
    """
    path = step.absolute().parent.parent / "config.yaml"
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing: a checkpoint is converted within the run folder that it was made in."
        )
    cfg, manifest = RunConfig.load(path), manifests.read(step)
    if manifest.fixed_hash != cfg.fixed_hash:
        raise CheckpointError(
            f"{step} has fixed_hash {manifest.fixed_hash}, {path} has {cfg.fixed_hash}: configuration and weights "
            "disagree, restore the config.yaml of this run."
        )
    return cfg


class MegatronFolder:
    """One checkpoint. ``prefix`` chooses the weights: none for the raw ones, ``ema.`` for the average.

    Integrity: ``verify`` checks sizes and the index; then ``read`` checks each chunk's CRC against ``tensors.json``.
    Where a checkpoint has no such file, all data files are hashed in the background and ``finish`` has the verdict.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self.folder, self.prefix = folder, prefix
        self.manifest = manifests.read(folder)
        self.index: Index = read_index(folder)
        self._checksums = checksums.read(folder)
        self._hashing: threading.Thread | None = None
        self._damaged: list[str] = []
        self._fault: str | None = None
        self._stop = threading.Event()
        self._last: tuple[Chunk, Tensor] | None = None
        self._starts: dict[Chunk, int] = {}  # where the numbers of chunks begin that were read before
        self.buffers = Buffers()  # who reads many tensors gives a pool

    def weights(self) -> dict[str, StoredTensor]:
        """The chosen weights by key, without the prefix."""
        if self.prefix:
            return {
                key.removeprefix(self.prefix): tensor
                for key, tensor in self.index.tensors.items()
                if key.startswith(self.prefix)
            }
        return {
            key: tensor
            for key, tensor in self.index.tensors.items()
            if not key.startswith(EMA) and not _OPTIMIZER.fullmatch(key)
        }

    def leave(self, ledger: Ledger, known: set[str]) -> None:
        """Enter everything that is not converted, with its reason, into the ledger.

        ``known``: keys of the model's weights.

        Raises:
            CheckpointError: a tensor or an object that nobody can place.
        """
        for key in self.index.tensors:
            optimizer = _OPTIMIZER.fullmatch(key)
            weight = optimizer[1] if optimizer else key.removeprefix(EMA)
            if weight not in known:
                raise CheckpointError(
                    f"tensor {key} of {self.folder} has no place in the model of its configuration: "
                    "configuration and weights disagree."
                )
            if optimizer:
                ledger.left[key] = "optimizer state"
            elif key.startswith(EMA) != bool(self.prefix):
                ledger.left[key] = "weights not asked for"
        for key, chunk in self.index.objects.items():
            self._check_empty(key, chunk)
            ledger.left[key] = "no content"

    def _check_empty(self, key: str, chunk: Chunk) -> None:
        """Megatron writes an ``_extra_state`` for each linear layer; without fp8 it is nothing."""
        if "._extra_state" not in key:
            raise CheckpointError(f"object {key} of {self.folder} is unknown to this version: it cannot be converted.")
        try:
            with open(self.folder / chunk.file, "rb", buffering=0) as file:
                content = View(file, chunk.start, chunk.length).read()
        except FileNotFoundError:
            raise CheckpointError(f"{self.folder / chunk.file} is missing: take another checkpoint.") from None
        try:
            value: Any = torch.load(io.BytesIO(content), weights_only=True) if content else None
        except Exception as error:  # pickles fail in many ways
            raise CheckpointError(f"object {key} of {self.folder} is damaged ({str(error)[:100]}).") from None
        if not _is_nothing(value):
            raise CheckpointError(f"object {key} of {self.folder} holds extra state, which no HF folder can: refused.")

    def read(self, key: str, expert: int | None = None, *, check: bool = True) -> Tensor:
        """Tensor ``key``, or one expert's slice of it; without ``check`` its CRC is not computed again.

        Raises:
            CheckpointError: it is damaged, or its chunks do not tile it.
        """
        name = self.prefix + key
        stored = self.index.tensors[name]
        low = [0] * len(stored.shape)
        high = list(stored.shape)
        if expert is not None:
            low[0], high[0] = expert, expert + 1
        box = [b - a for a, b in zip(low, high, strict=True)]
        pieces = [(chunk, cut) for chunk in stored.chunks if (cut := _cut(chunk, low, high)) is not None]
        if sum(math.prod(s.stop - s.start for s in to) for _, (_, to) in pieces) != math.prod(box) or _overlap(pieces):
            raise CheckpointError(f"tensor {name} of {self.folder} is not whole: its chunks do not tile it.")
        if len(pieces) == 1 and pieces[0][0].sizes == tuple(box):
            whole: Tensor = self._chunk(name, stored, pieces[0][0], check)
        else:
            whole = self.buffers.empty(box, stored.dtype)
            for chunk, (own, to) in pieces:
                tensor = self._chunk(name, stored, chunk, check)
                whole[to] = tensor[own]
                if expert is not None and chunk.sizes[0] > 1:  # the next expert will ask for it
                    self._last = chunk, tensor
        return whole if expert is None else whole[0]

    def _chunk(self, name: str, stored: StoredTensor, chunk: Chunk, check: bool) -> Tensor:
        if self._last is not None and self._last[0] is chunk:
            return self._last[1]
        self._last = None
        try:
            tensor = self._load(stored, chunk)
        except Exception as error:  # a damaged pickle raises whatever it likes
            text = (str(error) or type(error).__name__).splitlines()[0][:100]
            raise CheckpointError(f"tensor {name} of {self.folder / chunk.file} is damaged ({text}).") from None
        if check and self._checksums is not None:
            expected = self._checksums[name]["crc32"].get(checksums.place(chunk))
            if checksums.crc32(tensor) != expected:
                raise CheckpointError(
                    f"tensor {name} of {self.folder / chunk.file} is altered: it does not have the CRC-32 that "
                    f"{checksums.FILE} says; take another checkpoint."
                )
        return tensor

    def _load(self, stored: StoredTensor, chunk: Chunk) -> Tensor:
        """A chunk's numbers, read straight to where they stay: ``torch.load`` would take fresh memory for each."""
        start = self._starts.get(chunk)
        if start is None:
            with open(self.folder / chunk.file, "rb", buffering=0) as file:
                part: Any = View(file, chunk.start, chunk.length)
                start = numbers_start(part, chunk.sizes, stored.dtype)
                if start is None:
                    part.seek(0)
                    loaded: Tensor = torch.load(part, map_location="cpu", weights_only=True)
                    return loaded.reshape(chunk.sizes)
            self._starts[chunk] = start = chunk.start + start
        return direct_file.read_tensor(self.folder / chunk.file, start, chunk.sizes, stored.dtype, self.buffers)

    def verify(self) -> None:
        """Check sizes and everything but tensor data; then begin to hash that too, where no CRCs cover it.

        With CRCs, what is found here waits for ``finish``: reading may name the tensor that was altered.

        Raises:
            CheckpointError: names the file, and the tensor where it can be told.
        """
        data = {chunk.file for tensor in self.index.tensors.values() for chunk in tensor.chunks}
        data |= {chunk.file for chunk in self.index.objects.values()}
        if self._checksums is not None:
            self._check_hash(checksums.FILE)
            self._compare_index(self._checksums)
        faults = self._faults(data)
        if self._checksums is not None:
            self._fault = next(faults, None)
            return
        for fault in faults:
            raise CheckpointError(fault)
        self._hashing = threading.Thread(target=self._hash, args=(sorted(data),), daemon=True)
        self._hashing.start()

    def _faults(self, data: set[str]) -> Iterator[str]:
        """What is wrong with the files, as sentences: names and sizes of all, hashes of those without tensor data."""
        for name in sorted(data - set(self.manifest.files)):
            yield f"{self.folder / name} is not in the manifest: {METADATA} was exchanged, take another checkpoint."
        for name, record in self.manifest.files.items():
            if fault := self._size_fault(name, int(record["bytes"])):
                yield fault
        for name in sorted(set(self.manifest.files) - data):
            if manifests.file_record(self.folder / name)["sha256"] != self.manifest.files[name]["sha256"]:
                yield f"{self.folder / name} does not match its sha256: take another checkpoint."

    def _check_hash(self, name: str) -> None:
        record = self.manifest.files.get(name)
        if record is None or manifests.file_record(self.folder / name) != record:
            raise CheckpointError(f"{self.folder / name} does not match the manifest: take another checkpoint.")

    def _compare_index(self, written: checksums.Checksums) -> None:
        """An index that was rewritten is told tensor by tensor."""
        for key in self.index.tensors:
            if key not in written:
                raise CheckpointError(f"tensor {key} of {self.folder} was added to {METADATA} after it was written.")
        for key, expected in written.items():
            stored = self.index.tensors.get(key)
            if stored is None:
                raise CheckpointError(f"tensor {key} of {self.folder} is missing: {METADATA} was altered.")
            found = [list(stored.shape), str(stored.dtype).removeprefix("torch.")]
            if found != [expected["shape"], expected["dtype"]]:
                raise CheckpointError(
                    f"tensor {key} of {self.folder} is {found[1]} {found[0]} and was written as {expected['dtype']} "
                    f"{expected['shape']}: {METADATA} was altered."
                )

    def _size_fault(self, name: str, expected: int) -> str | None:
        path = self.folder / name
        if not path.is_file():
            return f"{path} is missing{self._first_tensor(name, 0)}: take another checkpoint."
        size = path.stat().st_size
        if size == expected:
            return None
        return (
            f"{path} is truncated or longer than it was ({size} bytes, the manifest says {expected}"
            f"{self._first_tensor(name, size)}): take another checkpoint."
        )

    def _first_tensor(self, file: str, size: int) -> str:
        """Which tensors lie behind byte ``size`` of a file."""
        at = [(c.start, key) for key, t in self.index.tensors.items() for c in t.chunks if c.file == file]
        lost = sorted((start, key) for start, key in at if start >= size) or sorted(at)[-1:]
        return f", from tensor {lost[0][1]} on" if lost else ""

    def _hash(self, names: list[str]) -> None:
        for name in names:
            if self._stop.is_set():
                return
            if manifests.file_record(self.folder / name)["sha256"] != self.manifest.files[name]["sha256"]:
                self._damaged.append(name)

    def finish(self) -> None:
        """The verdict on all files; waits for hashes that are still being computed.

        Raises:
            CheckpointError: a file is not what the manifest says; names the tensors that can be told.
        """
        if self._fault is not None:
            raise CheckpointError(self._fault)
        if self._hashing is None:
            return
        self._hashing.join()
        for name in self._damaged:
            bad = [
                key
                for key, tensor in self.index.tensors.items()
                if any(c.file == name and not checksums.is_intact(self.folder, c) for c in tensor.chunks)
            ]
            which = f" in tensor {', '.join(bad[:3])}" if bad else ""
            raise CheckpointError(
                f"{self.folder / name} does not match its sha256{which}: it was altered, take another checkpoint."
            )

    def abandon(self) -> None:
        """Stop hashing after the file at hand: the conversion failed for another reason."""
        self._stop.set()


Cut = tuple[tuple[slice, ...], tuple[slice, ...]]


def _cut(chunk: Chunk, low: list[int], high: list[int]) -> Cut | None:
    """What a chunk gives to the box ``low .. high``: slices of the chunk, and of the box; None if nothing."""
    own, to = [], []
    for at, size, a, b in zip(chunk.offsets, chunk.sizes, low, high, strict=True):
        start, stop = max(at, a), min(at + size, b)
        if start >= stop:
            return None
        own.append(slice(start - at, stop - at))
        to.append(slice(start - a, stop - a))
    return tuple(own), tuple(to)


def _overlap(pieces: list[tuple[Chunk, Cut]]) -> bool:
    """Whether two chunks write to the same place. Boxes that fill a volume exactly and do not overlap tile it."""
    boxes = [to for _, (_, to) in pieces]
    return any(
        all(x.start < y.stop and y.start < x.stop for x, y in zip(a, b, strict=True))
        for n, a in enumerate(boxes)
        for b in boxes[:n]
    )


def _is_nothing(value: Any) -> bool:
    """None, or a list or tuple of nothing, or an empty buffer."""
    if isinstance(value, list | tuple):
        return all(map(_is_nothing, value))
    if isinstance(value, io.BytesIO):
        return not value.getbuffer().nbytes
    return value is None or (isinstance(value, Tensor) and not value.numel())
