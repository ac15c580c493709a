"""A tokenizer trained on real text that every Python has."""

from __future__ import annotations

import argparse
import inspect
import typing

import pytest

from refractor_megatron.tokenizer import Tokenizer, train_tokenizer

TEXTS = [inspect.getsource(module).encode() for module in (argparse, typing, inspect)]


@pytest.fixture(scope="session")
def texts() -> list[bytes]:
    """A few hundred kilobytes of Python source."""
    return TEXTS


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A vocabulary of 1000."""
    return train_tokenizer(TEXTS, 1000)
