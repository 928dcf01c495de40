"""Errors a user can cause or must act on: one class and one exit code each.

A project error's message is one line that says what is wrong, where, and what to do.
`__main__` prints it without a traceback and exits with `exit_code`; anything else that
escapes is a bug of ours and exits 70.

    0 done · 2 configuration · 3 diverged (or an export over its bound) · 65 data
    66 missing input · 70 bug · 74 disk or I/O · 75 stopped on a signal, resumable
"""

from hydra.errors import CompactHydraException


class QLoRAError(CompactHydraException):
    """Base of all errors that end a run with one line; `exit_code` is the process's status."""

    exit_code: int = 70


class ConfigError(QLoRAError):
    """The configuration is wrong, contradicts itself, or cannot run on this machine."""

    exit_code = 2


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
