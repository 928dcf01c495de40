"""Which checkpoint a run goes on from, and whether it may.

In: the run folder, `checkpoint.resume_from_checkpoint` (auto, never, or a folder) and the identity
of the run as a flat dictionary of plain values. Out: a verified `Checkpoint`, or None to begin at
step 0; or an error that names the checkpoint or the field.

A timeline is never mixed with another: what a run leaves behind by starting over, or by going on
from an earlier checkpoint than its newest, is moved to `checkpoints.old-<n>`, where `auto` does not
look, and is not deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from qlora_trainer.checkpoint import disk, format, publish
from qlora_trainer.checkpoint.format import Checkpoint
from qlora_trainer.errors import CheckpointError, ConfigError, MissingInputError

CHECKPOINTS = "checkpoints"


def find(run: Path, mode: str, *, warn: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint that `mode` asks for; changes nothing on the disk.

    Args:
        mode: `auto`, the newest below `run` that verifies; `never`; or a checkpoint folder.
        warn: given one line for each corrupt checkpoint that `auto` passes over.

    Raises:
        CheckpointError: the named folder is corrupt; or `auto` found checkpoints and all are
            (beginning again would throw the work away without a word).
        MissingInputError: the named folder does not exist.
    """
    if mode == "never":
        return None
    if mode != "auto":
        folder = Path(mode)
        if not folder.exists():
            raise MissingInputError(
                f"checkpoint.resume_from_checkpoint={mode}: there is no such folder; "
                "name a checkpoint folder, or auto, or never"
            )
        return format.read(folder)
    root = disk.require_inside(run, run / CHECKPOINTS)
    folders = publish.checkpoints(root)
    for folder in reversed(folders):
        try:
            return format.read(folder)
        except CheckpointError as error:
            warn(f"{error}; skipped")
    if folders:
        raise CheckpointError(
            f"all {len(folders)} checkpoints in {root} are corrupt: restore one, "
            "or start over with checkpoint.resume_from_checkpoint=never"
        )
    return None


def set_aside(run: Path, after: int | None) -> Path | None:
    """Moves the checkpoints that lie ahead of the point where the run goes on out of its way.

    Args:
        after: the step it goes on from; None when it starts over. Under `auto` nothing verified
            lies ahead, so what moves is corrupt.

    Returns:
        The folder they are in now, or None if there were none.
    """
    root = run / CHECKPOINTS
    ahead = [p for p in publish.checkpoints(root) if after is None or (format.step_of(p) or 0) > after]
    if not ahead:
        return None
    number = 1
    while (target := run / f"{CHECKPOINTS}.old-{number}").exists():
        number += 1
    target.mkdir()
    for folder in ahead:
        folder.rename(target / folder.name)
    return target


def check_same_run(
    saved: Mapping[str, Any], now: Mapping[str, Any], allow_change: Iterable[str] = ()
) -> None:
    """Refuses to go on with a run that is no longer the same.

    Args:
        saved, now: the run's identity, field name -> what JSON can hold: data and template
            fingerprints, packing, rank, base revision, precision, world size …
        allow_change: fields, or whole sections (`data` for `data.packing`), that may differ.

    Raises:
        ConfigError: naming every field that differs, with both values, and the way to allow it;
            or an entry of `allow_change` that names nothing.
    """
    allowed = tuple(allow_change)
    fields = sorted(saved.keys() | now.keys())
    for name in allowed:
        if not any(_covers(name, field) for field in fields):
            raise ConfigError(f"checkpoint.allow_change: no field {name!r}; there are {', '.join(fields)}")
    changed = [
        f"{field} was {saved.get(field)!r} and is now {now.get(field)!r}"
        for field in fields
        if saved.get(field) != now.get(field) and not any(_covers(name, field) for name in allowed)
    ]
    if changed:
        raise ConfigError(
            f"not the run that this checkpoint belongs to: {'; '.join(changed)}. Choose another output_dir, "
            "start over with checkpoint.resume_from_checkpoint=never, or name what may change in "
            "checkpoint.allow_change=[…]"
        )


def _covers(name: str, field: str) -> bool:
    return field == name or field.startswith(f"{name}.")
