"""Errors that codecs are judged by, all relative to the tensor given and computed in fp64."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Doubles = npt.NDArray[np.float64]


def rows_of(tensor: Tensor) -> Doubles:
    """Vectors of the last dimension, fp64 [vectors, d]."""
    return tensor.detach().reshape(-1, tensor.shape[-1]).to("cpu", torch.float64).numpy()


def relative(error: float, reference: float) -> float:
    """``error / reference``; what should be nothing and is not, is infinitely wrong."""
    if reference > 0:
        return error / reference
    return 0.0 if error == 0 else math.inf


def relative_frobenius(raw: Doubles, restored: Doubles) -> float:
    """|x − x'| / |x| over all values."""
    return relative(float(np.linalg.norm(restored - raw)), float(np.linalg.norm(raw)))


def vector_norm_errors(raw: Doubles, restored: Doubles) -> Doubles:
    """||x'_i| − |x_i|| / |x_i| of every vector i; a zero vector that stays zero has none."""
    before, after = (np.sqrt(np.einsum("ij,ij->i", x, x)) for x in (raw, restored))
    off = np.abs(after - before)
    with np.errstate(divide="ignore", invalid="ignore"):
        errors: Doubles = np.where(off == 0, 0.0, off / before)
    return errors


def norms(raw: Doubles, restored: Doubles) -> float:
    """The larger of the tensor norm's relative error and the rms over vectors of the vector norms' relative errors."""
    if raw.size == 0:
        return 0.0
    whole, after = float(np.linalg.norm(raw)), float(np.linalg.norm(restored))
    vectors = vector_norm_errors(raw, restored)
    return max(relative(abs(after - whole), whole), float(np.sqrt(np.mean(vectors**2))))


def bitwise(raw: Tensor, restored: Tensor) -> bool:
    """Whether every bit is the same: NaN payloads and the sign of zero count."""
    return raw.shape == restored.shape and bool(torch.equal(_bits(raw), _bits(restored)))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)
