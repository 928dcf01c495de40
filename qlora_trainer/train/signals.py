"""What a run does when it is told to stop, and what `status.json` says meanwhile.

SIGTERM, SIGUSR1 (what Slurm sends ahead of a time limit) and SIGINT mean: save at the next step
boundary, exit 75, the same command goes on. Where there is nothing to save yet or any more (loading,
tokenizing, exporting: *interruptible* phases) the run leaves at once. A second signal ends the
process on the spot; everything on the disk is published atomically, so nothing is torn.

The handler runs only when the main thread runs Python. A watching thread, woken by the C-level
handler through a pipe, therefore ends the process itself on a second signal, and when an
interruptible phase has not let go for `GRACE` seconds (a barrier whose peer is gone, a tokenizer's
long call, a library that swallowed the exception).

In: signals, and the names of the phases. Out: `requested()` for the loop, `PreemptedError`
(exit 75), and `status.json`.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from qlora_trainer.errors import CheckpointError, PreemptedError
from qlora_trainer.system.disk import write_json
from qlora_trainer.system.processes import STOP_SIGNALS

GRACE = 10.0  # seconds an interruptible phase gets to let go
ONE_REQUEST = 1.0  # seconds: a job's scheduler and its launcher both pass the same request on
TICK = 1.0  # seconds between two writings of status.json by the loop
# What is kept of an earlier start.
SESSION = ("started", "updated", "state", "first_step", "step", "measured")
SESSIONS = 200  # the last ones: the file is written every second


class Status:
    """`status.json`: what the run is doing, replaced atomically; nothing is written before `write_to`.

    Keys: `state` (running, stopping, stopped, done, failed), `phase`, `step`, `total_steps`,
    `signal`, `exit_code`, `message`, `pid`, `started` and `updated` (UTC), whatever is noted of the run, and
    `sessions`: what was left of earlier starts in the same folder. Not fsynced: it is for the living. A
    disk that refuses it ends no run.

    Attributes:
        unwritten: why the last writing failed, if it did.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._fields: dict[str, Any] = {"state": "running", "pid": os.getpid(), "started": _now()}
        self._written = 0.0
        self.unwritten: CheckpointError | None = None

    def write_to(self, path: Path) -> None:
        """From now on there is a file; for the one rank that has the run folder to itself.

        Raises:
            CheckpointError: the disk refuses it, here at the beginning.
        """
        self._path = path
        self.note(sessions=_sessions(path))
        self.update()
        if self.unwritten is not None:
            raise self.unwritten

    def note(self, **fields: Any) -> None:
        """Sets fields that the next writing will have."""
        self._fields |= fields

    def update(self, **fields: Any) -> None:
        """Sets fields and writes the file."""
        self.note(**fields, updated=_now())
        self._written = time.monotonic()
        if self._path is not None:
            try:
                write_json(self._path, self._fields, durable=False)
                self.unwritten = None
            except CheckpointError as error:
                self.unwritten = error

    def tick(self, **fields: Any) -> None:
        """`update`, at most once in `TICK` seconds: for every step of the loop."""
        if time.monotonic() - self._written >= TICK:
            self.update(**fields)
        else:
            self.note(**fields)

    def finish(self, exit_code: int, message: str = "") -> None:
        """The last word of a run."""
        state = {0: "done", PreemptedError.exit_code: "stopped"}.get(exit_code, "failed")
        if exit_code == 0:
            self._fields.pop("phase", None)  # of a run that ended otherwise it says where
        self.update(state=state, exit_code=exit_code, message=message)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _sessions(path: Path) -> list[dict[str, Any]]:
    """The starts that an earlier status.json tells of, its own the last; without those that made no step."""
    try:
        previous = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):  # none there, or torn
        return []
    if not isinstance(previous, dict):
        return []
    earlier = previous.get("sessions")
    last = {key: previous[key] for key in SESSION if key in previous}
    sessions = [*(earlier if isinstance(earlier, list) else []), last]
    return [each for each in sessions if isinstance(each, dict) and {"first_step", "step"} <= each.keys()][
        -SESSIONS:
    ]


class StopSignals:
    """Handles the stop signals while it is entered; for the main thread, once a process."""

    def __init__(self, status: Status) -> None:
        self._status = status
        self._phase = "starting"
        self._interruptible = True
        self._depth = 0
        self._over = False
        self._signal: int | None = None
        self._previous: dict[int, Any] = {}

    def over(self) -> None:
        """The run has ended, and how is written down: a first signal changes nothing any more."""
        self._over, self._interruptible = True, False

    def requested(self) -> bool:
        """Whether a signal has asked this process to stop."""
        return self._signal is not None

    @contextmanager
    def phase(self, name: str, *, interruptible: bool = False) -> Iterator[None]:
        """Names what happens inside, and says whether a signal may end it anywhere.

        Raises:
            PreemptedError: on entry to, or anywhere in, an interruptible phase.
        """
        outer = (self._phase, self._interruptible)
        self._depth += 1
        try:
            self._enter(name, interruptible)
            yield
        finally:
            self._depth -= 1
            self._phase, self._interruptible = outer
        self._enter(outer[0] if self._depth else f"going on after {name}", outer[1])

    def _enter(self, name: str, interruptible: bool) -> None:
        self._phase, self._interruptible = name, interruptible
        self._status.update(phase=name)
        if self.requested() and interruptible:
            raise self._preempted()

    def _preempted(self) -> PreemptedError:
        assert self._signal is not None
        name = signal.Signals(self._signal).name
        return PreemptedError(f"stopped on {name} while {self._phase}: run the same command to go on")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested() or self._over:
            return  # the watching thread decides whether this is a second request
        self._signal = number
        self._status.update(state="stopping", signal=signal.Signals(number).name)
        if self._interruptible:
            raise self._preempted()

    def __enter__(self) -> StopSignals:
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        self._previous_fd = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._forget)
        threading.Thread(target=self._watch, args=(self._pipe[0],), name="stop-signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
        os.close(self._pipe[1])  # ends the watching thread

    def _watch(self, pipe: int) -> None:
        """Reads the number of each arriving signal; ends the process where the main thread cannot."""
        first: float | None = None
        while numbers := os.read(pipe, 64):
            if not any(number in STOP_SIGNALS for number in numbers):
                continue
            now = time.monotonic()
            if first is None:
                first = now
                threading.Timer(GRACE, self._lost_patience).start()
            elif now - first >= ONE_REQUEST:
                os._exit(PreemptedError.exit_code)
        os.close(pipe)

    def _lost_patience(self) -> None:
        if self._previous and self._interruptible:
            message = f"stopped while {self._phase}, which did not let go"
            self._status.finish(PreemptedError.exit_code, message)
            os._exit(PreemptedError.exit_code)

    def _forget(self) -> None:
        """In a forked child: its signals are not ours, and must not reach our pipe."""
        if self._previous:
            signal.set_wakeup_fd(-1)
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
            self._previous = {}


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """For the seconds of importing before `StopSignals`: a signal is exit 75, with nothing to save."""

    def leave(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        os.write(2, f"error: stopped on {name} before the run began: run the same command again\n".encode())
        os._exit(PreemptedError.exit_code)

    previous = {number: signal.signal(number, leave) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
