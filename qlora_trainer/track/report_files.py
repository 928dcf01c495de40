"""A run's folder as plain values: what the page is made from, so that it can be remade at any time.

In: the folder. Out: `RunFiles`, with secrets masked. A file that is missing is empty; one that cannot be read
is empty too and named in `problems`: the page says what it could not show, and shows the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from qlora_trainer.system.redact import Redactor
from qlora_trainer.system.untrusted import parse_json, parse_yaml
from qlora_trainer.track.report_series import Series

LARGEST = 32 << 20  # bytes of a JSON file that is still read; ours have kilobytes


@dataclass(frozen=True)
class Saved:
    """A checkpoint, an export or the adapter on the disk: `size` in bytes, `about` is its JSON."""

    name: str
    size: int
    written: datetime
    about: dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """What there is; documents as their JSON has them.

    Attributes:
        name: of the folder.
        exports: the contents of each `exports/*/verify.json`, by folder; None where it was not verified.
        problems: a line for each file that could not be read.
    """

    name: str
    folder: str
    config: dict[str, Any]
    plan: dict[str, Any]
    status: dict[str, Any]
    evaluation: dict[str, Any]
    lm_eval: dict[str, Any]
    series: Series
    checkpoints: list[Saved]
    adapter: Saved | None
    exports: dict[str, dict[str, Any] | None]
    problems: list[str] = field(default_factory=list)


def read_run(folder: Path) -> RunFiles:
    """Reads all that the page is made from; nothing in the folder makes it fail."""
    reader = _Reader(folder)
    checkpoints = sorted(folder.glob("checkpoints/step-*/manifest.json"))
    exported = sorted(folder.glob("exports/*/export.json"))
    adapter = folder / "adapter" / "training.json"
    return RunFiles(
        name=reader.redactor.text(folder.resolve().name),
        folder=reader.redactor.text(str(folder)),
        config=reader.document("config.yaml", parse_yaml),
        plan=reader.document("plan.json"),
        status=reader.document("status.json"),
        evaluation=reader.document("evaluation.json"),
        lm_eval=reader.document("lm_eval.json"),
        series=reader.metrics("metrics.jsonl"),
        checkpoints=reader.saved(path.with_name("state.json") for path in checkpoints),
        adapter=next(iter(reader.saved([adapter] if adapter.exists() else [])), None),
        exports={reader.redactor.text(path.parent.name): reader.verified(path.parent) for path in exported},
        problems=reader.problems,
    )


class _Reader:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.redactor = Redactor()
        self.problems: list[str] = []

    def document(self, name: str, parse: Callable[[str], Any] = parse_json) -> dict[str, Any]:
        path = self.folder / name
        try:
            if not path.is_file():
                return {}
            if path.stat().st_size > LARGEST:
                raise ValueError(f"larger than {LARGEST >> 20} MiB")
            content = self.redactor.tree(parse(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, yaml.YAMLError) as error:
            self._not_read(name, error)
            return {}
        if not isinstance(content, dict):
            self._not_read(name, TypeError("not a mapping"))
            return {}
        return content

    def metrics(self, name: str) -> Series:
        path = self.folder / name
        try:
            if path.is_file():
                with path.open(encoding="utf-8", errors="replace") as lines:
                    return Series.of(lines)
        except OSError as error:
            self._not_read(name, error)
        return Series.of([])

    def saved(self, documents: Iterable[Path]) -> list[Saved]:
        found = []
        for path in documents:
            folder = path.parent
            try:
                size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
                written = datetime.fromtimestamp(folder.stat().st_mtime, timezone.utc)
            except OSError as error:  # retention may be taking it away
                self._not_read(str(folder.relative_to(self.folder)), error)
                continue
            about = self.document(str(path.relative_to(self.folder)))
            found.append(Saved(self.redactor.text(folder.name), size, written, about))
        return found

    def verified(self, export: Path) -> dict[str, Any] | None:
        return self.document(str((export / "verify.json").relative_to(self.folder))) or None

    def _not_read(self, name: str, error: Exception) -> None:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        self.problems.append(self.redactor.text(f"{name} could not be read: {reason[:200]}"))
