"""Shares of domains: temperature sampling (Conneau and Lample 2019, arXiv:1901.07291), in slots of a fixed period."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from refractor_megatron.errors import DataError

#: Samples after which the schedule of domains repeats. Any so many consecutive samples hold the same counts.
PERIOD = 10_000
#: Largest difference between the share of a domain in a period and its target.
TOLERANCE = 0.001


def shares(
    tokens: npt.NDArray[np.int64], weights: npt.NDArray[np.float64], temperature: float
) -> npt.NDArray[np.float64]:
    """p_d proportional to weights_d * tokens_d ** (1 / temperature), float64 [domains], sum 1.

    Args:
        tokens: [domains], 0 for a domain that has nothing: its share is 0.
        weights: [domains], at least 0.
        temperature: above 0; 1 keeps the proportions of the text, infinity makes all domains alike.

    Raises ``DataError`` where no domain has both text and a weight.
    """
    if not temperature > 0:
        raise DataError(f"data.mix.temperature must be above 0, not {temperature:g}.")
    if not np.all(np.isfinite(weights)) or np.any(weights < 0):
        raise DataError("The weight of a source must be a number of at least 0; mend the source's weight.")
    here = (tokens > 0) & (weights > 0)
    if not here.any():
        raise DataError("No domain has both text and a weight above 0; raise the weight of a source.")
    # by logarithms: a low temperature raises to powers that leave the range of a float
    logs = np.log(weights[here]) + np.log(tokens[here]) / temperature
    powers = np.exp(logs - logs.max())
    values = np.zeros(len(tokens), dtype=np.float64)
    values[here] = powers / powers.sum()
    return values


def with_fixed(free: npt.NDArray[np.float64], fixed: Sequence[float]) -> npt.NDArray[np.float64]:
    """Shares of the ``free`` domains, scaled down, followed by the ``fixed`` ones.

    Raises ``DataError`` if the fixed shares are not at least 0 and together below 1.
    """
    if min(fixed, default=0.0) < 0 or sum(fixed) >= 1:
        said = ", ".join(f"{share:g}" for share in fixed)
        raise DataError(f"The shares of data.tasks ({said}) must be at least 0 and add up to less than 1.")
    return np.concatenate([free * (1 - sum(fixed)), np.asarray(fixed, dtype=np.float64)])


def slots(target: npt.NDArray[np.float64], names: Sequence[str]) -> npt.NDArray[np.int64]:
    """How many samples of each ``PERIOD`` every domain gets, int64 [domains]: largest remainders, but no share above
    0 gets none, so that no text is left out unsaid.

    Raises ``DataError`` if the rounding moves a share by more than ``TOLERANCE``.
    """
    assert abs(target.sum() - 1) < 1e-9 and np.all(target >= 0)
    if np.count_nonzero(target) > PERIOD:
        raise DataError(
            f"{np.count_nonzero(target)} domains are more than the {PERIOD} samples of a period of the mix; set "
            "data.mix.by=language or put sources together."
        )
    exact = target * PERIOD
    counts = np.where((target > 0) & (exact < 1), 1, np.floor(exact)).astype(np.int64)
    short = PERIOD - int(counts.sum())
    # rising: to those that lost most by rounding; falling: from those that are most above their target
    order = np.argsort(-(exact - counts), kind="stable") if short > 0 else np.argsort(exact - counts, kind="stable")
    order = order[counts[order] > 1] if short < 0 else order[target[order] > 0]
    while short:
        step = min(abs(short), len(order))
        counts[order[:step]] += 1 if short > 0 else -1
        short = PERIOD - int(counts.sum())
        order = order[counts[order] > 1] if short < 0 else order
    check(counts, target, names)
    return counts


def check(counts: npt.NDArray[np.int64], target: npt.NDArray[np.float64], names: Sequence[str]) -> None:
    """Compares the counts of a period with the target. Raises ``DataError`` naming the worst domain beyond
    ``TOLERANCE``."""
    error = np.abs(counts / counts.sum() - target)
    worst = int(error.argmax())
    if error[worst] > TOLERANCE:
        raise DataError(
            f"Domain {names[worst]} of the mix would get {counts[worst] / counts.sum():.4%} of the samples, its "
            f"target is {target[worst]:.4%}: too many small domains; set data.mix.by=language or put sources together."
        )
