"""Processes of one job: they end together, and a signal to all of them spares the workers.

Linux sends a child a signal of its choice when its parent dies (`PR_SET_PDEATHSIG`): no worker outlives what
it works for, even where that is killed.
"""

from __future__ import annotations

import ctypes
import os
import signal

# What schedulers, launchers and terminals stop a job with.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LAUNCHERS = ("ACCELERATE_", "TORCHELASTIC_")  # prefixes of the variables they set for their children


def follow_launcher() -> None:
    """Asks for a SIGTERM when the launcher dies, so that no rank is left behind as an orphan.

    Only under accelerate or torchrun: a run started from a shell must survive its shell (`nohup`).
    `accelerate launch` with one process does not pass SIGTERM on, it just dies.
    """
    if any(name.startswith(_LAUNCHERS) for name in os.environ):
        _die_with_parent(signal.SIGTERM)


def shield_worker() -> None:
    """For a worker, first thing in its process: dies with what it works for, not of its signals.

    A scheduler signals the whole job; the main process still needs its workers to end in order.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _die_with_parent(signal.SIGKILL)


def _die_with_parent(number: int) -> None:
    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died in between, and the kernel will not say so any more
        os.kill(os.getpid(), number)
