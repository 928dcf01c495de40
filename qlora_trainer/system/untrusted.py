"""Documents that anybody may have made, read within limits of size, depth and length.

In: the text of a JSON or YAML document. Out: plain values, or `ValueError` with a few words, before which the
reader puts the file's name. Without limits a kilobyte is enough to end a process: brackets nested a hundred
thousand deep, a number of a million digits, aliases of aliases (ten levels of ten are 10^10 values).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

DEEPEST = 100  # brackets inside brackets
LARGEST_JSON = 16 << 20  # bytes of a file of settings; they have kilobytes
LARGEST_YAML = 256 << 10  # characters; a run's whole configuration has six thousand
MOST_NODES = 100_000  # of a YAML document with its aliases written out
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON document.

    Raises:
        ValueError: not JSON, not UTF-8, a number of thousands of digits, or nested over `DEEPEST`.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # UnicodeDecodeError, or Python's limit on the digits of a number
        raise ValueError(few_words(error)) from error
    brackets = "[{" if isinstance(text, str) else b"[{"
    if text.count(brackets[:1]) + text.count(brackets[1:]) > DEEPEST:  # type: ignore[arg-type]
        check_depth(value)
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a small file.

    Raises:
        OSError: it cannot be read.
        ValueError: larger than `LARGEST_JSON`, not JSON, or not an object.
    """
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"larger than {LARGEST_JSON >> 20} MiB")
    try:
        found = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def check_depth(value: Any) -> None:
    """Raises ValueError if lists and objects are nested over `DEEPEST`: what walks over them would fall."""
    level, depth = [value], 0
    while level := [
        inner
        for outer in level
        if isinstance(outer, dict | list)
        for inner in (outer.values() if isinstance(outer, dict) else outer)
        if isinstance(inner, dict | list)
    ]:
        depth += 1
        if depth >= DEEPEST:
            raise ValueError(f"nested more than {DEEPEST} deep")


def check_yaml(text: str) -> None:
    """Raises ValueError where a YAML document would grow when it is read, or yaml.YAMLError if it is none."""
    if len(text) > LARGEST_YAML:
        raise ValueError(f"longer than {LARGEST_YAML >> 10} KiB")
    sizes: dict[str, int] = {}  # anchor -> nodes under it, aliases written out
    open_: list[tuple[str | None, int]] = []  # anchor of each list or object around, and nodes before it
    nodes = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor, nodes))
            nodes += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            if anchor is not None:
                sizes[anchor] = nodes - before
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:  # of what is still open; yaml itself reports one that is not there
                if event.anchor in (anchor for anchor, _ in open_):
                    raise ValueError(f"*{event.anchor} stands inside itself")
            else:
                nodes += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            nodes += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        if len(open_) > DEEPEST:
            raise ValueError(f"nested more than {DEEPEST} deep")
        if nodes > MOST_NODES:
            raise ValueError(f"more than {MOST_NODES:,} values once its aliases are written out")


def parse_yaml(text: str) -> Any:
    """The value of a YAML document, plain types only.

    Raises:
        ValueError: over the limits, or a number of thousands of digits.
        yaml.YAMLError: not YAML, or with tags of Python.
    """
    check_yaml(text)
    try:
        return yaml.safe_load(text)
    except ValueError as error:
        raise ValueError(few_words(error)) from error


def hidden_characters(name: str) -> str:
    """Control characters in a name, and bytes that are no UTF-8, as Python writes them; empty if none.

    With them a name could forge a line of a log, or tell a terminal what to do.
    """
    return " ".join(ascii(found)[1:-1] for found in dict.fromkeys(_CONTROLS.findall(name)))


def few_words(error: ValueError) -> str:
    """What a parser says, without Python's advice to raise its limit on the digits of a number."""
    text = " ".join(str(error).split())
    return "a number of thousands of digits" if "set_int_max_str_digits" in text else text
