"""Start the ranks of a local run and see them through.

torchrun is what the SLURM scripts use. It ends every failure with its own traceback and exit code 1, so a user's
mistake could not be told in one sentence; for one machine a few processes and a free port are all that is needed.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

#: Seconds that ranks get to end after one of them failed, before they are killed.
GRACE_S = 30.0


def spawn(module: str, arguments: Sequence[str], ranks: int) -> int:
    """Run ``python -m module arguments`` as ``ranks`` processes; returns the exit code of the first that failed, or 0.

    Stop signals that reach this process are passed on to the ranks.
    """
    environment = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    # Threads that spin while they wait slow each other down several times over as soon as the cores are shared.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if ranks > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    processes: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    previous = {s: signal.signal(s, forward) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        for rank in range(ranks):
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-W", "ignore", "-m", module, *arguments],
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    start_new_session=True,  # a Ctrl-C on the terminal reaches the ranks once, through ``forward``
                )
            )
        return _wait(processes)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all; once one has failed the others get ``GRACE_S`` seconds."""
    failed, deadline = 0, float("inf")
    while time.monotonic() < deadline:
        codes = [p.poll() for p in processes]
        if not failed and (failed := next((code for code in codes if code), 0)):
            deadline = time.monotonic() + GRACE_S
        if None not in codes:
            break
        time.sleep(0.05)
    return failed


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port
