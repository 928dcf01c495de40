"""`metrics.jsonl` as columns for the charts, thinned so that a million steps still make a small page.

In: the lines of the file, one at a time. Out: `Series`, with a row for each step, and its JSON for the page.

Up to `WHOLE` steps everything is drawn. Above, the steps are cut into `STRETCHES` equal stretches; of each,
its first step and the steps where any curve was least or greatest are kept. Spikes therefore stay, whatever
the length, and all curves keep the same steps, so that linked cursors speak of one step. The smoothed loss
is computed before thinning.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_trainer.track.jsonl import parse

Column = NDArray[np.float64]

CURVES = ("loss", "learning_rate", "grad_norm", "tokens_per_second")
COLUMNS = ("epoch", *CURVES, "tokens", "eval_loss")
WHOLE = 4000  # steps drawn without thinning
STRETCHES = 400
MARKS = 500  # non-finite steps that are marked one by one; all are counted
SMOOTHED_FROM = 100  # steps: a shorter run's curve is read as it is
SMOOTHING = 0.02  # of the run: the span of the moving average
DIGITS = 6  # significant, in the page


@dataclass
class Series:
    """One row a step.

    Attributes:
        steps: optimizer steps, ascending.
        columns: `COLUMNS`, NaN where a step has no (finite) value.
        nonfinite: steps whose loss or gradient was not finite.
        unread: lines that are no records; the last line of a running or killed run may be one.
    """

    steps: NDArray[np.int64]
    columns: dict[str, Column]
    nonfinite: list[int] = field(default_factory=list)
    unread: int = 0

    @classmethod
    def of(cls, lines: Iterable[str]) -> Series:
        steps = array("q")
        columns = {name: array("d") for name in COLUMNS}
        nonfinite: list[int] = []
        unread = 0
        for line in lines:
            record = parse(line)
            if record is None or (steps and record["step"] < steps[-1]):
                unread += 1
                continue
            step = record["step"]
            if not steps or step > steps[-1]:
                steps.append(step)
                for column in columns.values():
                    column.append(math.nan)
            for name, column in columns.items():
                if name in record:
                    column[-1] = _number(record[name])
            if record.get("nonfinite") is True:
                nonfinite.append(step)
        arrays = {name: np.array(column, dtype=np.float64) for name, column in columns.items()}
        return cls(np.array(steps, dtype=np.int64), arrays, nonfinite, unread)

    def __len__(self) -> int:
        return len(self.steps)

    def last(self, name: str) -> float | None:
        """The last finite value of a column."""
        finite = self.finite(name)
        return float(finite[-1]) if finite.size else None

    def finite(self, name: str) -> Column:
        column = self.columns[name]
        return column[np.isfinite(column)]

    def seconds_per_step(self) -> Column:
        """Of each step whose speed was measured; evaluation and saving are not in it."""
        with np.errstate(divide="ignore", invalid="ignore"):
            seconds = self.columns["tokens"] / self.columns["tokens_per_second"]
        return seconds[np.isfinite(seconds)]

    def smoothed(self) -> Column | None:
        """The loss as an exponential moving average, corrected for its start; None for a short run."""
        if len(self) < SMOOTHED_FROM:
            return None
        keep = 1 - 2 / (1 + max(10.0, SMOOTHING * len(self)))
        average = weight = 0.0
        result = np.full(len(self), math.nan)
        for index, value in enumerate(self.columns["loss"].tolist()):
            if math.isfinite(value):
                average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
            if weight:
                result[index] = average / weight
        return result

    def chart(self, resumed: Sequence[int] = ()) -> dict[str, Any]:
        """What the page's script draws: columns of one length, None for a gap; `resumed` are marked."""
        kept = self.thinned()
        columns = {name: self.columns[name] for name in (*CURVES, "epoch", "eval_loss")}
        smoothed = self.smoothed()
        if smoothed is not None:
            columns["smoothed"] = smoothed
        return {
            "steps": self.steps[kept].tolist(),
            "columns": {
                name: [_rounded(value) for value in column[kept].tolist()]
                for name, column in columns.items()
                if np.isfinite(column).any()
            },
            "nonfinite": self.nonfinite[:MARKS],
            "resumed": list(resumed),
            "total": len(self),
        }

    def thinned(self) -> NDArray[np.int64]:
        """Indices of the rows to draw."""
        if len(self) <= WHOLE:
            return np.arange(len(self))
        kept = {0, len(self) - 1}
        kept |= set(np.flatnonzero(np.isfinite(self.columns["eval_loss"]))[-WHOLE:].tolist())
        bounds = np.linspace(0, len(self), STRETCHES + 1).astype(int).tolist()
        for start, end in itertools.pairwise(bounds):
            kept.add(start)
            for name in CURVES:
                stretch = self.columns[name][start:end]
                if np.isfinite(stretch).any():
                    kept |= {start + int(np.nanargmin(stretch)), start + int(np.nanargmax(stretch))}
        return np.array(sorted(kept), dtype=np.int64)


def _number(value: Any) -> float:
    """NaN for what is no finite number: non-finite ones are stored as text."""
    return float(value) if type(value) in (int, float) and abs(value) < 1e308 else math.nan


def _rounded(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
