"""Training: Hugging Face ``tokenizers`` learns the merges, and its ids are checked against the encoder we run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from refractor_megatron.errors import DataError
from refractor_megatron.tokenizer.pieces import SPLIT_PATTERN, training_pieces
from refractor_megatron.tokenizer.tokenizer import SPECIALS, Tokenizer

if TYPE_CHECKING:
    import tokenizers

#: Default share of the corpus that the trainer sees (bytes).
TRAIN_BYTES = 8_000_000
#: Pairs seen once are no pattern.
MIN_PAIR_COUNT = 2
#: Bytes of training text on which a fresh tokenizer's ids are compared with Hugging Face's.
VERIFY_BYTES = 50_000


def smallest_vocab() -> int:
    """Ids that every tokenizer has: 256 bytes and the special tokens."""
    return 256 + len(SPECIALS)


def train_tokenizer(texts: Iterable[bytes], vocab_size: int, max_bytes: int = TRAIN_BYTES) -> Tokenizer:
    """Learns at most ``vocab_size`` ids, special tokens included, from the first ``max_bytes`` of ``texts``.

    Deterministic: the result depends on the text and ``vocab_size`` alone. A small corpus may not hold enough repeated
    pairs; the vocabulary is then smaller. Raises ``DataError`` if ``vocab_size`` is below ``smallest_vocab()``.
    """
    if vocab_size < smallest_vocab():
        raise DataError(
            f"A vocabulary of {vocab_size} is too small: {smallest_vocab()} ids are needed for the 256 bytes and the "
            "special tokens; raise model.vocab_size."
        )
    pieces = list(_capped(texts, max_bytes))
    reference = _train_reference(pieces, vocab_size - len(SPECIALS))
    tokenizer = Tokenizer(_ranks_of(reference))
    _verify(tokenizer, reference, pieces)
    return tokenizer


def _capped(texts: Iterable[bytes], max_bytes: int) -> Iterator[str]:
    seen = 0
    for data in texts:
        yield from training_pieces(data[: max_bytes - seen])
        seen += len(data)
        if seen >= max_bytes:
            return


def byte_alphabet() -> dict[str, int]:
    """The visible character that stands for each byte in Hugging Face's byte-level models, as character -> byte."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


def _pre_tokenizer() -> tokenizers.pre_tokenizers.PreTokenizer:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _train_reference(pieces: list[str], size: int) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import models, trainers

    reference = tokenizers.Tokenizer(models.BPE())
    reference.pre_tokenizer = _pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=MIN_PAIR_COUNT,
        show_progress=False,
        initial_alphabet=sorted(byte_alphabet()),
        special_tokens=[],
    )
    reference.train_from_iterator(pieces, trainer)
    return reference


def _ranks_of(reference: tokenizers.Tokenizer) -> list[bytes]:
    """Byte strings in our id order: the 256 bytes by value, then the merges as learnt."""
    alphabet = byte_alphabet()
    by_id = sorted(reference.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
    learnt = [bytes(alphabet[char] for char in token) for token, _ in by_id if len(token) > 1]
    return [bytes([b]) for b in range(256)] + learnt


def _verify(tokenizer: Tokenizer, reference: tokenizers.Tokenizer, pieces: list[str]) -> None:
    """Our ids spell the same tokens as the trainer's own encoder on the head of the training text."""
    alphabet = byte_alphabet()
    left = VERIFY_BYTES
    for piece in pieces:
        head = piece[:left]
        theirs = [bytes(alphabet[char] for char in token) for token in reference.encode(head).tokens]
        ours = [tokenizer.ranks[i] for i in tokenizer.encode(head)]
        assert ours == theirs, "tiktoken and tokenizers disagree on the training text"
        left -= len(head)
        if left <= 0:
            return
