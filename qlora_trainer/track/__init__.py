"""What a run tells the world: the terminal, `metrics.jsonl`, and trackers a user asks for.

A tracker takes flat records (`step` and numbers) in order. `metrics.jsonl` is the truth: it is
complete whatever happens to the others, and none of them can slow or stop a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Protocol

from qlora_trainer.errors import QLoRAError


class Tracker(Protocol):
    def log(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


@contextmanager
def closing(trackers: Sequence[Tracker]) -> Iterator[None]:
    """Closes all of them at the end. What one raises then is the run's error, unless it has one already."""

    def close() -> None:
        with ExitStack() as each:  # the others, too, if one fails
            for tracker in trackers:
                each.callback(tracker.close)

    try:
        yield
    except BaseException:
        with suppress(QLoRAError):
            close()
        raise
    close()
