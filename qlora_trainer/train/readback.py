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
    """A queue of (tag, values); `depth` steps may be under way before `ready` waits for the oldest."""

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
        """What has arrived, oldest first; with `drain`, waits for everything that was pushed."""
        arrived = []
        while self._queue:
            tag, values, event = self._queue[0]
            if event is not None and not event.query():
                if not drain and len(self._queue) <= self.depth:
                    break
                event.synchronize()
            self._queue.popleft()
            arrived.append((tag, values.tolist()))
        return arrived
