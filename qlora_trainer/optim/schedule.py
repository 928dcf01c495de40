"""Learning rate as a pure function of the step: nothing to save, nothing to restore.

The formulas are those of transformers' `get_constant_schedule_with_warmup`,
`get_linear_schedule_with_warmup` and `get_cosine_schedule_with_warmup` (optimization.py): the first
update (step 0) of a run with warmup has learning rate 0. A run of a single step is the exception.
"""

from __future__ import annotations

import math

NAMES = ("constant", "linear", "cosine")


def warmup_steps(warmup_ratio: float, total_steps: int) -> int:
    """Steps of warmup, rounded up as transformers' `TrainingArguments.get_warmup_steps` does.

    None where there is only one step: its learning rate would be 0, and nothing would be learned.
    """
    return math.ceil(warmup_ratio * total_steps) if total_steps > 1 else 0


def learning_rate(name: str, step: int, *, peak: float, warmup: int, total: int) -> float:
    """Learning rate of the update number `step` (from 0) of `total`, after `warmup` rising ones.

    `name` is one of `NAMES`; it was checked with the configuration.
    """
    assert name in NAMES, name
    if step < warmup:
        return peak * (step / warmup)
    if name == "constant":
        return peak
    if name == "linear":
        return peak * max(0.0, (total - step) / max(1, total - warmup))
    progress = (step - warmup) / max(1, total - warmup)
    return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
