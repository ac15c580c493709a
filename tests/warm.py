"""Ranks forked from one process that has already imported Megatron: 1.5 s of a processor for a short run, not 10.

Only ``Popen`` inside ``refractor_megatron.training.spawn`` is another; a rank's module, arguments, environment, signals
and exit code are as ever. What real processes alone can prove is left to them, so some tests never use this: a cold
import, another hash seed in each rank (test_grids, test_batch_drill, test_kill_resume), and what a rank prints
(``capfd``), which goes where the fork server's output went when it started.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from refractor_megatron.training import spawn as spawning

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["refractor_megatron.training.worker", "refractor_megatron.training.trace", "refractor_megatron.evaluation.final"]
)


class Rank:
    """As much of ``subprocess.Popen`` as ``spawn`` uses, for ``python -W ignore -m module arguments``."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], start_new_session: bool) -> None:
        assert list(command[:4]) == [sys.executable, "-W", "ignore", "-m"] and start_new_session
        self._process = _context.Process(target=_run, args=(command[4], list(command[5:]), dict(env), os.getcwd()))
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode


def _run(module: str, arguments: list[str], environment: dict[str, str], folder: str) -> None:
    """The child's whole life."""
    assert "megatron.core" in sys.modules, "the fork server says nothing when a preload fails; import it to see why"
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    warnings.simplefilter("ignore")
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


@contextmanager
def warm_ranks() -> Iterator[None]:
    """Inside, ``spawn`` forks its ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spawning, "subprocess", SimpleNamespace(Popen=Rank))
        yield
