"""A worker of the local pool: does the tasks that its parent names on a socket, until the socket closes.

The socket closes when the parent has no more use for the worker, and when the parent dies, whatever killed it. A thread
waits for that, so that no worker outlives its build by more than ``GRACE_SECONDS``.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from refractor_megatron import errors

#: How long a task may clear up after itself before it is killed (seconds).
GRACE_SECONDS = 2.0


def serve(handle: int) -> None:
    """Answers each ``[folder, index]`` with what ``outcome`` says of the task. ``handle`` is this end of the socket.

    Called in a session of its own, by ``local.LocalExecutor``.
    """
    assert os.getsid(0) == os.getpid()
    os.dup2(2, 1)  # what a task prints is no answer, and must not mix with the build's own output
    signal.signal(signal.SIGTERM, _leave)
    channel = Connection(handle)
    orders: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(channel, orders), daemon=True).start()
    while True:
        folder, index = orders.get()
        answer = json.dumps(outcome(Path(folder), index)).encode()
        try:
            channel.send_bytes(answer)
        except OSError:
            sys.exit(1)  # the parent is gone


def outcome(folder: Path, index: int) -> dict[str, Any]:
    """Does a task and says how it went: ``{}``, or ``error`` (a class of ``errors``, or null) and ``message``."""
    from data_pipeline.engine.tasks import run_task

    try:
        run_task(folder, index)
    except errors.RefractorError as error:
        return {"error": type(error).__name__, "message": str(error)}
    except MemoryError:
        return {"error": "MemoryError", "message": ""}
    except Exception:
        return {"error": None, "message": traceback.format_exc()}
    return {}


def _listen(channel: Connection, orders: queue.SimpleQueue[tuple[str, int]]) -> None:
    try:
        while True:
            folder, index = json.loads(channel.recv_bytes())
            orders.put((folder, index))
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGTERM)  # the main thread takes its draft away
        time.sleep(GRACE_SECONDS)
        os.killpg(os.getpid(), signal.SIGKILL)  # with whatever a task has started


def _leave(number: int, frame: object) -> None:
    sys.exit(1)
