"""Stop signals: noted at once, acted on between two steps, agreed on by all ranks. Imports no torch, to come first."""

from __future__ import annotations

import signal
from types import FrameType

#: USR1 = the time limit is near (SLURM ``--signal``); TERM = the node is going away; INT = Ctrl-C.
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
#: Exit code of a run that saved and stopped on a signal: run it again and it goes on (EX_TEMPFAIL).
EXIT_STOPPED = 75


class StopRequest:
    """Remembers the first stop signal; a second Ctrl-C or TERM ends the process at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def install(self) -> StopRequest:
        """Catch the stop signals from now on."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number != signal.SIGUSR1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = self.signal or signal.Signals(number)

    @property
    def requested(self) -> bool:
        """Whether a stop signal has arrived."""
        return self.signal is not None
