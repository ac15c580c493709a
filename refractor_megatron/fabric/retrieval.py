"""The bank of retrieved records that a model reads: vectors and policies by record id, frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from data_pipeline.retrieval.index import RetrievalIndex


@dataclass(frozen=True, eq=False)
class RetrievalBank:
    """Data, not parameters: nothing of it is trained, saved with the weights, or given a gradient.

    ``vectors`` float32 [N, dim]; ``policies`` uint8 [N], bits of ``distinction.roles.RecordPolicy``; ``digest`` of the
    index, which a run resumes with or not at all.
    """

    vectors: Tensor
    policies: npt.NDArray[np.uint8]
    digest: str

    def __post_init__(self) -> None:
        assert self.vectors.dim() == 2 and not self.vectors.requires_grad
        assert self.policies.shape == self.vectors.shape[:1] and self.policies.dtype == np.uint8

    @classmethod
    def from_index(cls, index: RetrievalIndex, device: torch.device) -> RetrievalBank:
        """The records of ``index``, copied to ``device``."""
        return cls(torch.from_numpy(np.array(index.vectors)).to(device), index.policies, index.digest)

    def to(self, device: torch.device) -> RetrievalBank:
        """The same bank on another device."""
        return RetrievalBank(self.vectors.to(device), self.policies, self.digest)
