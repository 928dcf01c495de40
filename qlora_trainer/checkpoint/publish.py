"""Checkpoints on the disk: published whole, listed, and removed so that a verified one always remains.

In: the run's checkpoint folder and what `format.write` takes. Out: published folders. `disk` does the
work of being atomic; here is what makes it about checkpoints.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora_trainer.checkpoint import format
from qlora_trainer.errors import CheckpointError
from qlora_trainer.system import disk
from qlora_trainer.system.disk import atomic_write, publish_folder

__all__ = ["atomic_write", "checkpoints", "publish_folder", "retain", "save", "space_needed"]


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    documents: Mapping[str, Mapping[str, Any]],
) -> Path:
    """Publishes the checkpoint of `step` below `root` (see `format.write`) and returns its folder.

    Raises:
        CheckpointError: the disk refuses, or `root`'s own folder is gone: made anew, it would be no run's.
    """
    assert documents[format.STATE]["step"] == step
    if not root.parent.is_dir():
        raise CheckpointError(f"{root.parent} is gone: it was moved or removed while the run was at work")
    return publish_folder(
        root / format.folder_name(step),
        lambda folder: format.write(folder, tensors, documents),
        needed=format.size_of(tensors),
    )


def checkpoints(root: Path) -> list[Path]:
    """The checkpoint folders below `root`, oldest step first; not yet verified."""
    if not root.is_dir():
        return []
    folders = [path for path in root.iterdir() if path.is_dir() and not path.is_symlink()]
    steps = [(step, path) for path in folders if (step := format.step_of(path)) is not None]
    return [path for _, path in sorted(steps)]


def space_needed(root: Path, size: int, saves: int, limit: int, keep_best: bool) -> int:
    """Bytes that `saves` further checkpoints of `size` bytes need at most, beside those that are there.

    `retain(root, limit, …)` runs after each, so one more than is kept exists at a time.
    """
    there = len(checkpoints(root))
    most = there + saves if limit == 0 else min(there + saves, limit + int(keep_best) + 1)
    return size * max(1, most - there)


def retain(root: Path, limit: int, best_step: int | None = None) -> list[Path]:
    """Removes all but the newest `limit` checkpoints and the best one; returns what it removed.

    The newest is read back from the disk first: nothing goes unless it verifies, so at every
    instant there is a verified checkpoint. `limit` 0 keeps all.

    Raises:
        CheckpointError: the newest does not verify.
    """
    folders = checkpoints(root)
    surplus = [path for path in folders[:-limit] if format.step_of(path) != best_step] if limit > 0 else []
    if not surplus:
        return []
    format.read(folders[-1])
    with disk.disk_errors(root):
        for path in surplus:
            doomed = path.with_name(f"{disk.TEMPORARY}{path.name}-{os.getpid()}")
            path.rename(doomed)  # half a removal must not look like a corrupt checkpoint
            disk.remove(doomed)
    return surplus
