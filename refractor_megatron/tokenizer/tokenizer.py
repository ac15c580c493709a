"""The tokenizer: an immutable table of byte strings, and encode and decode over it."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from refractor_megatron.distinction.roles import ROLES
from refractor_megatron.errors import DataError
from refractor_megatron.tokenizer import fileformat
from refractor_megatron.tokenizer.decoder import StreamDecoder
from refractor_megatron.tokenizer.pieces import SPLIT_PATTERN, bounded, utf8_runs

if TYPE_CHECKING:
    import tiktoken

EOD, PAD, END = "<|eod|>", "<|pad|>", "<|end|>"
#: Names of the special tokens in id order; they follow the byte strings. Role tokens open a message, ``END`` closes it.
SPECIALS: tuple[str, ...] = (EOD, PAD, END, *(f"<|{role}|>" for role in ROLES))


class Tokenizer:
    """Byte-level BPE over any bytes, exact in both directions.

    Ids ``0..255`` are the single bytes (by value where we trained it; other models order them otherwise), then merges
    in the order they were learnt, then the special tokens. No input to ``encode`` can produce a special id: those are
    placed by whoever builds a document from its structure.
    """

    def __init__(
        self, ranks: Sequence[bytes], specials: Sequence[str] = SPECIALS, pattern: str = SPLIT_PATTERN
    ) -> None:
        """``ranks``: byte string of every ordinary id; the first 256 must be the single bytes."""
        assert sorted(ranks[:256]) == [bytes([b]) for b in range(256)], "the single bytes come first"
        assert len(set(ranks)) == len(ranks), "every byte string has one id"
        self._ranks = tuple(ranks)
        self._specials = tuple(specials)
        self._pattern = pattern
        self._byte_id = {token[0]: i for i, token in enumerate(self._ranks[:256])}
        self._table = self._ranks + (b"",) * len(self._specials)
        self._special_id = {name: len(self._ranks) + i for i, name in enumerate(self._specials)}
        self.digest = fileformat.digest(self._pattern, self._ranks, self._specials)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Reads ``path``. Raises ``DataError`` if it is missing, damaged, or of another format version."""
        pattern, ranks, specials = fileformat.read(path)
        missing = [name for name in SPECIALS if name not in specials]
        if missing:
            raise DataError(
                f"{path} lacks the special token {missing[0]}; build the dataset or export the model again."
            )
        return cls(ranks, specials, pattern)

    def save(self, path: Path) -> None:
        """Writes the tokenizer as JSON with its digest."""
        fileformat.write(path, self._pattern, self._ranks, self._specials)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self._table)

    @property
    def eod(self) -> int:
        """Id that ends every document."""
        return self._special_id[EOD]

    @property
    def pad(self) -> int:
        """Id of padding."""
        return self._special_id[PAD]

    @property
    def end(self) -> int:
        """Id that ends a message."""
        return self._special_id[END]

    @functools.cached_property
    def role_ids(self) -> dict[str, int]:
        """Id of the token that opens a message of each role."""
        return {role: self._special_id[f"<|{role}|>"] for role in ROLES}

    @functools.cached_property
    def token_bytes(self) -> npt.NDArray[np.int32]:
        """Length in bytes of each token, int32 [vocab_size]; 0 for special tokens."""
        return np.array([len(token) for token in self._table], dtype=np.int32)

    @property
    def ranks(self) -> tuple[bytes, ...]:
        """Byte string of every ordinary id."""
        return self._ranks

    @property
    def pattern(self) -> str:
        """The regular expression that splits text before merging."""
        return self._pattern

    def special_name(self, token: int) -> str | None:
        """Name of a special token, ``None`` for an ordinary one."""
        index = token - len(self._ranks)
        return self._specials[index] if 0 <= index < len(self._specials) else None

    @functools.cached_property
    def _encoding(self) -> tiktoken.Encoding:
        import tiktoken

        ranks = {token: i for i, token in enumerate(self._ranks)}
        return tiktoken.Encoding(name=self.digest[:12], pat_str=self._pattern, mergeable_ranks=ranks, special_tokens={})

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of ``text``; ``decode`` gives back its bytes exactly (a lone surrogate of a ``str`` as three bytes)."""
        data = text.encode(errors="surrogatepass") if isinstance(text, str) else text
        ids: list[int] = []
        for run in utf8_runs(data):
            if isinstance(run, bytes):
                ids.extend(self._byte_id[byte] for byte in run)
                continue
            for piece in bounded(run):
                ids.extend(self._encoding.encode_ordinary(piece))
        return ids

    def decode(self, ids: Iterable[int], *, show_specials: bool = False) -> bytes:
        """Bytes of ``ids``; special tokens give nothing, or their names if ``show_specials``.

        Raises ``DataError`` for an id outside the vocabulary (a model may have more rows than the tokenizer has ids).
        """
        if show_specials:
            return b"".join((self.special_name(i) or "").encode() or self._bytes_of(i) for i in ids)
        return b"".join(map(self._bytes_of, ids))

    def _bytes_of(self, token: int) -> bytes:
        if not 0 <= token < len(self._table):
            raise DataError(
                f"Token id {token} is outside the tokenizer's vocabulary of {len(self._table)}; "
                "sample only below tokenizer.vocab_size."
            )
        return self._table[token]

    def stream_decoder(self) -> StreamDecoder:
        """A fresh incremental decoder."""
        return StreamDecoder(self._table)
