"""Weights & Biases, when asked (`track.report_to=[wandb]`). It may be offline, slow or gone: training
neither waits for it nor ends with it, and `metrics.jsonl` has everything it would have had.
"""

from __future__ import annotations

import queue
import sys
import threading
from pathlib import Path
from typing import Any

from qlora_trainer.errors import ConfigError
from qlora_trainer.system import redact
from qlora_trainer.system.disk import write_text
from qlora_trainer.system.terminal import console

INIT_SECONDS = 20
CLOSE_SECONDS = 7  # a run that is done, or has to stop, waits no longer for the last records to leave


class WandbTracker:
    """Hands records to W&B from a thread of its own.

    The run's id is the run folder's, so a resumed run goes on in the same place. `WANDB_MODE=offline`
    and the other variables of W&B keep their meaning.
    """

    def __init__(self, project: str, folder: Path, config: dict[str, Any], run_id: str) -> None:
        try:
            import wandb
            from wandb.sdk.mailbox import HandleAbandonedError
        except ImportError as error:
            raise ConfigError("track.report_to=[wandb] needs `pip install wandb`") from error
        self._wandb, self._folder = wandb, folder
        self._gone = (wandb.Error, HandleAbandonedError, OSError, TimeoutError)
        self._records: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._options = {
            "project": project,
            "dir": str(folder),
            "config": config,
            "id": run_id,
            "resume": "allow",
            "settings": wandb.Settings(
                init_timeout=INIT_SECONDS,
                silent=True,
                disable_git=True,
                save_code=False,
                console="off",  # it would take what is printed before secrets are masked
                x_disable_meta=any(redact.text(argument) != argument for argument in sys.argv),
            ),
        }
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, record: dict[str, Any]) -> None:
        self._records.put(record)

    def close(self) -> None:
        self._records.put(None)
        self._thread.join(timeout=CLOSE_SECONDS)
        self._closed = True
        if self._thread.is_alive():
            console.print("wandb did not finish in time; metrics.jsonl has every step", style="yellow")

    def _mask_logs(self) -> None:
        """W&B's own logs name the run's folder, whatever is in its name."""
        for log in (self._folder / "wandb").glob("*/logs/*.log"):
            text = log.read_text(encoding="utf-8", errors="replace")
            if redact.text(text) != text:
                write_text(log, text, durable=False)

    def _work(self) -> None:
        try:
            run = self._wandb.init(**self._options)
            while (record := self._records.get()) is not None:
                record = dict(record)
                run.log(record, step=record.pop("step"))
            run.finish()
            self._mask_logs()
        except self._gone as error:
            if self._closed:
                return  # it has been said that W&B did not finish
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            console.print(
                f"wandb stopped ({reason}); training goes on, metrics.jsonl has every step", style="yellow"
            )
