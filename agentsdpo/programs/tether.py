"""How a program is told to stop: Ctrl-C, SIGTERM, or the death of whoever started it."""

import os
import signal
import threading
from types import FrameType

TETHER = "AGENTSDPO_TETHER"
"""Set in a program's environment when its stdin is a pipe that its starter holds open for as long as it lives."""
PATIENCE_S = 60.0
"""Seconds a program without a starter may take to stop by itself."""


def stoppable() -> None:
    """Stop at Ctrl-C, even where a shell had it ignored, and the same way at SIGTERM or when the starter is gone."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _as_interrupt)
    if os.environ.get(TETHER):
        threading.Thread(target=_hold, name="tether", daemon=True).start()


def _as_interrupt(number: int, frame: FrameType | None) -> None:
    signal.raise_signal(signal.SIGINT)


def _hold() -> None:
    """Wait for the end of stdin. Nobody will look for a program whose starter is gone: it must not outlive it long."""
    while os.read(0, 1):  # no buffered reader, whose lock the end of the interpreter would miss
        pass
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait(PATIENCE_S)
    os._exit(1)
