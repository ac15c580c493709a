"""Tier A geometry: which earlier keys a query may read, before any rule (spec section 4, ``relation.local``).

Two independent forms of one definition: key intervals of query rows for the compiler, and an elementwise test for the
dense oracle and for ``mask_mod``. With w = window, d = dilation, u = dilation_unit, s = stride, all causal (k <= q):

* sliding: ``k >= (q // s + 1) * s - w``: the last w keys; the window moves s tokens at a time (the stride of
  generalized neighborhood attention, Hassani et al. 2025), so s queries share their first key;
* block: the query's own block of w tokens, which is sliding with s = w;
* dilated: units of u tokens, every d-th counted from the query's own, w // u of them; u = 1 dilates single tokens;
* hybrid: the last w // 2 keys and the rest of the unit where they begin; behind it every d-th unit, enough of them for
  the other half of w.

Keys after the query (rules with ``causal: false``) are within reach when ``k - q < w``, whatever the pattern.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

IntArray = npt.NDArray[np.int64]
PatternKind = Literal["sliding", "dilated", "block", "hybrid"]


@dataclass(frozen=True)
class LocalPattern:
    """Geometry of the local tier. ``window=None`` reads the whole prefix (sliding only).

    window, unit, stride: in tokens; dilation: every how many-th unit is read. unit and dilation matter to ``dilated``
    and ``hybrid``, stride to ``sliding``.
    """

    kind: PatternKind = "sliding"
    window: int | None = None
    dilation: int = 1
    unit: int = 128
    stride: int = 1

    def __post_init__(self) -> None:
        assert self.window is None or self.window >= 1, self.window
        assert self.window is not None or (self.kind, self.stride) == ("sliding", 1), self
        assert min(self.dilation, self.unit, self.stride) >= 1, self
        assert self.stride == 1 or (self.kind == "sliding" and self.stride <= (self.window or 0)), self

    @property
    def _step(self) -> int:
        """Tokens by which the sliding window moves."""
        return self.window if self.kind == "block" and self.window is not None else self.stride

    @property
    def _near(self) -> int:
        """Tokens of the sliding part."""
        assert self.window is not None
        return max(1, self.window // 2) if self.kind == "hybrid" else self.window

    @property
    def _units(self) -> int:
        """Dilated units a query visits: its own among them for ``dilated``, all farther ones for ``hybrid``."""
        assert self.window is not None
        tokens = self.window - self._near if self.kind == "hybrid" else self.window
        return max(1, tokens // self.unit)

    def reach(self, length: int) -> int:
        """Distance of the farthest key that a query of a sample of ``length`` tokens can read."""
        if self.window is None:
            return length - 1
        if self.kind in ("sliding", "block"):
            reach = self.window - 1
        elif self.kind == "dilated":
            reach = (self._units - 1) * self.dilation * self.unit + self.unit - 1
        else:
            reach = self._near + self.unit - 2 + self._units * self.dilation * self.unit
        return min(reach, length - 1)

    def after(self, length: int) -> int:
        """Keys after the query are within reach when ``k - q`` is below this."""
        return length if self.window is None else min(self.window, length)

    def pieces(self, q: IntArray) -> list[tuple[IntArray, IntArray]]:
        """Intervals [lo, hi) of each query, ascending, with gaps between; some may be empty, the last one ends at q."""
        if self.window is None:
            return [(np.zeros_like(q), q + 1)]
        if self.kind in ("sliding", "block"):
            step = self._step
            return [(np.maximum((q // step + 1) * step - self.window, 0), q + 1)]
        own, far = q // self.unit, self._units - 1
        if self.kind == "hybrid":
            own, far = (q - self._near + 1) // self.unit, self._units
        if self.dilation == 1:  # units that touch are one piece
            own, far = own - far, 0
        units = [own - j * self.dilation for j in range(far, 0, -1)]
        behind = [(np.maximum(n * self.unit, 0), np.maximum((n + 1) * self.unit, 0)) for n in units]
        return [*behind, (np.maximum(own * self.unit, 0), q + 1)]

    def allows(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Elementwise: key k lies in the pattern of query q (integer tensors of broadcastable shapes -> bool)."""
        if self.window is None:
            return (q - k) == (q - k)
        return ((k > q) & (k - q < self.window)) | ((k <= q) & self._behind(q, k))

    def _behind(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        assert self.window is not None
        if self.kind == "sliding":
            return k >= (q // self.stride + 1) * self.stride - self.window
        if self.kind == "block":
            return q // self.window == k // self.window
        if self.kind == "dilated":
            apart = q // self.unit - k // self.unit
            return (apart % self.dilation == 0) & (apart // self.dilation < self._units)
        apart = (q - self._near + 1) // self.unit - k // self.unit
        return (apart <= 0) | ((apart % self.dilation == 0) & (apart // self.dilation <= self._units))


#: Every earlier key.
FULL = LocalPattern()
