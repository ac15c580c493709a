"""Weights of other decoders: Llama, Mistral and Mixtral folders read as ours, and ours written as theirs.

Our HF names are Llama's; Mixtral's experts have names of their own, in two layouts. Reading is a matter of names alone:
``ForeignFolder`` looks like one of our folders, so the one mapping table and everything built on it serves it as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import tokenizers
import torch
from torch import Tensor

from ...errors import CheckpointError, DataError
from ...tokenizer import Tokenizer
from ...tokenizer.hf_files import hf_backend
from ...tokenizer.imported import load_tokenizer
from .foreign_config import CONFIG, Foreign, read_config
from .hf_folder import HfFolder
from .mapping import table
from .safetensors_file import Stored, read_tensor
from .shape import Shape

#: Our name of a projection of an expert <-> Mixtral's.
_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_OURS = {theirs: ours for ours, theirs in _MIXTRAL.items()}
_EXPERT = re.compile(r"(.*)\.mlp\.experts\.(\d+)\.(\w+)\.weight")
_MIXTRAL_EXPERT = re.compile(r"(.*)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight")
#: How transformers 5 holds experts in memory, and writes them with ``save_original_format=False``.
_FUSED = re.compile(r"(.*)\.mlp\.experts\.(gate_up_proj|down_proj)")
#: Buffers that old versions of transformers wrote; computed from the configuration.
_BUFFER = ".rotary_emb.inv_freq"
#: Rows of a vocabulary that are summed in double precision at a time.
_ROWS = 4096


def foreign_name(name: str, family: str) -> str:
    """What ``family`` calls our HF tensor ``name``."""
    if family != "mixtral":
        return name
    if match := _EXPERT.fullmatch(name):
        return f"{match[1]}.block_sparse_moe.experts.{match[2]}.{_MIXTRAL[match[3]]}.weight"
    return name.replace(".mlp.gate.", ".block_sparse_moe.gate.")


def our_name(name: str) -> str:
    """Our HF name of a tensor of any of the families; names that need none of it stay."""
    if match := _MIXTRAL_EXPERT.fullmatch(name):
        return f"{match[1]}.mlp.experts.{match[2]}.{_OURS[match[3]]}.weight"
    return name.replace(".block_sparse_moe.gate.", ".mlp.gate.")


def is_foreign(folder: Path) -> bool:
    """Whether ``folder`` holds a model of another kind than ours; ``read_config`` says whether it can be imported."""
    try:
        kind = json.loads((folder / CONFIG).read_bytes())["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(kind != "refractor")


def tokenizer_of(folder: Path, log: Callable[[str], object], vocab_size: int | None = None) -> Tokenizer | None:
    """The folder's tokenizer as ours; None, and a note that says why, where it cannot be ours id for id.

    ``vocab_size``: rows of the model. Only special tokens of ours, which the source does not have, may lie beyond them.
    """
    if not (folder / "tokenizer.json").is_file():
        log(f"note: {folder} has no tokenizer.json, so the new folder gets no tokenizer: give one to pretrain yourself")
        return None
    try:
        tokenizer = load_tokenizer(folder)
        hf_backend(tokenizer)  # it goes out again with every export
    except DataError as error:
        log(f"note: the new folder gets no tokenizer. {error}")
        return None
    own = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    if vocab_size is not None and own > vocab_size:
        log(
            f"note: the new folder gets no tokenizer. {folder / 'tokenizer.json'} has {own} ids and the model "
            f"{vocab_size}, so it is not the model's: give the right one to pretrain with --tokenizer."
        )
        return None
    return tokenizer


class ForeignFolder(HfFolder):
    """A foreign folder under our names, for the table of its configuration.

    ``origin``: the foreign name of every tensor, with the part in brackets where it is one. ``left``: foreign tensors
    that are no weights, with the reason.
    """

    def __init__(self, folder: Path, ids: int = 0) -> None:
        """Read configuration, index and headers, and compare all names and shapes with what the model needs.

        ``ids``: of the tokenizer. Where the model has fewer rows, embedding and head appear with that many: the new
        ones are the mean of the source's, which gives a token nobody has seen the least surprising start.

        Raises:
            CheckpointError: as ``HfFolder`` and ``read_config``; or a tensor is missing, has another shape, or has no
                place, named as the folder names it.
        """
        self.model: Foreign = read_config(folder)
        super().__init__(folder)
        self.shape = Shape.of_run(self.model.cfg)
        self.table = table(self.shape)
        self.source_vocab = self.shape.vocab
        self._short: dict[str, tuple[Stored, Tensor]] = {}  # as stored, and the mean of its rows [hidden]
        self.left: dict[str, str] = {}
        self.origin: dict[str, str] = {}
        theirs, self.tensors = self.tensors, {}
        for name, stored in theirs.items():
            self._adopt(name, stored)
        self._check_tied()
        self._check_complete()
        if ids > self.source_vocab:
            self._grow(ids)

    def read(self, name: str, *, check: bool = True) -> Tensor:
        """A tensor under our name, with the rows that were added to it."""
        if name not in self._short:
            return super().read(name, check=check)
        stored, mean = self._short[name]
        return torch.cat([read_tensor(stored, self.buffers), mean.expand(self.model.rows, -1)])

    @property
    def growth(self) -> list[str]:
        """What was added to the vocabulary, in words for the ledger."""
        first, last = self.source_vocab, self.shape.vocab - 1
        return [
            f"{self.origin[name]}: rows {first} to {last} added for special tokens of ours, each the mean of the "
            f"{first} rows of {self.folder}"
            for name in self._short
        ]

    def _grow(self, ids: int) -> None:
        self.model = read_config(self.folder, ids)
        self.shape = Shape.of_run(self.model.cfg)
        self.table = table(self.shape)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in self.tensors:
                stored = self.tensors[name]
                parts = torch.split(read_tensor(stored, self.buffers), _ROWS)
                total = torch.stack([part.double().sum(0) for part in parts]).sum(0)
                self._short[name] = stored, (total / self.source_vocab).to(stored.dtype)
                self.tensors[name] = replace(stored, shape=(ids, self.shape.hidden))

    def _adopt(self, name: str, stored: Stored) -> None:
        """Enter a foreign tensor under our name, or its parts under ours."""
        if name.endswith(_BUFFER):
            self.left[name] = "rotary frequencies, which follow from the configuration"
        elif (match := _FUSED.fullmatch(name)) and self.shape.experts:
            for own, part in self._parts(name, match[1], match[2], stored).items():
                self._enter(own, f"{name} ({own.rpartition('.experts.')[2].removesuffix('.weight')})", part)
        else:
            self._enter(our_name(name), name, stored)

    def _enter(self, own: str, name: str, stored: Stored) -> None:
        if own in self.tensors:
            raise CheckpointError(
                f"tensors {self.origin[own]} and {name} of {self.folder} are the same weight: remove one."
            )
        self.tensors[own], self.origin[own] = stored, name

    def _parts(self, name: str, layer: str, kind: str, stored: Stored) -> Mapping[str, Stored]:
        """Slices of one expert each: gate_up [E, 2 I, H] -> gate and up [I, H]; down [E, H, I] -> [H, I]."""
        shape = self.shape
        rows, width = (2 * shape.ffn, shape.hidden) if kind == "gate_up_proj" else (shape.hidden, shape.ffn)
        if stored.shape != (shape.experts, rows, width):
            raise CheckpointError(
                f"tensor {name} of {self.folder} has shape {list(stored.shape)} and its configuration asks for "
                f"{[shape.experts, rows, width]}: configuration and weights disagree."
            )
        names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        size = (rows // len(names), width)
        step = size[0] * size[1] * stored.dtype.itemsize
        return {
            f"{layer}.mlp.experts.{expert}.{one}.weight": replace(
                stored, start=stored.start + step * (len(names) * expert + number), shape=size
            )
            for expert in range(shape.experts)
            for number, one in enumerate(names)
        }

    def _check_tied(self) -> None:
        """Some folders of tied models hold the shared matrix twice."""
        head, embedding = "lm_head.weight", "model.embed_tokens.weight"
        if not self.shape.tied or head not in self.tensors or embedding not in self.tensors:
            return
        if not torch.equal(self.read(head), self.read(embedding)):
            raise CheckpointError(
                f"tensor {head} of {self.folder} differs from {embedding} although tie_word_embeddings is true: "
                "configuration and weights disagree."
            )
        del self.tensors[head]
        self.left[self.origin.pop(head)] = f"the same numbers as {embedding}"

    def _check_complete(self) -> None:
        wanted = {one.name: one.shape for entry in self.table for one in entry.tensors if not one.padding}
        family = self.model.family
        for own, shape in wanted.items():
            if own not in self.tensors:
                raise CheckpointError(
                    f"tensor {foreign_name(own, family)} is missing in {self.folder}, and its configuration asks for "
                    "it: give the whole model."
                )
            if self.tensors[own].shape != shape:
                raise CheckpointError(
                    f"tensor {self.origin[own]} of {self.folder} has shape {list(self.tensors[own].shape)} and its "
                    f"configuration asks for {list(shape)}: configuration and weights disagree."
                )
        extra = [self.origin[own] for own in self.tensors if own not in wanted]
        if extra:
            more = f" and {len(extra) - 1} others" if len(extra) > 1 else ""
            raise CheckpointError(
                f"tensor {extra[0]}{more} of {self.folder} has no place in a {family} decoder of its configuration: "
                "it would be lost, so nothing is imported."
            )
