"""Whether two starts are the same run: identities compared field by field, except where the user lets go.

In: flat dictionaries of plain values. Out: what differs, a line each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qlora_trainer.errors import ConfigError

REMEDY = (
    "choose another output_dir, start over with checkpoint.resume_from_checkpoint=never, "
    "or name what may change in checkpoint.allow_change=[…]"
)


def changed(saved: Mapping[str, Any], now: Mapping[str, Any], allow_change: Iterable[str] = ()) -> list[str]:
    """`field was … and is now …` for each that differs and that `allow_change` does not cover.

    Args:
        allow_change: fields, or whole sections (`data` for `data.packing`), that may differ.
    """
    allowed = tuple(allow_change)
    return [
        f"{field} was {saved.get(field)!r} and is now {now.get(field)!r}"
        for field in sorted(saved.keys() | now.keys())
        if saved.get(field) != now.get(field) and not covered(field, allowed)
    ]


def check_same_run(
    saved: Mapping[str, Any], now: Mapping[str, Any], allow_change: Iterable[str] = ()
) -> None:
    """Refuses to go on with a run that is no longer the same.

    Args:
        saved, now: the run's whole identity, field name -> what JSON can hold.

    Raises:
        ConfigError: naming every field that differs, with both values, and the way to allow it;
            or an entry of `allow_change` that names nothing.
    """
    allowed = tuple(allow_change)
    fields = sorted(saved.keys() | now.keys())
    for name in allowed:
        if not any(covered(field, [name]) for field in fields):
            raise ConfigError(f"checkpoint.allow_change: no field {name!r}; there are {', '.join(fields)}")
    if found := changed(saved, now, allowed):
        raise ConfigError(f"not the run that this checkpoint belongs to: {'; '.join(found)}: {REMEDY}")


def covered(field: str, names: Iterable[str]) -> bool:
    """Whether `names` has the field or a section it is in."""
    return any(field == name or field.startswith(f"{name}.") for name in names)
