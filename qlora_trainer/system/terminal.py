"""The terminal: the one pair of rich consoles that all rooms print to.

In: text and tables. Out: lines on stdout (`results`: what was asked for) or stderr (`console`: what is going
on). What comes from users (names, paths, rows, a model's answers) is shown and never obeyed: strings carry
no markup (a style is given beside the text), control characters, with which a terminal is told to move, to
hide or to paste, appear in words, and secrets are masked before a long line is wrapped, behind which no
filter would know them any more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from qlora_trainer.system import redact

# C0 and C1 without tab and line feed, DEL, and what turns the direction of writing.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """`text` with its control characters written out (`\\x1b`); lines and tabs stay."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def one_line(text: object) -> str:
    """`text` as one printable line: what stands in it cannot begin a line of its own."""
    return printable(" ".join(str(text).split()))


class Terminal(Console):
    """A console that shows what it is given."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(redact.text(text)), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment  # rich's own: the cursor of a progress bar
            else:
                yield segment._replace(text=printable(segment.text))


def to_stderr(line: str) -> None:
    """What a room says for itself where no caller takes its lines; on one line, however long."""
    console.print(line, soft_wrap=True)


console = Terminal(stderr=True, highlight=False)
results = Terminal(highlight=False)
