"""What a recipe says of its own task does not pass to a heir with other data.

A recipe that names `data.path` and `data.eval_path` measures one task. Who inherits it and names other data,
in a recipe or on the command line, would measure the old task on a model of the new one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

OWN = ("data.eval_path", "evaluate.task")  # of the recipe's own rows
NEEDS_ROWS = ("evaluate.eval_steps",)  # of any held-out rows


def disinherit(layers: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """The layers, ancestors first, without what measures the task of an ancestor; and a line on what went.

    Each layer is flat: dotted key -> value. The last one is the command line.
    """
    kept: list[dict[str, Any]] = []
    lines = []
    path: Any = None
    for layer in layers:
        heir = dict(layer)
        before, path = path, heir.get("data.path", path)
        changed = before is not None and path != before
        if changed and "data.eval_path" not in heir and any(past.get("data.eval_path") for past in kept):
            held_out = heir.get("data.eval_fraction")
            lost = [*OWN, *(() if held_out else NEEDS_ROWS)]
            gone = [key for key in lost if any(past.get(key, "none") != "none" for past in kept)]
            kept = [{key: value for key, value in past.items() if key not in lost} for past in kept]
            remedy = (
                "" if held_out else "; to hold rows out, give data.eval_path=FILE or data.eval_fraction=0.05"
            )
            lines.append(f"data.path is not the recipe's, so its {' and '.join(gone)} do not apply{remedy}")
        kept.append(heir)
    return kept, lines
