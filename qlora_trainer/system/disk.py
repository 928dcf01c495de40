"""How files reach the disk: whole or not at all, whenever the process dies.

A folder is filled under a temporary name, every file and then the folder are fsynced, it is renamed
into place and the parent is fsynced; only then is anything older removed. Readers see the old state
or the new one. What a killed process leaves behind carries a `.tmp-` name and goes at the next start.

In: a target path and the bytes, or a function that fills a folder. Out: the published path, or
`CheckpointError` (exit 74) with the disk as it was before. Modes are the user's umask's: safetensors
and tempfile create 0600, which locks out the group that shares a project folder.

Replacing a folder swaps the two names in one system call (Linux's renameat2). Where the filesystem
cannot (some network ones), the old folder steps aside first, and `clean` brings it back if the
process dies between the two renames.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from qlora_trainer.errors import REFUSALS, CheckpointError, one_line, system_code
from qlora_trainer.system import redact

TEMPORARY = ".tmp-"
_number = itertools.count()
_ASIDE = ".old-"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_CANNOT_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}
_CANNOT_LOCK = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}  # Lustre mounted without flock


def to_json(document: Mapping[str, Any]) -> bytes:
    """JSON for programs: sorted keys, exact floats, no NaN (a `ValueError`). Whoever calls masks secrets."""
    text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def write_json(path: Path, document: Any, *, durable: bool = True) -> None:
    """`atomic_write` of JSON for people: keys in the order given, secrets masked."""
    text = json.dumps(redact.tree(document), indent=2, ensure_ascii=False)
    atomic_write(path, text.encode(errors="replace") + b"\n", durable=durable)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """`atomic_write` of UTF-8 text, secrets masked."""
    atomic_write(path, redact.text(text).encode(errors="replace"), durable=durable)


def atomic_write(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replaces a file by `data`; readers and a crash see the old bytes or the new ones.

    Args:
        durable: survive a power cut too (fsync). A heartbeat such as status.json can do without.
    """
    # Numbered, because a signal handler or another thread may be writing the same file meanwhile.
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}-{next(_number)}")
    with disk_errors(path, len(data)):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            temporary.replace(path)
            if durable:
                _fsync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def publish_folder(target: Path, fill: Callable[[Path], None], *, needed: int = 0) -> Path:
    """Makes `target` the folder that `fill` has filled, replacing one of that name.

    Args:
        fill: called with an existing empty folder beside `target`.
        needed: bytes it will write, checked against the free space first.

    Raises:
        CheckpointError: no space, read-only, quota …; what was there before is untouched.
    """
    require_place(target)
    temporary = target.with_name(f"{TEMPORARY}{target.name}-{os.getpid()}")
    with disk_errors(target, needed):
        target.parent.mkdir(parents=True, exist_ok=True)
        require_space(target.parent, needed, str(target))
        remove(temporary)
        try:
            temporary.mkdir()
            fill(temporary)
            _settle(temporary)
            _rename(temporary, target)
        except BaseException:
            remove(temporary)
            raise
        _fsync(target.parent)
        remove(temporary)  # holds the replaced folder, if there was one
    return target


def clean(root: Path) -> None:
    """Removes what a killed process left directly in `root` (a run folder, its checkpoints …).

    Call it only while holding the run's `lock`: it takes every temporary name for a dead process's.
    """
    if not root.is_dir():
        return
    with disk_errors(root):
        for path in sorted(root.iterdir()):
            if path.name.startswith(_ASIDE):
                target = path.with_name(path.name[len(_ASIDE) :])
                if target.exists():
                    remove(path)
                else:
                    path.rename(target)
            elif path.name.startswith(TEMPORARY):
                remove(path)


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raises `CheckpointError`, naming both sizes, unless `folder`'s disk has `needed` bytes free."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise CheckpointError(
            f"{what} needs {needed:,} bytes and the disk of {existing} has {free:,} free: "
            "make room, or choose another output_dir"
        )


def require_place(target: Path) -> None:
    """Looks whether a folder can be published as `target`, so that nobody works for it in vain.

    A link or a file of that name is the user's: it is not replaced, nor followed, because nothing is written
    outside output_dir.

    Raises:
        CheckpointError: it is a link or a file, or may not be written to.
    """
    if target.is_symlink():
        raise CheckpointError(
            f"{target} is a link to {os.readlink(target)}, and nothing is written outside output_dir: "
            "put the folder itself there, or make output_dir the link"
        )
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file where a folder will be: move it away")
    for folder in (target, target.parent):
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            number = errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES
            raise CheckpointError(f"cannot write {folder}: {os.strerror(number)}; {REFUSALS[number]}")


def require_inside(root: Path, path: Path) -> Path:
    """`path` unchanged if it lies below `root` when links and `..` are followed.

    Raises:
        CheckpointError: it leads elsewhere. `root` itself may be a link: that is the user's choice.
    """
    if not path.resolve().is_relative_to(root.resolve()):
        raise CheckpointError(f"{path} leads out of {root}: nothing is written outside output_dir")
    return path


def lock(run: Path) -> IO[bytes]:
    """Takes the run folder for this process, made if need be, and clears away what a dead one left.

    Returns an open file: the lock holds until it is closed or the process ends, however it ends.

    Raises:
        CheckpointError: another process has it, or the folder cannot be written.
    """
    with disk_errors(run):
        run.mkdir(parents=True, exist_ok=True)
        file = (run / ".lock").open("ab")
        try:
            # A POSIX lock: forked data workers do not inherit it and so cannot outlive the run with it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in {errno.EACCES, errno.EAGAIN}:
                file.close()
                raise CheckpointError(
                    f"another process is at work in {run}: wait for it, stop it, or choose another output_dir"
                ) from None
            if error.errno not in _CANNOT_LOCK:
                raise
        for folder in [run, *(path for path in run.iterdir() if path.is_dir() and not path.is_symlink())]:
            clean(folder)
    return file


@contextmanager
def disk_errors(target: Path, needed: int = 0) -> Iterator[None]:
    """Turns what the system says about a disk into one line and exit 74."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors' writer reports I/O errors as its own class
        raise CheckpointError(_complaint(target, error, needed)) from error


def _complaint(target: Path, error: OSError | SafetensorError, needed: int) -> str:
    number = system_code(error)
    text = f"cannot write {target}: {os.strerror(number) if number else one_line(error)}"
    with suppress(OSError):
        free = shutil.disk_usage(target.parent).free
        text += f" ({needed:,} bytes needed, {free:,} free)" if needed else f" ({free:,} bytes free)"
    return "; ".join(filter(None, [text, REFUSALS.get(number), "nothing was replaced"]))


def _settle(folder: Path) -> None:
    """Gives every file below the mode that the umask gave the folder, and brings all to the disk."""
    mode = folder.stat().st_mode & 0o666
    for parent, _, files in os.walk(folder):
        for name in files:
            path = Path(parent, name)
            path.chmod(mode)
            _fsync(path)
        _fsync(Path(parent))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename(temporary: Path, target: Path) -> None:
    """Moves a folder to `target`; one that was there is at `temporary` afterwards."""
    if not target.exists():
        temporary.rename(target)
        return
    if _exchange(temporary, target):
        return
    aside = target.with_name(_ASIDE + target.name)
    remove(aside)
    target.rename(aside)
    try:
        temporary.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    aside.rename(temporary)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two names in one system call; False where libc or the filesystem cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    names = (os.fsencode(first), os.fsencode(second))
    if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(second))


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
