"""`metrics.jsonl`: one JSON object a line, appended as it happens, on disk within seconds.

Floats are written so that they read back to the same bits. A resumed run first takes away the lines
of steps it will do again, so the file of an interrupted run equals that of an uninterrupted one. A line
that is no record (a machine that died, an editor) costs itself and no other: it goes to `metrics.jsonl.bad`.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from qlora_trainer.errors import CheckpointError
from qlora_trainer.system.disk import atomic_write, disk_errors

SYNC_SECONDS = 5.0
BAD = ".bad"  # appended to the file's name


class JsonlTracker:
    """Appends to `path`; at most `SYNC_SECONDS` of lines are lost if the machine itself dies.

    Attributes:
        bad: lines of the file as it was that are no records, now in `path` + `BAD`. The line that was
            being written when the process died is none of them: its step is done again.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self.path = path
        lines = _lines(path) if resume_step else []
        records = [(line, parse(line)) for line in lines]
        torn = bool(records) and records[-1][1] is None and not lines[-1].endswith(b"\n")
        bad = [line for line, record in (records[:-1] if torn else records) if record is None]
        self.bad = len(bad)
        if bad:
            aside = path.with_name(path.name + BAD)
            atomic_write(aside, b"".join([*_lines(aside), *bad]))
        kept = [_whole(line) for line, record in records if record and record["step"] <= resume_step]
        atomic_write(path, b"".join(kept))
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
    """The records of a metrics file; lines that are none are left out."""
    return [record for line in _lines(path) if (record := parse(line))]


def parse(line: bytes | str) -> dict[str, Any] | None:
    """A line as a record, which has at least a `step`; None if it is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    step = record.get("step")
    return record if type(step) is int and 0 <= step < 1 << 53 else None


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def _whole(line: bytes) -> bytes:
    return line if line.endswith(b"\n") else line + b"\n"


def _dump(record: dict[str, Any]) -> str:
    # JSON has no NaN: a number that is not finite is written as the string Python reads back.
    safe = {k: str(v) if isinstance(v, float) and not abs(v) < float("inf") else v for k, v in record.items()}
    return json.dumps(safe, ensure_ascii=False) + "\n"
