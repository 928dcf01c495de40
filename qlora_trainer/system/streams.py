"""Standard streams of a process: what a terminal cannot show is spelt, and one that goes away ends nothing.

In: `sys.stdout` and `sys.stderr`. Out: the same, in whatever encoding they have (`LANG=C`, Latin-1): a
character that is not in it is written in ASCII, as `-` for a dash or `\\U0001f642`. They last for as long as
somebody reads them: a reader that has gone (`… | head`, a terminal that was closed) ends nothing, and what
follows is written to nowhere. What goes on is said on stderr, and a disk too full for it ends nothing either;
results go to stdout, and a disk that does not take them is an error.
"""

from __future__ import annotations

import codecs
import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import TextIOWrapper
from typing import Any, TextIO, TypeVar, cast

T = TypeVar("T")
SPELT = "qlora_trainer.spelt"  # the name of an error handler
LOOKALIKES = str.maketrans(
    {"–": "-", "—": "-", "…": "...", "×": "x", "·": "-", "→": "->", "≤": "<=", "≥": ">=", "±": "+-"}
    | {"█": "#", "▏": "|", "Δ": "d"}
)
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
    """Whatever is printed inside goes out, in any encoding, for as long as somebody takes it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=SPELT)
    out, err = LastingStream(sys.stdout, needed=True), LastingStream(sys.stderr, needed=False)
    with redirect_stdout(cast(TextIO, out)), redirect_stderr(cast(TextIO, err)):
        yield
        err.flush()


def _spelt(error: UnicodeError) -> tuple[str, int]:
    """An error handler for `str.encode`: ASCII in place of what cannot be encoded."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    there = error.object[error.start : error.end].translate(LOOKALIKES)
    return there.encode("ascii", "backslashreplace").decode(), error.end


codecs.register_error(SPELT, _spelt)
