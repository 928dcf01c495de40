"""A save that is killed at any point: the scene, what must hold afterwards, and a Python-only killer.

`scripts/fault_sweep` kills at real system calls with strace; here `sys.setprofile` sees every call
into C that the save makes (open, write, fsync, rename …), and the process ends itself with SIGKILL
before or after one of them. That works wherever the tests do.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from qlora_trainer.checkpoint import format, publish, resume
from qlora_trainer.system import disk
from tests.checkpoint import samples

SAVED_BEFORE = (1, 2)
LIMIT = 2
ACKNOWLEDGED = "acknowledged"


def prepare(run: Path) -> None:
    """A run folder with two checkpoints and a published adapter, as a run leaves it."""
    run.mkdir(exist_ok=True)
    for step in SAVED_BEFORE:
        samples.save(run / resume.CHECKPOINTS, step)
    disk.publish_folder(run / "adapter", lambda folder: format.write(folder, *samples.contents(2)))
    acknowledge(run, 2)


def copy(scene: Path, run: Path) -> Path:
    """A fresh `run` like the prepared `scene`."""
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(scene, run)
    acknowledge(run, 2)
    return run


def acknowledge(run: Path, step: int) -> None:
    """What the outside world has been told; not part of what is tested."""
    descriptor = os.open(run.parent / f"{run.name}.{ACKNOWLEDGED}", os.O_WRONLY | os.O_CREAT, 0o600)
    os.pwrite(descriptor, f"{step:09d}".encode(), 0)
    os.close(descriptor)


def acknowledged(run: Path) -> int:
    return int((run.parent / f"{run.name}.{ACKNOWLEDGED}").read_bytes())


def act(run: Path) -> None:
    """Everything that a run does to its folder when it saves, twice, the second time over an old folder."""
    root = run / resume.CHECKPOINTS
    samples.save(root, 3)
    acknowledge(run, 3)
    publish.retain(root, LIMIT, best_step=1)
    disk.atomic_write(run / "status.json", b'{"step": 3}')
    samples.save(root, 3)
    disk.publish_folder(run / "adapter", lambda folder: format.write(folder, *samples.contents(3)))
    samples.save(root, 4)
    acknowledge(run, 4)
    publish.retain(root, LIMIT)


def problems(run: Path) -> list[str]:
    """What does not hold in a run folder whose process died in `act`; empty if all is well."""
    found: list[str] = []
    promised = acknowledged(run)
    with disk.lock(run):
        pass
    checkpoint = resume.find(run, "auto", warn=found.append)  # a skipped one would be a torn one
    if checkpoint is None or checkpoint.step < promised:
        found.append(f"resumes at {checkpoint and checkpoint.step}, step {promised} was acknowledged")
    else:
        tensors, documents = samples.contents(checkpoint.step)
        for name in (format.ADAPTER, format.OPTIMIZER):
            read, written = checkpoint.tensors(name), tensors[name]
            if read.keys() != written.keys() or any(not read[key].equal(written[key]) for key in read):
                found.append(f"{name} of step {checkpoint.step} is not what was saved")
        if checkpoint.state != documents[format.STATE]:
            found.append(f"state of step {checkpoint.step} is not what was saved")
    if wrong := format.verify(run / "adapter"):
        found.append(f"adapter: {wrong}")
    found += [f"left behind: {path}" for path in run.rglob(".*") if path.name != ".lock"]
    samples.save(run / resume.CHECKPOINTS, 5)  # and the next one must work
    removed = publish.retain(run / resume.CHECKPOINTS, LIMIT)
    if not removed or len(publish.checkpoints(run / resume.CHECKPOINTS)) != LIMIT:
        found.append(f"the next save removed {removed}")
    return found


class Killer:
    """Counts the calls into C that can touch a disk, before and after each, and dies at number `point`."""

    def __init__(self, point: int | None) -> None:
        self.point = point
        self.count = 0

    def __call__(self, frame: FrameType, event: str, function: Any) -> None:
        if event not in ("c_call", "c_return", "c_exception") or not _touches_disk(function):
            return
        if self.count == self.point:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1


def _touches_disk(function: Any) -> bool:
    owner = getattr(function, "__self__", None)
    module = getattr(function, "__module__", None) or getattr(type(owner), "__module__", "")
    name = getattr(function, "__name__", "")
    if module in ("posix", "nt"):
        return name not in ("fspath", "getpid", "fsencode", "fsdecode", "kill")
    return module in ("_io", "io", "_safetensors_rust", "safetensors._safetensors_rust")


def points(run: Path) -> int:
    """How many points `act` has."""
    killer = Killer(None)
    sys.setprofile(killer)
    try:
        act(run)
    finally:
        sys.setprofile(None)
    return killer.count


def die_at(run: Path, point: int) -> bool:
    """Runs `act` in a forked child that dies at `point`; whether it did."""
    pid = os.fork()
    if pid == 0:
        sys.setprofile(Killer(point))
        act(run)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
