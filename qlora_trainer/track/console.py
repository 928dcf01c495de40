"""The run on the terminal: a progress bar where there is one, plain lines where output goes to a file.

Everything here goes to stderr; stdout stays free for results.
"""

from __future__ import annotations

import time
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from qlora_trainer.system.terminal import console

PLAIN_EVERY_SECONDS = 10.0


class ConsoleTracker:
    """Shows step, loss, learning rate and tokens/s; evaluation results stay on the screen."""

    def __init__(self, total_steps: int, start_step: int = 0) -> None:
        self.total = total_steps
        self._last_plain = 0.0
        self._bar = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            transient=False,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=total_steps, completed=start_step, numbers="")
        self._bar.start()

    def log(self, record: dict[str, Any]) -> None:
        step = record["step"]
        if "loss" not in record:
            evaluation = {key: value for key, value in record.items() if key != "step"}
            self._print(f"step {step}  " + "  ".join(f"{k} {_short(v)}" for k, v in evaluation.items()))
            return
        speed = record["tokens_per_second"]
        numbers = f"loss {record['loss']:.4f}  lr {record['learning_rate']:.2e}"
        if speed is not None:
            numbers += f"  {speed:,.0f} tok/s"
        self._bar.update(self._task, completed=step, numbers=numbers)
        if record.get("nonfinite"):
            self._print(f"step {step}: loss or gradient not finite; the step was skipped", "yellow")
        elif not console.is_terminal and self._time_to_speak(step):
            self._print(f"step {step}/{self.total}  {numbers}")

    def close(self) -> None:
        self._bar.stop()

    def _time_to_speak(self, step: int) -> bool:
        now = time.monotonic()
        if step not in (1, self.total) and now - self._last_plain < PLAIN_EVERY_SECONDS:
            return False
        self._last_plain = now
        return True

    def _print(self, text: str, style: str | None = None) -> None:
        self._bar.console.print(text, style=style, soft_wrap=True)


def _short(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
