"""Feature maps of linear attention: ``elu+1`` (Katharopoulos et al. 2020) and FAVOR+ (Choromanski et al. 2020).

A map gives positive features; the weight of key k for query q is phi(q) . phi(k) over its sum along the readable keys.
A factor of phi(q) that depends on q alone, or of phi(k) that is the same for all keys, therefore cancels: FAVOR+ scales
its exponentials by such factors and by nothing else. A running maximum over keys would not cancel exactly, and within
a chunk it would let later keys change the rounding of earlier rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

#: Largest exponent of a FAVOR+ key feature. exp(60) leaves float32 room for the sum over 10^6 keys and the products.
_TOP = 60.0


class FeatureMap(Protocol):
    """phi: [b, h_kv, ..., d] in float32 or float64 -> [b, h_kv, ..., m], no negative values."""

    @property
    def width(self) -> int:
        """Features m of one head."""
        ...

    def query(self, q: torch.Tensor) -> torch.Tensor:
        """phi(q), up to a factor for each query."""
        ...

    def key(self, k: torch.Tensor) -> torch.Tensor:
        """phi(k), up to one factor for all keys of a head."""
        ...


@dataclass(frozen=True)
class LinearMode:
    """Settings of linear attention (``relation.linear_mode``).

    features: random features of favor+, drawn from ``seed``; elu+1 has none (0).
    """

    kernel: Literal["elu+1", "favor+"] = "elu+1"
    features: int = 0
    seed: int = 0

    def feature_map(self, layer: int, kv_heads: Sequence[int], head_dim: int, scale: float) -> FeatureMap:
        """The map of one layer.

        kv_heads: numbers of this rank's key/value heads in the whole model; the features of a head depend on
        (seed, layer, head) alone, so every grid has the same ones. Query heads share those of the key head they read.
        scale: of the scores that favor+ imitates, exp(scale * q . k); elu+1 has none.
        """
        if self.kernel == "elu+1":
            return EluPlusOne(head_dim)
        directions = [orthogonal_directions(self.seed, layer, head, self.features, head_dim) for head in kv_heads]
        return PositiveRandomFeatures(torch.from_numpy(np.stack(directions)), scale)


@dataclass(frozen=True)
class EluPlusOne:
    """phi(x) = elu(x) + 1, elementwise: x + 1 above zero, exp(x) below."""

    width: int

    def query(self, q: torch.Tensor) -> torch.Tensor:
        """[..., d] -> [..., d]."""
        # Not F.elu(q) + 1, which rounds exp(x) to a multiple of the machine epsilon.
        return torch.where(q > 0, q + 1, q.clamp(max=0).exp())

    key = query


@dataclass(frozen=True, eq=False)
class PositiveRandomFeatures:
    """FAVOR+: phi(x)_i = exp(w_i . x' - |x'|^2 / 2), x' = sqrt(scale) x; the mean of phi(q)_i phi(k)_i over random w is
    exp(scale * q . k).

    directions: float64 [h_kv, m, d], rows w_i. Kept outside of module buffers, which ``module.bfloat16()`` would round.
    Keys are exact down to exponents of about -147 + max |w|^2 / 2 (float32; -97 for d = 64): a key below that, some six
    times longer than a normalised one, has no weight left, and a row that reads nothing else is zero.
    """

    directions: torch.Tensor
    scale: float
    _placed: dict[tuple[torch.device, torch.dtype], torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def width(self) -> int:
        """Features of one head."""
        return self.directions.shape[1]

    def query(self, q: torch.Tensor) -> torch.Tensor:
        """[b, h_kv, ..., d] -> [b, h_kv, ..., m], scaled so that the largest feature of each query is 1."""
        projected = self._project(q)
        return (projected - projected.detach().amax(-1, keepdim=True)).exp()

    def key(self, k: torch.Tensor) -> torch.Tensor:
        """[b, h_kv, ..., d] -> [b, h_kv, ..., m], scaled so that no key whatever exceeds exp(60)."""
        return (self.exponents(k) - self._shift(k)).exp()

    def exponents(self, x: torch.Tensor) -> torch.Tensor:
        """w_i . x' - |x'|^2 / 2, the logarithm of the features without any scaling."""
        return self._project(x) - (0.5 * self.scale) * x.square().sum(-1, keepdim=True)

    def _project(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bh...d,hmd->bh...m", x * self.scale**0.5, self._at(x))

    def _shift(self, x: torch.Tensor) -> torch.Tensor:
        """[h_kv, 1, ..., 1]: w . x' - |x'|^2 / 2 has its maximum, |w|^2 / 2, at x' = w."""
        highest = 0.5 * self.directions.square().sum(-1).amax(-1) - _TOP
        return highest.to(x).reshape(-1, *[1] * (x.dim() - 2))

    def _at(self, x: torch.Tensor) -> torch.Tensor:
        place = (x.device, x.dtype)
        if place not in self._placed:
            self._placed[place] = self.directions.to(x)
        return self._placed[place]


def orthogonal_directions(seed: int, layer: int, head: int, features: int, width: int) -> npt.NDArray[np.float64]:
    """float64 [features, width]: blocks of ``width`` orthogonal rows, each by itself distributed as N(0, I).

    Orthogonal rows estimate the kernel with less variance than independent ones. The legacy generator of numpy is used
    because its stream is frozen: a checkpoint must find the same features under any later version.
    """
    rng = np.random.RandomState([seed, layer, head])
    blocks = []
    for first in range(0, features, width):
        q, r = np.linalg.qr(rng.standard_normal((width, width)))
        # With the signs of R's diagonal moved into Q it is uniform over all rotations and reflections.
        rows = (q * np.sign(np.diag(r))).T
        lengths = np.linalg.norm(rng.standard_normal((width, width)), axis=1)
        blocks.append((rows * lengths[:, None])[: features - first])
    return np.concatenate(blocks)
