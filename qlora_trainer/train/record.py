"""What is told of a step: facts that the host knows when it is made, and numbers that arrive later.

In: a `StepTag` and, when `readback` lets go of them, loss and gradient norm. Out: what trackers log.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StepTag:
    """What travels beside a step's numbers until they arrive on the host."""

    step: int
    epoch: float
    learning_rate: float
    tokens: int
    supervised: int
    rows: tuple[int, ...]
    batch: str


def is_finite(value: float) -> bool:
    return abs(value) < float("inf")  # false for NaN too


def record_of(tag: StepTag, loss: float, grad_norm: float, seconds: float, finite: bool) -> dict[str, Any]:
    """The step's line in `metrics.jsonl`; `seconds` are the device's, from its first micro-batch on."""
    record: dict[str, Any] = {
        "step": tag.step,
        "epoch": round(tag.epoch, 4),
        "loss": loss,
        "learning_rate": tag.learning_rate,
        "grad_norm": grad_norm,
        "tokens": tag.tokens,
        "supervised": tag.supervised,
        "tokens_per_second": round(tag.tokens / seconds, 1) if seconds > 0 else None,
        "batch": tag.batch,
    }
    if not finite:
        record |= {"nonfinite": True, "rows": list(tag.rows)}
    return record
