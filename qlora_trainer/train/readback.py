"""Numbers on their way from the device to the host, without making the device wait.

A step pushes a few float32 scalars; they are copied to pinned memory behind an event and come out,
in order, one or more steps later. On a CPU they come out at once.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

import torch
from torch import Tensor

Tag = TypeVar("Tag")


class Readback(Generic[Tag]):
    """A queue of (tag, values) that lets go of each `depth` pushes later, on every rank alike.

    What decides is the count and not what happens to have arrived, so that ranks that act on a
    number (three not finite in a row) act in the same step. On a CPU there is nothing to wait for.
    """

    def __init__(self, depth: int = 2) -> None:
        self.depth = depth
        self._queue: deque[tuple[Tag, Tensor, torch.cuda.Event | None]] = deque()

    def push(self, tag: Tag, values: Tensor) -> None:
        """Takes a 1-d tensor of scalars; it may be overwritten by its owner afterwards."""
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._queue.append((tag, host, event))
        else:
            self._queue.append((tag, values.clone(), None))

    def ready(self, drain: bool = False) -> list[tuple[Tag, list[float]]]:
        """What is due, oldest first; with `drain`, everything that was pushed."""
        arrived = []
        while self._queue:
            tag, values, event = self._queue[0]
            if event is not None:
                if not drain and len(self._queue) <= self.depth:
                    break
                event.synchronize()
            self._queue.popleft()
            arrived.append((tag, values.tolist()))
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
