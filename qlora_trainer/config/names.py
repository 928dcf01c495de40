"""What the texts of a configuration may be made of: all of them name something that is shown and written.

In: a flat configuration. Out: problems. A name with a line break forges lines of logs, one with an escape
sequence speaks to the terminal, one that is no UTF-8 cannot be written down, one that is too long is no path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qlora_trainer.config.schema import FACTS
from qlora_trainer.system.untrusted import hidden_characters

TEXT = "chat.system"  # may have lines
PATHS = {"output_dir", "run", *(key for key, facts in FACTS.items() if facts.place is not None)}
LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes; limits.h


def problems(flat: Mapping[str, Any]) -> Iterator[str]:
    """A line for each text that cannot be a name."""
    for key, value in flat.items():
        for text in _texts(value):
            if hidden := hidden_characters(text.translate({10: None, 9: None}) if key == TEXT else text):
                yield f"{key}: {text[:80]!r} holds control characters or no UTF-8 ({hidden}); leave them out"
            elif key in PATHS and _too_long(text):
                yield f"{key}: {text[:80]}… is too long for a path, of which each part has at most 255 bytes"


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _too_long(text: str) -> bool:
    encoded = text.encode()
    return len(encoded) > LONGEST_PATH or any(len(part) > LONGEST_NAME for part in encoded.split(b"/"))
