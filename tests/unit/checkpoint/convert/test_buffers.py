"""The pool gives memory that nobody looks into any more, and holds no more than it may."""

from __future__ import annotations

import threading

import torch

from refractor_megatron.checkpoint.convert.buffers import Buffers

MIB = 1 << 20


def test_memory_is_used_again() -> None:
    buffers = Buffers(64 * MIB)
    first = buffers.empty((4, MIB), torch.uint8)
    place = first.data_ptr()
    row = first[1].view(torch.float32)
    del first
    assert buffers.empty((MIB,), torch.float32).data_ptr() != place, "a view still looks into the block"
    del row
    again = {buffers.empty((MIB,), torch.float32).data_ptr() for _ in range(3)}
    assert place in again
    assert buffers.held == 8 * MIB


def test_limit() -> None:
    buffers = Buffers(16 * MIB)
    for size in (4, 12, 5, 16, 2, 9):
        tensor = buffers.empty((size * MIB,), torch.uint8)
        del tensor
        assert buffers.held <= 16 * MIB
    kept = [buffers.empty((10 * MIB,), torch.uint8) for _ in range(3)]  # all in use: more than the limit
    assert buffers.held == 30 * MIB and len({t.data_ptr() for t in kept}) == 3


def test_no_limit_keeps_nothing() -> None:
    buffers = Buffers()
    assert buffers.empty((2, MIB), torch.bfloat16).shape == (2, MIB) and buffers.held == 0


def test_threads_never_share_a_block() -> None:
    buffers, wrong = Buffers(32 * MIB), []

    def work(number: int) -> None:
        for _ in range(50):
            tensor = buffers.empty((MIB,), torch.uint8).fill_(number)
            if not bool((tensor == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
