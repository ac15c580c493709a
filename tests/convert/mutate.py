"""Damage to exactly one tensor, or two that change places, of a checkpoint or of a model folder at rest."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path

import safetensors.torch
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from refractor_megatron.checkpoint.convert.hf_folder import INDEX
from refractor_megatron.checkpoint.convert.megatron_folder import MegatronFolder

KINDS = ("drop", "swap", "zero", "transpose", "truncate")
Tensors = dict[str, torch.Tensor]


def mutate(tensors: Tensors, kind: str, rng: random.Random) -> tuple[Tensors, set[str]]:
    """A copy with one mutation, and the names of the tensors that it touches. Inputs are left as they are."""
    names = [n for n in sorted(tensors) if possible(tensors, n, kind)]
    name = rng.choice(names)
    out = dict(tensors)
    if kind == "drop":
        del out[name]
        return out, {name}
    if kind == "swap":
        other = rng.choice([n for n in partners(tensors, name)])
        out[name], out[other] = out[other], out[name]
        return out, {name, other}
    if kind == "zero":
        out[name] = torch.zeros_like(out[name])
    elif kind == "transpose":
        out[name] = out[name].transpose(-1, -2).contiguous()
    else:
        dim = rng.randrange(out[name].dim())
        out[name] = out[name].narrow(dim, 0, out[name].shape[dim] - 1).contiguous()
    return out, {name}


def partners(tensors: Tensors, name: str) -> list[str]:
    one = tensors[name]
    alike = [n for n in sorted(tensors) if n != name and tensors[n].shape == one.shape]
    return [n for n in alike if not torch.equal(tensors[n], one)]


def possible(tensors: Tensors, name: str, kind: str) -> bool:
    """Whether the mutation changes anything."""
    one = tensors[name]
    if kind == "swap":
        return bool(partners(tensors, name))
    if kind == "transpose":
        return one.dim() > 1 and not torch.equal(one, one.transpose(-1, -2))
    if kind == "zero":
        return bool(one.any())
    return kind == "drop" or max(one.shape) > 1


def mutate_hf(folder: Path, kind: str, rng: random.Random, *, index_too: bool) -> set[str]:
    """Rewrite the safetensors files with the format's own library; ``index_too`` keeps the index in step."""
    files = sorted(folder.glob("*.safetensors"))
    files = [file for file in files if file.name.startswith("model-")]
    places = {name: file for file in files for name in safetensors.torch.load_file(file)}
    tensors: Tensors = {name: value for file in files for name, value in safetensors.torch.load_file(file).items()}
    changed, names = mutate(tensors, kind, rng)
    for file in files:
        safetensors.torch.save_file({n: t for n, t in changed.items() if places[n] == file}, file, {"format": "pt"})
    if index_too:
        total = sum(tensor.nbytes for tensor in changed.values())
        content = {"metadata": {"total_size": total}, "weight_map": {n: places[n].name for n in changed}}
        (folder / INDEX).write_text(json.dumps(content))
    return names


def mutate_megatron(step: Path, kind: str, rng: random.Random, *, among: str = "") -> set[str]:
    """Save the checkpoint again, chunk by chunk where it was, by torch's own writer; our two JSON files stay.

    Args:
        among: prefix of the keys that may be touched (none: raw weights).
    """
    source = MegatronFolder(step)
    stored = source.index.tensors
    all_tensors = {key: source.read(key, check=False) for key in stored}
    eligible = {k: t for k, t in all_tensors.items() if (k.startswith(among) if among else k in source.weights())}
    changed, names = mutate(eligible, kind, rng)
    kept = {key: changed.get(key) if key in eligible else tensor for key, tensor in all_tensors.items()}
    metadata = FileSystemReader(step).read_metadata()
    _save(step, metadata, {key: tensor for key, tensor in kept.items() if tensor is not None}, source)
    return names


def _save(step: Path, old: Metadata, tensors: Tensors, source: MegatronFolder) -> None:
    """Every chunk and every other object goes to the file that it came from, in the same order."""
    metadata = Metadata({}, storage_data={})
    rows: dict[str, list[tuple[int, MetadataIndex, torch.Tensor | bytes]]] = {}
    for key, chunk in source.index.objects.items():
        content = (step / chunk.file).read_bytes()[chunk.start : chunk.start + chunk.length]
        rows.setdefault(chunk.file, []).append((chunk.start, MetadataIndex(key), content))
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
    for key, tensor in tensors.items():
        before = source.index.tensors[key]
        whole = tuple(tensor.shape) == before.shape
        new = TensorStorageMetadata(old.state_dict_metadata[key].properties, tensor.shape, [])
        for chunk in before.chunks if whole else before.chunks[:1]:
            at, sizes = (chunk.offsets, chunk.sizes) if whole else ((0,) * tensor.dim(), tuple(tensor.shape))
            new.chunks.append(ChunkStorageMetadata(torch.Size(at), torch.Size(sizes)))
            data = tensor[tuple(slice(o, o + n) for o, n in zip(at, sizes, strict=True))].clone()
            rows.setdefault(chunk.file, []).append((chunk.start, MetadataIndex(key, at), data))
        metadata.state_dict_metadata[key] = new
    for file, items in rows.items():
        with open(step / file, "wb") as out:
            for _, index, content in sorted(items, key=lambda row: row[0]):
                start = out.tell()
                if isinstance(content, bytes):
                    out.write(content)
                else:
                    torch.save(content, out)
                metadata.storage_data[index] = _StorageInfo(file, start, out.tell() - start)
    with open(step / ".metadata", "wb") as out:
        pickle.dump(metadata, out)
