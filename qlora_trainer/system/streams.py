"""Standard output and error of a process whose terminal, pipe or log may go away while it works.

In: `sys.stdout` and `sys.stderr`. Out: the same, for as long as somebody reads them. A reader that has gone
(`… | head`, a terminal that was closed) ends nothing: what follows is written to nowhere. What goes on is
said on stderr, and a disk too full for it ends nothing either; results go to stdout, and a disk that does
not take them is an error.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO, TypeVar, cast

T = TypeVar("T")
_GONE = {errno.EPIPE, errno.EIO, errno.ENXIO}  # a pipe without reader, a terminal that hung up


class LastingStream:
    """A text stream that outlives its reader; else the stream itself.

    Args:
        needed: whether a disk that refuses what is written is an error.
    """

    def __init__(self, stream: TextIO, needed: bool) -> None:
        self._stream, self._needed = stream, needed

    def write(self, text: str) -> int:
        return self._try(lambda: self._stream.write(text), len(text))

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._try(self._stream.flush, None)

    def _try(self, write: Callable[[], T], otherwise: T) -> T:
        try:
            return write()
        except OSError as error:
            if self._needed and error.errno not in _GONE:
                raise
            # What is still in the stream's buffer goes there too, or the interpreter would fail at its end.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            return otherwise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Whatever is printed inside goes out for as long as somebody takes it."""
    out, err = LastingStream(sys.stdout, needed=True), LastingStream(sys.stderr, needed=False)
    with redirect_stdout(cast(TextIO, out)), redirect_stderr(cast(TextIO, err)):
        yield
        err.flush()
