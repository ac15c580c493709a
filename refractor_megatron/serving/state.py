"""The decoding state of a sequence as one page of fixed size, for engines that own the memory of all sequences.

The state is ``RefractorCache`` laid out for ``length`` tokens at most: the ring of the local window, the summaries of
every block there can be, and the records of the tokens. Its size is known beforehand, so an engine can treat it as the
state of a recurrent layer: one page a sequence, however long it has grown. Needs torch and transformers alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refractor_megatron.errors import CheckpointError, ConfigError
from refractor_megatron.hf.configuration_refractor import RefractorConfig
from refractor_megatron.hf.masking_refractor import RefractorCache
from refractor_megatron.hf.modeling_refractor import RefractorModel


@dataclass(frozen=True)
class Field:
    """One tensor of the cache: ``name`` of layer ``layer`` (None: shared by all), its shape without the samples."""

    layer: int | None
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in a page."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def state_fields(config: RefractorConfig, length: int, dtype: torch.dtype) -> tuple[Field, ...]:
    """Fields of the state of a sequence of up to ``length`` tokens, widest element first, so that each is aligned.

    dtype: of keys and values. Errors: ``ConfigError`` for models whose state has no fixed size or needs more than ids.
    """
    if config.retrieval:
        raise ConfigError(
            "config.json: retrieval is set, but a request to a serving engine brings no retrieved records; serve this "
            "model with `refractor generate`, or export one that was trained without relation.retrieval."
        )
    if config.linear_attention:
        raise ConfigError(
            "config.json: linear_attention is set, and its states, one for each kind of token met, have no fixed size; "
            "serve this model with `refractor generate`."
        )
    heads, width, cache = config.num_key_value_heads, config.head_dim, RefractorCache(config)
    fields = [Field(None, "ids", (length,), torch.int64), Field(None, "history", (length, 4), torch.int32)]
    ring = length if cache.grows else cache.ring
    places = {"k": ring, "v": ring}
    if config.summaries:
        block, per_block = config.summaries["block_size"], config.summaries["per_block"]
        levels = [("block", "summary", length // block)]
        if config.summaries["levels"] == 2:
            levels.append(("group", "group", length // (block * config.summaries["fanout"])))
        for records, keys, count in levels:
            fields += [Field(None, f"{records}_{name}", (count,), torch.int64) for name in ("document", "segment")]
            fields.append(Field(None, f"{records}_kinds", (count, len(config.roles) * 8), torch.bool))
            places |= {f"{keys}_{name}": count * per_block for name in ("k", "v")}
    for layer in range(config.num_hidden_layers):
        fields += [Field(layer, name, (heads, count, width), dtype) for name, count in places.items()]
    # A level of which not one group can become complete has no tensor.
    return tuple(sorted((field for field in fields if field.nbytes), key=lambda field: -field.dtype.itemsize))


class Pages:
    """Runs sequences whose states lie in pages.

    Args:
        fields: of ``state_fields``. tensors: one for each field, [pages, ...], views of the engine's memory.
    """

    def __init__(self, config: RefractorConfig, fields: Sequence[Field], tensors: Sequence[Tensor]) -> None:
        self.config, self.fields, self.tensors = config, fields, tensors

    def run_batch(
        self, model: RefractorModel, ids: Tensor, starts: Sequence[int], known: Sequence[int], rows: Tensor
    ) -> Tensor:
        """Hidden states [tokens, hidden] of sequences laid end to end in ids [tokens]; places of no sequence are zero.

        starts: where each sequence's new tokens begin, and where the last one's end; known: tokens that each had
        before; rows: int64, their pages. Sequences that go on by one token pass together, longer pieces one by one.
        """
        hidden: Tensor | None = None
        spans = list(zip(starts, starts[1:], strict=False))
        single = [i for i, (start, stop) in enumerate(spans) if stop - start == 1]
        longer = [[i] for i, (start, stop) in enumerate(spans) if stop - start > 1]
        for group in ([single] if single else []) + longer:
            index = torch.tensor([range(*spans[i]) for i in group], device=ids.device)
            out = self.run(model, ids[index], [known[i] for i in group], rows[torch.tensor(group, device=rows.device)])
            hidden = out.new_zeros(len(ids), out.shape[-1]) if hidden is None else hidden
            hidden[index] = out
        assert hidden is not None, "a batch without tokens"
        return hidden

    def run(self, model: RefractorModel, ids: Tensor, known: Sequence[int], rows: Tensor) -> Tensor:
        """Hidden states [b, n, hidden] of the next tokens ids [b, n] of the sequences in pages ``rows`` [b].

        A single sequence is written where it lies; the pages of several are gathered, and written back after.
        """
        alone = len(known) == 1
        at = int(rows[0])
        held = [x[at : at + 1] if alone else x[rows] for x in self.tensors]
        if 0 in known:  # a page holds what the sequence before left there, and 0 * NaN is NaN
            fresh = torch.tensor([count == 0 for count in known], device=ids.device)
            for x in held:
                x[fresh] = 0
        cache = RefractorCache(self.config)
        cache.length = torch.tensor(known, device=ids.device)
        for field, x in zip(self.fields, held, strict=True):
            self._part(cache, field)[field.name] = x
        hidden: Tensor = model(ids, past_key_values=cache).last_hidden_state
        self._check_in_place(cache, held)
        if not alone:
            for pages, x in zip(self.tensors, held, strict=True):
                pages[rows] = x
        return hidden

    @staticmethod
    def _part(cache: RefractorCache, field: Field) -> dict[str, Tensor]:
        return cache.shared if field.layer is None else cache.layers[field.layer]

    def _check_in_place(self, cache: RefractorCache, held: Sequence[Tensor]) -> None:
        """Asserts that the call wrote into the page and kept nothing beside it: that would be lost."""
        for field, x in zip(self.fields, held, strict=True):
            assert self._part(cache, field)[field.name] is x, f"{field} left its page"
        kept = sum(x.numel() > 0 for part in (cache.shared, *cache.layers) for x in part.values())
        assert kept == len(self.fields), f"the cache holds {kept} tensors, its page {len(self.fields)}"


def load_exactly(parameters: dict[str, Tensor], weights: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Copies every tensor of an export into the parameter of its name; gives the names.

    Errors: ``CheckpointError`` for a tensor that is missing, unknown, of another shape or there twice.
    """
    loaded: set[str] = set()
    for name, tensor in weights:
        target = parameters.get(name)
        if target is None:
            raise CheckpointError(f"the weights hold {name}, which config.json does not know; export the model again.")
        if name in loaded:
            raise CheckpointError(f"the weights hold {name} twice; export the model again.")
        if target.shape != tensor.shape:
            raise CheckpointError(
                f"{name} has shape {list(tensor.shape)} in the weights and {list(target.shape)} by config.json; "
                "export the model again."
            )
        target.data.copy_(tensor)
        loaded.add(name)
    if missing := sorted(parameters.keys() - loaded):
        raise CheckpointError(f"the weights lack {', '.join(missing[:3])} (of {len(missing)}); export the model again.")
    return loaded
