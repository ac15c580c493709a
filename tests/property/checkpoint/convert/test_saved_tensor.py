"""The numbers of any saved tensor are where ``numbers_start`` says, or it leaves them to ``torch.load``."""

from __future__ import annotations

import io
import pickle
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refractor_megatron.checkpoint.convert.saved_tensor import numbers_start

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64]


def saved(tensor: torch.Tensor) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(tensor, file)
    return file


@given(
    shape=st.lists(st.integers(1, 9), max_size=4),
    dtype=st.sampled_from(DTYPES),
    cut=st.integers(0, 3),
    turned=st.booleans(),
)
def test_they_are_there(shape: list[int], dtype: torch.dtype, cut: int, turned: bool) -> None:
    whole = torch.randn(cut + 1, *shape).to(dtype)
    tensor = whole[cut].transpose(0, -1) if turned and shape else whole[cut]  # a view into a larger storage
    file = saved(tensor)
    start = numbers_start(file, shape, dtype)
    if start is None:
        assert not tensor.is_contiguous()
        return
    count = max(1, tensor.numel())
    found = torch.frombuffer(bytearray(file.getvalue()[start : start + count * dtype.itemsize]), dtype=dtype)
    assert torch.equal(found.reshape(tensor.shape), tensor)


def test_another_type_or_size_is_refused() -> None:
    file = saved(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="float32"):
        numbers_start(file, [3, 4], torch.bfloat16)
    with pytest.raises(ValueError, match=r"\[3, 4\]"):
        numbers_start(file, [3, 5], torch.float32)


class Runs:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("run",)


def test_a_pickle_that_runs_code_does_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Runs()))
    with pytest.raises(pickle.UnpicklingError, match="print"):
        numbers_start(file, [1], torch.float32)
    assert not capsys.readouterr().out
