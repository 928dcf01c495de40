"""What can be wrong with a row, in words: the field, and what was found there.

The lowest module of the room: who reads files and who reads rows both speak of problems. `RowError` is raised
where a row is taken apart; who reads the rows catches it, keeps the `Problem` and adds `file:line`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

MAX_ROW_BYTES = 10 * 2**20  # a longer row is a broken file, not an example


class Problem(NamedTuple):
    """What is wrong with a row: the field (empty: the row as a whole) and a few words."""

    field: str
    text: str


class RowError(Exception):
    """A row that does not fit its format."""

    def __init__(self, field: str, text: str) -> None:
        super().__init__(field, text)
        self.problem = Problem(field, text)

    def __str__(self) -> str:
        return ": ".join(filter(None, self.problem))


def kind(value: Any) -> str:
    """A value's type in words a user of JSON knows."""
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)
