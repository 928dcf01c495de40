"""Numbers on their way from the device to the host, without making the device wait.

A step pushes a few float32 scalars; they are copied to pinned memory behind an event and come out,
in order, one or more steps later, with the time the step took by the device's own clock: the host's
would tell when it looked. On a CPU they come out at once.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Generic, TypeVar

import torch
from torch import Tensor

Tag = TypeVar("Tag")
_Moment = torch.cuda.Event | float


class Readback(Generic[Tag]):
    """A queue of (tag, values) that lets go of each `depth` pushes later, on every rank alike.

    What decides is the count and not what happens to have arrived, so that ranks that act on a
    number (three not finite in a row) act in the same step. On a CPU there is nothing to wait for.
    """

    def __init__(self, device: torch.device, depth: int = 2) -> None:
        self._on_gpu, self.depth = device.type == "cuda", depth
        self._begun = self._now()
        self._queue: deque[tuple[Tag, Tensor, _Moment, _Moment]] = deque()

    def _now(self) -> _Moment:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self) -> None:
        """A step begins, once the device has done what it was given before."""
        self._begun = self._now()

    def push(self, tag: Tag, values: Tensor) -> None:
        """Takes a 1-d tensor of scalars; it may be overwritten by its owner afterwards."""
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=self._on_gpu)
        host.copy_(values, non_blocking=True)
        self._queue.append((tag, host, self._begun, self._now()))

    def ready(self, drain: bool = False) -> list[tuple[Tag, list[float], float]]:
        """(tag, values, seconds from `begin` to `push`) of what is due, oldest first; all with `drain`."""
        arrived = []
        while self._queue:
            tag, values, begun, ended = self._queue[0]
            if isinstance(ended, torch.cuda.Event) and isinstance(begun, torch.cuda.Event):
                if not drain and len(self._queue) <= self.depth:
                    break
                ended.synchronize()
                seconds = begun.elapsed_time(ended) / 1e3
            else:
                assert isinstance(begun, float) and isinstance(ended, float)
                seconds = ended - begun
            self._queue.popleft()
            arrived.append((tag, values.tolist(), seconds))
        return arrived


class Pace:
    """Keeps the host at most `ahead` micro-batches in front of the device.

    The device always has the next one queued, so it never waits; but a request to stop is heard within
    a few micro-batches, and not only when all that was queued of several long steps has run.
    """

    def __init__(self, device: torch.device, ahead: int = 2) -> None:
        self._on = device.type == "cuda"
        self._ahead = ahead
        self._events: deque[torch.cuda.Event] = deque()

    def tick(self) -> None:
        """Call after launching a micro-batch; waits for the one `ahead` before it."""
        if not self._on:
            return
        event = torch.cuda.Event()
        event.record()
        self._events.append(event)
        if len(self._events) > self._ahead:
            self._events.popleft().synchronize()
