"""Errors a user can cause or must act on: one class and one exit code each.

A project error's message is one line that says what is wrong, where, and what to do.
`__main__` prints it without a traceback and exits with `exit_code`. What Python, the system and
the libraries raise becomes one of these in `explained`, the only place that knows how: a disk that
refuses, memory that runs out, and else a bug of ours.

    0 done · 2 configuration · 3 diverged (or an export over its bound) · 65 data
    66 missing input · 70 bug · 74 disk or I/O · 75 stopped on a signal, resumable
"""

from __future__ import annotations

import errno
import os
import re

from hydra.errors import CompactHydraException


class QLoRAError(CompactHydraException):
    """Base of all errors that end a run with one line; `exit_code` is the process's status."""

    exit_code: int = 70

    def adding(self, text: str) -> QLoRAError:
        """The same error with more to say."""
        error = type(self)(f"{self}; {text}")
        error.exit_code = self.exit_code
        return error


class Bug(QLoRAError):
    """Something that nobody expected."""


class ConfigError(QLoRAError):
    """The configuration is wrong, contradicts itself, or cannot run on this machine."""

    exit_code = 2


class OutOfMemoryError(ConfigError):
    """What is asked for does not fit this machine (exit 2)."""


class DivergedError(QLoRAError):
    """Training produced non-finite numbers repeatedly, or an export left its bound."""

    exit_code = 3


class DataError(QLoRAError):
    """The training data is broken, empty, or not of the stated format."""

    exit_code = 65


class MissingInputError(QLoRAError):
    """A model, data file, recipe or checkpoint that was named does not exist or cannot be reached."""

    exit_code = 66


class CheckpointError(QLoRAError):
    """A checkpoint or export is corrupt, or the disk refused to hold or return it."""

    exit_code = 74


class PreemptedError(QLoRAError):
    """A signal stopped the run; its state is saved and the same command resumes it."""

    exit_code = 75


_ROOM = "make room, or write to another disk (output_dir, data.cache_dir)"
_ELSEWHERE = "choose another output_dir"
# What the system says of disks, files and their number, and what helps; each is exit 74.
REFUSALS = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: f"your quota is used up: {_ROOM}",
    errno.EFBIG: f"ulimit -f or the filesystem allows no file that large: raise it, or {_ELSEWHERE}",
    errno.EIO: "the disk or the way to it fails: look at it (dmesg)",
    errno.EROFS: f"mount it writable, or {_ELSEWHERE}",
    errno.EACCES: "see to its owner and mode",
    errno.EPERM: "see to its owner, mode and attributes",
    errno.EMFILE: "raise the number of files that a process may open (ulimit -n)",
    errno.ENFILE: "raise the number of files that the system may open (fs.file-max)",
    errno.EAGAIN: "raise the number of processes and threads that a user may have (ulimit -u)",
    errno.EMLINK: f"make room in its folder, or {_ELSEWHERE}",
    errno.ENAMETOOLONG: "choose an output_dir with a shorter path",
    errno.ELOOP: "links lead in a circle: remove them",
    errno.EBUSY: "another program holds it: end that, and run the same command again",
    errno.ESTALE: "the network disk was mounted anew: run the same command again",
    errno.ENOTCONN: "the network disk is gone: mount it again, and run the same command again",
    errno.ENODEV: "the disk is gone: mount it again, and run the same command again",
    errno.ENXIO: "the disk is gone: mount it again, and run the same command again",
    errno.EUCLEAN: "the filesystem is damaged: check it (fsck)",
}


def explained(error: BaseException) -> QLoRAError:
    """`error` as one of ours: itself, or what stands for it, with its exit code and one line."""
    if isinstance(error, QLoRAError):
        return error
    if is_out_of_memory(error):
        return OutOfMemoryError(
            f"out of memory: {one_line(error)}; free some, or choose a smaller batch, length or model"
        )
    refused: BaseException | None = error
    while refused is not None:  # libraries raise their own on top of the system's
        if (number := system_code(refused)) in REFUSALS:
            raised = "the system refused" if refused is error else one_line(error)
            where = getattr(refused, "filename", None) or raised
            return CheckpointError(f"{where}: {os.strerror(number)}; {REFUSALS[number]}")
        refused = refused.__cause__
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return MissingInputError(f"{error.filename}: there is no such file; put it back, or see to the path")
    text = f"{type(error).__name__}: {one_line(error)}"
    return Bug(f"this is a bug, please report it with the output of -v: {text}")


def system_code(error: BaseException) -> int:
    """The `errno` that an exception carries, or that a library has written into its text; 0 if none."""
    if isinstance(error, OSError):
        return error.errno or 0
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):  # Python's, for EAGAIN
        return errno.EAGAIN
    written = re.search(r"\(os error (\d+)\)", str(error))
    return int(written[1]) if written else 0


_SAYINGS = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
    "not enough memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the device or on the host.

    What it was raised on top of counts too: an allocation that fails while a CUDA graph is captured
    surfaces as the capture's own error.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError) or (isinstance(seen, OSError) and seen.errno == errno.ENOMEM):
            return True
        # torch's own class is a RuntimeError, and always says so; this module is read before torch is.
        if isinstance(seen, RuntimeError) and any(saying in str(seen) for saying in _SAYINGS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def one_line(error: BaseException) -> str:
    """What an exception says, on one line of bounded length."""
    return " ".join(str(error).split())[:300] or type(error).__name__
