"""What survives a power cut, which a killed process cannot show: the order of fsyncs and renames.

`Recorder` watches the calls that bring bytes and names to the disk, in this process, as they are made. A file
is safe once it was fsynced with the bytes that it has; a name, once its folder was fsynced with it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from qlora_trainer.system import disk

_watching: list[Recorder] = []  # an audit hook stays for the life of the process


class Recorder:
    """Lists in `problems` what was given its name, or removed, before what it needs was on the disk.

    Args:
        root: what happens elsewhere does not matter.
        lost: fsyncs that are not made, by path: the check must notice each.
    """

    def __init__(self, root: Path, lost: Callable[[Path], bool] = lambda path: False) -> None:
        self.root, self.lost = root.resolve(), lost
        self.problems: list[str] = []
        self.renamed: list[Path] = []  # all that got its name
        self._safe: dict[Path, Any] = {}  # path -> its bytes, or its folder's names, when it was fsynced last
        self._unsafe: set[Path] = set()  # names that their folder has not on the disk yet

    def __enter__(self) -> Recorder:
        self._patches = [
            patch.object(os, "fsync", self._recorded(os.fsync)),
            patch.object(disk, "_exchange", self._exchanged(disk._exchange)),
        ]
        for each in self._patches:
            each.start()
        if not _watching:
            sys.addaudithook(_hook)
        _watching.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _watching[_watching.index(self)] = Recorder(Path("/nowhere"))
        for each in self._patches:
            each.stop()
        self.problems += [f"{path}: its name is not on the disk" for path in sorted(self._unsafe)]

    def _recorded(self, fsync: Callable[[int], None]) -> Callable[[int], None]:
        def recorded(descriptor: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            if self.lost(path):
                return
            fsync(descriptor)
            self._safe[path] = _content(path)
            if path.is_dir():
                self._unsafe -= {name for name in self._unsafe if name.parent == path and name.exists()}

        return recorded

    def _exchanged(self, exchange: Callable[[Path, Path], bool]) -> Callable[[Path, Path], bool]:
        def exchanged(first: Path, second: Path) -> bool:
            if not exchange(first, second):
                return False
            self._safe.update(_moved(self._safe, first.resolve(), second.resolve()))
            self.named(second.resolve(), second.resolve())
            return True

        return exchanged

    def named(self, source: Path, target: Path) -> None:
        """`source`, which is there, is getting the name `target`."""
        if not target.is_relative_to(self.root) or target.name.startswith((disk.TEMPORARY, ".old-")):
            return
        for path in [source, *source.rglob("*")] if source.is_dir() else [source]:
            if self._safe.get(path) != _content(path):
                self.problems.append(f"{path}: named {target.name} before it was on the disk")
        self._safe.update(_moved(self._safe, source, target))
        self.renamed.append(target)
        self._unsafe.add(target)

    def removed(self, path: Path) -> None:
        """A replaced folder goes: what took its name must be on the disk."""
        if path.is_relative_to(self.root) and path.name.startswith(disk.TEMPORARY):
            self.problems += [
                f"{path.name}: removed before {new.name} was on the disk"
                for new in sorted(self._unsafe)
                if path.name.startswith(f"{disk.TEMPORARY}{new.name}-")
            ]


def _content(path: Path) -> Any:
    return sorted(os.listdir(path)) if path.is_dir() else path.read_bytes()


def _moved(safe: dict[Path, Any], source: Path, target: Path) -> dict[Path, Any]:
    return {
        target / path.relative_to(source): value
        for path, value in safe.items()
        if path.is_relative_to(source)
    }


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "os.rename":  # os.replace too
        source, target = (Path(os.fsdecode(name)).absolute() for name in arguments[:2])
        _watching[-1].named(source.parent.resolve() / source.name, target.parent.resolve() / target.name)
    elif event == "shutil.rmtree":
        _watching[-1].removed(Path(os.fsdecode(arguments[0])).absolute())
