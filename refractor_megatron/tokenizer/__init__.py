"""Byte-exact byte-pair encoding; special tokens come from structure, never from text."""

from refractor_megatron.tokenizer.decoder import StreamDecoder
from refractor_megatron.tokenizer.tokenizer import SPECIALS, Tokenizer
from refractor_megatron.tokenizer.train import smallest_vocab, train_tokenizer

__all__ = ["SPECIALS", "StreamDecoder", "Tokenizer", "smallest_vocab", "train_tokenizer"]
