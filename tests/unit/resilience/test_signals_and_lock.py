"""Stop signals and the folder lock."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from refractor_megatron.errors import OutputError
from refractor_megatron.resilience.lock import exclusive
from refractor_megatron.resilience.signals import STOP_SIGNALS, StopRequest


@pytest.fixture
def restore_handlers() -> object:
    before = {s: signal.getsignal(s) for s in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted(number: signal.Signals, restore_handlers: object) -> None:
    stop = StopRequest().install()
    assert not stop.requested
    os.kill(os.getpid(), number)
    assert stop.requested and stop.signal == number


def test_a_second_term_ends_the_process() -> None:
    program = (
        "import os, signal\n"
        "from refractor_megatron.resilience.signals import StopRequest\n"
        "stop = StopRequest().install()\n"
        "os.kill(os.getpid(), signal.SIGUSR1); os.kill(os.getpid(), signal.SIGUSR1); assert stop.requested\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGTERM


def test_the_lock_is_exclusive_and_freed(tmp_path: Path) -> None:
    refusal = pytest.raises(OutputError, match=f"in use by process {os.getpid()}.*--out")
    with exclusive(tmp_path), refusal, exclusive(tmp_path):
        pass
    with exclusive(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
