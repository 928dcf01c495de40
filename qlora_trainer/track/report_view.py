"""What the page is made of: sections of facts, tables and examples, all of it text that the template escapes.

And how numbers are written: sizes in GiB and MB, times as a person says them, dates in UTC.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeAlias

GIB = 1 << 30
LONGEST = 4000  # characters of one value; the files have the rest


@dataclass(frozen=True)
class Cell:
    """Text with a tone: good, bad, warn, soft, strong, or code for what is typed or compared."""

    text: str
    tone: str = ""


Row: TypeAlias = Sequence[Cell | str]


@dataclass(frozen=True)
class Table:
    """Rows of cells.

    Attributes:
        columns: titles; a column without one holds text.
        kind: figures (numbers behind a first column of text), examples (texts side by side, one below the
            other on a phone), or keys (a key and what it is).
    """

    columns: Sequence[str]
    rows: Sequence[Row]
    caption: str = ""
    notes: Row = ()
    kind: str = "figures"


@dataclass(frozen=True)
class Fold:
    """A table that is not shown before it is asked for."""

    title: str
    table: Table


@dataclass(frozen=True)
class Facts:
    """Label and values, a line each."""

    items: Sequence[tuple[str, Row]]


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Table | Fold | Facts] = ()
    notes: Row = ()


@dataclass(frozen=True)
class Headline:
    """The top of the page.

    Attributes:
        state, tone: done, stopped …, and its tone.
        message: why it ended so, if that has to be said.
        figures: label, value and what to compare it with.
    """

    name: str
    state: str
    tone: str
    progress: str
    message: str = ""
    figures: Sequence[tuple[str, str, str]] = ()
    facts: Facts = field(default_factory=lambda: Facts(()))


def clip(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text):,} characters)"


def form(value: float | None, pattern: str) -> str:
    """`value` by a format pattern; empty if there is none."""
    return "" if value is None else pattern.format(value)


def gib(size: float) -> str:
    value = size / GIB
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def binary_unit(largest: float) -> tuple[str, Callable[[float], str]]:
    """GiB, or MiB where everything is small, and how to write a size in it."""
    return ("GiB", gib) if largest >= GIB else ("MiB", lambda size: f"{size / (1 << 20):,.1f}")


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.3g}" if size < 1e9 else f"{size / 1e6:,.0f}"


def count(number: float) -> str:
    """8_030_261_248 -> 8.03B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"


def duration(seconds: float) -> str:
    """0.53 s, 12 s, 4 min 10 s, 3 h 12 min, 2 d 4 h."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    whole = round(seconds)
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def date(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M} UTC"


def off(planned: float, measured: float, margin: float) -> Cell:
    """How far the measurement is from the plan; a warning when further than the plan promises."""
    share = measured / planned - 1
    return Cell(f"{share:+.1%}", "warn" if abs(share) > margin else "soft")
