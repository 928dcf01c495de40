"""`metrics.jsonl`: one JSON object a line, appended as it happens, on disk within seconds.

Floats are written so that they read back to the same bits. A resumed run first takes away the lines
of steps it will do again, so the file of an interrupted run equals that of an uninterrupted one.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from qlora_trainer.checkpoint.disk import disk_errors
from qlora_trainer.errors import CheckpointError

SYNC_SECONDS = 5.0


class JsonlTracker:
    """Appends to `path`; at most `SYNC_SECONDS` of lines are lost if the machine itself dies."""

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self.path = path
        kept = [line for line in _lines(path) if line["step"] <= resume_step] if resume_step else []
        temporary = path.with_suffix(".jsonl.tmp")
        temporary.write_text("".join(_dump(line) for line in kept))
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")
        self._synced = time.monotonic()

    def log(self, record: dict[str, Any]) -> None:
        with disk_errors(self.path):
            if os.fstat(self._file.fileno()).st_nlink == 0:
                raise CheckpointError(f"{self.path} was removed while the run wrote to it")
            self._file.write(_dump(record))
            self._file.flush()  # survives kill -9 of this process from here on
            if time.monotonic() - self._synced > SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()

    def close(self) -> None:
        with disk_errors(self.path), self._file:
            os.fsync(self._file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a last line torn by a crash is left out."""
    return _lines(path)


def _lines(path: Path) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    if not path.exists():
        return records
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break  # only the line being written when the machine stopped can be torn
    return records


def _dump(record: dict[str, Any]) -> str:
    # JSON has no NaN: a number that is not finite is written as the string Python reads back.
    safe = {k: str(v) if isinstance(v, float) and not abs(v) < float("inf") else v for k, v in record.items()}
    return json.dumps(safe, ensure_ascii=False) + "\n"
