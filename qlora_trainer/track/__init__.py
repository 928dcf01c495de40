"""What a run tells the world: the terminal, `metrics.jsonl`, and trackers a user asks for.

A tracker takes flat records (`step` and numbers) in order. `metrics.jsonl` is the truth: it is
complete whatever happens to the others, and none of them can slow or stop a run.
"""

from __future__ import annotations

from typing import Any, Protocol


class Tracker(Protocol):
    def log(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...
