"""Which text goes to which stage.

A document is "long" for the first stage whose sequence holds it whole. Each stage but the first also trains on shorter
documents, ``short_share`` of its tokens: long text alone harms (ProLong, Gao et al. 2024, arXiv:2410.02660, finds 40 %
of short data best; Llama 3, arXiv:2407.21783, mixes likewise). Which ones, a keyed hash decides. A token of
text is dealt out once, so as text no stage repeats what another has seen. Made tasks are not dealt out: they quote text
of any stage, and how many tokens of it stands with them in the manifest (``copied_tokens`` of ``tasks.write``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.pack.order import hashed
from refractor_megatron.errors import ConfigError

Ints = npt.NDArray[np.int64]
#: A stage takes no more of the shorter text that is left than this, so that the stages before it keep some.
MOST_DRAWN = 0.5


def check_lengths(lengths: tuple[int, ...], short_share: float) -> None:
    """Raises ``ConfigError`` unless the lengths are positive and rise and the share lies in [0, 1)."""
    if min(lengths, default=0) < 1 or any(low >= high for low, high in zip(lengths, lengths[1:], strict=False)):
        raise ConfigError(f"data.curriculum.lengths must be positive and rise, not {list(lengths)}.")
    if not 0 <= short_share < 1:
        raise ConfigError(f"data.curriculum.short_share must be at least 0 and below 1, not {short_share:g}.")


def cut(pieces: Ints, capacity: int) -> Ints:
    """``pieces`` int64 [n, 3] with each longer one cut into pieces of ``capacity`` and a rest, in order."""
    parts = -(-pieces[:, 2] // capacity)
    out = np.repeat(pieces, parts, axis=0)
    place = np.arange(len(out)) - np.repeat(np.cumsum(parts) - parts, parts)
    out[:, 1] += place * capacity
    out[:, 2] = np.minimum(capacity, out[:, 2] - place * capacity)
    return out


class Pool:
    """Pieces of one domain that no stage has, in an order by hash."""

    def __init__(self, pieces: Ints, capacity: int, key: str) -> None:
        """``pieces`` int64 [n, 3]; those longer than ``capacity`` are cut."""
        pieces = cut(pieces, capacity)
        self.pieces = pieces[np.argsort(hashed(pieces[:, 1], key), kind="stable")]

    def tokens(self, above: int, most: int) -> int:
        """Tokens in pieces longer than ``above`` and no longer than ``most``."""
        length = self.pieces[:, 2]
        return int(length[(length > above) & (length <= most)].sum())

    def take(self, above: int, most: int, tokens: int | None = None) -> Ints:
        """Removes and returns pieces of those lengths: all, or the first ones that hold ``tokens`` together."""
        length = self.pieces[:, 2]
        fits = (length > above) & (length <= most)
        if tokens is not None:
            held = np.where(fits, length, 0)
            fits &= np.cumsum(held) - held < tokens  # what came before did not suffice
        taken, self.pieces = self.pieces[fits], self.pieces[~fits]
        return taken

    def give(self, pieces: Ints) -> None:
        """Puts pieces back, behind the others."""
        self.pieces = np.concatenate([self.pieces, pieces])


@dataclass(frozen=True)
class TooLittle:
    """Why a stage cannot be made: only so many ``tokens`` of long text fill sequences of one domain."""

    tokens: int
    needs: int


def sequences_of(long: Ints, short: Ints, capacity: int, short_share: float) -> Ints | TooLittle:
    """How many sequences of ``capacity`` each domain contributes to a stage, int64 [domains].

    Short text, ``short_share`` of the whole or ``MOST_DRAWN`` of what there is, is spread over the domains as it lies
    in them. Remainders of a sequence go to domains with long text first. A stage that would not even have half of the
    long text asked for is refused.

    Args:
        long: tokens of each domain that only this stage holds whole.
        short: tokens of each domain in shorter documents that no stage has yet.
    """
    needs = int(np.ceil(capacity * (1 - short_share)))
    if long.sum() < needs:
        return TooLittle(int(long.sum()), needs)
    wanted = min(round(long.sum() * short_share / (1 - short_share)), int(MOST_DRAWN * short.sum()))
    exact = (long + wanted * short / max(1, int(short.sum()))) / capacity
    count = np.floor(exact).astype(np.int64)
    order = np.lexsort((-(exact - count), long == 0))
    order = order[count[order] < ((long + short) // capacity)[order]]
    spare = int(exact.sum() + 1e-9) - int(count.sum())
    count[order[:spare]] += 1
    # where domains are too small for a sequence of their own, what remains may hardly be long text any more
    placed, least = int(np.minimum(long, count * capacity).sum()), needs * int(count.sum()) / 2
    return count if placed >= max(least, 1) else TooLittle(placed, max(needs, int(np.ceil(least))))
