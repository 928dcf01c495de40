"""Which checkpoint a run goes on from. Whether it may is asked in `same`.

In: the run folder and `checkpoint.resume_from_checkpoint` (auto, never, or a folder). Out: a verified
`Checkpoint`, or None to begin at step 0; or an error that names the checkpoint.

A timeline is never mixed with another: what a run leaves behind by starting over, or by going on
from an earlier checkpoint than its newest, is moved to `old-<n>`, where `auto` does not look, and is
not deleted.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from qlora_trainer.checkpoint import format, publish
from qlora_trainer.checkpoint.format import Checkpoint
from qlora_trainer.errors import CheckpointError
from qlora_trainer.system import disk

CHECKPOINTS = "checkpoints"


def find(run: Path, mode: str, *, warn: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint that `mode` asks for; changes nothing on the disk.

    Args:
        mode: `auto`, the newest below `run` that verifies; `never`; or a checkpoint folder.
        warn: given one line for each corrupt checkpoint that `auto` passes over.

    Raises:
        CheckpointError: the named folder is corrupt; or `auto` found checkpoints and all are
            (beginning again would throw the work away without a word).
    """
    if mode == "never":
        return None
    if mode != "auto":
        return format.read(Path(mode))
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


def set_aside(
    run: Path, after: int | None, products: Iterable[str] = (), copies: Iterable[str] = ()
) -> Path | None:
    """Moves what lies ahead of the point where the run goes on out of its way.

    Args:
        after: the step it goes on from; None when it starts over. Under `auto` nothing verified
            lies ahead, so what moves is corrupt.
        products: files and folders that an earlier timeline leaves beside its checkpoints; they move
            with them when the run starts over.
        copies: files that go with the products and stay as well, until they are written anew.

    Returns:
        The folder they are in now, or None if there were none.
    """
    root = run / CHECKPOINTS
    ahead = [p for p in publish.checkpoints(root) if after is None or (format.step_of(p) or 0) > after]
    if after is None:
        ahead += [run / name for name in products if (run / name).exists()]
    if not ahead:
        return None
    number = 1
    while (target := run / f"old-{number}").exists():
        number += 1
    with disk.disk_errors(target):
        for path in ahead:
            place = target / path.relative_to(run)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.rename(place)
        for name in copies:
            if after is None and (run / name).is_file():
                shutil.copy2(run / name, target / name)
    return target
