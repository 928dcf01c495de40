"""One measurement made several times: the fullest stands, and the latest beside it if it measured less.

A quick look at ten rows must not take the place of what was measured on all of them, and neither may hide
the other. A result of another model (`same`) is no result of this one and goes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

LATEST = "latest"
BAD = ".bad"  # appended to the name of a file that cannot be read


def fullest(
    earlier: Any, found: Mapping[str, Any], *, same: Sequence[str], size: Sequence[str]
) -> dict[str, Any]:
    """What is to be stored: `found`, or the fuller `earlier` with `found` under `LATEST`.

    Args:
        earlier: what is stored now, of any shape: it is read from a file.
        same: keys that are equal in two results of the same model.
        size: keys whose numbers say how much was measured; None stands for all there is.
    """
    latest = dict(found)
    if not isinstance(earlier, Mapping) or any(earlier.get(key) != found[key] for key in same):
        return latest
    sizes = [(_number(earlier.get(key, 0)), _number(found[key])) for key in size]
    if all(now >= before for before, now in sizes):
        return latest
    return {**earlier, LATEST: latest}


def read_results(path: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The stored results; empty if there are none. A file that holds none is put aside, which is said."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        content = None
    if isinstance(content, dict):
        return content
    aside = path.with_name(path.name + BAD)
    path.replace(aside)
    say(f"{path.name}: holds no results, and is kept as {aside.name}")
    return {}


def _number(value: Any) -> float:
    if value is None:
        return float("inf")
    return float(value) if isinstance(value, int | float) else 0.0
