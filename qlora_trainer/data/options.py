"""What the data room is told: one plain dataclass with the keys of the `data` section.

`DataOptions(**vars(config.data))` is all a command needs to write. Values are checked here, when the
options are made, so a wrong one ends the run before a file is opened.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qlora_trainer.errors import ConfigError
from qlora_trainer.system import cache

FORMATS = ("auto", "alpaca", "messages", "sharegpt", "prompt_completion", "text", "oasst")
OVERLONG = ("drop", "truncate_left", "truncate_right", "split", "error")
SAMPLE_BY = ("line", "paragraph", "document")


@dataclass(frozen=True)
class Source:
    """One place rows come from, and how much of it.

    Attributes:
        path: file, folder, hub name or `builtin:…`.
        name, revision: of a dataset on the hub.
        split: of a dataset on the hub or a built-in one, of a folder whose files tell theirs by name, or of a
            JSON document; None: held-out rows, validation or else test.
        format: one of FORMATS.
        columns: our column name -> the source's.
        weight: how often a row is seen per epoch; 0.5 draws half of the rows anew each epoch.
        max_rows: the first so many usable rows.
        sample_by: what a row of a text file is.
        streaming: read a hub dataset over the network instead of downloading it first.
    """

    path: str
    name: str | None = None
    split: str | None = "train"
    revision: str | None = None
    format: str = "auto"
    columns: tuple[tuple[str, str], ...] = ()
    weight: float = 1.0
    max_rows: int | None = None
    sample_by: str = "line"
    streaming: bool = False

    def __post_init__(self) -> None:
        _one_of("data.format", self.format, FORMATS)
        _one_of("data.sample_by", self.sample_by, SAMPLE_BY)
        if not (isinstance(self.weight, int | float) and 0 < self.weight < 1000):
            raise ConfigError(f"data.path: weight={self.weight} of {self.path}: expected a number above 0")
        if self.max_rows is not None and self.max_rows < 1:
            raise ConfigError(f"data.max_rows={self.max_rows}: expected at least 1, or null for all rows")


@dataclass(frozen=True)
class DataOptions:
    """The `data` section, as plain values; see config/schema.py for each key."""

    path: Any = None
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    format: str = "auto"
    columns: dict[str, str] | None = None
    template: str | None = None
    eval_path: Any = None
    eval_fraction: float = 0.0
    max_rows: int | None = None
    train_on_inputs: bool = False
    train_on_last_turn_only: bool = False
    on_bad_row: str = "error"
    on_lost_content: str = "error"
    overlong: str = "truncate_right"
    sample_by: str = "line"
    streaming: bool = False
    cache_dir: str | None = None
    num_workers: int = 0

    def __post_init__(self) -> None:
        _one_of("data.on_bad_row", self.on_bad_row, ("error", "skip"))
        _one_of("data.on_lost_content", self.on_lost_content, ("error", "warn"))
        _one_of("data.overlong", self.overlong, OVERLONG)
        if not 0 <= self.eval_fraction < 1:
            raise ConfigError(f"data.eval_fraction={self.eval_fraction}: expected 0 or more and less than 1")
        if self.eval_fraction and self.eval_path:
            raise ConfigError("data.eval_fraction and data.eval_path are both set; set one of them")
        if self.train_on_inputs and self.train_on_last_turn_only:
            raise ConfigError(
                "data.train_on_inputs and data.train_on_last_turn_only contradict; set one of them"
            )
        if self.num_workers < 0:
            raise ConfigError(f"data.num_workers={self.num_workers}: expected 0 or more")
        self.sources("train")
        if self.eval_path:
            self.sources("eval")

    @property
    def has_eval(self) -> bool:
        """Whether anything is held out."""
        return bool(self.eval_path or self.eval_fraction)

    def sources(self, role: str) -> tuple[Source, ...]:
        """The sources of `train` or `eval` rows (the same ones when a fraction is held out).

        `data.path` and `data.eval_path` are a text, a mapping with the keys of `Source`, or a list of
        these; what a mapping leaves out comes from the section's own keys.
        """
        assert role in ("train", "eval")
        own_eval = role == "eval" and bool(self.eval_path)
        key = "data.eval_path" if own_eval else "data.path"
        value = self.eval_path if own_eval else self.path
        entries = list(value) if isinstance(value, list | tuple) else [value]
        if not entries or any(entry is None or entry == "" for entry in entries):
            raise ConfigError(f"{key} is not set; give a file, a folder, a hub name or builtin:restaurant")
        return tuple(self._source(key, entry, own_eval) for entry in entries)

    def _source(self, key: str, entry: Any, own_eval: bool) -> Source:
        if isinstance(entry, str | Path):
            entry = {"path": str(entry)}
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise ConfigError(f"{key}: expected a text or a mapping with `path`, found {entry!r}")
        known = {field.name for field in fields(Source)}
        for name in entry:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, 1)
                hint = f"did you mean {near[0]}?" if near else f"known: {' '.join(sorted(known))}"
                raise ConfigError(f"{key}: unknown key {name!r} of a source; {hint}")
        shared: dict[str, Any] = {
            "name": self.name,
            # A folder that is held out may have a part for it; on the hub there is no looking first.
            "split": None if own_eval and Path(entry["path"]).expanduser().exists() else self.split,
            "revision": self.revision,
            "format": self.format,
            "columns": self.columns,
            "max_rows": None if own_eval else self.max_rows,
            "sample_by": self.sample_by,
            "streaming": self.streaming,
        }
        merged = shared | entry
        merged["columns"] = tuple(sorted((merged["columns"] or {}).items()))
        return Source(**merged)

    def cache_folder(self, given: str | Path | None = None) -> Path:
        """Where tokenized data are kept: `given`, `data.cache_dir`, or the user's cache."""
        return Path(given or self.cache_dir or cache.root() / "tokenized").expanduser()

    def key(self) -> dict[str, Any]:
        """The settings that change which tokens come out (not where they are kept or who reads them)."""
        values = asdict(self)
        for name in ("cache_dir", "num_workers"):
            del values[name]
        return values


def _one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{key}={value}: expected one of {' '.join(choices)}{hint}")
