"""What the schema says of a key beside its type and default: its meaning, who reads it and when, and whether
a run may change it between two starts. `key(…)` says it in the field itself, so that no second list exists.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any


class Resume(Enum):
    """What becomes of a run that is started again with another value."""

    SAME = "refused: a step's arithmetic depends on it"
    CONTENT = "refused if it stands for other content: another spelling of the same files is the same"
    LENGTH = "goes on, unless the learning rate would jump"
    FREE = "goes on: no step depends on it"


SAME, CONTENT, LENGTH, FREE = Resume.SAME, Resume.CONTENT, Resume.LENGTH, Resume.FREE


class Place(Enum):
    """Whether a value names a file or folder, which then is the one that was meant where the run began."""

    ALWAYS = "a file or folder"
    IF_THERE = "the file or folder of that name, if there is one"
    IF_PLAIN = "a file or folder if it is there and is written with a slash or an ending"

    def located(self, value: Any) -> Any:
        """`value` with every path in it absolute, so that it means the same from any folder."""
        if isinstance(value, list):
            return [self.located(item) for item in value]
        if isinstance(value, dict):
            return {**value, "path": self.located(value["path"])} if "path" in value else value
        if not isinstance(value, str) or not value or ":" in value.partition("/")[0]:
            return value
        path = Path(value).expanduser()
        plain = self is not Place.IF_PLAIN or "/" in value or bool(path.suffix)
        if self is Place.ALWAYS or (plain and os.path.exists(path)):
            return os.path.abspath(path)
        return str(path) if value.startswith("~") else value


@dataclass(frozen=True)
class When:
    """A key has effect only if `key` has one of `values` (for a list: contains one); with none, if it is set.

    `command`: the only one that this condition is about; None: all.
    """

    key: str
    values: tuple[Any, ...] = ()
    command: str | None = None

    def holds(self, flat: Mapping[str, Any]) -> bool:
        """Whether it does in a configuration of dotted keys."""
        value = flat[self.key]
        if not self.values:
            return bool(value)
        return any(item in self.values for item in (value if isinstance(value, list) else [value]))

    @property
    def keys(self) -> tuple[str, ...]:
        """Those that it depends on."""
        return (self.key,)

    def __str__(self) -> str:
        values = "|".join(str(value).lower() if value is True else str(value) for value in self.values)
        return f"{self.key}={values}" if values else f"{self.key} set"


@dataclass(frozen=True)
class FromHub:
    """A key has effect only if one of `keys` names something of the hub, and no file or folder here."""

    keys: tuple[str, ...]
    command: str | None = None

    def holds(self, flat: Mapping[str, Any]) -> bool:
        return any(_of_hub(flat[key]) for key in self.keys)

    def __str__(self) -> str:
        return f"{' or '.join(self.keys)} of the hub"


def _of_hub(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_of_hub, value))
    if isinstance(value, dict):
        return _of_hub(value.get("path"))
    return value is not None and ":" not in value and not os.path.exists(Path(value).expanduser())


@dataclass(frozen=True)
class Facts:
    """Of one key.

    Attributes:
        meaning: one line, with the values it takes where they are few.
        by: commands that read it. Those that take `run=` find it in the run's config.yaml too.
        when: the condition under which it has effect; None: always.
        place: its value may be a file or folder here.
    """

    resume: Resume
    meaning: str
    by: tuple[str, ...]
    when: When | FromHub | None = None
    place: Place | None = None

    def located(self, value: Any) -> Any:
        """`value` as a configuration has it: paths are absolute."""
        return value if self.place is None else self.place.located(value)


def key(
    default: Any,
    resume: Resume,
    meaning: str,
    *,
    by: tuple[str, ...],
    when: When | FromHub | None = None,
    place: Place | None = None,
) -> Any:
    """A field of a section, with its facts."""
    metadata = {"facts": Facts(resume, meaning, by, when, place)}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)
