"""Plain records for probes and benchmarks."""

from __future__ import annotations

import numpy as np
import pytest

from refractor_megatron.distinction.generators import plain_records
from refractor_megatron.distinction.roles import DOCUMENT_ROLE, ROLE_ID


def test_plain_records_are_documents_side_by_side() -> None:
    records = plain_records(10, fan_in=3, documents=[4, 1, 5])
    assert records.dtype == np.int32 and records.shape == (10, 7)
    assert records[:, 0].tolist() == [0] * 4 + [1] + [2] * 5
    assert (records[:, 1] == 0).all() and (records[:, 3] == 0).all() and (records[:, 2] == ROLE_ID[DOCUMENT_ROLE]).all()
    assert (records[:, 4:] == [0, 1, 2]).all()
    assert plain_records(5).shape == (5, 4) and not plain_records(5)[:, 0].any()
    with pytest.raises(AssertionError):
        plain_records(10, documents=[4, 5])
